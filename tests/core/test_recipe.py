"""A recipe is the pipeline in TOML: read strictly, written whole, and equal on both sides."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tunekit as tk
from tunekit.core import recipe
from tunekit.core.component import Component
from tunekit.core.registry import Registry, default_registry

DATA = {"use": "json-lines", "path": tk.ORDERS}


def table(**more: Any) -> dict[str, Any]:
    """A recipe that is right, with `more` written into it."""
    return {"model": tk.TINY, "data": DATA, **more}


def pipeline(**more: Any) -> tk.Pipeline:
    return tk.Pipeline(**{"model": tk.TINY, "data": tk.JsonLines(path=tk.ORDERS), **more})


def through_toml(value: Mapping[str, Any], path: Path) -> dict[str, Any]:
    recipe.write(path, value)
    return recipe.read(path)


# Strictness ------------------------------------------------------------------------------------------------------------

ERRORS = [
    ({"trainr": {}}, "recipe.trainr: unknown field; did you mean 'trainer'?"),
    ({"adapter": {"use": "lora", "rnk": 8}}, "recipe.adapter.rnk: unknown field; did you mean 'rank'?"),
    ({"adapter": {"use": "lora", "rank": "8"}}, "recipe.adapter.rank: expected int, got str '8'"),
    ({"adapter": {"use": "lora", "rank": True}}, "recipe.adapter.rank: expected int, got bool True"),
    ({"adapter": {"use": "lora", "rank": 0}}, "recipe.adapter.rank: must be at least 1, got 0"),
    ({"adapter": {"use": "lora", "dropout": 1}}, "recipe.adapter.dropout: must be in [0, 1), got 1"),
    ({"adapter": {"use": "lora", "trained_modules": ["a", 3]}}, "recipe.adapter.trained_modules[1]: expected str, got int 3"),
    ({"adapter": {"use": "lora", "targets": ["a", 3]}}, "recipe.adapter.targets: expected str or tuple of str"),
    ({"adapter": {"use": "lora", "bias": "some"}}, "recipe.adapter.bias: expected 'none' or 'all' or 'lora_only'"),
    ({"adapter": {"rank": 8}}, "recipe.adapter.use: missing: name the adapter ("),
    ({"adapter": {"use": 8}}, "recipe.adapter.use: missing: name the adapter ("),
    ({"adapter": "lora"}, "recipe.adapter: expected a table with `use` (one of "),
    ({"adapter": [{"use": "lora"}]}, "recipe.adapter: expected a table with `use` (one of "),
    ({"quantizer": "nf4"}, "recipe.quantizer: expected Quantizer or None, got str 'nf4'"),
    ({"validation": "0.1"}, "recipe.validation: expected float or DataSource, got str '0.1'"),
    ({"validation": True}, "recipe.validation: expected float or DataSource, got bool True"),
    ({"validation": {"use": "json-lines"}}, "recipe.validation.path: missing; it is required and of type str"),
    ({"evaluators": {"use": "perplexity"}}, "recipe.evaluators: expected tuple of Evaluator, got dict"),
    (
        {"evaluators": [{"use": "perplexity"}, {"use": "exact-match", "max_new_tokens": "5"}]},
        "recipe.evaluators[1].max_new_tokens: expected int, got str '5'",
    ),
    (
        {"evaluators": [{"use": "perplexity"}, {"use": "exact-match", "max_new_tokens": 0}]},
        "recipe.evaluators[1].max_new_tokens: must be at least 1, got 0",
    ),
    ({"seed": 0.5}, "recipe.seed: expected int, got float 0.5"),
    ({"dtype": "float64"}, "recipe.dtype: expected 'float32' or 'bfloat16' or 'float16' or None, got str 'float64'"),
    ({"data": {"use": "json-lines"}}, "recipe.data.path: missing; it is required and of type str"),
    ({"data": {"use": "json-lines", "path": 5}}, "recipe.data.path: expected str or tuple of str, got int 5"),
    ({"data": {**DATA, "columns": {"text": 5}}}, "recipe.data.columns: expected Mapping[str, str] or None"),
    ({"trainer": {"use": "sft", "learning_rate": "2e-4"}}, "recipe.trainer.learning_rate: expected float or None, got str '2e-4'"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_an_error_has_the_dotted_path_of_the_field_from_python_and_from_toml(tmp_path, wrong, message):
    with pytest.raises(tk.ConfigError) as caught:
        tk.Pipeline.from_dict(table(**wrong))
    assert str(caught.value).startswith(message)
    assert caught.value.where == message.partition(": ")[0]
    recipe.write(tmp_path / "recipe.toml", table(**wrong))
    with pytest.raises(tk.ConfigError) as again:
        tk.load(tmp_path / "recipe.toml")
    assert message in str(again.value)


@pytest.mark.parametrize("missing", ["model", "data"])
def test_a_required_part_that_is_missing_is_named(missing):
    incomplete = {name: value for name, value in table().items() if name != missing}
    with pytest.raises(tk.ConfigError, match=rf"^recipe\.{missing}: missing; it is required"):
        tk.Pipeline.from_dict(incomplete)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"adapter": {"use": "lra"}}, "recipe.adapter.use: no adapter is named 'lra'; did you mean 'lora'?"),
        ({"evaluators": [{"use": "lora"}]}, "recipe.evaluators[0].use: no evaluator is named 'lora'; known: "),
        ({"validation": {"use": "json-line"}}, "recipe.validation.use: no source is named 'json-line'; did you mean"),
        ({"quantizer": {"use": "nobody/nf4"}}, "recipe.quantizer.use: no quantizer is named 'nobody/nf4'"),
    ],
)
def test_an_unknown_component_has_its_path_and_a_suggestion(wrong, message):
    with pytest.raises(tk.UnknownComponent) as caught:
        tk.Pipeline.from_dict(table(**wrong))
    assert str(caught.value).startswith(message)


@attrs.frozen(kw_only=True)
class Scores:
    """Something with evaluators, to be read with a registry of the test's own."""

    evaluators: tuple[tk.Evaluator, ...]


