"""What a model computes, in float64: the truth from which the error of ways in fewer bits is measured.

Only ever imported from inside of methods, since it imports torch.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tunekit.core.lean.frozen import dequantized, is_quantized
from tunekit.core.model import masters
from tunekit.errors import NotSupported, TunekitError

ROUNDED = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes in whose place float64 is taken."""


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Within it, `model` computes in float64, forward and backward, from the very weights that it has.

    No second model is made: a weight is cast for the one operation that needs it, so that this takes as much memory as
    the largest weight in float64, and activations of up to four times the size. Quantized weights are those that the
    layer multiplies with, rounded to the dtype in which it does, and master weights are rounded as they are there. What
    is trained keeps its dtype, and its gradient may be rounded to that.

    Raises NotSupported for one of which each process has pieces, and for one with operations that know no float64:
    compute it as it is first, so that what fails anyway is not taken for that.
    """
    if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
        raise NotSupported("a model that is cut among processes is gathered in the dtype that it has")
    quantized = [module for module in model.modules() if is_quantized(module) and "forward" not in vars(module)]
    for module in quantized:
        module.forward = _Dequantized(module)
    try:
        with _Float64(masters.parameters_of(model)), _Convolutions():
            yield
    except TunekitError:
        raise
    except Exception as error:
        raise NotSupported(f"in float64 it raises {type(error).__name__}: {error}") from error
    finally:
        for module in quantized:
            del module.forward


class _Float64(TorchDispatchMode):  # type: ignore[misc]
    """Computes every operation of torch in float64; a cast to fewer bits is none.

    Args:
        rounded: parameters that are rounded all the same.
    """

    def __init__(self, rounded: Collection[Any]) -> None:
        super().__init__()
        self.rounded = {id(parameter) for parameter in rounded}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if function is torch.ops.aten._grouped_mm.default:
            return _grouped_product(*_cast(args, torch.float64))
        written, cast = _what_it_does(function)
        copies = function is torch.ops.aten._to_copy.default
        if copies and given.get("dtype") in ROUNDED and id(args[0]) in self.rounded:
            return function(*args, **given).double()
        if given.get("dtype") in ROUNDED and not (copies and _in_backward()):
            given["dtype"] = torch.float64
        if not cast:
            return function(*args, **(kwargs or {}) if function.namespace != "aten" else given)
        dtype = torch.float64 if written is None else _dtype_of(args[written])
        if dtype is None:
            return function(*args, **given)
        return function(
            *(_cast(one, dtype) for one in args), **{name: _cast(one, dtype) for name, one in given.items()}
        )


class _Convolutions(TorchFunctionMode):  # type: ignore[misc]
    """Casts what convolutions are given: torch compares the dtypes of these before an operation is dispatched."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__name__", "").startswith("conv"):
            return function(
                *_cast(args, torch.float64), **{n: _cast(v, torch.float64) for n, v in (kwargs or {}).items()}
            )
        return function(*args, **(kwargs or {}))


@cache
def _what_it_does(function: Any) -> tuple[int | None, bool]:
    """The number of the argument that `function` writes into, if it does, and whether its arguments are to be cast.

    They are not for operations of other libraries, which have dtypes of their own, nor for views, which a cast would
    cut off from what they are views of.
    """
    schema = function._schema
    writes = [at for at, one in enumerate(schema.arguments) if one.alias_info is not None and one.alias_info.is_write]
    views = not writes and any(one.alias_info is not None for one in schema.returns)
    return (writes[0] if writes else None), function.namespace == "aten" and not views


def _in_backward() -> bool:
    """Whether autograd is at work, which casts a gradient to the dtype of what it is the gradient of."""
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()


def _dtype_of(value: Any) -> torch.dtype | None:
    """That of a tensor, or of the first of some; None where it is not a floating one."""
    first = value[0] if isinstance(value, list | tuple) and value else value
    return first.dtype if isinstance(first, Tensor) and first.is_floating_point() else None


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A floating tensor, or some, in `dtype`; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return [_cast(one, dtype) for one in value] if isinstance(value, list | tuple) else value


def _grouped_product(one: Tensor, other: Tensor, ends: Tensor | None = None, *_: Any) -> Tensor:
    """The products of a mixture of experts, one of each group, which torch has in fewer bits alone.

    Groups are rows of `one` that end at `ends` (tokens, features) and matrices of `other`, the other way round, or the
    columns of one and the rows of the other, whose products are matrices of their own.
    """
    if ends is None:
        return one @ other
    marks = [0, *ends.tolist()]
    groups = [slice(*pair) for pair in pairwise(marks)]
    if one.dim() == 2 and other.dim() == 2:
        return torch.stack([one[:, group] @ other[group] for group in groups])
    if one.dim() == 2:
        found = one.new_zeros(len(one), other.shape[-1])
        for number, group in enumerate(groups):
            found[group] = one[group] @ other[number]
        return found
    found = one.new_zeros(one.shape[1], other.shape[1])
    for number, group in enumerate(groups):
        found[:, group] = one[number] @ other[:, group]
    return found


class _Dequantized:
    """The forward of a quantized layer, W x + bias, with W dequantized anew each time."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = _Product.apply(x, self.module)
        return found if self.module.bias is None else found + self.module.bias


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """W x, without keeping W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.module = module
        return linear(x, _weight(module))

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ _weight(ctx.module), None


def _weight(module: Any) -> Tensor:
    return dequantized(module, getattr(module, "compute_dtype", None) or torch.float32).double()
