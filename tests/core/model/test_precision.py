"""The dtype of the base's weights: the user's word, then what is trained, then what the hardware is made for."""

import pytest
import torch

import tunekit as tk
from tunekit.core.model import precision
from tunekit.core.model.precision import choose_precision
from tunekit.core.registry import default_registry
from tunekit.testing import tiny_model
from tunekit.testing.harness import ROWS

FROZEN, TRAINED = tk.LoRA(), tk.Full()
ASKED = precision.multiplies_bfloat16  # the real one: for all tests there is a processor without bfloat16


@pytest.mark.parametrize(
    ("dtype", "device", "method", "quick", "expected"),
    [
        (None, "cpu", FROZEN, False, "float32: this processor has no quick bfloat16"),
        (None, "cpu", FROZEN, True, "bfloat16: the base is frozen, and this processor multiplies bfloat16 quickly"),
        (None, "cuda:1", FROZEN, False, "float32: this GPU has no quick bfloat16"),
        (None, "cuda:1", FROZEN, True, "bfloat16: the base is frozen, and this GPU multiplies bfloat16 quickly"),
        (None, "cpu", TRAINED, True, "float32: these weights are trained, and a step would be lost in bfloat16"),
        (None, "cuda", TRAINED, True, "float32: these weights are trained, and a step would be lost in bfloat16"),
        ("bfloat16", "cpu", TRAINED, False, "bfloat16: as asked for"),
        ("float32", "cuda", FROZEN, True, "float32: as asked for"),
        ("float16", "cuda", FROZEN, True, "float16: as asked for"),
    ],
)
def test_the_choice(dtype, device, method, quick, expected, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: quick)
    assert str(choose_precision(dtype, device, method)) == expected


def test_the_hardware_is_not_asked_where_the_choice_does_not_depend_on_it(monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: pytest.fail("asked"))
    assert choose_precision("bfloat16", "cpu", FROZEN).dtype == "bfloat16"
    assert choose_precision(None, "cpu", TRAINED).dtype == "float32"


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("avx512_bf16", [False, True])
def test_a_processor_has_it_with_amx_or_avx512_bf16(amx, avx512_bf16, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert ASKED("cpu") is (amx or avx512_bf16)


def test_a_gpu_has_it_where_torch_need_not_emulate_it(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or torch.no_grad())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert ASKED("cuda:1")
    assert asked == ["cuda:1"]


def test_every_built_in_method_that_trains_the_base_says_so():
    registry = default_registry()
    fields = {"peft": {"type": "VERA", "options": {"target_modules": ["q_proj"], "r": 4}}}
    for name in registry.names("adapter"):
        adapter = registry.find("adapter", name)(**fields.get(name, {}))
        model = tiny_model()
        own = {id(parameter) for parameter in model.parameters()}
        trained = adapter.attach(model, tk.Context(model_id="tiny", total_steps=20)).parameters()
        assert adapter.trains_base is any(id(p) in own for p in trained if p.requires_grad), name


def test_the_plan_and_the_run_say_what_was_chosen(tiny_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: True)
    pipeline = tk.Pipeline(
        model=str(tiny_directory),
        data=tk.InMemory(rows=ROWS),
        validation=0.0,
        evaluators=(),
        adapter=tk.LoRA(rank=2),
        trainer=tk.SFT(max_steps=1, batch_size=2),
        device="cpu",
    )
    plan = pipeline.plan()
    assert plan.precision.startswith("bfloat16: the base is frozen")
    assert plan.precision in str(plan)
    model = pipeline.run(tmp_path / "run")._model(tuned=True).model
    assert model.get_base_model().dtype == torch.bfloat16
