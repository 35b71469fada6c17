"""A model in pieces: each process keeps a piece of every parameter, and a block is whole only while it is computed.

This is torch's FSDP2, `torch.distributed.fsdp.fully_shard`; Zhao et al. 2023, https://arxiv.org/abs/2304.11277. Blocks
are what the model itself says must not be split; what is outside of them (embedding, head, the last norm) is put
together for a whole pass, so that the head may be used after it. Gradients are added up over the processes as they are
made, and each keeps those of its pieces. So all processes go through the model in step: whoever has no rows goes
along, and whatever needs a parameter from outside of a pass asks for it on all of them.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from tunekit.core.common.distributions import release, version
from tunekit.core.common.free_memory import free_bytes
from tunekit.core.component import Context
from tunekit.core.interfaces import AdapterMethod, Quantizer, Trainer
from tunekit.core.training.parallel import Processes, started
from tunekit.errors import ConfigError, NotSupported

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

T = TypeVar("T")

CUTS_INTEGERS = (2, 12)
"""The first torch whose FSDP2 takes parameters that are integers, as packed weights are: older ones want gradients."""

ROOM = 2
"""Parts of a whole model's size that there is to be free memory for: while float32 is made of bfloat16, both are."""


def check(trainer: Trainer, adapter: AdapterMethod, quantizer: Quantizer | None) -> None:
    """Raise ConfigError where `trainer` wants the model in pieces, and method or quantizer need it whole."""
    if not trainer.sharded:
        return
    instead = "the trainer has the model in pieces; train it whole (parallel='replicated'), or take"
    for slot in ("extra_loss", "after_step"):
        if getattr(type(adapter), slot) is not getattr(AdapterMethod, slot):
            raise ConfigError(
                f"{adapter.name} looks at whole parameters between steps ({slot}); {instead} LoRA", "Pipeline.adapter"
            )
    if quantizer and not quantizer.shardable:
        raise ConfigError(f"{quantizer.name} needs its weights whole; {instead} NF4", "Pipeline.quantizer")
    installed = version("torch")
    if quantizer and release(installed) < CUTS_INTEGERS:
        wanted = ".".join(map(str, CUTS_INTEGERS))
        raise ConfigError(
            f"torch {installed} cuts no quantized base into pieces; install torch {wanted} or newer, or train it whole "
            "(parallel='replicated')",
            "Pipeline.quantizer",
        )