@pytest.mark.parametrize(
    ("fakes", "name", "error"),
    [
        (("fake-twin-one", "fake-twin-two"), "twin", tk.AmbiguousComponent),
        (("fake-lazy",), "no-class", tk.PluginError),
    ],
)
def test_a_component_that_cannot_be_had_has_its_path(install, fakes, name, error):
    install(*fakes)
    with pytest.raises(error, match=r"^recipe\.evaluators\[0\]\.use: "):
        recipe.from_table({"evaluators": [{"use": name}]}, Scores, Registry(environment={}))


@pytest.mark.parametrize("name", ["fake-twin-one/twin", "fake-twin-two/twin"])
def test_a_component_whose_name_is_not_its_alone_is_written_with_its_distribution(install, name):
    install("fake-twin-one", "fake-twin-two")
    registry = Registry(environment={})
    scores = recipe.from_table({"evaluators": [{"use": name}]}, Scores, registry)
    assert recipe.to_table(scores, registry) == {"evaluators": [{"use": name}]}


def test_what_a_validator_of_attrs_refuses_has_its_path_too():
    @attrs.frozen(kw_only=True)
    class Sized:
        size: int = attrs.field(validator=attrs.validators.ge(1))

    with pytest.raises(tk.ConfigError, match=r"^recipe: 'size' must be >= 1: 0"):
        recipe.from_table({"size": 0}, Sized, Registry(environment={}))


@pytest.mark.parametrize("written", [1, 1.0])
def test_a_whole_number_is_a_float_and_stays_equal(tmp_path, written):
    made = tk.Pipeline.from_dict(table(trainer={"use": "sft", "learning_rate": written}))
    assert made == pipeline(trainer=tk.SFT(learning_rate=1.0))
    made.save(tmp_path / "recipe.toml")
    assert tk.load(tmp_path / "recipe.toml") == made


