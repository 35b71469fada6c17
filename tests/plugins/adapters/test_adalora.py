"""AdaLoRA spends its budget, its orthogonality term counts once a step and never in evaluation, and resume is exact."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import tunekit as tk
from tunekit.testing import tiny_model

ROWS = [{"prompt": f"repeat {n}", "completion": f"{n} {n}" * (1 + n % 3)} for n in range(13)]
CONTEXT = tk.Context(model_id="tiny", device="cpu", dtype="float32", total_steps=20)
MATRICES = 14
"""Linear layers of the tiny Llama: seven in each of its two layers."""
IDS = torch.arange(5, 25)[None]


def adalora(**fields):
    return tk.AdaLoRA(**{"initial_rank": 6, "target_rank": 2, "interval": 2, **fields})


def make(tiny_directory, adapter, **trainer):
    return tk.Pipeline(
        model=str(tiny_directory),
        data=tk.InMemory(rows=ROWS),
        validation=0.2,
        adapter=adapter,
        trainer=tk.SFT(**{"max_steps": 20, "batch_size": 4, "learning_rate": 0.01, **trainer}),
    )


def attached(adapter, context=CONTEXT, **config):
    torch.manual_seed(0)
    return adapter.attach(tiny_model(**config), context)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def step(model, adapter, optimizer, number):
    """One optimizer step on fixed tokens, with the method's slots in their places."""
    out = model.train()(IDS).logits
    cross_entropy(out[0, :-1], IDS[0, 1:]).backward()
    extra = adapter.extra_loss(model)
    if extra is not None:
        extra.backward()
    optimizer.step()
    adapter.after_step(model, number)
    optimizer.zero_grad()


def trained(adapter, steps=20):
    model = attached(adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for number in range(1, steps + 1):
        step(model, adapter, optimizer, number)
    return model


def singular_values(model):
    """How many singular values of each update are not zero."""
    from peft.tuners.adalora.layer import AdaLoraLayer

    layers = [module for module in model.modules() if isinstance(module, AdaLoraLayer)]
    return [
        int(torch.linalg.matrix_rank(layer.get_delta_weight("default").detach().double(), rtol=1e-5))
        for layer in layers
    ]


# The budget ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "steps"), [(1, 20), (5, 20), (2, 2), (2, 47)])
def test_the_budget_is_spent_and_peft_reads_what_is_left(tiny_directory, tmp_path, target, steps):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = make(tiny_directory, adalora(target_rank=target), max_steps=steps, warmup=0).run(tmp_path / "run")
    config = json.loads((run.directory / "adapter" / "adapter_config.json").read_text())
    ranks = {name: sum(kept) for name, kept in config["rank_pattern"].items()}
    assert len(ranks) == MATRICES
    assert sum(ranks.values()) == target * MATRICES
    live = run._model(tuned=True).model
    assert sum(singular_values(live)) == target * MATRICES

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        theirs = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_directory), run.directory / "adapter"
        )
    assert (logits(theirs) - logits(live)).abs().max() < 1e-5
    again = tk.open_run(run.directory)._model(tuned=True).model
    assert (logits(again) - logits(live)).abs().max() < 1e-5
    base = AutoModelForCausalLM.from_pretrained(tiny_directory)
    assert (logits(base) - logits(live)).abs().max() > 1e-4, "something was learned"


