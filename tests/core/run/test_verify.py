"""`verify` passes where the numerics are right, and where one thing is wrong, the line that is about it fails."""

import os
import random
import tempfile
from pathlib import Path
from unittest.mock import patch

import attrs
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tunekit as tk
from tunekit.core.data.batching import supervised_tokens
from tunekit.core.lean import lora
from tunekit.core.lean.low_rank import low_rank
from tunekit.core.training import head_loss, rows_loss, segments
from tunekit.core.training.prefixes import Layout
from tunekit.core.training.rows_loss import RowsLoss
from tunekit.plugins.trainers import loop
from tunekit.testing import tiny_model, tiny_tokenizer

SHARED = Path(os.environ.get("TUNEKIT_SHARED") or Path(__file__).parents[4] / "shared")
ROWS = [{"prompt": f"repeat {n}", "completion": f"{n} " * (n % 4 + 1)} for n in range(9)]
CHECKS = [
    "start == base",
    "accumulation 1xN == Nx1",
    "padding-free == padded",
    "chunked loss == plain loss",
    "shared prefix == each its own",
    "lean forwards == usual ones",
    "base untouched",
    "saved == loaded",
    "merged == live",
    "resumed == uninterrupted",
]
PASS = dict.fromkeys(CHECKS, "pass") | {"shared prefix == each its own": "n/a"}
"""Of rows that begin with little alike."""


def make(model, adapter, **changes):
    return tk.Pipeline(model=str(model), **{"data": tk.InMemory(rows=ROWS), "adapter": adapter, **changes})


def statuses(report):
    return {line.check: line.status for line in report.lines}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    place = tmp_path_factory.mktemp("gpt2")
    tiny_model("gpt2").save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


RIGHT = {
    "lora": tk.LoRA(rank=4),
    "dropout": tk.LoRA(rank=4, dropout=0.5),
    "pissa": tk.LoRA(rank=4, variant="pissa"),
    "adalora": tk.AdaLoRA(),
    "ia3": tk.IA3(),
    "lokr": tk.LoKr(rank=4),
    "qlora": tk.QLoRA(rank=4),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes_every_line(tiny_directory, name, dtype):
    if name == "qlora":
        pytest.importorskip("bitsandbytes")
    report = make(tiny_directory, RIGHT[name], dtype=dtype).verify()
    assert statuses(report) == PASS, str(report)
    assert report.ok


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_a_base_in_8_bits_passes_every_line(tiny_directory, name, dtype):
    """While evaluating, its layers round activations to 8 bits: what trains is compared as it trains."""
    pytest.importorskip("bitsandbytes")
    report = make(tiny_directory, RIGHT[name], quantizer=tk.Int8(), dtype=dtype).verify()
    assert statuses(report) == PASS, str(report)
    assert max(line.bound for line in report.lines if line.bound) < {"float32": 1e-4, "bfloat16": 0.2}[dtype]


def test_another_architecture_passes_too(gpt2):
    report = make(gpt2, tk.LoRA(rank=4)).verify()
    assert report.ok, str(report)
    assert {"pass", "n/a"} == set(statuses(report).values()), str(report)


@pytest.mark.real
@pytest.mark.parametrize("adapter", [tk.LoRA(rank=8), tk.IA3()], ids=lambda adapter: adapter.name)
def test_a_trained_model_in_bfloat16_passes_too(adapter):
    rows = [{"text": f"Once upon a time there was a {a} {b}. It was very {a}."} for a in ("red", "big") for b in "cd"]
    story = make(SHARED / "models" / "stories260k", adapter, data=tk.InMemory(rows=rows), dtype="bfloat16")
    report = story.verify()
    assert report.ok, str(report)


def test_rows_that_begin_alike_are_compared_with_what_they_begin_with_computed_once(tiny_directory, monkeypatch):
    rows = [{"prompt": f"say again and again, please: {n}", "completion": f"{n}"} for n in range(9)]
    pipeline = make(tiny_directory, tk.LoRA(rank=4), data=tk.InMemory(rows=rows))
    assert statuses(pipeline.verify()) == dict.fromkeys(CHECKS, "pass")
    right = Layout.of

    def wrong(rows, shared=False):  # remainders begin at position 0, as if nothing were before them
        found = right(rows, shared)
        return attrs.evolve(found, positions=[0 for _ in found.positions]) if found.after else found

    monkeypatch.setattr(Layout, "of", wrong)
    report = pipeline.verify()
    assert statuses(report)["shared prefix == each its own"] == "n/a"
    assert "the run does not use it: no shared prefixes: the loss is" in str(report)


def test_what_there_is_nothing_to_compare_of_says_why(tiny_directory):
    report = make(tiny_directory, tk.PromptTuning(virtual_tokens=4), trainer=tk.Transformers()).verify()
    reasons = {line.check: line.reason for line in report.lines if line.status == "n/a"}
    assert report.ok
    assert reasons["start == base"] == "prompt-tuning does not start as its base"
    assert reasons["accumulation 1xN == Nx1"] == "transformers has no micro_batch_size"
    assert "cannot be merged" in reasons["merged == live"]
    assert reasons["lean forwards == usual ones"] == "transformers trains without lean"
    assert reasons["resumed == uninterrupted"] == "transformers wrote no checkpoint to go on from"


# What is wrong -------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class StartsElsewhere(tk.LoRA):
    """LoRA whose B does not start at zero."""

    def attach(self, model, context):
        found = super().attach(model, context)
        with torch.no_grad():
            for name, value in found.named_parameters():
                if "lora_B" in name:
                    value += 0.01
        return found


@attrs.frozen(kw_only=True)
class WritesIntoTheBase(tk.LoRA):
    """LoRA that changes an embedding, of a token that no row has."""

    def after_step(self, model, step):
        with torch.no_grad():
            model.get_input_embeddings().weight[250] += 0.001


@attrs.frozen(kw_only=True)
class SavesHalf(tk.LoRA):
    """LoRA that saves the half of one tensor."""

    def save(self, model, directory):
        super().save(model, directory)
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        name = next(name for name in tensors if "lora_B" in name)
        save_file({**tensors, name: tensors[name] / 2}, path)


@attrs.frozen(kw_only=True)
class SavesNothing(tk.LoRA):
    """LoRA that cannot be saved."""

    def save(self, model, directory):
        raise RuntimeError("no room")


@attrs.frozen(kw_only=True)
class MergesDouble(tk.LoRA):
    """LoRA that is merged with a weight off."""

    def merge(self, model, context):
        merged = super().merge(model, context)
        merged.lm_head.weight.data *= 1.001
        return merged


@attrs.frozen(kw_only=True)
class CountsInSecret(tk.LoRA):
    """LoRA that depends on how many steps it has seen in this process."""

    def after_step(self, model, step):
        model.seen = getattr(model, "seen", 0) + 1
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).mul_(1 + 0.01 * model.seen)


