"""A checkpoint is whole or not there, runs no code when it is read, and restores what was drawn from."""

import json
import random

import numpy as np
import pytest
import torch

from tunekit import ConfigError, TrainingError
from tunekit.core.common.random_states import random_states, set_random_states
from tunekit.core.registry import default_registry
from tunekit.core.run import checkpoint
from tunekit.core.run.observers import Observers
from tunekit.core.run.run_log import RunLog
from tunekit.testing import tiny_model


def write(directory, step, model=None, **state):
    return checkpoint.write(directory, step, checkpoint.trained_parameters(model or tiny_model()), {"trainer": state})


def test_what_is_written_is_read_back(tmp_path):
    model = tiny_model()
    write(tmp_path, 7, model, rate=0.5, moment=torch.ones(2))
    found = checkpoint.newest(tmp_path)
    assert found.step == 7
    assert found.state["trainer"]["rate"] == 0.5
    assert torch.equal(found.state["trainer"]["moment"], torch.ones(2))
    other = tiny_model(seed=1)
    found.load_parameters(other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_step_is_restored_with_the_state_of_the_method_and_the_rest_stays(tmp_path):
    model, states = tiny_model(), iter([{"ranks": [3]}, {"ranks": [2]}])
    given = []
    log = RunLog(directory=tmp_path, observers=Observers(default_registry()), method_state=lambda: next(states))
    log.load_method_state = given.append
    log.save(1, model, {}, keep=2)
    expected = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    log.save(2, model, {}, keep=2)
    log.restore(1, model)
    assert all(torch.equal(value, expected[name]) for name, value in model.named_parameters())
    assert given == [{"ranks": [3]}]


def test_nothing_but_whole_checkpoints_is_left_behind(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.is_whole(tmp_path / "step-000001")


@pytest.mark.parametrize("name", [checkpoint.PARAMETERS, checkpoint.STATE, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_for_the_whole_one_before(tmp_path, name, damage):
    write(tmp_path, 1)
    file = write(tmp_path, 2) / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes(content[:middle] if damage == "cut" else flipped)
    if (name, damage) == (checkpoint.MANIFEST, "flipped"):
        assert not checkpoint.is_whole(file.parent), "a digest that does not match"
    assert checkpoint.newest(tmp_path).step == 1


def test_no_checkpoint_is_none_and_damaged_ones_alone_are_an_error(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    (write(tmp_path, 3) / checkpoint.PARAMETERS).unlink()
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is as it was written: step-000003"):
        checkpoint.newest(tmp_path)


def test_only_the_newest_are_kept(tmp_path):
    for step in (2, 9, 999_999, 1_000_000):
        write(tmp_path, step)
    assert checkpoint.newest(tmp_path).step == 1_000_000
    checkpoint.keep_newest(tmp_path, 2, best=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-1000000", "step-999999"]
    checkpoint.keep_newest(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000"]


def test_parameters_of_another_model_are_refused(tmp_path):
    write(tmp_path, 1)
    found = checkpoint.newest(tmp_path)
    for other, difference in (
        (tiny_model("gpt2"), r"lm_head.weight is \[261, 32\] there and missing here"),
        (tiny_model(hidden_size=16), r"lm_head.weight is \[261, 32\] there and \[261, 16\] here"),
    ):
        with pytest.raises(TrainingError, match=f"holds other parameters than this pipeline trains.*: {difference}"):
            found.load_parameters(other)


class Payload:
    """Runs code when it is unpickled carelessly."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return (open, (str(self.sentinel), "w"))


def test_a_state_that_would_run_code_does_not(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    place = write(tmp_path / "checkpoints", 1)
    sentinel = tmp_path / "sentinel"
    torch.save({"trainer": Payload(sentinel)}, place / checkpoint.STATE)
    manifest = json.loads((place / checkpoint.MANIFEST).read_text())
    manifest["sha256"][checkpoint.STATE] = checkpoint.sha256(place / checkpoint.STATE)
    (place / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(TrainingError, match="holds more than plain values and tensors"):
        checkpoint.newest(tmp_path / "checkpoints")
    assert not sentinel.exists()


def test_every_random_state_is_restored_through_a_file(tmp_path):
    def draw():
        return random.random(), float(np.random.rand()), float(np.random.randn()), torch.rand(3).tolist()

    checkpoint.write(tmp_path, 1, checkpoint.trained_parameters(tiny_model()), {"random": random_states()})
    first = draw()
    assert draw() != first
    set_random_states(checkpoint.newest(tmp_path).state["random"])
    assert draw() == first
