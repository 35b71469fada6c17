"""Lean forwards are used where they pass their trial, while training alone, and a run remembers it."""

from typing import ClassVar

import attrs
import pytest
import torch
from safetensors.torch import load_file

import tunekit as tk
from tunekit.core.lean import lora
from tunekit.core.lean.forward import LeanForward
from tunekit.core.lean.forwards import lean_forwards
from tunekit.core.lean.trial import fault
from tunekit.core.training import rows_loss
from tunekit.core.training.rows_loss import choose
from tunekit.testing import tiny_model
from tunekit.testing.harness import ROWS

IDS = list(range(5, 25))
ENCODED = [{"input_ids": IDS[:end], "labels": [-100] * 3 + IDS[3:end]} for end in (8, 20)]


def attached(adapter):
    return adapter.attach(tiny_model(attention_dropout=0.2), tk.Context(model_id="tiny", total_steps=20))


def way(model, lean=True):
    return choose(model, ENCODED, 0, "cpu", padding_free=True, chunked=True, lean=lean)


def wrong(find):
    """LoRA's product at a scale, or with factors, that are slightly off."""

    def other(x, a, b, base, scale, **rest):
        return lora_product(x, *find(a, b), base, scale * (1.001 if find is same else 1), **rest)

    lora_product = lora.low_rank
    return other


def same(a, b):
    return a, b


MISTAKES = {
    "scale": wrong(same),
    "gradient of A": wrong(lambda a, b: (1.001 * a - 0.001 * a.detach(), b)),
    "gradient of B": wrong(lambda a, b: (a, b.detach() + 0.9 * (b - b.detach()))),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_forward_that_is_slightly_wrong_is_not_used_and_the_log_says_why(mistake, monkeypatch):
    monkeypatch.setattr(lora, "low_rank", mistake)
    found = way(attached(tk.LoRA(rank=4)))
    assert (found.padding_free, found.chunked, found.lean) == (True, True, False)
    (note,) = found.notes
    assert note.startswith("no lean forwards: the ")
    assert "PEFT's" in note


def test_a_forward_that_fails_is_not_used_either(monkeypatch):
    monkeypatch.setattr(lora, "low_rank", lambda *args, **options: 1 / 0)
    assert way(attached(tk.LoRA(rank=4))).notes == ["no lean forwards: ZeroDivisionError: division by zero"]


@pytest.mark.parametrize("adapter", [tk.LoRA(rank=4, dropout=0.3), tk.LoKr(rank=4, dropout=0.3)], ids=lambda a: a.name)
def test_the_trial_leaves_everything_as_it_was(adapter):
    model = attached(adapter).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert (
        fault(model, lambda: model(input_ids=torch.tensor([IDS]), use_cache=False).logits.logsumexp(-1).sum()) is None
    )
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training or "forward" in vars(module) for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_is_asked_for_and_means_adapters_alone():
    assert way(attached(tk.LoRA(rank=4))).lean
    assert not way(attached(tk.LoRA(rank=4)), lean=False).lean
    full = way(attached(tk.Full()))
    assert (full.lean, list(full.notes)) == (False, [])


class Seen(tk.Evaluator):
    """Counts lean forwards in the model it is given."""

    name = "seen"
    better: ClassVar = {"lean": "min"}

    def evaluate(self, model, tokenizer, data, context):
        return {"lean": float(sum(isinstance(vars(m).get("forward"), LeanForward) for m in model.modules()))}


class Stops:
    """Stops a run as soon as a checkpoint is saved."""

    @tk.hookimpl
    def tunekit_saved(self):
        raise KeyboardInterrupt


@pytest.fixture
def pipeline(tiny_directory):
    return tk.Pipeline(
        model=str(tiny_directory),
        data=tk.InMemory(rows=ROWS),
        validation=0.2,
        adapter=tk.LoRA(rank=4),
        trainer=tk.SFT(max_steps=2, batch_size=4, learning_rate=1e-2, evaluate_every=1, save_every=1),
        evaluators=(Seen(),),
        device="cpu",
    )


@pytest.fixture
def computed(monkeypatch):
    """The layers that computed lean, one entry each time."""
    found, compute = [], lora.LeanLoRA.compute
    monkeypatch.setattr(lora.LeanLoRA, "compute", lambda self, x: found.append(self) or compute(self, x))
    return found


def test_a_run_is_lean_while_it_trains_alone_and_writes_what_it_writes_without(pipeline, tmp_path, computed):
    lean = pipeline.run(tmp_path / "lean")
    assert len(computed) >= 3 * 12, "in the trial and in two steps, by all layers but those that gated MLPs stand for"
    assert [line["validation/lean"] for line in lean.history if "validation/lean" in line] == [0, 0]
    computed.clear()
    usual = attrs.evolve(pipeline, trainer=attrs.evolve(pipeline.trainer, lean=False)).run(tmp_path / "usual")
    assert computed == []
    losses = [[line["loss"] for line in run.history if "loss" in line] for run in (lean, usual)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    mine, theirs = ({path.name: path for path in (run.directory / "adapter").iterdir()} for run in (lean, usual))
    assert mine.keys() == theirs.keys()
    assert mine["adapter_config.json"].read_bytes() == theirs["adapter_config.json"].read_bytes()
    tensors = [load_file(table["adapter_model.safetensors"]) for table in (mine, theirs)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.allclose(value, tensors[1][name], atol=1e-4) for name, value in tensors[0].items())


def test_saving_while_training_writes_the_bytes_that_saving_afterwards_does(tmp_path):
    model, adapter = attached(tk.LoKr(rank=4)), tk.LoKr(rank=4)
    for name in ("lean", "usual"):
        (tmp_path / name).mkdir()
    with lean_forwards(model):
        adapter.save(model, tmp_path / "lean")
    adapter.save(model, tmp_path / "usual")
    for path in (tmp_path / "usual").iterdir():
        assert path.read_bytes() == (tmp_path / "lean" / path.name).read_bytes()


def test_a_resumed_run_goes_the_way_it_went_before(pipeline, tmp_path, computed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(rows_loss, "fault", lambda model, loss, kept_bytes: "it is not to be")
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(tmp_path / "run", observers=[Stops()])
    pipeline.run(tmp_path / "run", resume=True)
    assert computed == []
    assert "no lean forwards: it is not to be" in (tmp_path / "run" / "log.txt").read_text()
