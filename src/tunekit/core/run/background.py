"""One piece of work beside training: a checkpoint is copied while training waits, and written while it goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from tunekit.core.common.free_memory import free_bytes

T = TypeVar("T")

SPARE = 2
"""Times its size that must be free in memory for a copy to be made: training must not run out of it by saving."""


class Background(Generic[T]):
    """At most one function at a time in a thread of its own; what comes of it is handed out where it is asked for.

    The thread is no daemon: a process that ends waits for it, so that nothing is cut short but by a kill.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._found: list[T] = []
        self._raised: list[BaseException] = []

    def start(self, function: Callable[[], T]) -> None:
        """Begin; what was begun before must be settled."""
        assert self._thread is None, "the one before is not settled"
        self._thread = threading.Thread(target=self._work, args=(function,), name="tunekit-saving")
        self._thread.start()

    @property
    def succeeded(self) -> bool:
        """Whether something was begun, is done and did not fail."""
        return bool(self._thread and not self._thread.is_alive() and not self._raised)

    def settle(self) -> list[T]:
        """Wait for what was begun, if anything was; what it returned, if anything. Raises what it raised."""
        if self._thread is None:
            return []
        self._thread.join()
        found, raised = self._found, self._raised
        self._thread, self._found, self._raised = None, [], []
        if raised:
            raise raised[0]
        return found

    def _work(self, function: Callable[[], T]) -> None:
        try:
            self._found.append(function())
        except BaseException as error:  # raised where it is settled
            self._raised.append(error)


def copied(value: Any) -> Any:
    """`value` with every tensor within it copied to memory of its own, on the CPU."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(copied, value))
    return value


def has_room_for(value: Any) -> bool:
    """Whether the memory has room for a copy of every tensor within `value`, and room to spare."""
    return bool(SPARE * sum(tensor.nbytes for tensor in _tensors(value)) < free_bytes("cpu"))


def _tensors(value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