@attrs.frozen(kw_only=True)
class KnowsNoFloat64(tk.LoRA):
    """Over a model with an operation of somebody's own."""

    name = "knows-no-float64"

    def attach(self, model, context):
        model.get_input_embeddings().register_forward_hook(self.only_float32)
        return super().attach(model, context)

    @staticmethod
    def only_float32(module, inputs, output):
        if (output + 0.0).dtype is torch.float64:
            raise TypeError("only float32")


class MeanOfMeans(RowsLoss):
    """The mean over the tokens of each forward pass."""

    def of(self, model, batch):
        return 10 * super().of(model, batch) / len(batch.wanted)


@attrs.frozen(kw_only=True)
class AveragesMicroBatches(tk.SFT):
    """SFT whose loss depends on how rows are split."""

    def fit(self, *arguments, **slots):
        right = loop._summed_loss

        def wrong(*facts):
            return MeanOfMeans(**attrs.asdict(right(*facts), recurse=False, filter=lambda field, _: field.init))

        with patch.object(loop, "_summed_loss", wrong):
            return super().fit(*arguments, **slots)


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        (StartsElsewhere(rank=4), "start == base"),
        (AveragesMicroBatches(), "accumulation 1xN == Nx1"),
        (WritesIntoTheBase(rank=4), "base untouched"),
        (SavesHalf(rank=4), "saved == loaded"),
        (MergesDouble(rank=4), "merged == live"),
        (CountsInSecret(rank=4), "resumed == uninterrupted"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_wrong_fails_the_line_that_is_about_it_and_no_other(tiny_directory, wrong, check):
    parts = {"trainer": wrong} if isinstance(wrong, tk.Trainer) else {}
    type(wrong).name = type(wrong).__name__.lower()
    report = make(tiny_directory, tk.LoRA(rank=4) if parts else wrong, **parts).verify()
    assert statuses(report) == {**PASS, check: "fail"}, str(report)
    assert not report.ok
    (line,) = [line for line in report.lines if line.status == "fail"]
    assert line.difference > line.bound
    assert f"{line.difference:.2g}" in str(report)


def test_a_gradient_that_is_wrong_behind_a_loss_that_is_right_is_seen(tiny_directory, monkeypatch):
    pipeline = make(tiny_directory, tk.LoRA(rank=4))
    attend, slope = segments.attend, head_loss._loss_and_slope

    def detached(*arguments, **options):
        found, weights = attend(*arguments, **options)
        return found.detach(), weights

    def steeper(logits, targets):
        loss, found = slope(logits, targets)
        return loss, 1.5 * found

    def twice(found):
        return found + (found - found.detach())

    with monkeypatch.context() as patch:
        patch.setattr(segments, "attend", detached)
        assert statuses(pipeline.verify())["padding-free == padded"] == "n/a", "a run sees it, too, and does without"
    monkeypatch.setattr(rows_loss, "as_accurate", lambda chosen, *_: chosen)
    with monkeypatch.context() as patch:
        patch.setattr(segments, "attend", detached)
        assert statuses(pipeline.verify()) == {**PASS, "padding-free == padded": "fail"}
    with monkeypatch.context() as patch:
        patch.setattr(lora, "low_rank", lambda *parts, **options: twice(low_rank(*parts, **options)))
        patch.setattr(rows_loss, "fault", lambda model, loss, kept_bytes: None)  # by which a run would see it, too
        assert statuses(pipeline.verify()) == {**PASS, "lean forwards == usual ones": "fail"}
    with monkeypatch.context() as patch:
        patch.setattr(head_loss, "_loss_and_slope", steeper)
        assert statuses(pipeline.verify()) == {**PASS, "chunked loss == plain loss": "fail"}


@pytest.mark.parametrize(("dtype", "roundings"), [("float32", 10), ("bfloat16", 1)])
def test_a_lean_forward_that_rounds_three_times_as_much_fails(
    tiny_directory, dtype, roundings, lean_lora_rounding, monkeypatch
):
    lean_lora_rounding(3 * roundings)
    monkeypatch.setattr(rows_loss, "as_accurate", lambda chosen, *_: chosen)  # by which a run would see it, too
    report = make(tiny_directory, tk.LoRA(rank=4), dtype=dtype).verify()
    assert statuses(report) == {**PASS, "lean forwards == usual ones": "fail"}, str(report)


def test_a_line_that_cannot_be_measured_fails_with_the_reason_and_raises_nothing(tiny_directory):
    SavesNothing.name = "saves-nothing"
    report = make(tiny_directory, SavesNothing(rank=4)).verify()
    expected = {"saved == loaded": "fail", "merged == live": "n/a"}
    assert statuses(report) == {**PASS, **expected}
    assert "RuntimeError: no room" in str(report)


# What it leaves ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_computed_in_float64_says_so_and_the_rest_is_compared(tiny_directory):
    report = make(tiny_directory, KnowsNoFloat64(rank=4)).verify()
    compared = {"base untouched", "resumed == uninterrupted"}
    assert {check for check, status in statuses(report).items() if status == "pass"} == compared
    others = [line for line in report.lines if line.check not in compared]
    assert {line.status for line in others} == {"n/a"}
    assert sum("in float64 it raises TypeError: only float32" in line.reason for line in others) >= 6


def test_it_leaves_no_file_and_draws_from_no_random_state(tiny_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = states()
    make(tiny_directory, tk.LoRA(rank=4, dropout=0.1)).verify()
    assert states() == before
    assert list(tmp_path.iterdir()) == []


def test_rows_are_few_and_short_and_bad_ones_are_passed_over(tmp_path):
    from tunekit.core.data.codec import Codec
    from tunekit.core.run.verification import TOKENS, some_rows

    long = [{"prompt": "x" * 500, "completion": "an answer"}, {"prompt": "short", "completion": "y" * 500}]
    codec = Codec(tiny_tokenizer())
    rows = some_rows(tk.InMemory(rows=[{"prompt": "?", "completion": "!"}, *long]), tk.SFT(), codec, 40)
    assert [len(row["input_ids"]) for row in rows] == [len(row["labels"]) for row in rows]
    assert len({len(row["input_ids"]) for row in rows}) > 1, "nothing would be padded"
    assert max(len(row["input_ids"]) for row in rows) == 40 < TOKENS
    alike = some_rows(tk.InMemory(rows=long[:1] * 9), tk.SFT(), codec, None)
    assert len({len(row["input_ids"]) for row in alike}) == len(alike), "nothing would be padded"
    assert all(supervised_tokens(row) for row in rows)
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n')
    with pytest.raises(tk.DataError, match="none of the first 32 rows can be learned from"):
        some_rows(tk.JsonLines(path=str(tmp_path / "bad.jsonl")), tk.SFT(), codec, None)


def test_what_cannot_work_is_told_as_by_a_run(tiny_directory):
    with pytest.raises(tk.ConfigError, match="cannot train on a nf4 base"):
        make(tiny_directory, tk.Full(), quantizer=tk.NF4()).verify()
    with pytest.raises(tk.ConfigError, match="no module is named"):
        make(tiny_directory, tk.LoRA(targets=("nowhere",))).verify()