def test_the_budget_falls_by_the_cubic_schedule_of_the_paper():
    adapter = adalora(interval=1, warmup=0.2, cooldown=0.3)
    model = attached(adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    left = []
    for number in range(1, 21):
        step(model, adapter, optimizer, number)
        pattern = model.peft_config["default"].rank_pattern
        left.append(sum(map(sum, pattern.values())) if pattern else None)
    # Warm-up over 4 of 20 steps, cool-down over the last 6, so it falls from 84 after step 4 to 28 at step 14.
    expected = [int(28 + (84 - 28) * (1 - (number - 4) / (20 - 4 - 6)) ** 3) for number in range(5, 14)]
    assert left == [None] * 4 + expected + [28] * 7


def test_ranks_differ_between_matrices():
    kept = set(singular_values(trained(adalora())))
    assert len(kept) > 1


def test_a_matrix_that_loses_all_its_rank_is_saved_and_loaded_like_any_other(tmp_path):
    adapter = adalora(initial_rank=4, target_rank=1)
    model = trained(adapter)
    assert 0 in singular_values(model)
    adapter.save(model, tmp_path)
    assert (logits(adapter.load(tiny_model(), tmp_path)) - logits(model)).abs().max() < 1e-5


def test_a_run_whose_budget_did_not_move_is_not_saved(tiny_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(tk.AdaLoRA, "after_step", lambda self, model, step: None)
    with pytest.raises(tk.TrainingError, match=r"84 triplets are in use and 0 allotted, where 28 should be left"):
        make(tiny_directory, adalora()).run(tmp_path / "run")


@pytest.mark.parametrize("steps", [10, 13])
def test_a_run_that_ended_before_its_planned_steps_is_not_saved(tmp_path, steps):
    adapter = adalora()
    with pytest.raises(tk.TrainingError, match="must take all planned steps and call after_step after each"):
        adapter.save(trained(adapter, steps), tmp_path)


def test_a_cut_that_training_undid_is_not_saved(tmp_path):
    adapter = adalora()
    model = trained(adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter.fill_(1.0)
    with pytest.raises(tk.TrainingError, match="84 triplets are in use and 28 allotted"):
        adapter.save(model, tmp_path)


def test_gradients_that_are_gone_are_named_as_the_reason():
    adapter = adalora()
    with pytest.raises(tk.TrainingError, match=r"after_step must come before zero_grad\(\)"):
        adapter.after_step(attached(adapter), 1)


def test_with_nothing_to_cut_it_trains_all_of_its_rank(tiny_directory, tmp_path):
    run = make(tiny_directory, adalora(initial_rank=3, target_rank=3)).run(tmp_path / "run")
    live = run._model(tuned=True).model
    assert singular_values(live) == [3] * MATRICES
    assert (logits(tk.open_run(run.directory)._model(tuned=True).model) - logits(live)).abs().max() < 1e-5


# The schedule --------------------------------------------------------------------------------------------------------


def test_the_schedule_is_that_of_the_planned_steps(tiny_directory):
    pipeline = make(tiny_directory, adalora(warmup=0.25, cooldown=0.4), max_steps=None, epochs=7)
    steps = pipeline.plan().steps
    config = pipeline.adapter.peft_config(tk.Context(model_id="tiny", total_steps=steps))
    assert steps == 21
    assert (config.total_step, config.tinit, config.tfinal) == (21, 5, 8)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"initial_rank": 4, "target_rank": 5}, "AdaLoRA.target_rank: must be at most initial_rank=4"),
        ({"warmup": 0.5, "cooldown": 0.5}, "AdaLoRA.cooldown: warmup and cooldown must leave steps between them"),
        ({"initial_rank": "6"}, "AdaLoRA.initial_rank: expected int, got str '6'"),
        ({"interval": 0}, "AdaLoRA.interval: must be at least 1"),
        ({"alpha": 0}, "AdaLoRA.alpha: must be above 0"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(fields, problem):
    with pytest.raises(tk.ConfigError, match=problem):
        tk.AdaLoRA(**fields)


@pytest.mark.parametrize(("fields", "needed"), [({}, 2), ({"warmup": 0.05, "cooldown": 0.9}, 11)])
def test_too_few_steps_are_refused_with_how_many_it_takes(tiny_directory, tmp_path, fields, needed):
    with pytest.raises(tk.ConfigError, match=f"needs {needed} optimizer steps, and {needed - 1} are planned"):
        make(tiny_directory, adalora(**fields), max_steps=needed - 1).plan()
    assert make(tiny_directory, adalora(**fields), max_steps=needed).plan().steps == needed


def test_its_parameters_are_counted_by_its_formula(tiny_directory):
    plan = make(tiny_directory, adalora()).plan()
    # Two layers: q and o 32->32, k and v 32->16, gate and up 32->64, down 64->32; rank * (in + out + 1) each.
    assert plan.trainable_parameters == 2 * 6 * (2 * 64 + 2 * 48 + 3 * 96 + 7)
    assert make(tiny_directory, adalora(), learning_rate=None).plan().learning_rate == 2e-3


# The orthogonality term ----------------------------------------------------------------------------------------------


def test_the_term_is_the_mean_distance_from_orthogonality_by_hand_and_by_peft():
    adapter = adalora(orthogonality=0.3)
    model = trained(adapter, 3)
    distances = []
    for name, parameter in model.named_parameters():
        values = parameter.detach().double().numpy()
        if "lora_A" in name:
            distances.append(np.sqrt(((values @ values.T - np.eye(6)) ** 2).sum()))
        elif "lora_B" in name:
            distances.append(np.sqrt(((values.T @ values - np.eye(6)) ** 2).sum()))
    assert len(distances) == 2 * MATRICES
    term = adapter.extra_loss(model)
    assert term.item() == pytest.approx(0.3 * np.mean(distances), rel=1e-6)

    plain = model(IDS, labels=IDS).loss.item()
    model.peft_config["default"].orth_reg_weight = 0.3
    assert term.item() == pytest.approx(model(IDS, labels=IDS).loss.item() - plain, rel=1e-5)


def test_no_loss_of_the_model_holds_the_term_neither_live_nor_loaded(tmp_path):
    adapter = adalora()
    model = trained(adapter)
    adapter.save(model, tmp_path)
    for found in (model, adapter.load(tiny_model(), tmp_path)):
        for mode in (found.eval(), found.train()):
            out = mode(IDS, labels=IDS)
            assert out.loss.item() == pytest.approx(cross_entropy(out.logits[0, :-1], IDS[0, 1:]).item(), rel=1e-6)


def test_the_metrics_are_the_cross_entropy_alone(tiny_directory, tmp_path):
    pipeline = make(tiny_directory, adalora(orthogonality=5.0))
    run = pipeline.run(tmp_path / "run")
    loaded = run._model(tuned=True)
    total = tokens = 0.0
    for row in pipeline.rows()[1]:
        encoded = loaded.codec.encode(row)
        ids, labels = torch.tensor([encoded["input_ids"]]), torch.tensor(encoded["labels"])
        with torch.no_grad():
            out = loaded.model(ids).logits[0, :-1]
        total += cross_entropy(out, labels[1:], ignore_index=-100, reduction="sum").item()
        tokens += (labels[1:] != -100).sum().item()
    assert run.metrics["nll"] == pytest.approx(total / tokens, rel=1e-5)


def test_accumulation_changes_neither_the_parameters_nor_the_weight_of_the_term(tiny_directory, tmp_path):
    def end(name, **fields):
        adapter = adalora(**fields.pop("adapter", {}))
        pipeline = make(tiny_directory, adapter, optimizer="sgd", learning_rate=0.5, **fields)
        model = pipeline.run(tmp_path / name)._model(tuned=True).model
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    whole = end("whole", micro_batch_size=4)
    assert (end("split", micro_batch_size=1) - whole).abs().max() < 1e-6
    assert (end("free", adapter={"orthogonality": 0.0}) - whole).abs().max() > 1e-3


def test_a_trainer_that_cannot_add_the_term_refuses_it_and_trains_without(tiny_directory, tmp_path):
    trainer = tk.Transformers(arguments={"max_steps": 12, "learning_rate": 0.01, "per_device_train_batch_size": 4})
    parts = {"model": str(tiny_directory), "data": tk.InMemory(rows=ROWS), "trainer": trainer}
    with pytest.raises(tk.NotSupported, match="cannot add this method's extra loss"):
        tk.Pipeline(adapter=adalora(), **parts).run(tmp_path / "refused")
    run = tk.Pipeline(adapter=adalora(orthogonality=0.0), **parts).run(tmp_path / "run")
    assert sum(singular_values(run._model(tuned=True).model)) == 2 * MATRICES


# Going on, merging ---------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Raised in the middle of a run."""


@pytest.fixture(scope="module")
def whole(tiny_directory, tmp_path_factory):
    pipeline = make(tiny_directory, adalora(dropout=0.1, warmup=0.25), save_every=1)
    return pipeline, pipeline.run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.mark.parametrize("at", [3, 9, 18], ids=lambda at: f"step {at} of 20, cuts at 6 to 14")
def test_an_interrupted_run_goes_on_to_the_same_end_bit_for_bit(whole, tmp_path, monkeypatch, at):
    pipeline, run = whole
    original = tk.AdaLoRA.after_step

    def stops(self, model, step):
        if step == at:
            raise Stop
        original(self, model, step)

    with monkeypatch.context() as patch:
        patch.setattr(tk.AdaLoRA, "after_step", stops)
        with pytest.raises(Stop):
            pipeline.run(tmp_path / "run")
    resumed = pipeline.run(tmp_path / "run", resume=True)
    assert resumed.history == run.history
    assert resumed.metrics == run.metrics
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (resumed.directory / "adapter" / file).read_bytes() == (run.directory / "adapter" / file).read_bytes()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merged_it_is_the_live_model(architecture):
    adapter = adalora(targets="all-linear")
    torch.manual_seed(0)
    model = adapter.attach(tiny_model(architecture), CONTEXT)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for number in range(1, 21):
        step(model, adapter, optimizer, number)
    live = logits(model)
    merged = adapter.merge(model, CONTEXT)
    assert not any("lora" in name for name in merged.state_dict())
    assert (logits(merged) - live).abs().max() < 1e-4
    assert (logits(tiny_model(architecture)) - live).abs().max() > 1e-2


def test_over_a_bfloat16_base_it_trains_its_triplets_alone_and_in_float32():
    model = adalora().attach(tiny_model().to(torch.bfloat16), CONTEXT)
    found = {name.rpartition(".lora_")[2]: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert found == {"A.default": torch.float32, "B.default": torch.float32, "E.default": torch.float32}
