"""Counting the bytes that are alive while torch computes, by what they are for: on real tensors and on fake ones.

Only ever imported from inside of methods, since it imports torch.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):  # type: ignore[misc]
    """Within it, every tensor that torch makes is counted from its making to its end, and the highest sum is kept.

    Views count once, with what they are views of. What a kernel takes for itself while it works is not seen.

    Args:
        part: what new tensors are for; see `making`.
    """

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self.live: Counter[str] = Counter()
        self.at_peak: Mapping[str, int] = {}
        self.most: Counter[str] = Counter()
        """The most bytes of each part that were alive at once, whenever that was."""
        self._known: dict[int, tuple[str, int, weakref.ref[Any]]] = {}

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once."""
        return sum(self.at_peak.values())

    def hold(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count tensors that are there already, or count them for another part from now on."""
        for tensor in tensors:
            self._forget(tensor.untyped_storage()._cdata)
            self._count(tensor, part)

    @contextmanager
    def making(self, part: str) -> Iterator[None]:
        """Within it, new tensors are for `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `function`, and count what it returns."""
        # Where a mode like this one is active, the gradient of an index is made in a copy of what it is put into.
        if function is aten.index_put.default and args[0].is_meta and not torch.is_grad_enabled():
            function = aten.index_put_.default
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor, self.part)
        return made

    def _count(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        # A storage lives as long as the last tensor that looks at it, in Python or in the graph.
        ended = weakref.ref(storage, partial(_ended, weakref.ref(self), key))
        self._known[key] = part, size, ended
        self.live[part] += size
        self.most[part] = max(self.most[part], self.live[part])
        if self.live.total() > self.peak:
            self.at_peak = dict(self.live)

    def _forget(self, key: int) -> None:
        if known := self._known.pop(key, None):
            self.live[known[0]] -= known[1]


def _ended(counting: "weakref.ref[LiveBytes]", key: int, _: object) -> None:
    if (live := counting()) is not None:
        live._forget(key)
