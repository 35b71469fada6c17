"""Random states, against `transformers.set_seed`, torch and numpy themselves."""

import random

import numpy as np
import pytest
import torch
from transformers import set_seed

from tunekit.core.common.random_states import random_states, random_states_kept, seed_everything, set_random_states


def draw():
    return random.random(), float(np.random.rand()), float(np.random.randn()), torch.rand(3).tolist()


def test_it_seeds_as_transformers_does():
    with random_states_kept():
        set_seed(7)
        expected = draw()
        seed_everything(8)
        assert draw() != expected
        seed_everything(7)
        assert draw() == expected


def test_states_are_those_of_before_whatever_was_drawn_or_raised():
    def failing():
        with random_states_kept():
            draw()
            assert repr(random_states()) != before
            raise ZeroDivisionError

    before = repr(random_states())
    with pytest.raises(ZeroDivisionError):
        failing()
    assert repr(random_states()) == before


def test_what_was_kept_beside_gpus_is_restored_where_there_are_none_and_the_other_way_round():
    states = random_states("cpu")
    assert states["cuda"] == []
    expected = draw()
    set_random_states({**states, "cuda": [torch.get_rng_state()] * 2})  # no GPU here takes them
    assert draw() == expected
