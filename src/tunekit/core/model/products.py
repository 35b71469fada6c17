"""How quickly this processor multiplies in float32 and in bfloat16, measured on products of a model's own shapes.

Which instructions a processor has does not tell: with AVX512-BF16 and without AMX, products in bfloat16 took twice the
time of those in float32. So both are tried, once in a process for the same shapes and number of threads.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Shape = tuple[int, int]
"""Features that come in and that go out of a linear layer."""

FEW, TOKENS = 16, 512
"""So many go through a layer at once while it is measured: few at first."""
HOPELESS = 4
"""With few tokens, bfloat16 that is so many times slower is not tried with more: it can take half a minute."""
LARGEST = 1024
"""A side of a layer that is longer is cut to this: speeds no longer depend on it, and the time does."""
LEAST = 1 << 17
"""Weights of the largest layer from which on its products take the time of a step, and not the calls of them."""
SHAPES = 2
"""So many are measured: oneDNN keeps memory for every new shape in bfloat16."""
ROUNDS = 5
"""How often each is measured, of which the least time counts."""
SECONDS = 0.5
"""After so many, the rounds there were suffice."""
MARGIN = 1.25
"""bfloat16 has to be so many times as fast.

What stands between the products gains nothing by it, casts come on top, it rounds, and two measurements of the same
differ by up to a tenth: a dtype must not be another one in every process.
"""


@attrs.frozen(kw_only=True)
class Speeds:
    """Of products of the same shapes, in GFLOP/s.

    Args:
        float32: in float32.
        bfloat16: in bfloat16.
    """

    float32: float
    bfloat16: float

    @property
    def bfloat16_pays(self) -> bool:
        """Whether bfloat16 is clearly the faster one."""
        return self.bfloat16 >= MARGIN * self.float32

    def in_words(self, dtype: str) -> str:
        """The figure of one dtype, and of the other beside it."""
        other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
        speeds = attrs.asdict(self)
        return f"layers of this base at {speeds[dtype]:.0f} GFLOP/s in {dtype}, at {speeds[other]:.0f} in {other}"


def shapes_of(model: nn.Module) -> tuple[Shape, ...]:
    """The layers of `model` that most of its weights are in, by their shapes; none where all of them are small.

    Embeddings, of which nothing is multiplied, do not count. On the meta device will do.
    """
    from torch.nn import Embedding

    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
    weights: Counter[Shape] = Counter()
    for parameter in model.parameters():
        if parameter.ndim >= 2 and id(parameter) not in looked_up:
            out, into = (min(side, LARGEST) for side in parameter.shape[-2:])
            weights[into, out] += parameter.numel()
    found = [shape for shape, _ in weights.most_common(SHAPES)]
    return tuple(found) if any(into * out >= LEAST for into, out in found) else ()


def measured(shapes: tuple[Shape, ...]) -> Speeds:
    """The speeds of products of `shapes` with the threads that torch has now, the same throughout a process."""
    import torch

    return _measured(shapes, torch.get_num_threads())


@cache
def _measured(shapes: tuple[Shape, ...], threads: int) -> Speeds:
    few = _speeds(shapes, FEW)
    return few if HOPELESS * few.bfloat16 < few.float32 else _speeds(shapes, TOKENS)


def _speeds(shapes: tuple[Shape, ...], tokens: int) -> Speeds:
    import torch

    operations = sum(4 * tokens * into * out for into, out in shapes)
    with torch.no_grad():
        timed = {name: _products(shapes, tokens, getattr(torch, name)) for name in ("float32", "bfloat16")}
        return Speeds(**{name: operations / seconds / 1e9 for name, seconds in least_times(timed).items()})


def least_times(
    timed: dict[str, Callable[[], object]], clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The least time that each of `timed` takes in seconds, of rounds in which they take turns.

    Other work on the machine only ever adds to a time, and goes on while all of them are measured. A first round, in
    which kernels are made, does not count.
    """
    least = dict.fromkeys(timed, float("inf"))
    begun = clock()
    for number in range(ROUNDS + 1):
        for name, call in timed.items():
            before = clock()
            call()
            if number:
                least[name] = min(least[name], clock() - before)
        if number and clock() - begun > SECONDS:
            break
    return least


def _products(shapes: tuple[Shape, ...], tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    """What multiplies through frozen layers of `shapes`, forward and backward.

    The results have their places: making room anew took longer than multiplying.
    """
    import torch

    def made(*sides: int) -> Tensor:
        return torch.full(sides, 0.5, dtype=dtype)

    layers = [(made(tokens, into), made(out, into), made(tokens, out)) for into, out in shapes]
    ways = [((i, w.t(), made(*o.shape)), (o, w, made(*i.shape))) for i, w, o in layers]
    return lambda: [torch.mm(left, right, out=place) for way in ways for left, right, place in way]
