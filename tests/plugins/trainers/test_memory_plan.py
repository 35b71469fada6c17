"""A run keeps within its memory: by nothing while that suffices, else by as little as suffices; and its numbers stay."""

import json
import signal

import attrs
import pytest
import torch
from test_sft import encoded, fit, largest_difference

import tunekit as tk
from tunekit.core.data import batching
from tunekit.core.lean.forward import LeanForward
from tunekit.core.memory.budget import fits
from tunekit.core.run.checkpoint import newest
from tunekit.errors import NotSupported
from tunekit.plugins.trainers import micro_batches
from tunekit.plugins.trainers.memory_plan import settled
from tunekit.plugins.trainers.micro_batches import Limits, heaviest
from tunekit.plugins.trainers.recomputing import activations_computed_again, layers_to_recompute
from tunekit.testing import tiny_model, tiny_tokenizer

LAYERS = 10
GIB = 2**30


@pytest.fixture
def auto(monkeypatch):
    """640 tokens in a forward pass where the user leaves it open."""
    monkeypatch.setattr(micro_batches, "AUTO_TOKENS", 640)


def needs(sft):
    """A model of ten layers, each of which keeps 1 MiB for 64 tokens; recomputed, a tenth of that."""
    kept = {None: 0, 0: LAYERS}.get(sft.recomputed_layers, LAYERS - (sft.recomputed_layers or 0))
    limits = Limits.of(sft)
    size = limits.tokens * 2**14 if limits.rows is None else limits.rows * 2**20
    return {"frozen weights": 20 * 2**20, "activations": int(size * (kept + 0.1 * (LAYERS - kept)))}


def choose(mebibytes, longest=100, **changes):
    return settled(tk.SFT(**changes), needs, LAYERS, mebibytes * 2**20, longest)


@pytest.mark.usefixtures("auto")
def test_nothing_is_done_while_the_memory_suffices():
    plan = choose(200)
    assert plan.trainer.recomputed_layers == 0
    assert Limits.of(plan.trainer).tokens == 640
    assert plan.choices["gradient checkpointing"] == "not needed"
    assert "why" not in plan.choices


@pytest.mark.usefixtures("auto")
@pytest.mark.usefixtures("auto")
@pytest.mark.parametrize("budget", range(45, 130, 5))
def test_as_few_layers_are_recomputed_as_suffice(budget):
    plan = choose(budget)
    count = plan.trainer.recomputed_layers
    assert fits(plan.parts, plan.budget)
    assert Limits.of(plan.trainer).tokens == 640, "before a forward pass has fewer tokens"
    fewer = attrs.evolve(plan.trainer, gradient_checkpointing=(LAYERS if count is None else count) - 1)
    assert not fits(needs(fewer), plan.budget)
    assert plan.choices["why"] == f"120.0 MiB would be needed without, of {budget}.0 MiB"


@pytest.mark.usefixtures("auto")
def test_then_there_are_fewer_tokens_at_once_and_never_less_than_a_row():
    plan = choose(25)
    assert plan.trainer.recomputed_layers is None
    assert 100 <= Limits.of(plan.trainer).tokens <= 320
    assert fits(plan.parts, plan.budget)
    assert plan.choices["a forward pass"].endswith("instead of 640")
    with pytest.raises(tk.ConfigError, match=r"20.5 MiB do not|21.0 MiB do not suffice: .* at least, of it frozen wei"):
        choose(21, memory=21 / 1024)
    assert choose(21).choices["not enough"], "where the user allows nothing, the least is tried"
    assert Limits.of(choose(21).trainer).tokens == 100


@pytest.mark.usefixtures("auto")
def test_what_the_user_has_set_is_left_alone():
    with pytest.raises(tk.ConfigError, match=r"SFT\.memory"):
        choose(40, memory=1, gradient_checkpointing=False, micro_batch_size=10)
    assert choose(60, gradient_checkpointing=True).trainer.recomputed_layers is None
    assert choose(200, gradient_checkpointing=3).trainer.recomputed_layers == 3


def test_a_model_that_cannot_recompute_has_fewer_tokens_at_once():
    def unable(sft):
        if sft.recomputed_layers != 0:
            raise NotSupported("it knows no gradient checkpointing")
        return needs(sft)

    plan = settled(tk.SFT(), unable, LAYERS, 60 * 2**20, 50)
    assert plan.trainer.recomputed_layers == 0
    assert fits(plan.parts, plan.budget)