@attrs.frozen(kw_only=True)
class Pieces:
    """How the model of a run lies among its processes: whole in each, or cut into pieces.

    Args:
        trainer: says which it is to be.
        context: the facts of the run.
        processes: those of the run; one has all of the model.
    """

    trainer: Trainer
    context: Context
    processes: Processes

    @property
    def wanted(self) -> bool:
        """Whether the model is cut."""
        return self.trainer.sharded and self.processes.count > 1

    def load(self, load: Callable[[Context], PreTrainedModel]) -> PreTrainedModel:
        """A model that may be cut: it is loaded into the memory of the CPU, and but its pieces go to the GPU.

        A quantized one is loaded where it is used, since there it gets its layout; it must fit there for a moment.
        """
        if self.wanted and self.context.quantization is None:
            return load(attrs.evolve(self.context, device="cpu"))
        return load(self.context)

    def made(self, make: Callable[[], nn.Module]) -> nn.Module:
        """What `make` returns, in pieces on the devices of all processes where that is wanted; there is no way back.

        The processes of a machine make and cut it in turns, so that its memory holds no more whole models at a time
        than it has room for, and be it one. Cutting sends nothing: each takes its pieces of its own.

        Raises NotSupported for a model that does not say which of its modules are blocks.
        """
        if not self.wanted:
            return make()
        import torch
        from torch.distributed.device_mesh import init_device_mesh

        gc.collect()  # a model in pieces that nobody uses any more refers to itself
        mesh = init_device_mesh(torch.device(self.context.device).type, (self.processes.count,))
        size = 0

        def cut() -> nn.Module:
            nonlocal size
            model = make()
            size = sum(each.nbytes for each in chain(model.parameters(), model.buffers()))
            return self._cut(model, mesh)

        return in_turns(self.processes, cut, lambda: free_bytes("cpu") // max(1, ROOM * size))

    def _cut(self, model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
        for block in blocks(model):
            fully_shard(block, mesh=mesh, reshard_after_forward=again)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Added up, not averaged: the loss is divided by the tokens of the whole step.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        # It warns of what is done to a view in place, which nothing here does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
        if hasattr(model, "generate"):
            register_fsdp_forward_method(model, "generate")
        return model

    def usable(self, found: T) -> T | None:
        """`found`, which is made of the model, where a process can use it alone; None if it is in pieces."""
        return None if self.wanted else found


def in_turns(processes: Processes, function: Callable[[], T], room: Callable[[], int]) -> T:
    """What `function` returns on each process; all processes call it.

    On every machine the first process goes alone. Then it says by `room` how many may go at a time, which is the same
    on all machines: the least that one says, and at least one.

    What `function` raises on one is raised on all when its turn is over, and no other turn begins. Within it a process
    is on its own: it must not wait for the others.
    """
    mine = int(os.environ.get("LOCAL_RANK", processes.rank))
    made: list[T] = []

    def go(turn: bool) -> None:
        processes.together((lambda: made.append(function())) if turn else lambda: None)

    last = max(processes.gather(mine))
    go(mine == 0)
    said = processes.gather(room() if mine == 0 else None)
    at_once = max(1, min(number for number in said if number is not None))
    for first in range(1, last + 1, at_once):
        go(first <= mine < first + at_once)
    return made[0]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that are put together one after the other: those of the classes that must not be split.

    The names of the classes are those of accelerate's configuration, else the model's own (`_no_split_modules`).
    """
    named = [name for name in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",") if name]
    names = set(named) or {name for m in model.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise NotSupported(
            f"{type(model).__name__} does not say which of its modules are blocks, and cannot be cut into pieces"
            f"{f' ({sorted(names)} are not in it)' if names else ''}; train it whole (parallel='replicated')"
        )
    return found


def in_pieces(model: nn.Module) -> bool:
    """Whether `model` was cut; each process has only some of every parameter then."""
    if started().count == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def take_apart(model: nn.Module) -> None:
    """Leave each process its pieces alone: after an evaluation, what is outside of the blocks is still whole."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def share_of(model: nn.Module) -> str:
    """How much of a model in pieces this process keeps, in words."""
    kept = sum(local(parameter).numel() for parameter in model.parameters())
    there = sum(parameter.numel() for parameter in model.parameters())
    return f"the model is in {started().count} pieces; this process keeps {kept:,} of {there:,} numbers"


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within it, what is trained is whole on the first process, in the memory of the CPU; all processes enter.

    For what reads parameters by name, as the saving of an adapter does. A pass through the model is not possible.
    """
    if not in_pieces(model):
        yield
        return
    import torch

    take_apart(model)
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    gathered: dict[int, nn.Parameter] = {}  # a tied one is one
    for _, _, parameter in places:
        if id(parameter) not in gathered:
            value = put_together(parameter.detach(), started().is_first)
            gathered[id(parameter)] = parameter if value is None else torch.nn.Parameter(value)
    try:
        for module, name, parameter in places:
            module._parameters[name] = gathered[id(parameter)]
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def put_together(value: Any, keep: bool = True) -> Any:
    """`value` with every tensor in it that is in pieces made whole, on the CPU; all processes call it.

    Args:
        value: a tensor, or tables and lists with tensors in them.
        keep: whether the caller wants them; None stands in their place otherwise.
    """
    if isinstance(value, Mapping):
        return {name: put_together(each, keep) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(put_together(each, keep) for each in value)
    if not hasattr(value, "full_tensor"):
        return value
    found = value.full_tensor()
    return found.cpu() if keep else None


def local(value: Tensor) -> Tensor:
    """What this process has of `value`: all of it, if it is in no pieces."""
    piece: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return piece


def cut_alike(parameter: nn.Parameter, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer for `parameter`, in which tensors of its shape are cut as it is; every process has it.

    Nothing is sent: each takes its piece.
    """
    if not hasattr(parameter, "placements"):
        return dict(state)
    from torch.distributed.tensor import distribute_tensor

    def cut(value: Any) -> Any:
        if getattr(value, "shape", None) != parameter.shape:
            return value
        there = value.to(parameter.device)
        return distribute_tensor(there, parameter.device_mesh, parameter.placements, src_data_rank=None)

    return {name: cut(value) for name, value in state.items()}
