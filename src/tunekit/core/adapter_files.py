"""What is beside an adapter's weights: who made it, on which base, and with which template it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.core.codec import Codec
from tunekit.core.interfaces import AdapterMethod
from tunekit.core.model import Base
from tunekit.core.registry import default_registry
from tunekit.core.run import write_json

if TYPE_CHECKING:
    from torch import nn

PROVENANCE = "tunekit.json"


def save(directory: Path, method: AdapterMethod, model: nn.Module, base: Base, codec: Codec) -> None:
    """Write the adapter of `model` into `directory`, and beside it what is needed to use it."""
    directory.mkdir(exist_ok=True)
    method.save(model, directory)
    provenance = default_registry().provenance(type(method))
    stated = {**provenance, "model": base.model, "revision": base.revision, "template": codec.template}
    write_json(directory / PROVENANCE, stated)
