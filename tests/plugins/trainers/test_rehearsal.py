"""The predicted peak of memory, beside what torch's own allocator reports of a real run: within 10 % on every row."""

import random
from functools import partial

import pytest
import torch
from test_sft import TOKENIZER
from torch.profiler import ProfilerActivity, profile

import tunekit as tk
from tunekit.core.component import Context
from tunekit.core.memory.live_bytes import LiveBytes
from tunekit.core.memory.weightless import AsOnDevice
from tunekit.core.registry import default_registry
from tunekit.core.run.files import create
from tunekit.core.run.observers import Observers
from tunekit.core.run.run_log import RunLog
from tunekit.core.training import rows_loss
from tunekit.plugins.trainers.rehearsal import PARTS, Rehearsal

SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def steps_alone(monkeypatch):
    """What is predicted is a step. Before the first, ways to the loss are tried in float64, on excerpts as long as the
    rows of these tests; over a model this small that takes more than a step does.
    """
    monkeypatch.setattr(rows_loss, "as_accurate", lambda chosen, *_: chosen)
    monkeypatch.setattr(rows_loss, "not_as_alone", lambda *_: None)


def rows(count, length, seed=0):
    numbers = random.Random(seed)
    made = []
    for _ in range(count):
        size = int(length * (0.5 + numbers.random()))
        ids = [numbers.randrange(100) for _ in range(size)]
        made.append({"input_ids": ids, "labels": [-100] * (size // 3) + ids[size // 3 :]})
    return made


def model(device="cpu", dtype="float32", kind="llama", **shape):
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    config = LlamaConfig(**{"vocab_size": 4096, "num_key_value_heads": 2, **SHAPE, **shape})
    if kind == "gpt2":  # with dropout in its attention, which no fused kernel on the CPU has
        config = GPT2Config(vocab_size=4096, n_embd=128, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return made


def predicted(trainer, method, data, context, quantizer=None, **given):
    empty = method.attach(model("meta", context.dtype, **given), context)
    return Rehearsal.of(trainer, empty, data, TOKENIZER, quantizer, context).parts(trainer)


def train(trainer, trained, data, context, directory):
    create(directory)
    log = RunLog(directory=directory, observers=Observers(default_registry()), resumed=None)
    nothing = {"after_step": lambda *_: None, "extra_loss": lambda _: None, "validate": None}
    trainer.fit(trained, TOKENIZER, data, run=log, context=context, **nothing)


def measured_on_cpu(run, held):
    """The most bytes that were allocated at once, by the allocator's own account, on top of those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as report:
        run()
    now = most = 0
    for event in report.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}.values()) + most


def sft(**changes):
    """Two passes over 16 rows: in the first, the optimizer has no states yet."""
    return tk.SFT(
        **{"max_steps": 4, "batch_size": 8, "save_every": 99, "order": "as-given", "learning_rate": 1e-3, **changes}
    )


TABLE = {
    "LoRA": (tk.LoRA(), sft(), {}),
    "LoRA by PEFT's forwards": (tk.LoRA(), sft(lean=False), {}),
    "dropout in bfloat16": (tk.LoRA(dropout=0.1), sft(), {"dtype": "bfloat16"}),
    "several passes": (tk.Full(), sft(micro_batch_size=3), {}),
    "padded, whole logits": (tk.LoRA(), sft(padding_free=False, chunked_loss=False), {}),
    "all layers recomputed": (tk.LoRA(), sft(gradient_checkpointing=True), {}),
    "one layer recomputed": (tk.Full(), sft(gradient_checkpointing=1), {}),
    "attention with dropout": (tk.LoRA(), sft(), {"kind": "gpt2"}),
    "adafactor on short rows": (tk.Full(), sft(optimizer="adafactor"), {"length": 8}),
    "adamw on short rows": (tk.Full(), sft(), {"length": 8}),
    "short rows with more labels": (tk.LoRA(), sft(gradient_checkpointing=True), {"answers": True}),
    "a large vocabulary": (tk.IA3(), sft(), {"vocab_size": 30_000}),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_peak_is_predicted(name, tmp_path):
    method, trainer, given = TABLE[name]
    given = dict(given)
    data, dtype = rows(16, given.pop("length", 80)), given.pop("dtype", "float32")
    if given.pop("answers", False):  # the longer rows of the first step have one label each
        data = [{**row, "labels": [-100] * (len(row["labels"]) - 1) + [5]} for row in rows(8, 120)] + data[8:]
    context = Context(model_id="x", device="cpu", dtype=dtype, total_steps=2)
    parts = predicted(trainer, method, data, context, **given)
    trained = method.attach(model(dtype=dtype, **given), context)
    run = partial(train, trainer, trained, data, context, tmp_path / "run")
    measured = measured_on_cpu(run, [*trained.parameters(), *trained.buffers()])
    assert list(parts) == list(PARTS)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.1)


def test_the_standing_parts_are_counted_to_the_byte():
    context = Context(model_id="x", device="cpu", dtype="bfloat16", total_steps=2)
    parts = predicted(sft(micro_batch_size=2), tk.LoRA(rank=4), rows(8, 40), context)
    empty = model("meta")
    lora = 3 * 4 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 384))
    buffers = sum(b.numel() * 4 for b in empty.buffers())
    assert parts["frozen weights"] == pytest.approx(2 * empty.num_parameters() + buffers, abs=buffers)
    assert parts["trained weights"] == 4 * lora, "PEFT keeps them in float32"
    assert parts["optimizer"] == pytest.approx(8 * lora, rel=1e-3), "two moments"


def tensors_of(trained):
    """What a quantized model holds: parameters, buffers, and bitsandbytes' states, which are neither."""
    yield from [*trained.parameters(), *trained.buffers()]
    for module in trained.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        while state is not None:
            yield from [each for each in (state.absmax, state.code, state.offset) if each is not None]
            state = state.state2
        if isinstance(getattr(getattr(module, "weight", None), "SCB", None), torch.Tensor):
            yield module.weight.SCB


ALL, SOME, NONE = ({"keep_dequantized": gibibytes} for gibibytes in (1.0, 0.001, 0.0))


@pytest.mark.parametrize(
    ("quantizer", "changes"),
    [
        (tk.NF4(), {"lean": False}),
        (tk.NF4(double_quantization=False), {"lean": False}),
        (tk.Int8(), {"lean": False}),
        (tk.NF4(), ALL),
        (tk.NF4(), SOME),
        (tk.NF4(), NONE),
        (tk.Int8(), ALL),
    ],
    ids=str,
)
def test_the_peak_is_predicted_on_a_quantized_base(quantizer, changes, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    method, trainer, data = tk.LoRA(), sft(**changes), rows(8, 12)
    context = Context(model_id="x", device="cpu", dtype="float32", total_steps=2, quantization=quantizer.scheme)
    parts = predicted(trainer, method, data, context, quantizer)
    model().save_pretrained(tmp_path / "model")
    options = quantizer.load_kwargs(context)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, **options)
    base = quantizer.prepare(base, context)
    stored = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_of(base)}.values())
    assert parts["frozen weights"] + parts["quantization state"] == pytest.approx(stored, rel=0.005)
    trained = method.attach(base, context)
    run = partial(train, trainer, trained, data, context, tmp_path / "run")
    assert sum(parts.values()) == pytest.approx(measured_on_cpu(run, tensors_of(trained)), rel=0.1)


def test_the_step_is_counted_for_a_gpu_where_there_is_none():
    context = Context(model_id="x", device="cuda", dtype="float32", total_steps=2)
    data, trainer = rows(8, 8), sft()
    there = predicted(trainer, tk.Full(), data, context)
    here = predicted(trainer, tk.Full(), data, Context(model_id="x", device="cpu", dtype="float32", total_steps=2))
    assert {part: there[part] for part in PARTS[:3]} == {part: here[part] for part in PARTS[:3]}
    moved = 4 * model("meta").num_parameters()
    assert there["workspace"] < moved, "AdamW moves all parameters in one pass there, and makes no copy of them"


@pytest.mark.parametrize(("device", "mask"), [("cuda:0", 1), ("cpu", 4)])
def test_what_dropout_keeps_is_counted_as_the_device_keeps_it(device, mask):
    x = torch.ones(64, 100, device="meta", requires_grad=True)
    live = LiveBytes("kept")
    live.hold([x], "there")
    with AsOnDevice(device), live:
        found = torch.nn.Dropout(0.1)(x)
        assert found.requires_grad
    assert live.live["kept"] == (4 + mask) * x.numel()
    with AsOnDevice(device), live:
        assert torch.nn.Dropout(0.1).eval()(x) is x


def test_on_cuda_a_quantized_base_and_what_is_kept_of_it_take_no_more_than_one_in_half_precision():
    pytest.importorskip("bitsandbytes")

    def rehearsed(device):
        context = Context(model_id="x", device=device, dtype="bfloat16", total_steps=2, quantization="nf4")
        empty = tk.LoRA().attach(model("meta", "bfloat16"), context)
        return Rehearsal.of(sft(), empty, rows(8, 8), TOKENIZER, tk.NF4(), context)

    numbers = 3 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384)
    there = rehearsed("cuda:1")
    assert there.dequantized(None) == 2 * numbers
    assert there.worth_keeping() == 2 * numbers - numbers // 2
    here = rehearsed("cpu")
    assert here.worth_keeping() > here.dequantized(None)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["LoRA", "dropout in bfloat16", "several passes", "one layer recomputed"])
def test_the_peak_is_predicted_on_cuda(name, tmp_path):
    method, trainer, given = TABLE[name]
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
    context = Context(model_id="x", device="cuda", dtype=given.get("dtype", "float32"), total_steps=2)
    data = rows(16, 400)
    parts = predicted(trainer, method, data, context, **shape)
    trained = method.attach(model("cuda", context.dtype, **shape), context)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train(trainer, trained, data, context, tmp_path / "run")
    assert sum(parts.values()) == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)