def test_the_passes_with_the_most_tokens_are_those_of_the_run():
    rows = encoded(20)
    lengths = [len(row["input_ids"]) for row in rows]
    sft = tk.SFT(epochs=2, batch_size=6, packing=100)
    first, later, labels = heaviest(rows, sft, seed=1, padded=False)
    assert max(lengths) == lengths[first[0]]
    assert 0 < sum(lengths[at] for at in later) <= 100 or len(later) == 1
    passes = [sum(batching.supervised_tokens(rows[at]) for at in group) for group in (first, later)]
    assert labels[0] >= passes[0] > 0
    assert labels[1] >= passes[1] > 0
    alone = heaviest(rows, attrs.evolve(sft, packing=None, micro_batch_size=6), seed=1, padded=True)
    assert not alone[1]
    assert len(alone[0]) == 6


@pytest.mark.parametrize("layers", [0, 1, 2, None])
def test_only_the_first_layers_are_computed_again(layers):
    model = tiny_model().train()
    passes = []
    for number, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, number=number: passes.append(number))
    with activations_computed_again(model, layers):
        model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    again = list(range(2 if layers is None else layers))
    assert sorted(passes) == sorted([0, 1, *again])
    assert not model.is_gradient_checkpointing


def test_layers_that_keep_nothing_are_not_counted():
    model = tiny_model().requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    assert layers_to_recompute(model) == [model.model.layers[1]]
    model.model.embed_tokens.requires_grad_(True)
    assert layers_to_recompute(model) == list(model.model.layers)


def test_a_resumed_run_goes_on_with_what_was_settled(tmp_path):
    asked = tk.SFT(max_steps=4, batch_size=4, learning_rate=0.01, save_every=2)
    chosen = attrs.evolve(asked, gradient_checkpointing=1, packing=40)
    whole, _, _ = fit(chosen, tmp_path / "run")
    checkpoint = newest(tmp_path / "run" / "checkpoints")
    state = checkpoint.state["trainer"]["so_far"]
    assert (state["recomputed"], state["limits"]["tokens"]) == (1, 40)
    (tmp_path / "again").mkdir()
    again, _, _ = fit(asked, tmp_path / "again", resumed=checkpoint)
    assert largest_difference(whole, again) == 0


def test_limits_of_a_checkpoint_stay_unless_others_are_asked_for():
    auto = Limits(tokens=100)
    assert auto.resumed(Limits(tokens=4096)) is auto
    assert auto.resumed(Limits(tokens=50)).tokens == 50
    assert auto.resumed(Limits(rows=3)).rows == 3
    assert Limits(rows=2).resumed(Limits(rows=3)).rows == 3
    assert Limits(rows=2, halved=1).resumed(Limits(rows=4)).rows == 2


ROWS = [{"prompt": f"What is {n} + {n}?", "completion": "ab " * n} for n in range(1, 25)]


def pipeline(place, adapter=tk.LoRA(rank=2), **changes):  # noqa: B008 - it is frozen
    trainer = tk.SFT(**{"max_steps": 3, "batch_size": 8, "learning_rate": 1e-2, **changes})
    return tk.Pipeline(model=str(place), data=tk.InMemory(rows=ROWS), validation=0, adapter=adapter, trainer=trainer)


