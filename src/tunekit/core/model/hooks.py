"""Whether somebody is told when a module computes, hooks of our own aside; and a forward that stands in for its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

Hook = TypeVar("Hook", bound=Callable[..., Any])

MARK = "needless_where_lean"
"""The attribute of hooks so marked."""


def needless_where_lean(hook: Hook) -> Hook:
    """Mark `hook` as one that mends a forward of somebody else's, and which lean forwards in its place do without."""
    setattr(hook, MARK, True)
    return hook


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook is called when `module` computes, forward or backward, without which it would be another thing."""
    tables = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(not hasattr(hook, MARK) for hooks in tables for hook in hooks.values())


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Within it, `forward` is what `module` computes; yields what it computes otherwise."""
    real: Callable[..., Any] = module.forward
    own = "forward" in vars(module)  # another library put one in its place, and wants it back
    module.forward = forward
    try:
        yield real
    finally:
        if own:
            module.forward = real
        else:
            del module.forward
