"""One base in memory for run after run: put back as it was loaded, proved by its bits, or else loaded again."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.component import Context
from tunekit.core.data.codec import Codec
from tunekit.core.interfaces import Quantizer
from tunekit.core.model.base import Base, load_base
from tunekit.core.run.checkpoint import checksum

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@attrs.define(eq=False)
class SharedBase:
    """Loads bases as `load_base` does, and keeps the last one in memory for who wants the same again.

    Between two runs, `take_back` undoes whatever the first left in the model.
    """

    _key: tuple[object, ...] = ()
    _kept: Snapshot | None = None

    def load(self, base: Base, quantizer: Quantizer | None, codec: Codec, context: Context) -> PreTrainedModel:
        """What `load_base` would load; see there. At most one model is kept: another takes its place."""
        key = (base, quantizer, codec.template, context.device, context.dtype, context.added_ids)
        if self._kept is None or self._key != key:
            self._kept = None  # before another is loaded: both together may not fit
            self._kept, self._key = Snapshot(load_base(base, quantizer, codec, context)), key
        return self._kept.model

    def take_back(self) -> bool:
        """Put the base back as it was loaded; if that cannot be done, let go of it and return False."""
        if self._kept is not None and not self._kept.put_back():
            self._kept = None
        return self._kept is not None


class Snapshot:
    """A model as it is now, to be put back: modules, hooks and settings by their places, weights by their bits.

    Weights are not copied. Methods that put modules beside or around the base's leave them as they are; those that
    write into them cannot be undone, which the checksums show.

    Args:
        model: of which the snapshot is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._modules = [(module, type(module), _copied(vars(module))) for module in model.modules()]
        self._tensors = [_Kept(tensor, tensor.data, tensor.requires_grad, checksum(tensor)) for tensor in _all(model)]
        self._settings = [(found, copy.deepcopy(found)) for found in _settings(model)]

    def put_back(self) -> bool:
        """Put everything back, and return whether the model then is what it was, to the last bit of its weights."""
        for module, kind, attributes in self._modules:
            if type(module) is not kind:
                return False
            vars(module).clear()
            vars(module).update(_copied(attributes))
        if any(now != then for now, then in self._settings):
            return False
        return all(kept.put_back() for kept in self._tensors)


@attrs.frozen
class _Kept:
    """A parameter or buffer, and what it was."""

    tensor: Tensor
    data: Tensor
    requires_grad: bool
    checksum: int

    def put_back(self) -> bool:
        """Put it back; whether its bits are what they were, and nothing is called when its gradient is computed."""
        self.tensor.grad = None
        self.tensor.requires_grad_(self.requires_grad)
        if self.tensor.data_ptr() != self.data.data_ptr():
            self.tensor.data = self.data
        hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
        return not any(getattr(self.tensor, name) for name in hooks) and checksum(self.tensor) == self.checksum


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes of a module; tables (of modules, parameters, buffers, hooks) are copies, what is in them is not."""
    tables = (dict, list, set)
    return {name: copy.copy(value) if isinstance(value, tables) else value for name, value in attributes.items()}


def _all(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _settings(model: PreTrainedModel) -> list[Any]:
    """The configurations of the model, which methods and trainers might write into."""
    return [found for found in (model.config, model.generation_config) if found is not None]
