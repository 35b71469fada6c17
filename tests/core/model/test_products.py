"""float32 and bfloat16 are compared on products of the model's own large layers, by their least times."""

import pytest
import torch
from torch import nn

from tunekit.core.model import products
from tunekit.core.model.products import Speeds, least_times, measured, shapes_of
from tunekit.testing import tiny_model


class Clock:
    """A clock that only the work moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        """Work that takes one of `seconds` after another."""
        left = iter(seconds)

        def call():
            self.now += next(left)

        return call


def test_the_least_time_of_rounds_in_turns_counts_and_the_first_does_not():
    clock = Clock()
    timed = {
        "float32": clock.work([0.001, 0.04, 0.02, 0.03, 0.05, 0.06]),
        "bfloat16": clock.work([0.001, 0.03, 0.05, 0.04, 0.01, 0.02]),
    }
    found = least_times(timed, clock)
    assert found == pytest.approx({"float32": 0.02, "bfloat16": 0.01}, abs=1e-12)


def test_half_a_second_is_enough_and_one_round_is_measured_however_long_it_takes():
    clock = Clock()
    assert least_times({"a": clock.work([9.0, 7.0])}, clock) == {"a": 7.0}
    clock = Clock()
    assert least_times({"a": clock.work([0.1, 0.3, 0.2])}, clock) == pytest.approx({"a": 0.2})


@pytest.mark.parametrize(("bfloat16", "pays"), [(124.9, False), (125.0, True), (30.0, False)])
def test_bfloat16_pays_where_it_is_a_quarter_faster(bfloat16, pays):
    assert Speeds(float32=100.0, bfloat16=bfloat16).bfloat16_pays is pays


def test_the_shapes_are_those_of_the_layers_that_most_weights_are_in():
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "embedding": nn.Embedding(50_000, 576),
                "narrow": nn.Linear(576, 192),
                "square": nn.ModuleList(nn.Linear(576, 576) for _ in range(2)),
                "wide": nn.ModuleList(nn.Linear(576, 1536) for _ in range(2)),
                "norm": nn.LayerNorm(576),
            }
        )
    assert shapes_of(model) == ((576, 1024), (576, 576)), "a long side is cut"


def test_a_head_that_shares_the_weights_of_the_embedding_does_not_count():
    model = nn.ModuleDict({"embedding": nn.Embedding(2000, 512), "head": nn.Linear(512, 2000, bias=False)})
    assert shapes_of(model) == ((512, 1024),)
    model["head"].weight = model["embedding"].weight
    assert shapes_of(model) == ()


def test_experts_in_one_tensor_count_as_layers():
    model = nn.ParameterDict({"experts": nn.Parameter(torch.empty(4, 512, 640, device="meta"))})
    assert shapes_of(model) == ((640, 512),)


def test_of_small_layers_there_is_nothing_to_measure():
    assert shapes_of(tiny_model()) == ()
    assert shapes_of(nn.Linear(256, 511)) == ()
    assert shapes_of(nn.Linear(256, 512)) == ((256, 512),)


def test_speeds_are_operations_of_both_directions_by_time_and_measured_once_for_shapes_and_threads(monkeypatch):
    asked = []

    def timed(calls):
        asked.append(calls.keys())
        for call in calls.values():
            forward, back = call()
            assert (forward.shape, back.shape) == ((len(back), 6), (len(back), 8))
        return {"float32": 1e-6, "bfloat16": 2e-6}

    monkeypatch.setattr(products, "least_times", timed)
    products._measured.cache_clear()
    try:
        found = measured(((8, 6),))
        # 2 products of 512 x 8 x 6, each number a multiplication and an addition
        assert found == Speeds(float32=pytest.approx(98.304), bfloat16=pytest.approx(49.152))
        assert len(asked) == 2, "few tokens, then many"
        assert measured(((8, 6),)) == found
        assert len(asked) == 2
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
        assert measured(((8, 6),)) == found
        assert len(asked) == 4
    finally:
        products._measured.cache_clear()


def test_bfloat16_that_is_hopeless_with_few_tokens_is_not_tried_with_more(monkeypatch):
    tokens = []

    def speeds(shapes, count):
        tokens.append(count)
        return Speeds(float32=100.0, bfloat16=24.9)

    monkeypatch.setattr(products, "_speeds", speeds)
    products._measured.cache_clear()
    try:
        assert not measured(((1024, 1024),)).bfloat16_pays
    finally:
        products._measured.cache_clear()
    assert tokens == [products.FEW]
