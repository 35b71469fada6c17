"""A comparison loads its base once, and each run is to the last bit the one that the pipeline makes alone."""

import attrs
import pytest
import torch

import tunekit as tk
from tunekit.core.comparison import shared_base
from tunekit.core.comparison.arms import name_of
from tunekit.core.comparison.shared_base import Snapshot
from tunekit.core.model.base import load_base
from tunekit.core.registry import default_registry
from tunekit.testing import tiny_model

ROWS = [{"prompt": f"repeat {n}", "completion": " ".join([str(n)] * (1 + n % 5))} for n in range(12)]
METHODS = (
    tk.LoRA(rank=2, dropout=0.1),
    tk.Full(),
    tk.IA3(),
    tk.LoRA(rank=2, variant="pissa"),
    tk.LastLayers(count=1),
    tk.PromptTuning(virtual_tokens=2),
)


def make(model, **changes):
    parts = {
        "model": str(model),
        "data": tk.InMemory(rows=ROWS),
        "validation": 0.25,
        "trainer": tk.SFT(batch_size=4, max_steps=2),
        "evaluators": (tk.Perplexity(),),
        "dtype": "float32",
    }
    return tk.Pipeline(**{**parts, **changes})


@pytest.fixture
def loads(monkeypatch):
    """Every base that a comparison loads, by its quantizer."""
    seen = []

    def counted(base, quantizer, codec, context):
        seen.append(quantizer and quantizer.scheme)
        return load_base(base, quantizer, codec, context)

    monkeypatch.setattr(shared_base, "load_base", counted)
    return seen


def files_of(directory):
    """All that a run keeps of its training: the adapter, what was logged, what was measured."""
    found = sorted((directory / "adapter").glob("*.safetensors"))
    assert found
    return [path.read_bytes() for path in [*found, directory / "metrics.jsonl", directory / "evaluations/tuned.json"]]


@pytest.fixture(scope="module")
def alone(tiny_directory, tmp_path_factory):
    """What each method gives in a run of its own."""
    place = tmp_path_factory.mktemp("alone")
    runs = {method: make(tiny_directory, adapter=method).run(place / name_of(method)) for method in METHODS}
    return {method: files_of(run.directory) for method, run in runs.items()}


@pytest.mark.parametrize("turn", [1, -1], ids=["in one order", "in the other"])
def test_a_run_over_the_shared_base_is_the_run_alone_to_the_last_bit(tiny_directory, alone, loads, tmp_path, turn):
    found = tk.compare(make(tiny_directory), METHODS[::turn], directory=tmp_path)
    assert not found.failures
    for method in METHODS:
        assert files_of(tmp_path / name_of(method) / "seed-0") == alone[method], name_of(method)
    # Full and LastLayers write into the weights: they come last, and the second of them gets a base of its own.
    assert loads == [None] * 2


def test_a_base_is_loaded_once_for_each_way_to_store_it_however_many_methods_and_seeds(tiny_directory, loads, tmp_path):
    methods = (tk.QLoRA(rank=2), tk.LoRA(rank=2), tk.IA3())
    options = {"directory": tmp_path, "budget": tk.Steps(1), "seeds": (0, 1)}
    found = tk.compare(make(tiny_directory), methods, **options)
    assert not found.failures
    assert [arm.name for arm in found.arms] == ["qlora-rank-2", "lora-rank-2", "ia3"]
    assert sorted(map(str, loads)) == ["None", "nf4"]
    tk.compare(make(tiny_directory), methods, **options)
    assert len(loads) == 2  # finished runs need none


def test_a_method_that_fails_halfway_leaves_the_next_the_base_as_it_was(tiny_directory, alone, loads, tmp_path):
    @attrs.frozen(kw_only=True)
    class Halfway(tk.LoRA):
        name = "halfway"

        def after_step(self, model, step):
            model.base_model.model.model.layers[0].register_forward_hook(lambda *_: None)
            raise RuntimeError("out of something")

    default_registry.cache_clear()
    tk.register(Halfway)
    try:
        found = tk.compare(make(tiny_directory), (Halfway(rank=2), METHODS[2]), directory=tmp_path)
    finally:
        default_registry.cache_clear()
    assert found.failures == ["halfway-rank-2, seed 0: RuntimeError: out of something"]
    assert files_of(tmp_path / "ia3/seed-0") == alone[METHODS[2]]
    assert loads == [None]


def weight(model):
    return model.model.layers[0].mlp.up_proj.weight


def written_in_place(model):
    with torch.no_grad():
        weight(model)[0, 0] += 1


def configured(model):
    model.config.rms_norm_eps = 1.0


def stops_elsewhere(model):
    model.generation_config.eos_token_id = [3]


def hooked(model):
    weight(model).register_hook(lambda gradient: 2 * gradient)


def of_another_class(model):
    model.model.norm.__class__ = torch.nn.Identity


def buffered(model):
    model.model.rotary_emb.inv_freq.mul_(2)


@pytest.mark.parametrize("change", [written_in_place, configured, stops_elsewhere, hooked, of_another_class, buffered])
def test_what_cannot_be_undone_is_seen(change):
    model = tiny_model()
    kept = Snapshot(model)
    assert kept.put_back()
    change(model)
    assert not kept.put_back()


def wrapped(model):
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp, torch.nn.Dropout())
    model.model.layers[1].mlp.act_fn = torch.nn.Identity()
    del model.model.layers[1].mlp.up_proj


def hooked_and_patched(model):
    model.register_forward_hook(lambda *_: None)
    model.model.layers[0].forward = lambda *_, **__: None
    model.peft_config = {}


def trained(model):
    model.train().requires_grad_(False)
    weight(model).requires_grad = True
    weight(model).sum().backward()


def in_another_place(model):
    weight(model).data = torch.zeros_like(weight(model))
    model.model.norm.weight = torch.nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize("change", [wrapped, hooked_and_patched, trained, in_another_place])
def test_what_can_be_undone_is(change):
    model = tiny_model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(6)[None]
    logits = model(ids).logits.detach()
    names = [name for name, _ in model.named_modules()]
    kept = Snapshot(model)
    for _ in range(2):
        change(model)
        assert kept.put_back()
        assert [name for name, _ in model.named_modules()] == names
        assert torch.equal(model(ids).logits, logits)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not model.training
        assert all(value.requires_grad and value.grad is None for value in model.parameters())