# Files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [2, 0, "1", True])
def test_a_recipe_of_another_format_is_refused(tmp_path, written):
    assert tk.Pipeline.from_dict({"tunekit": recipe.FORMAT, **table()}) == pipeline()
    message = f"written for recipe format {written!r}, this tunekit reads 1"
    with pytest.raises(tk.ConfigError, match=message):
        tk.Pipeline.from_dict(table(tunekit=written))
    path = tmp_path / "recipe.toml"
    path.write_text(f"tunekit = {str(written).lower() if written is True else repr(written)}\n")
    with pytest.raises(tk.ConfigError, match=f"{path}: {message}"):
        tk.load(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"model = ", "is no TOML: Invalid value"), (b"model = '\xff'", "is no TOML: 'utf-8' codec")],
)
def test_a_file_that_is_no_toml_is_named(tmp_path, content, reason):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(tk.ConfigError, match=f"^{path}: {reason}"):
        tk.load(path)


@pytest.mark.parametrize(("name", "reason"), [("missing.toml", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, reason):
    with pytest.raises(tk.ConfigError, match=f"^{tmp_path / name}: cannot read the recipe: {reason}"):
        tk.load(tmp_path / name)


# Round trip ------------------------------------------------------------------------------------------------------------

RICH = {
    "template": "{{ messages }}\n\"'''",
    "validation": tk.InMemory(rows=[{"text": "held out"}]),
    "adapter": tk.LoRA(rank=4, alpha=8, layers=(0, 1), targets=("q_proj", "v_proj"), trained_modules=("lm_head",)),
    "trainer": tk.SFT(max_steps=5, micro_batch_size=2, max_grad_norm=float("inf")),
    "evaluators": (tk.Perplexity(), tk.ExactMatch(max_new_tokens=8), tk.TokenAccuracy()),
    "dtype": "bfloat16",
    "device": "cpu",
    "seed": 7,
}


@pytest.mark.parametrize(
    "more", [{}, RICH, {"evaluators": ()}, {"trainer": tk.Transformers(arguments={"max_steps": 3})}]
)
def test_a_saved_pipeline_loads_as_an_equal_one(tmp_path, more):
    made = pipeline(**more)
    made.save(tmp_path / "recipe.toml")
    assert tk.load(tmp_path / "recipe.toml") == made
    assert tk.Pipeline.from_dict(made.to_dict()) == made
    assert tk.load(tmp_path / "recipe.toml").to_dict() == made.to_dict()


def components(part: Any) -> list[Component]:
    """Every component in a pipeline, wherever it stands."""
    held = part if isinstance(part, tuple) else [getattr(part, field.name) for field in attrs.fields(type(part))]
    inside = [item for item in held if isinstance(item, Component | tuple)]
    return [*([part] if isinstance(part, Component) else []), *(found for item in inside for found in components(item))]


def tables(value: Any) -> list[Mapping[str, Any]]:
    """Every table with `use` in a recipe, in the same order."""
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, Mapping) and "use" in value else []
    return [*own, *(found for item in inside for found in tables(item))]


@pytest.mark.parametrize("more", [{}, RICH])
def test_a_saved_recipe_says_every_field_that_is_set_so_that_no_default_is_left_to_change(tmp_path, more):
    made = pipeline(**more)
    made.save(tmp_path / "recipe.toml")
    written = made.to_dict()
    assert tomllib.loads((tmp_path / "recipe.toml").read_text()) == {"tunekit": recipe.FORMAT, **written}
    assert written.keys() == {name for name, value in attrs.asdict(made, recurse=False).items() if value is not None}
    pairs = list(zip(components(made), tables(written), strict=True))
    assert len(pairs) >= 4
    for component, found in pairs:
        values = attrs.asdict(component, recurse=False)
        assert found.keys() == {"use", *(name for name, value in values.items() if value is not None)}


TEXT = st.text(max_size=20)
NAMES = st.lists(TEXT, max_size=3).map(tuple)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
SHARE = st.floats(min_value=0, max_value=1, exclude_max=True)
LORA = st.builds(
    tk.LoRA,
    rank=st.integers(1, 2**70),
    alpha=st.none() | st.integers(0, 99) | st.floats(min_value=0, allow_nan=False),
    dropout=SHARE,
    targets=TEXT | NAMES,
    bias=st.sampled_from(["none", "all", "lora_only"]),
    variant=st.sampled_from(["standard", "rslora", "dora"]),
    layers=st.none() | st.lists(st.integers(), max_size=3).map(tuple),
    trained_modules=NAMES,
)
SFT = st.builds(
    tk.SFT,
    epochs=POSITIVE,
    max_steps=st.none() | st.integers(1),
    learning_rate=st.none() | POSITIVE,
    schedule=st.sampled_from(["cosine", "linear", "constant", "inverse-sqrt"]),
    warmup=SHARE,
    micro_batch_size=st.just("auto") | st.integers(1),
    max_grad_norm=POSITIVE | st.just(float("inf")),
    max_length=st.none() | st.integers(2),
    keep=st.integers(1),
)
JSON = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@given(adapter=LORA, trainer=SFT, template=st.none() | TEXT, seed=st.integers())
def test_any_pipeline_goes_through_toml_unchanged(tmp_path_factory, adapter, trainer, template, seed):
    made = pipeline(adapter=adapter, trainer=trainer, template=template, seed=seed)
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    made.save(path)
    assert tk.load(path) == made


@given(rows=st.lists(st.dictionaries(TEXT, JSON, max_size=3), max_size=3))
def test_rows_in_memory_go_through_toml_unchanged(tmp_path_factory, rows):
    made = pipeline(data=tk.InMemory(rows=rows))
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    made.save(path)
    assert tk.load(path) == made


def test_none_in_a_row_is_written_by_leaving_it_out():
    pipeline = tk.Pipeline(model="m", data=tk.InMemory(rows=[{"text": "a", "note": None}]))
    assert pipeline.to_dict()["data"]["rows"] == [{"text": "a"}]


def test_a_field_of_python_objects_is_no_part_of_the_recipe():
    pipeline = tk.Pipeline(
        model="m", data=tk.InMemory(rows=[{"text": "a"}]), trainer=tk.Transformers(callbacks=(print,))
    )
    assert "callbacks" not in pipeline.to_dict()["trainer"]
    assert tk.Pipeline.from_dict(pipeline.to_dict()).trainer == tk.Transformers()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"data": tk.InMemory(rows=[{"text": {"a", "b"}}])}, "recipe.data.rows[0].text: cannot be written"),
        ({"trainer": tk.Transformers(arguments={"callback": print})}, "recipe.trainer.arguments.callback: cannot be"),
    ],
)
def test_a_value_that_toml_cannot_hold_is_refused_with_its_path(tmp_path, more, message):
    with pytest.raises(tk.ConfigError) as caught:
        pipeline(**more).save(tmp_path / "recipe.toml")
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "recipe.toml").exists()


# Differences -----------------------------------------------------------------------------------------------------------


def test_differences_are_told_by_path_with_the_old_and_the_new_value():
    old = pipeline(trainer=tk.SFT(max_steps=5)).to_dict()
    new = pipeline(seed=1, device="cpu", adapter=tk.LoRA(rank=8), evaluators=()).to_dict()
    assert recipe.differences(old, new) == [
        "recipe.adapter.rank: 16 -> 8",
        "recipe.trainer.max_steps: 5 -> None",
        "recipe.evaluators: [{'use': 'perplexity'}] -> []",
        "recipe.seed: 0 -> 1",
        "recipe.device: None -> 'cpu'",
    ]


@given(adapter=LORA, trainer=SFT)
def test_a_recipe_does_not_differ_from_itself_read_back(tmp_path_factory, adapter, trainer):
    written = recipe.to_table(pipeline(adapter=adapter, trainer=trainer), default_registry())
    assert recipe.differences(through_toml(written, tmp_path_factory.getbasetemp() / "self.toml"), written) == []
