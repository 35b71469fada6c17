"""Every type of the installed peft lives a whole life under `Peft`, or is refused with the reason: none is forgotten."""

import importlib.util

import peft
import pytest
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import tunekit as tk
from tunekit.core.common.distributions import release
from tunekit.core.run.checkpoint import trained_parameters
from tunekit.core.run.plan import count_parameters
from tunekit.plugins.adapters.peft import CANNOT, MOVED, OWN
from tunekit.testing.harness import Harness, attached
from tunekit.testing.training import changed, copies, distance, frozen, logits, train

LINEAR = {"target_modules": "all-linear"}
WORKS = {
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "BEFT": LINEAR,
    "BOFT": LINEAR,
    "C3A": LINEAR | {"block_size": 16},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "DEFT": LINEAR,
    "DELORA": LINEAR,
    "FOURIERFT": LINEAR | {"n_frequency": 100},
    "GLORA": LINEAR,
    "GRALORA": LINEAR,
    "HIRA": LINEAR,
    "HRA": LINEAR,
    "LILY": LINEAR,
    "LN_TUNING": {"target_modules": ("input_layernorm", "post_attention_layernorm")},
    "MISS": LINEAR | {"r": 4},
    "OFT": LINEAR,
    "OSF": LINEAR,
    "PEANUT": LINEAR,
    "PSOFT": LINEAR | {"r": 8},
    "PVERA": LINEAR,
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 8},
    "RANDLORA": LINEAR,
    "ROAD": LINEAR | {"group_size": 16},
    "SHADOW": {},
    "SUPERTUNING": LINEAR,
    "TINYLORA": LINEAR,
    "TRAINABLE_TOKENS": {"token_indices": [3, 4, 5]},
    "UNILORA": LINEAR,
    "VBLORA": LINEAR | {"vector_length": 16, "num_vectors": 16, "r": 2},
    "VERA": LINEAR,
    "WAVEFT": LINEAR | {"n_frequency": 100},
}
if release(peft.__version__) < (0, 21):
    del WORKS["SHADOW"], WORKS["SUPERTUNING"]
LACKS_A_PACKAGE = {"ADAMSS": ("sklearn", "scikit-learn is required")}
NOT_MERGED = {"ADAPTION_PROMPT", "BEFT", "CARTRIDGE", "LILY", "P_TUNING", "SHADOW"}
CONTEXT = tk.Context(model_id="a/b")
# What PEFT says of the tiny Llama, and of a machine without a compiler for CUDA.
NOTES = (
    "ignore:Detected that the base layer has no bias term",
    "ignore:Failed to load the CUDA extension",
    "ignore:Unsupported layer type",
    "ignore:Setting boft_n_butterfly_factor to 1",
)


def quietly(test):
    for note in NOTES:
        test = pytest.mark.filterwarnings(note)(test)
    return test


def nll(found, batch):
    """Of the supervised tokens; PVERA's own losses are noisy."""
    import torch

    return torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def test_every_type_of_the_installed_peft_is_accounted_for():
    installed = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert installed - {*WORKS, *LACKS_A_PACKAGE, *CANNOT, *OWN} == set(), (
        "give it options above, or a reason in CANNOT"
    )
    assert {*CANNOT, *OWN} <= installed
    assert WORKS.keys() > MOVED


@pytest.mark.parametrize("kind", WORKS)
@quietly
def test_it_trains_and_is_saved_loaded_and_merged(kind, tmp_path):
    import torch

    harness = Harness()
    adapter, batch = tk.Peft(type=kind, options=WORKS[kind]), harness.batch()
    adapter.check(CONTEXT)
    adapter.extra_tokens()
    base = logits(harness.model(), batch)
    model = attached(adapter, harness)
    start = logits(model, batch)
    assert (distance(start, base) <= 1e-5) == adapter.starts_as_base == (kind not in MOVED)
    with torch.device("meta"):
        empty = harness.model()
    assert count_parameters(adapter.attach(empty, harness.context()))[0] == count_parameters(model)[0]

    before = copies(frozen(model))
    train(adapter, model, batch, 6)
    assert not changed(before, frozen(model))
    assert trained_parameters(model)
    live = logits(model, batch)
    assert distance(live, start) > 1e-4
    assert nll(live, batch) < nll(start, batch)

    adapter.save(model, tmp_path)
    assert distance(logits(model, batch), live) == 0, "saving changed the model"
    assert distance(logits(adapter.load(harness.model(), tmp_path), batch), live) < 1e-5
    theirs = PeftModel.from_pretrained(harness.model(), tmp_path).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = theirs(**inputs, use_cache=False).logits[:, -live.shape[1] :] * batch["attention_mask"][..., None]
    assert distance(found, live) < 1e-5

    if kind in NOT_MERGED:
        with pytest.raises(tk.NotSupported, match="cannot be merged"):
            adapter.merge(model, harness.context())
        return
    merged = adapter.merge(model, harness.context())
    assert type(merged) is type(harness.model())
    assert distance(logits(merged.eval(), batch), live) < 1e-4


