"""Stopped after every step and gone on with, any run is the run that was never stopped, to the last bit.

Each has what makes resuming hard: dropout in the model and in the method, several forward passes a step, the last step
of the epoch smaller, and a learning rate that warms up and falls.
"""

import pytest

import tunekit as tk
from tunekit.testing import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"repeat {n}", "completion": f"{n} {n}" * (1 + n % 3)} for n in range(7)]
PLAIN = {
    "lora": tk.LoRA(rank=2, dropout=0.1),
    "dora": tk.LoRA(rank=2, dropout=0.1, variant="dora"),
    "pissa": tk.LoRA(rank=2, dropout=0.1, variant="pissa"),
    "adalora": tk.AdaLoRA(initial_rank=3, target_rank=2, dropout=0.1, interval=1),
    "ia3": tk.IA3(),
    "loha": tk.LoHa(rank=2, dropout=0.1),
    "lokr": tk.LoKr(rank=2, dropout=0.1),
    "full": tk.Full(),
    "last-layers": tk.LastLayers(count=1),
    "bottleneck": tk.Bottleneck(size=4),
    "prompt-tuning": tk.PromptTuning(virtual_tokens=4),
    "prefix-tuning": tk.PrefixTuning(virtual_tokens=4),
    "peft": tk.Peft(type="HRA", options={"target_modules": "all-linear"}),
}
CASES = {
    **{name: {"adapter": adapter} for name, adapter in PLAIN.items()},
    "qlora": {"adapter": tk.QLoRA(rank=2, dropout=0.1)},
    "lora over int8": {"adapter": PLAIN["lora"], "quantizer": tk.Int8()},
    "adalora over nf4": {"adapter": PLAIN["adalora"], "quantizer": tk.NF4()},
}


class Stops:
    """Stops a run as soon as a checkpoint is saved."""

    @tk.hookimpl
    def tunekit_saved(self):
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A base with dropout of its own."""
    directory = tmp_path_factory.mktemp("base")
    tiny_model(attention_dropout=0.2).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def test_every_built_in_method_and_quantizer_is_among_the_cases():
    offered = {name for plugin in tk.plugins() if plugin.distribution == "tunekit-sdk" for name in plugin.components}
    quantizers = [case.get("quantizer") or case["adapter"].default_quantizer() for case in CASES.values()]
    named = {f"adapter/{case['adapter'].name}" for case in CASES.values()}
    named |= {f"quantizer/{quantizer.name}" for quantizer in quantizers if quantizer}
    assert named == {name for name in offered if name.startswith(("adapter/", "quantizer/"))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_run_that_is_stopped_after_every_step_ends_as_one_that_was_not(model, tmp_path, case, dtype):
    pipeline = tk.Pipeline(
        model=model,
        data=tk.InMemory(rows=ROWS),
        validation=0.0,
        evaluators=(),
        trainer=tk.SFT(epochs=1, batch_size=3, micro_batch_size=1, learning_rate=0.01, warmup=0.4, save_every=1),
        dtype=dtype,
        **case,
    )
    pipeline.run(tmp_path / "whole")
    stopped = tmp_path / "stopped"
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(stopped, resume=resume, observers=[Stops()])
    assert [resumed["step"] for resumed in pipeline.run(stopped, resume=True).result["resumes"]] == [1, 2]
    files = ["metrics.jsonl", *(path.relative_to(stopped) for path in sorted((stopped / "adapter").iterdir()))]
    for name in files:
        assert (stopped / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
