"""Every adapter method over every base: a whole life through the pipeline, and an export that is the live model.

Int8 quantizes activations as well when it is evaluated, which no plain model does. Its layers in training mode (on the
CPU) compute with whole activations and the very weights that the export was merged onto: so compared, it is as exact
as NF4. As it is evaluated, it is within a thousandth all the same.
"""

import pytest
from transformers import AutoModelForCausalLM

import tunekit as tk
from tunekit.core.data.batching import collate
from tunekit.core.evaluation.predicting import evaluating
from tunekit.testing.harness import ROWS
from tunekit.testing.training import cross_entropy

pytest.importorskip("bitsandbytes")

METHODS = {
    "lora": (tk.LoRA(rank=4), 1e-2),
    "qlora": (tk.QLoRA(rank=4), 1e-2),
    "adalora": (tk.AdaLoRA(initial_rank=6, target_rank=3, interval=2), 5e-2),
    "ia3": (tk.IA3(targets="all-linear"), 3e-1),
    "loha": (tk.LoHa(rank=4), 3e-2),
    "lokr": (tk.LoKr(rank=4), 2e-2),
}
BASES = {"plain": None, "nf4": tk.NF4(), "int8": tk.Int8()}
STEPS = 8


@pytest.fixture(scope="module", params=[(method, base) for method in METHODS for base in BASES], ids="-over-".join)
def finished(request, tiny_directory, tmp_path_factory):
    method, base = request.param
    if (method, base) == ("qlora", "plain"):
        pytest.skip("QLoRA brings NF4 where no other quantizer is named")
    adapter, rate = METHODS[method]
    pipeline = tk.Pipeline(
        model=str(tiny_directory),
        data=tk.InMemory(rows=ROWS),
        validation=tk.InMemory(rows=ROWS),
        adapter=adapter,
        quantizer=BASES[base],
        trainer=tk.SFT(max_steps=STEPS, batch_size=7, learning_rate=rate),
        device="cpu",
    )
    return pipeline, pipeline.run(tmp_path_factory.mktemp("runs") / "run")


def nll(pipeline, model, training=lambda module: False):
    """Of the held-out rows, those modules in training mode that `training` says."""
    encoded = pipeline._data(pipeline._base.codec(), None).validation
    with evaluating(model):
        for module in filter(training, model.modules()):
            module.training = True
        return float(cross_entropy(model, collate(encoded, 0)))


def test_it_learns_can_be_opened_and_asked_and_its_export_is_the_live_model(finished, tmp_path):
    pipeline, run = finished
    live, quantizer = run._model(tuned=True).model, pipeline._quantizer
    assert run.base_metrics["nll"] - run.metrics["nll"] > 0.1, "a hundred times the difference that an export may have"

    again = tk.open_run(run.directory)
    assert again.generate("one", max_new_tokens=4) == run.generate("one", max_new_tokens=4)
    assert nll(pipeline, again._model(tuned=True).model) == pytest.approx(run.metrics["nll"], abs=1e-5)

    exported = AutoModelForCausalLM.from_pretrained(run.export(tmp_path / "merged"))
    found = nll(pipeline, exported)
    assert found == pytest.approx(run.metrics["nll"], abs=1e-3)
    exact = nll(pipeline, live, quantizer.is_quantized if quantizer else lambda module: False)
    assert found == pytest.approx(exact, abs=1e-5)
