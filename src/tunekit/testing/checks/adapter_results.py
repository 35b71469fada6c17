"""Checks of adapter methods after training: that they can be gone on with, saved, loaded and merged."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.core.interfaces import AdapterMethod
from tunekit.core.run.checkpoint import trained_parameters
from tunekit.errors import NotSupported
from tunekit.testing.harness import Harness, attached, scratch
from tunekit.testing.training import changed, copies, distance, logits, new_optimizer, train

if TYPE_CHECKING:
    from torch import Tensor, nn


def resumes_exactly(adapter: AdapterMethod, harness: Harness) -> None:
    """Stopped after 4 steps and gone on with in a new model, it ends where it would have without the stop."""
    import torch

    batch = harness.batch()
    model = attached(adapter, harness)
    optimizer = new_optimizer(model)
    train(adapter, model, batch, 4, optimizer=optimizer)
    file = io.BytesIO()
    torch.save({"method": dict(adapter.train_state(model)), "optimizer": optimizer.state_dict()}, file)
    stored = copies(trained_parameters(model))
    torch.manual_seed(2)
    train(adapter, model, batch, 4, first=5, optimizer=optimizer)

    file.seek(0)
    try:
        state = torch.load(file, weights_only=True)
    except Exception as error:
        raise AssertionError(f"train_state holds more than JSON values and tensors: {error}") from error
    again = attached(adapter, harness)
    with torch.no_grad():
        for name, parameter in trained_parameters(again).items():
            assert name in stored, f"a second `attach` trains {name}, which the first did not"
            parameter.copy_(stored[name])
    adapter.load_train_state(again, state["method"])
    optimizer = new_optimizer(again)
    optimizer.load_state_dict(state["optimizer"])
    torch.manual_seed(2)
    train(adapter, again, batch, 4, first=5, optimizer=optimizer)
    differing = changed(copies(trained_parameters(model)), trained_parameters(again))
    assert not differing, (
        f"after a resume {differing[:3]} end elsewhere: return from train_state all that the coming steps depend on "
        "besides the trained parameters, and restore it in load_train_state"
    )


def saves_what_it_trained(adapter: AdapterMethod, harness: Harness) -> None:
    """What is saved, put onto a fresh base, predicts the same; and it is safetensors and JSON, of the trained alone."""
    is_saved(adapter, trained_model(adapter, harness), harness)


def is_saved(adapter: AdapterMethod, model: nn.Module, harness: Harness) -> None:
    """Raise AssertionError unless the trained `model` is saved, and loaded onto a fresh base, as it is."""
    from safetensors.torch import load_file

    batch = harness.batch()
    trained = sum(parameter.numel() * parameter.element_size() for parameter in trained_parameters(model).values())
    expected = logits(model, batch)
    with scratch() as directory:
        adapter.save(model, directory)
        files = [path for path in directory.rglob("*") if path.is_file()]
        _check_suffixes(files)
        stored = [tensor for path in files if path.suffix == ".safetensors" for tensor in load_file(path).values()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in stored)
        assert 0 < size <= 1.1 * trained + 1024, (
            f"save wrote {size:,} bytes of tensors, and {trained:,} were trained: save what was trained, nothing else"
        )
        loaded = adapter.load(harness.model(), directory).eval()
    away = distance(logits(loaded, batch), expected)
    assert away <= 1e-5, (
        f"loaded onto a fresh base, its logits are {away:.2g} away from the trained model's: save every trained "
        "tensor, and put each back in its place in `load`"
    )


def merges(adapter: AdapterMethod, harness: Harness) -> None:
    """Merged, it is a plain model that predicts the same; or merging is NotSupported."""
    batch = harness.batch()
    model = trained_model(adapter, harness)
    expected = logits(model, batch)
    try:
        merged = adapter.merge(model, harness.context())
    except NotSupported:
        return
    is_merged(merged, harness, expected)


def is_merged(merged: nn.Module, harness: Harness, expected: Tensor) -> None:
    """Raise AssertionError unless it is built as the model of `harness` is, and its logits are the expected ones."""
    plain = harness.model()
    assert type(merged) is type(plain), f"merge returned a {type(merged).__name__}: return a {type(plain).__name__}"
    rest = _structure(merged) ^ _structure(plain)
    assert not rest, f"the merged model is not built as its base is: {sorted(rest)[:3]}; take the adapter's modules out"
    away = distance(logits(merged.eval(), harness.batch()), expected)
    assert away <= 1e-4, f"the merged model's logits are {away:.2g} away from the trained model's"


def trained_model(adapter: AdapterMethod, harness: Harness) -> nn.Module:
    """A model after three steps, all that are planned; they must have changed what it predicts."""
    model, batch = attached(adapter, harness, steps=3), harness.batch()
    before = logits(model, batch)
    train(adapter, model, batch, 3)
    assert distance(logits(model, batch), before) > 1e-4, "three steps change nothing: see the check `learns`"
    return model.eval()


def _structure(model: nn.Module) -> set[str]:
    modules = {f"{name}: {type(module).__name__}" for name, module in model.named_modules()}
    return modules | {f"{name}: {tuple(parameter.shape)}" for name, parameter in model.named_parameters()}


def _check_suffixes(files: list[Path]) -> None:
    others = [path.name for path in files if path.suffix not in (".safetensors", ".json")]
    assert not others, f"save wrote {others}: write tensors as safetensors and all else as JSON (no pickle)"


CHECKS = (resumes_exactly, saves_what_it_trained, merges)
