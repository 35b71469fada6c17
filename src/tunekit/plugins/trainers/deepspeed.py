"""DeepSpeed around one training: accelerate told of it, and a whole model given back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tunekit.core.model import masters
from tunekit.core.training.messages import PATIENCE
from tunekit.core.training.parallel import DEEPSPEED
from tunekit.errors import NotSupported

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def told(device: str) -> Iterator[None]:
    """Within it, what accelerate and transformers make is for DeepSpeed; afterwards they know nothing of it.

    Accelerate's own start of DeepSpeed takes processes without GPUs for one process: they would all train on the same
    rows. So its state is made here, with the way by which they speak, and `TrainingArguments` is to take it.
    """
    import torch
    from accelerate.state import AcceleratorState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if device == "cpu" and torch.cuda.is_available():
        raise NotSupported("DeepSpeed would train on the GPUs of this machine, not on its CPU; leave the device open")
    before = os.environ.get(DEEPSPEED)
    os.environ[DEEPSPEED] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        PartialState(backend="gloo" if device == "cpu" else None, timeout=PATIENCE)
        yield
    finally:
        if before is None:
            del os.environ[DEEPSPEED]
        AcceleratorState._reset_state(reset_partial_state=True)
        unset_hf_deepspeed_config()  # with it, every model that is loaded later would be cut


def check(stage: int | None, model: nn.Module) -> None:
    """Raise NotSupported for weights that their modules see rounded, where DeepSpeed keeps them in pieces.

    Its hooks, which put a module's weights together before it computes, come after those that round them.
    """
    if stage == 3 and masters.are_in(model):
        raise NotSupported("ZeRO 3 cannot train weights of a base in bfloat16; set dtype='float32', or take stage 2")


def share_of(model: nn.Module) -> str:
    """How much of a model that ZeRO 3 has cut this process keeps, in words; of any other all."""
    there = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    # Its piece, and what is whole besides: small parameters stay so. Of one that is not, nothing is left but the piece.
    pieces = sum(parameter.ds_tensor.numel() for parameter in model.parameters() if hasattr(parameter, "ds_tensor"))
    kept = pieces + sum(parameter.numel() for parameter in model.parameters())
    return f"this process kept {kept:,} of the model's {there:,} numbers"


def take_back(engine: Any, model: nn.Module) -> None:
    """Leave `model` as it was before DeepSpeed had it, but trained: whole in every process, and nobody's hooks on it.

    All processes call it, after the last step.
    """
    from deepspeed.runtime.zero import GatheredParameters

    engine.destroy()
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        hook.remove()  # `destroy` leaves them, and with them all of the engine in memory
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            with GatheredParameters([parameter]):
                whole = parameter.detach().clone()
            for name, value in list(vars(parameter).items()):
                if name.startswith("ds_") or str(getattr(value, "__module__", "")).startswith("deepspeed."):
                    delattr(parameter, name)
            parameter.data = whole
    for module in model.modules():
        # A plain table again: ZeRO 3 puts one in its place that fetches what is asked for.
        module._parameters = dict(module._parameters)
        for name in [name for name in vars(module) if name.startswith("ds_") or name == "_original_parameters"]:
            delattr(module, name)
