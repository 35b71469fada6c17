"""Schedules, against those of transformers: the same numbers, to the last bit."""

import pytest
import torch
from transformers import get_scheduler

from tunekit.plugins.trainers.schedules import FALLS, schedule

THEIRS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup", "inverse-sqrt": "inverse_sqrt"}


def theirs(name, warmup, steps):
    nobodys = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    made = get_scheduler(THEIRS[name], nobodys, num_warmup_steps=round(warmup * steps), num_training_steps=steps)
    return made.lr_lambdas[0]


@pytest.mark.parametrize("name", FALLS)
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 97, 1000])
def test_they_are_those_of_transformers(name, warmup, steps):
    share, expected = schedule(name, warmup, steps), theirs(name, warmup, steps)
    assert [share(step) for step in range(steps + 3)] == [expected(step) for step in range(steps + 3)]
