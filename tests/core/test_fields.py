"""A field takes its annotated type and nothing else, whichever way the value came in."""

from collections.abc import Mapping
from typing import Any, Literal

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tunekit as tk
from tunekit.core.fields import at_least, between, describe, did_you_mean, matches, positive, types_of

RIGHT = [
    (8, int),
    (8.5, float),
    (8, float),
    ("a", str),
    (True, bool),
    (None, int | None),
    (8, int | None),
    ("auto", int | Literal["auto"]),
    ("cosine", Literal["cosine", "linear"]),
    ((), tuple[str, ...]),
    (("a", "b"), tuple[str, ...]),
    ((1, "a"), tuple[int, str]),
    ({"a": 1}, Mapping[str, int]),
    ({"a": [None]}, Mapping[str, Any]),
    (object(), Any),
]
WRONG = [
    ("8", int),
    (True, int),
    (8.0, int),
    ("8", float),
    (False, float),
    (1, bool),
    (8, str),
    (b"a", str),
    (None, int),
    ("many", int | Literal["auto"]),
    ("Cosine", Literal["cosine", "linear"]),
    (True, Literal[1]),
    (["a"], tuple[str, ...]),
    (("a", 1), tuple[str, ...]),
    ("ab", tuple[str, ...]),
    ((1, "a", 2), tuple[int, str]),
    ((1,), tuple[int, str]),
    ({"a": "1"}, Mapping[str, int]),
    ({1: 1}, Mapping[str, int]),
    ([("a", 1)], Mapping[str, int]),
]


@pytest.mark.parametrize(("value", "annotation"), RIGHT)
def test_a_value_of_the_annotated_type_is_taken(value, annotation):
    assert matches(value, annotation)


@pytest.mark.parametrize(("value", "annotation"), WRONG)
def test_a_value_of_another_type_is_not(value, annotation):
    assert not matches(value, annotation)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": "8"}, "LoRA.rank: expected int, got str '8'"),
        ({"rank": True}, "LoRA.rank: expected int, got bool True"),
        ({"rank": 8.0}, "LoRA.rank: expected int, got float 8.0"),
        ({"rank": None}, "LoRA.rank: expected int, got NoneType None"),
        ({"dropout": "0.1"}, "LoRA.dropout: expected float, got str '0.1'"),
        ({"bias": "some"}, "LoRA.bias: expected 'none' or 'all' or 'lora_only', got str 'some'"),
        ({"layers": [1, 2]}, "LoRA.layers: expected tuple of int or None, got list [1, 2]"),
        (
            {"trained_modules": ["head"]},
            "LoRA.trained_modules: expected tuple of str, got list ['head']; write a tuple",
        ),
        ({"targets": ("q_proj", 3)}, "LoRA.targets: expected str or tuple of str, got tuple ('q_proj', 3)"),
        ({"rank": 0}, "LoRA.rank: must be at least 1, got 0"),
        ({"dropout": 1.0}, "LoRA.dropout: must be in [0, 1), got 1.0"),
    ],
)
def test_a_component_refuses_a_wrong_value_and_names_the_field(fields, message):
    with pytest.raises(tk.ConfigError) as caught:
        tk.LoRA(**fields)
    assert str(caught.value).startswith(message)
    assert caught.value.where == message.partition(":")[0]


def test_a_class_where_an_instance_belongs_is_refused_with_what_to_write():
    with pytest.raises(tk.ConfigError, match=r"Pipeline.adapter: .*; that is the class, write LoRA\(\.\.\.\)"):
        tk.Pipeline(model=tk.TINY, data=tk.JsonLines(path=tk.ORDERS), adapter=tk.LoRA)


@pytest.mark.parametrize(
    ("part", "value"),
    [("adapter", [tk.LoRA()]), ("data", [{"text": "a"}]), ("trainer", tk.LoRA()), ("evaluators", tk.Perplexity())],
)
def test_a_pipeline_takes_a_component_of_the_right_kind_and_nothing_else(part, value):
    parts = {"model": tk.TINY, "data": tk.JsonLines(path=tk.ORDERS), part: value}
    with pytest.raises(tk.ConfigError, match=f"^Pipeline.{part}: expected "):
        tk.Pipeline(**parts)


def test_a_long_value_is_shown_in_part():
    with pytest.raises(tk.ConfigError) as caught:
        tk.LoRA(rank="8" * 1000)
    assert len(str(caught.value)) < 120


@attrs.frozen(kw_only=True)
class Bounds:
    share: float = attrs.field(default=0.5, validator=between(0, 1))
    count: int | None = attrs.field(default=None, validator=at_least(1))
    rate: float | None = attrs.field(default=None, validator=positive)


@pytest.mark.parametrize("fields", [{"share": 0}, {"share": 0.999}, {"count": 1}, {"count": None}, {"rate": 1e-9}])
def test_a_bound_admits_what_lies_within(fields):
    Bounds(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": 1}, "Bounds.share: must be in [0, 1), got 1"),
        ({"share": -0.1}, "Bounds.share: must be in [0, 1), got -0.1"),
        ({"count": 0}, "Bounds.count: must be at least 1, got 0"),
        ({"rate": 0}, "Bounds.rate: must be above 0, got 0"),
        ({"share": float("nan")}, "Bounds.share: must be in [0, 1), got nan"),
        ({"rate": float("nan")}, "Bounds.rate: must be above 0, got nan"),
        ({"count": float("nan")}, "Bounds.count: must be at least 1, got nan"),
    ],
)
def test_a_bound_refuses_what_lies_outside_and_what_is_no_number(fields, message):
    with pytest.raises(tk.ConfigError) as caught:
        Bounds(**fields)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        (int, "int"),
        (int | None, "int or None"),
        (Literal["linear", "cosine"], "'linear' or 'cosine'"),
        (tuple[str, ...], "tuple of str"),
        (str | tuple[int, ...], "str or tuple of int"),
        (Mapping[str, int], "Mapping[str, int]"),
        (tk.AdapterMethod | None, "AdapterMethod or None"),
    ],
)
def test_a_type_is_said_as_a_person_would(annotation, said):
    assert describe(annotation) == said


def test_a_near_name_is_suggested_and_else_all_are_listed():
    assert did_you_mean("rnk", ["rank", "alpha"]) == "; did you mean 'rank'?"
    assert did_you_mean("zzz", ["rank", "alpha"]) == "; known: alpha, rank"
    assert did_you_mean("rank", []) == ""


@given(st.sampled_from(["rank", "learning_rate", "max_new_tokens"]), st.data())
def test_one_slip_of_the_pen_is_understood(name, data):
    at = data.draw(st.integers(0, len(name) - 1))
    assert did_you_mean(name[:at] + name[at + 1 :], ["rank", "learning_rate", "max_new_tokens"]).endswith(f"{name!r}?")


def test_types_of_fields_are_resolved_from_text():
    @attrs.frozen(kw_only=True)
    class Written:
        rank: "int | None" = None

    assert types_of(Written) == {"rank": int | None}


def test_a_field_whose_type_is_not_there_at_run_time_is_a_plugins_mistake():
    @attrs.frozen(kw_only=True)
    class Unresolved:
        weight: "Tensor"  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(tk.PluginError, match=r"Unresolved: the annotation .*Tensor.* import its type at the top"):
        types_of(Unresolved)
