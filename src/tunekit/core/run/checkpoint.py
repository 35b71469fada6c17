"""Checkpoints that are whole or not there: written beside their place, flushed, and renamed into it.

`step-000100/` holds `parameters.safetensors` (what is trained, by name), `state.pt` (optimizer, schedule, random
states, the method's state; read with `weights_only=True`, so it cannot run code) and, written last, `checkpoint.json`
with the sha256 of both.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.common.writing import flush
from tunekit.core.training import sharded
from tunekit.core.training.parallel import started
from tunekit.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from torch import Tensor, nn

MANIFEST = "checkpoint.json"
PARAMETERS = "parameters.safetensors"
STATE = "state.pt"


@attrs.frozen(kw_only=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Args:
        directory: where it is.
        step: optimizer steps taken when it was written.
        state: what the trainer and the method stored, and the random states.
    """

    directory: Path
    step: int
    state: Mapping[str, Any] = attrs.field(repr=False)

    def load_parameters(self, model: nn.Module) -> None:
        """Put the trained parameters into `model`; TrainingError unless they are exactly the ones it trains."""
        import torch
        from safetensors.torch import load_file

        stored = load_file(self.directory / PARAMETERS)
        trained = trained_parameters(model)
        for name in sorted({*stored, *trained}):
            there, here = (list(found[name].shape) if name in found else "missing" for found in (stored, trained))
            if there != here:
                raise TrainingError(
                    f"{self.directory} holds other parameters than this pipeline trains; it cannot be resumed: "
                    f"{name} is {there} there and {here} here"
                )
        if sharded.in_pieces(model):
            sharded.take_apart(model)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(sharded.cut_alike(parameter, {name: stored[name]})[name])


def trained_parameters(model: nn.Module) -> dict[str, Any]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def checksums(model: nn.Module) -> dict[str, int]:
    """The checksum of each trained parameter: equal ones did not move. All processes call it for a model in pieces."""
    if not sharded.in_pieces(model):
        return {name: checksum(value) for name, value in trained_parameters(model).items()}
    sharded.take_apart(model)
    found = {name: checksum(sharded.local(value)) for name, value in trained_parameters(model).items()}
    everywhere = started().gather(found)
    return {name: sum(each[name] for each in everywhere) for name in found}


def checksum(value: Tensor) -> int:
    """A sum over the bits of a tensor, which a change of any number changes, but for rare ones that cancel out."""
    import torch

    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(value.detach().contiguous().view(whole[value.element_size()]).sum(dtype=torch.int64))


def check_moved(model: nn.Module, before: Mapping[str, int]) -> None:
    """Raise TrainingError if no trained parameter moved since its `checksums` were `before`."""
    if checksums(model) == before:
        raise TrainingError(
            f"none of the {len(before)} trained parameters moved: the learning rate is 0 or too small for their dtype, "
            "or no gradient reached them; nothing was learned"
        )


def write(directory: Path, step: int, parameters: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `step` into `directory` and return its place; it appears there only when it is whole.

    `parameters` are what is trained, by name; `state` is everything else.

    What goes wrong leaves nothing of it behind, and the checkpoints that are there as they are.
    """
    import torch
    from safetensors.torch import save_file

    place = _place(directory, step)
    scratch = directory / f".{place.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in parameters.items()}, scratch / PARAMETERS)
        with (scratch / STATE).open("wb") as stream:
            torch.save(dict(state), stream)
        digests = {name: sha256(scratch / name) for name in (PARAMETERS, STATE)}
        (scratch / MANIFEST).write_text(json.dumps({"step": step, "sha256": digests}, indent=2), encoding="utf-8")
        for path in [*scratch.iterdir(), scratch]:
            flush(path)
        if place.exists():
            # A damaged one that was passed over on resume.
            shutil.rmtree(place)
        scratch.rename(place)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    flush(directory)
    return place


def newest(directory: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `directory`; None if there is none, damaged or not.

    Raises:
        ConfigError: all that are there are damaged.
        TrainingError: it holds code.
    """
    places = by_age(directory)
    for place in places:
        if found := _read(place):
            return found
    if places:
        names = ", ".join(place.name for place in places)
        raise ConfigError(
            f"no checkpoint in {directory} is as it was written: {names}; start anew in another directory"
        )
    return None


def of_step(directory: Path, step: int) -> Checkpoint:
    """The checkpoint of `step` in `directory`; TrainingError if it is not there as it was written, or holds code."""
    place = _place(directory, step)
    if found := _read(place):
        return found
    raise TrainingError(f"the checkpoint {place} is not as it was written, or not there")


def _read(place: Path) -> Checkpoint | None:
    """A whole checkpoint; None for one that is damaged. TrainingError if it holds code."""
    import torch

    if not is_whole(place):
        return None
    manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    try:
        state = torch.load(place / STATE, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TrainingError(f"{place / STATE} holds more than plain values and tensors: {error}") from None
    return Checkpoint(directory=place, step=manifest["step"], state=state)


def _place(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def by_age(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, damaged ones too, the newest first."""
    places = [place for place in directory.glob("step-*") if place.name.removeprefix("step-").isdecimal()]
    return sorted(places, key=lambda place: int(place.name.removeprefix("step-")), reverse=True)


def is_whole(place: Path) -> bool:
    """Whether every file of the checkpoint is there, byte for byte as it was written."""
    try:
        digests = json.loads((place / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        # Of these two files alone: what else a manifest names might lie anywhere.
        return all(sha256(place / name) == digests[name] for name in (PARAMETERS, STATE))
    except (OSError, ValueError, KeyError):
        return False


def keep_newest(directory: Path, count: int, best: int | None = None) -> None:
    """Delete all but the newest `count` checkpoints, and that of step `best`."""
    for place in by_age(directory)[count:]:
        if best is None or place != _place(directory, best):
            shutil.rmtree(place)


def clear_scratch(directory: Path) -> None:
    """Delete what a process left that died while it wrote a checkpoint; under the lock of the run only."""
    for scratch in directory.glob(".step-*"):
        shutil.rmtree(scratch)


def sha256(file: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
