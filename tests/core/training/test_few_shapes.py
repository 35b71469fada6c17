"""In half precision on the CPU, what passes through the layers is a multiple of 64 tokens, and the loss is the same."""

import pytest
import torch

import tunekit as tk
from tunekit.core.training.few_shapes import filled, multiple_of
from tunekit.core.training.prefixes import Layout
from tunekit.core.training.rows_loss import RowsLoss
from tunekit.testing import tiny_model
from tunekit.testing.harness import ROWS


def rows(*lengths):
    return [
        {"input_ids": [7 + number] * length, "labels": [-100, *[9] * (length - 1)]}
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize(
    ("dtype", "device", "multiple"),
    [
        ("bfloat16", "cpu", 64),
        ("float16", "cpu", 64),
        ("float32", "cpu", 1),
        ("bfloat16", "cuda:1", 1),
        ("bfloat16", "meta", 1),
    ],
)
def test_only_half_precision_on_the_cpu_is_filled_up(dtype, device, multiple):
    assert multiple_of(getattr(torch, dtype), device) == multiple


def test_rows_are_filled_up_with_zeros_behind_them():
    tokens = torch.ones(70, 3, dtype=torch.bfloat16)
    found = filled(tokens)
    assert found.shape == (128, 3)
    assert torch.equal(found[:70], tokens)
    assert not found[70:].any()
    assert filled(found) is found
    assert filled(tokens.float()).shape == (70, 3)


def test_a_layout_is_filled_up_with_a_segment_of_its_own():
    plain = Layout.of(rows(5, 4))
    found = plain.filled(8)
    assert (found.tokens[:9], found.tokens[9:]) == (plain.tokens, [7] * 7)
    assert found.positions == [*range(5), *range(4), *range(7)]
    assert (found.lengths, found.begins, found.after) == ([5, 4, 7], plain.begins, plain.after)
    assert found.filled(8) is found
    assert plain.filled(1) is plain


def test_the_loss_and_gradient_are_those_without_what_is_filled_up(monkeypatch):
    model = tk.LoRA(rank=2).attach(tiny_model(), tk.Context(model_id="tiny", total_steps=1))
    way = RowsLoss(model=model, pad_id=0, device="cpu", padding_free=True, chunked=True)

    def found(multiple):
        for module in ("few_shapes", "batch"):
            monkeypatch.setattr(f"tunekit.core.training.{module}.multiple_of", lambda dtype, device: multiple)
        model.zero_grad()
        with way.training():
            loss = way(model, rows(11, 6, 23))
            loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    loss, gradients = found(1)
    other, others = found(64)
    assert float(other) == pytest.approx(float(loss), rel=1e-6)
    for gradient, its in zip(gradients, others, strict=True):
        assert torch.allclose(its, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "adapter", [tk.LoRA(rank=2, targets="all-linear"), tk.LastLayers(count=1)], ids=lambda each: each.name
)
def test_every_layer_of_a_run_in_bfloat16_sees_multiples_of_64(adapter, tiny_directory, tmp_path):
    seen = set()
    true = torch.nn.functional.linear

    class Sees(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            if function in (true, torch.matmul, torch.mm) and arguments[0].dtype == torch.bfloat16:
                seen.add(arguments[0].shape[:-1].numel())
            return function(*arguments, **(options or {}))

    freezes = isinstance(adapter, tk.LastLayers)
    trainer = tk.SFT(max_steps=3, batch_size=3, learning_rate=0.01, cache_frozen_layers=freezes, prefetch=False)

    class Begins:
        def __init__(self):
            self.mode = Sees()

        @tk.hookimpl
        def tunekit_log(self, step):
            if step == 1:
                self.mode.__enter__()

        @tk.hookimpl
        def tunekit_run_finished(self):
            self.mode.__exit__(None, None, None)

    pipeline = tk.Pipeline(
        model=str(tiny_directory),
        data=tk.InMemory(rows=ROWS),
        validation=0.0,
        evaluators=(),
        adapter=adapter,
        trainer=trainer,
        device="cpu",
        dtype="bfloat16",
    )
    run = pipeline.run(tmp_path / "run", observers=[Begins()])
    assert run.result["training"]["steps"] == 3
    assert seen
    assert {count % 64 for count in seen} == {0}