@pytest.mark.parametrize("kind", OWN)
def test_a_type_with_a_class_of_its_own_is_refused_with_its_name(kind):
    assert issubclass(getattr(tk, OWN[kind]), tk.PeftMethod)
    with pytest.raises(tk.ConfigError, match=rf"Peft\.type: {kind} has a class of its own: use tk\.{OWN[kind]}"):
        tk.Peft(type=kind).check(CONTEXT)


@pytest.mark.parametrize("kind", CANNOT)
def test_a_type_that_cannot_work_is_refused_with_the_reason(kind):
    with pytest.raises(tk.ConfigError, match=f"{kind} cannot be used: it"):
        tk.Peft(type=kind).check(CONTEXT)


@pytest.mark.parametrize("kind", LACKS_A_PACKAGE)
def test_a_type_whose_package_is_missing_says_so(kind):
    package, problem = LACKS_A_PACKAGE[kind]
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed here; whether {kind} then works is not known")
    with pytest.raises(tk.ConfigError, match=problem):
        tk.Peft(type=kind, options=LINEAR).extra_tokens()


@pytest.mark.parametrize(
    ("kind", "options", "problem"),
    [
        ("vera", {}, r"Peft\.type: unknown type 'vera'; did you mean 'VERA'\?"),
        ("NOTHING_LIKE_IT", {}, r"unknown type .*; known: ADAMSS, .*VERA"),
        ("VERA", {"vera_droput": 0.1}, r"Peft\.options\.vera_droput: .*did you mean 'vera_dropout'\?"),
        ("VERA", {"r": "8"}, r"Peft\.options\.r: expected int, got str '8'"),
        ("VERA", {"save_projection": 1}, r"Peft\.options\.save_projection: expected bool"),
        ("BOFT", {"boft_block_size": 3, "boft_block_num": 3}, r"Peft\.options: BOFT: "),
        ("P_TUNING", {"num_virtual_tokens": "four"}, r"options\.num_virtual_tokens: expected int"),
    ],
)
def test_a_wrong_type_or_option_is_found_before_anything_is_loaded(kind, options, problem, tmp_path, monkeypatch):
    from tunekit.core.model.base import Base

    monkeypatch.setattr(Base, "load", lambda *args, **options: pytest.fail("weights are loaded"))
    pipeline = tk.Pipeline(
        model=tk.TINY, data=tk.JsonLines(path=tk.ORDERS), adapter=tk.Peft(type=kind, options=options)
    )
    for act in (pipeline.plan, lambda: pipeline.run(tmp_path / "run")):
        with pytest.raises(tk.ConfigError, match=problem):
            act()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["task_type", "base_model_name_or_path", "inference_mode"])
def test_an_option_that_the_pipeline_sets_is_refused(name):
    with pytest.raises(tk.ConfigError, match=rf"Peft\.options\.{name}: is set by the pipeline"):
        tk.Peft(type="VERA", options={name: "x"}).check(CONTEXT)


def test_targets_may_be_a_group_of_layers():
    model = tk.Peft(type="VERA", options={"target_modules": "attention"}).attach(Harness().model(), CONTEXT)
    adapted = {name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "vera_lambda_b")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(tk.ConfigError, match=r"Peft\.options\.target_modules: no module is named 'q_pro'"):
        tk.Peft(type="VERA", options={"target_modules": ["q_pro"]}).attach(Harness().model(), CONTEXT)


def test_a_recipe_holds_it(tmp_path):
    adapter = tk.Peft(type="VERA", options=LINEAR | {"r": 4}, learning_rate=1e-2)
    pipeline = tk.Pipeline(model=tk.TINY, data=tk.JsonLines(path=tk.ORDERS), adapter=adapter)
    pipeline.save(tmp_path / "recipe.toml")
    assert tk.load(tmp_path / "recipe.toml") == pipeline
    assert pipeline.plan().learning_rate == 1e-2