def test_a_run_does_what_the_plan_says_and_learns_the_same(tiny_directory, tmp_path):
    free = pipeline(tiny_directory).plan()
    need = sum(free.memory.values())
    assert free.choices["gradient checkpointing"] == "not needed"
    tight = pipeline(tiny_directory, memory=0.7 * need / GIB)
    plan = tight.plan()
    assert sum(plan.memory.values()) < 0.7 * need
    shown = str(plan)
    assert plan.choices["why"] in shown
    assert "memory: activations" in shown
    runs = [made.run(tmp_path / name) for name, made in (("free", pipeline(tiny_directory)), ("tight", tight))]
    assert runs[1].metrics == pytest.approx(runs[0].metrics)
    losses = [[line["loss"] for line in run.history] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    log = (tmp_path / "tight" / "log.txt").read_text()
    assert plan.choices["gradient checkpointing"] in log
    assert "memory:" not in (tmp_path / "free" / "log.txt").read_text(), "nothing was short"


def test_too_little_memory_is_an_error_before_weights_are_loaded(tiny_directory, tmp_path, monkeypatch):
    monkeypatch.setattr("tunekit.core.model.base.Base.load", lambda *_, **__: pytest.fail("weights were loaded"))
    small = pipeline(tiny_directory, memory=1e-5)
    for attempt in (small.plan, lambda: small.run(tmp_path / "run")):
        with pytest.raises(tk.ConfigError, match=r"do not suffice: a step needs .* at least, of it .*frozen weights"):
            attempt()
    assert not (tmp_path / "run").exists()


def test_only_where_nothing_else_makes_it_fit_the_base_is_held_in_fewer_bits(tmp_path, monkeypatch):
    monkeypatch.delenv("TUNEKIT_CPU_DTYPE")
    monkeypatch.setattr("tunekit.core.model.precision.multiplies_bfloat16", lambda device: False)

    class Stops:
        @tk.hookimpl
        def tunekit_saved(self):
            raise KeyboardInterrupt

    tiny_model(hidden_size=128, intermediate_size=512).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    free = pipeline(tmp_path / "base").plan().memory
    weights, need = free["frozen weights"], sum(free.values())
    less = pipeline(tmp_path / "base", memory=0.8 * need / GIB).plan()
    assert less.choices["why"]  # layers are computed again, and that suffices
    assert less.precision.startswith("float32: ")

    settled = {"micro_batch_size": 2, "gradient_checkpointing": False, "save_every": 1}
    need = sum(pipeline(tmp_path / "base", **settled).plan().memory.values())
    tight = pipeline(tmp_path / "base", memory=(need - weights / 4) / GIB, **settled)
    plan = tight.plan()
    told = "float32 does not fit into the memory allowed"
    assert plan.precision == f"bfloat16: {told}; what is trained is held in float32"
    assert plan.memory["frozen weights"] == pytest.approx(weights / 2, rel=0.01)
    assert sum(plan.memory.values()) < need - weights / 4
    run = tight.run(tmp_path / "run")
    assert json.loads((run.directory / "environment.json").read_text())["dtype"] == "bfloat16"
    assert f"memory: precision: bfloat16, since {told}" in (run.directory / "log.txt").read_text()
    for asked in ({"dtype": "float32"}, {"adapter": tk.Full()}):
        with pytest.raises(tk.ConfigError, match="do not suffice"):
            attrs.evolve(tight, **asked).plan()

    with pytest.raises(KeyboardInterrupt):
        tight.run(tmp_path / "stopped", observers=[Stops()])
    assert tight.run(tmp_path / "stopped", resume=True).history == run.history, "resumed in as few bits"


@pytest.fixture
def kept(monkeypatch):
    """Bytes of dequantized weights that are there at each logged step, and the observer that notes them."""
    found = []

    @attrs.define
    class Looks:
        stops: int = 0

        @tk.hookimpl
        def tunekit_log(self, step):
            lean = [
                module.forward
                for module in trained[-1].modules()
                if isinstance(vars(module).get("forward"), LeanForward)
            ]
            found.append(sum(one.base._kept.nbytes for one in lean if one.base._kept is not None))
            if step == self.stops:
                signal.raise_signal(signal.SIGTERM)

    trained = []
    attach = tk.QLoRA.attach
    monkeypatch.setattr(tk.QLoRA, "attach", lambda *given: trained.append(attach(*given)) or trained[-1])
    return found, Looks


def test_dequantized_weights_are_kept_in_half_of_what_a_step_leaves_and_resumed_so(tiny_directory, tmp_path, kept):
    pytest.importorskip("bitsandbytes")
    sizes, looks = kept
    qlora = tk.QLoRA(rank=2)
    bare = pipeline(tiny_directory, qlora, keep_dequantized=0).plan().memory
    every = pipeline(tiny_directory, qlora, keep_dequantized=1).plan().memory["dequantized weights"]
    need = sum(bare.values())
    assert bare["dequantized weights"] == 0
    tight = pipeline(tiny_directory, qlora, memory=(1.1 * need + 0.8 * every) / GIB, save_every=1)
    plan = tight.plan()
    size = plan.memory["dequantized weights"]
    assert 0 < size < every, "some are, and some are not"
    assert size <= 0.5 * (plan.available - need)
    assert plan.choices["dequantized weights"].startswith(f"{size / 2**20:.1f} MiB of ")

    whole = tight.run(tmp_path / "whole", observers=[looks()])
    assert sizes == [size] * 3
    with pytest.raises(SystemExit):
        tight.run(tmp_path / "run", observers=[looks(stops=1)])
    assert tight.run(tmp_path / "run", resume=True, observers=[looks()]).history == whole.history
    assert sizes == [size] * 6, "as many after the resume"
    none = pipeline(tiny_directory, qlora, keep_dequantized=0).run(tmp_path / "none", observers=[looks()])
    assert sizes[6:] == [0] * 3
    assert none.history == whole.history, "the numbers are those of before, kept or not"
