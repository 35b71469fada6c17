"""Training with lean forwards in the place of PEFT's, and evaluating with PEFT's all the same."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tunekit.core.common.free_memory import free_bytes
from tunekit.core.lean.forward import LeanForward

if TYPE_CHECKING:
    from torch import nn

    from tunekit.core.lean.gated import LeanGated
    from tunekit.core.lean.norm import LeanNorm

SHARE = 0.5
"""Of the memory that nothing else needs, what dequantized weights may take."""


@contextmanager
def lean_forwards(model: nn.Module, kept_bytes: int | None = None) -> Iterator[list[LeanForward]]:
    """Within it, the layers of PEFT's that are known have lean forwards, which it yields; the others keep theirs.

    So have a gated MLP around a down-projection with one of LoRA's, and normalizations that are not trained. Only the
    forward of these very modules is another, so that parameters, their names and files are what they were. Dequantized
    weights are gone afterwards.

    Args:
        model: with an adapter of PEFT's.
        kept_bytes: what dequantized weights may take; None for what `may_keep` says of the memory that is free now.
    """
    found = _lean(model, kept_bytes)
    for one in found:
        one.layer.forward = one
    around = _around(model) if found else []
    for each in around:
        each.module.forward = each
    try:
        yield found
    finally:
        for one in found:
            del one.layer.forward
        for each in around:
            del each.module.forward


@contextmanager
def usual_forwards(model: nn.Module) -> Iterator[None]:
    """Within it, inside of `lean_forwards`, the layers have PEFT's forwards again."""
    from tunekit.core.lean.gated import LeanGated
    from tunekit.core.lean.norm import LeanNorm

    kinds = LeanForward | LeanGated | LeanNorm
    found = [module for module in model.modules() if isinstance(vars(module).get("forward"), kinds)]
    lean = [vars(module).pop("forward") for module in found]
    try:
        yield
    finally:
        for module, forward in zip(found, lean, strict=True):
            module.forward = forward


def can_be_lean(model: nn.Module) -> bool:
    """Whether any of its layers has a lean forward."""
    return bool(_lean(model, 0))


def may_keep(free: float) -> int:
    """Bytes of dequantized weights that each process may keep, where so many are free."""
    return max(0, int(SHARE * free / _sharing()))


def kept_bytes_of(model: nn.Module, dtype: str, most: int | None) -> int:
    """Bytes of the weights that are kept dequantized while `model` computes in `dtype`, of at most so many."""
    import torch

    from tunekit.core.lean.frozen import Budget

    sizes = [one.base.dequantized_bytes(getattr(torch, dtype)) for one in _lean(model, 0)]
    budget = Budget(sum(sizes) if most is None else most)
    return sum(size for size in sizes if budget.take(size))


def worth_keeping(model: nn.Module, device: str) -> int:
    """Bytes of dequantized weights beyond which a run on `device` takes none, however many are free.

    On CUDA a run over a quantized base takes no more by it than over one in half precision, for which it would have
    been chosen otherwise: dequantizing is 4 % of a step there. On the CPU it is more, and there is no such bound.
    """
    if not device.startswith("cuda"):
        return sys.maxsize
    return sum(one.base.saved_bytes() for one in _lean(model, 0))


def _lean(model: nn.Module, kept_bytes: int | None) -> list[LeanForward]:
    """A lean forward for each layer of `model` that does what one of them does, and nothing else."""
    if "peft" not in sys.modules:  # no layer can be of PEFT's, whose import takes seconds
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        return []
    from tunekit.core.lean.frozen import Budget, frozen

    kinds = _kinds()
    if kept_bytes is None:
        device = str(next(model.parameters()).device)
        kept_bytes = min(may_keep(free_bytes(device)), worth_keeping(model, device))
    budget = Budget(kept_bytes)
    found = []
    for layer in layers:
        active = layer.active_adapters
        base = frozen(layer, budget) if type(layer) in kinds and len(active) == 1 else None
        if base is None or "forward" in vars(layer):
            continue
        made = [kind(layer, active[0], base) for kind in kinds[type(layer)]]
        found += [one for one in made if one.tensors() and one.knows()][:1]
    return found


def _around(model: nn.Module) -> list[LeanGated | LeanNorm]:
    """A lean forward for each gated MLP around a layer that has one, and for each normalization."""
    from tunekit.core.lean.gated import gated
    from tunekit.core.lean.norm import norm

    return [one for module in model.modules() if (one := gated(module) or norm(module))]


def drop_kept(model: nn.Module) -> bool:
    """Drop dequantized weights, and keep none from here on: memory ran out; whether there were any."""
    found = [vars(module).get("forward") for module in model.modules()]
    had = [forward.base.drop() for forward in found if isinstance(forward, LeanForward)]
    return any(had)


def _sharing() -> int:
    """How many processes of this run share the machine's memory; each on a GPU of its own, they are as careful."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _kinds() -> dict[type[Any], tuple[type[LeanForward], ...]]:
    """What may stand in for the forward of each type of layer; subclasses may do more, and are others."""
    from peft.import_utils import is_bnb_available
    from peft.tuners import adalora, ia3, loha, lokr, lora

    from tunekit.core.lean.adalora import LeanAdaLoRA
    from tunekit.core.lean.ia3 import LeanIA3
    from tunekit.core.lean.loha import LeanLoHa
    from tunekit.core.lean.lokr import LeanLoKr
    from tunekit.core.lean.lora import LeanDoRA, LeanLoRA

    kinds: dict[type[Any], tuple[type[LeanForward], ...]] = {
        lora.Linear: (LeanLoRA, LeanDoRA),
        adalora.SVDLinear: (LeanAdaLoRA,),
        ia3.Linear: (LeanIA3,),
        loha.layer.Linear: (LeanLoHa,),
        lokr.layer.Linear: (LeanLoKr,),
    }
    if is_bnb_available():
        kinds |= {
            lora.Linear4bit: (LeanLoRA, LeanDoRA),
            lora.Linear8bitLt: (LeanLoRA, LeanDoRA),
            adalora.SVDLinear4bit: (LeanAdaLoRA,),
            adalora.SVDLinear8bitLt: (LeanAdaLoRA,),
            ia3.Linear4bit: (LeanIA3,),
            ia3.Linear8bitLt: (LeanIA3,),
        }
    return kinds
