"""The dtype of the base's weights: the user's word, then what is trained, then what the hardware is made for."""

import pytest
import torch
from torch import nn

import tunekit as tk
from tunekit.core.model import precision
from tunekit.core.model.precision import choose_precision
from tunekit.core.model.products import Speeds
from tunekit.core.registry import default_registry
from tunekit.testing import tiny_model
from tunekit.testing.harness import ROWS

FROZEN, TRAINED = tk.LoRA(), tk.Full()
MASTERS = "; what is trained is held in float32"


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    """Here the processor is asked, or what stands in for it; all other tests say what to take."""
    monkeypatch.delenv("TUNEKIT_CPU_DTYPE")


@pytest.mark.parametrize(
    ("dtype", "device", "method", "quick", "expected"),
    [
        (None, "cpu", FROZEN, False, "float32: this processor has no quick bfloat16"),
        (None, "cpu", FROZEN, True, "float32: the base's layers are too small for bfloat16 to pay"),
        (None, "cuda:1", FROZEN, False, "float32: this GPU has no quick bfloat16"),
        (None, "cuda:1", FROZEN, True, "bfloat16: this GPU multiplies bfloat16 quickly" + MASTERS),
        (None, "cpu", TRAINED, True, "float32: the base's layers are too small for bfloat16 to pay"),
        (None, "cuda", TRAINED, True, "bfloat16: this GPU multiplies bfloat16 quickly" + MASTERS),
        ("bfloat16", "cpu", TRAINED, False, "bfloat16: as asked for" + MASTERS),
        ("float32", "cuda", FROZEN, True, "float32: as asked for"),
        ("float16", "cuda", FROZEN, True, "float16: as asked for" + MASTERS),
    ],
)
def test_the_choice(dtype, device, method, quick, expected, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: quick)
    assert str(choose_precision(dtype, device, method, tiny_model)) == expected


def test_the_hardware_is_not_asked_where_the_choice_does_not_depend_on_it(monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: pytest.fail("asked"))
    assert choose_precision("bfloat16", "cpu", FROZEN, tiny_model).dtype == "bfloat16"
    assert choose_precision("float32", "cpu", TRAINED, tiny_model).dtype == "float32"


@pytest.mark.parametrize(
    ("float32", "bfloat16", "expected"),
    [
        (
            325,
            176,
            "float32: this processor multiplies layers of this base at 325 GFLOP/s in float32, at 176 in bfloat16",
        ),
        (
            100,
            124.9,
            "float32: this processor multiplies layers of this base at 100 GFLOP/s in float32, at 125 in bfloat16",
        ),
        (
            100,
            125,
            "bfloat16: this processor multiplies layers of this base at 125 GFLOP/s in bfloat16, at 100 in float32"
            + MASTERS,
        ),
    ],
)
@pytest.mark.parametrize("method", [FROZEN, TRAINED])
def test_a_processor_with_instructions_for_bfloat16_is_measured_and_the_faster_one_taken(
    float32, bfloat16, expected, method, monkeypatch
):
    asked = []

    def measured(shapes):
        asked.append(shapes)
        return Speeds(float32=float32, bfloat16=bfloat16)

    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(precision, "measured", measured)
    found = choose_precision(None, "cpu", method, lambda: nn.Linear(512, 640))
    assert str(found) == expected
    spare = "bfloat16" if found.dtype == "float32" and method is FROZEN else None
    assert found.smaller == spare, "nobody asked for float32"
    assert asked == [((512, 640),)]


def test_a_gpu_is_not_measured(monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(precision, "measured", lambda shapes: pytest.fail("measured"))
    assert choose_precision(None, "cuda", FROZEN, lambda: pytest.fail("made")).dtype == "bfloat16"


@pytest.mark.parametrize("named", ["float32", "bfloat16"])
def test_the_environment_names_the_dtype_on_the_cpu_alone(named, monkeypatch):
    other = {"float32": "bfloat16", "bfloat16": "float32"}[named]
    monkeypatch.setenv("TUNEKIT_CPU_DTYPE", named)
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: named == "float32")
    found = choose_precision(None, "cpu", FROZEN, tiny_model)
    assert str(found) == f"{named}: TUNEKIT_CPU_DTYPE says so" + MASTERS * (named == "bfloat16")
    assert found.smaller is None, "it is the user's word, and not left where memory is short"
    assert choose_precision(other, "cpu", FROZEN, tiny_model).dtype == other
    assert choose_precision(None, "cpu", TRAINED, tiny_model) == found
    assert choose_precision(None, "cuda", FROZEN, tiny_model).dtype == other


def test_another_dtype_in_the_environment_is_refused_by_check(monkeypatch):
    monkeypatch.setenv("TUNEKIT_CPU_DTYPE", "float16")
    with pytest.raises(
        tk.ConfigError, match="TUNEKIT_CPU_DTYPE: must be 'float32', 'bfloat16' or unset, got 'float16'"
    ):
        tk.Pipeline(model=tk.TINY, data=tk.InMemory(rows=ROWS)).check()
    monkeypatch.setenv("TUNEKIT_CPU_DTYPE", "")
    tk.Pipeline(model=tk.TINY, data=tk.InMemory(rows=ROWS)).check()


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("avx512_bf16", [False, True])
def test_a_processor_has_it_with_amx_or_avx512_bf16(amx, avx512_bf16, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert precision.multiplies_bfloat16("cpu") is (amx or avx512_bf16)


def test_a_gpu_has_it_where_torch_need_not_emulate_it(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or torch.no_grad())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert precision.multiplies_bfloat16("cuda:1")
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


def test_the_plan_and_the_run_say_what_was_chosen_and_what_was_measured(tiny_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(
        precision, "shapes_of", lambda model: ((1024, 1024),)
    )  # those of the tiny model are not measured
    monkeypatch.setattr(precision, "measured", lambda shapes: Speeds(float32=310.2, bfloat16=929.6))
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
    assert plan.precision == (
        "bfloat16: this processor multiplies layers of this base at 930 GFLOP/s in bfloat16, at 310 in float32"
        + MASTERS
    )
    assert plan.precision in str(plan)
    run = pipeline.run(tmp_path / "run")
    assert f"base weights: {plan.precision}\n" in (run.directory / "log.txt").read_text()
    assert run._model(tuned=True).model.get_base_model().dtype == torch.bfloat16
