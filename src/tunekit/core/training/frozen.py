"""Hidden states before the lowest trained layer, computed once a row and kept: later epochs begin there."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.evaluation.predicting import drops, evaluating
from tunekit.core.interfaces import Encoded
from tunekit.core.training.compiled import decoder_layers
from tunekit.errors import NotSupported

if TYPE_CHECKING:
    from torch import Tensor, nn

Inputs = Mapping[str, Any]


@attrs.define(kw_only=True, eq=False)
class FrozenLayers:
    """The layers below the lowest trained one, and what comes out of them.

    What is kept of a row is computed from that row alone: it is the same whatever the row is batched with, and so is a
    resumed run, which computes it again.

    Args:
        model: the model.
        below: its layers below the lowest trained one.
        lowest: the lowest trained layer.
        kept: shape (tokens of all rows, features), in a file that is mapped into memory and goes with the process.
    """

    model: nn.Module
    below: Sequence[nn.Module]
    lowest: nn.Module
    kept: Tensor
    _begins: dict[bytes, int] = attrs.field(factory=dict, init=False)
    _used: int = attrs.field(default=0, init=False)

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, tokens: int, directory: Path) -> FrozenLayers:
        """Those of `model`.

        Args:
            model: the model, as it is to be trained.
            inputs: of any one row, to see by what gradients flow.
            tokens: of all rows.
            directory: where the file is made.

        Raises:
            NotSupported: no layer lies below what is trained, something is dropped at random there, the model does not
                name its layers, or the disk has no room.
        """
        import torch

        layers = decoder_layers(model)
        reached: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, given, named: reached.append(_states(given, named)), with_kwargs=True
            )
            for layer in layers
        ]
        try:
            with evaluating(model), torch.enable_grad():
                model(**inputs, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        count = sum(not states.requires_grad for states in reached) - 1
        if count < 1 or len(reached) != len(layers):
            raise NotSupported("cache_frozen_layers: no layer lies below all that is trained")
        above = {module for layer in layers[count:] for module in layer.modules()}
        if drops(module for module in model.modules() if module not in above):
            raise NotSupported("cache_frozen_layers: dropout is drawn anew each time below what is trained")
        features, dtype = reached[count].shape[-1], reached[count].dtype
        size, free = tokens * features * dtype.itemsize, shutil.disk_usage(directory).free
        if size > free:
            raise NotSupported(
                f"cache_frozen_layers: the hidden states of {tokens:,} tokens are {size:,} bytes, and {directory} has "
                f"{free:,} left"
            )
        with tempfile.NamedTemporaryFile(dir=directory, prefix="frozen-layers-") as file:
            kept = torch.from_file(file.name, shared=True, size=tokens * features, dtype=dtype)
        return cls(model=model, below=layers[:count], lowest=layers[count], kept=kept.view(tokens, features))

    def states(self, rows: Sequence[Encoded], inputs: Callable[[Encoded], Inputs], device: str = "cpu") -> Tensor:
        """What comes to the lowest trained layer of `rows`, end to end, shape (tokens, features), on `device`.

        Rows that are new are computed from their `inputs`, one by one, and come from a GPU together, for which it is
        waited for once; to it all go together, for which nobody waits.
        """
        import torch

        ids = [array("q", row["input_ids"]) for row in rows]
        keys = [hashlib.blake2b(each.tobytes(), digest_size=16).digest() for each in ids]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._begins}
        if new:
            # Inputs may be filled up with tokens that belong to no row.
            computed = torch.cat([self._computed(inputs(row))[: len(row["input_ids"])] for row in new.values()])
            self.kept[self._used : self._used + len(computed)] = computed
        for key, row in new.items():
            self._begins[key] = self._used
            self._used += len(row["input_ids"])
        begins = [self._begins[key] for key in keys]
        parts = [self.kept[at : at + len(each)] for at, each in zip(begins, ids, strict=True)]
        shape = sum(map(len, parts)), self.kept.shape[1]
        found = torch.empty(shape, dtype=self.kept.dtype, pin_memory=device.startswith("cuda"))
        return torch.cat(parts, out=found).to(device, non_blocking=True)

    @contextmanager
    def left_out(self, states: Tensor) -> Iterator[None]:
        """Within it, the layers below hand on `states`, shape (rows, tokens, features), and compute nothing.

        Raises NotSupported where one of them is trained by now.
        """
        if any(parameter.requires_grad for layer in self.below for parameter in layer.parameters()):
            raise NotSupported("cache_frozen_layers: layers that were frozen are trained by now")
        own = [vars(layer).get("forward") for layer in self.below]
        for layer in self.below:
            layer.forward = partial(_handed_on, states)
        try:
            yield
        finally:
            for layer, forward in zip(self.below, own, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    def _computed(self, inputs: Inputs) -> Tensor:
        import torch

        def stop(_: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            raise _ReachedError(_states(given, named))

        hook = self.lowest.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                self.model(**inputs, use_cache=False)
        except _ReachedError as reached:
            states: Tensor = reached.args[0][0]
            return states
        finally:
            hook.remove()
        raise NotSupported("cache_frozen_layers: the model did not come to its lowest trained layer")


class _ReachedError(Exception):
    """Carries hidden states out of a forward pass that need not go on."""


def _states(given: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    states: Tensor = given[0] if given else named["hidden_states"]
    return states


def _handed_on(states: Tensor, *given: Any, **named: Any) -> Tensor:
    return states
