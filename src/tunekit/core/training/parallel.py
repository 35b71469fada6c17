"""Several processes that make one run: each takes a share of a step's rows, and the gradients are added up.

`torchrun`, `accelerate launch` and Slurm start them, and say so in the environment. The model is not wrapped: gradients
are summed once a step, when every process is done with its rows. So a process may have no rows, a forward pass may be
repeated, and the loss may be made wherever it is made with one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from tunekit.core.interfaces import Trainer
from tunekit.core.training.messages import PATIENCE, channel, portable
from tunekit.errors import ConfigError, NotSupported, TrainingError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

BUCKET_NUMBERS = 1 << 24
"""Numbers of gradients that are added up at a time, 64 MiB of them in float32."""
FSDP = "ACCELERATE_USE_FSDP"
"""What `accelerate launch` sets in the environment for a configuration that has every process keep a piece."""
FSDP_REFUSED = {
    "FSDP_VERSION": ("1", "fsdp_version: 2"),
    "FSDP_OFFLOAD_PARAMS": ("true", "fsdp_offload_params: false"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("true", "it to false, and SFT(gradient_checkpointing=True)"),
    "FSDP_AUTO_WRAP_POLICY": ("size_based_wrap", "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"),
}
"""Settings of that configuration with the value, in lower case, that is not followed, and what to set instead."""
DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
"""What it sets for a configuration that hands the model over to DeepSpeed."""
PRECISION = "ACCELERATE_MIXED_PRECISION"
"""What it sets where forward passes are to be computed in another dtype than the weights have."""
SHARDING = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
"""What it sets for a configuration that cuts the model into pieces in ways that are not supported."""


@attrs.frozen(kw_only=True)
class Processes:
    """The processes of a run, seen from one of them. Every method is called by all of them, in the same order.

    Args:
        rank: the number of this one, from 0: the first, which alone writes.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes, evaluates and shows progress."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """What each process calls this with, in the order of their ranks."""
        if self.count == 1:
            return [value]
        import torch.distributed

        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value, group=channel(torch.distributed.group.WORLD))
        return found

    def gather_numbers(self, numbers: Sequence[Tensor], counts: Sequence[int], device: str) -> list[Tensor]:
        """The numbers of each process, those of the first before those of the second; no GPU is waited for.

        Args:
            numbers: scalars, of this process.
            counts: how many each process has.
            device: where they are.
        """
        if self.count == 1:
            return list(numbers)
        import torch

        own = torch.zeros(max(counts), dtype=torch.float64, device=device)
        if numbers:
            own[: len(numbers)] = torch.stack([number.double() for number in numbers])
        found = [torch.empty_like(own) for _ in counts]
        torch.distributed.all_gather(found, own)
        return [number for each, count in zip(found, counts, strict=True) for number in each[:count].unbind()]

    def together(self, function: Callable[[], T]) -> list[T]:
        """What `function` returns on each process; what it raises on one is raised on all, so that none waits."""
        value, caught = None, None
        try:
            value = function()
        except Exception as error:
            if self.count == 1:
                raise
            caught = error
        found = self.gather((value, portable(caught)))
        if caught:
            raise caught
        for _, theirs in found:
            if theirs:
                raise theirs
        return [each for each, _ in found]  # type: ignore[misc]  # without an error it is what was returned

    def first(self, function: Callable[[], T]) -> T | None:
        """What `function` returns on the first process, None on the others, which wait; what it raises, all raise."""
        value = None
        caught: Exception | None = None
        if self.is_first:
            try:
                value = function()
            except Exception as error:
                if self.count == 1:
                    raise
                caught = error
        said = self.gather(portable(caught))[0]
        if caught or said:
            raise caught or said  # type: ignore[misc]  # one of them is an exception
        return value

    def shared(self, function: Callable[..., T], *arguments: object) -> T:
        """What `function` returns on the first process, which alone calls it, for all."""
        value = self.first(partial(function, *arguments))
        return self.gather(value)[0]  # type: ignore[return-value]  # the first's, which is no None of another process

    def in_turn(self, function: Callable[[], T]) -> T:
        """What `function` returns on each process; on the others once the first is done, which fills the cache."""
        mine = self.first(function)
        return function() if mine is None else mine

    def check_same(self, what: str, value: object) -> None:
        """Raise TrainingError unless all processes call this with an equal `value`."""
        found = self.gather(value)
        if differing := [rank for rank, other in enumerate(found) if other != found[0]]:
            raise TrainingError(f"{what} differs between the processes: process {differing[0]} has another than 0")

    def share(self, rows: list[int], lengths: list[int]) -> list[int]:
        """The rows of a step that are this process's: dealt out longest first, so that each has about as many tokens.

        One process has all, in their order. Where there are fewer rows than processes, some have none.
        """
        if self.count == 1:
            return rows
        longest_first = sorted(range(len(rows)), key=lambda at: lengths[at], reverse=True)
        return [rows[at] for at in longest_first[self.rank :: self.count]]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradient of each parameter by its sum over the processes, the same to the bit on all of them.

        One that has a gradient nowhere keeps none; one that has none here counts as zero.
        """
        # Those of a model in pieces are added up while they are made.
        trained = [parameter for parameter in parameters if not hasattr(parameter, "full_tensor")]
        if self.count == 1 or not trained:
            return
        import torch

        here = [parameter.grad is not None for parameter in trained]
        anywhere = [any(each) for each in zip(*self.gather(here), strict=True)]
        for bucket in _buckets(parameter for parameter, has in zip(trained, anywhere, strict=True) if has):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([grad.flatten() for grad in grads])
            torch.distributed.all_reduce(flat)
            for parameter, piece in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                # Copied: a view would keep the whole bucket alive, and optimizers want tensors of their own.
                parameter.grad = piece.view_as(parameter).clone()


ALONE = Processes()


def started() -> Processes:
    """The processes that this one has joined; itself alone where there are no others."""
    import torch.distributed

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ALONE
    return Processes(rank=torch.distributed.get_rank(), count=torch.distributed.get_world_size())


def check_alone(what: str) -> None:
    """Raise NotSupported for `what` where a launcher started several processes: each would do it, in one place."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise NotSupported(f"{what} is made by one process; a single run can be made by several")


def asks_for_pieces() -> bool:
    """Whether the launcher was told to have every process keep a piece of the model (FSDP)."""
    return _is_set(FSDP)


def asks_for_deepspeed() -> bool:
    """Whether the launcher was told to hand the model over to DeepSpeed."""
    return _is_set(DEEPSPEED)


def launched() -> int:
    """How many processes a launcher has started for the run; 1 where none has."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def check_launch(trainer: Trainer) -> None:
    """Raise NotSupported for a launch by which the model would be trained wrong, or not at all."""
    for variable, what in SHARDING.items():
        if _is_set(variable):
            raise NotSupported(
                f"{what} ({variable}) is not supported. Launch with torchrun, or with an accelerate configuration "
                "for several GPUs or CPUs without it; where the model does not fit, SFT(parallel='sharded') or "
                "fsdp_version: 2 leaves a piece of it to each process, as ZeRO-3 does, and QLoRA needs a quarter of "
                "the memory"
            )
    if asks_for_deepspeed() and trainer.zero_stage is None:
        raise NotSupported(
            f"the trainer {trainer.name!r} cannot hand the model over to DeepSpeed ({DEEPSPEED}); tk.Transformers can. "
            "Or launch without it: SFT(parallel='sharded') leaves a piece of the model to each process, as ZeRO-3 does"
        )
    if trainer.zero_stage is not None and "LOCAL_RANK" not in os.environ:
        raise NotSupported(
            "DeepSpeed trains in processes that a launcher has started, be it one: torchrun --nproc_per_node=1, or "
            "accelerate launch"
        )
    if not asks_for_pieces():
        return
    if not trainer.sharded:
        raise NotSupported(f"the trainer {trainer.name!r} cannot train a model in pieces ({FSDP}); SFT can")
    for variable, (refused, instead) in FSDP_REFUSED.items():
        said = os.environ.get(variable, "1" if variable == "FSDP_VERSION" else "").lower()
        if said == refused:
            raise NotSupported(f"FSDP ({FSDP}) with {variable}={said} is not supported; set {instead}")


def not_followed() -> list[str]:
    """What the launcher was told that the training loop does not follow, in words."""
    asked = os.environ.get(PRECISION, "no").lower()
    if "LOCAL_RANK" not in os.environ or asked in ("no", ""):
        return []
    return [f"mixed_precision: {asked} of accelerate's configuration is not followed: Pipeline(dtype=...) says it"]


def join(trainer: Trainer, device: str) -> tuple[Processes, str]:
    """Join the processes that a launcher started, and the device of this one: `device`, with CUDA a GPU each.

    Raises:
        NotSupported: the trainer knows of one process only; or see `check_launch`.
        ConfigError: one GPU for all was asked for, or there are more processes than GPUs on this machine.
    """
    check_launch(trainer)
    if launched() <= 1:
        return ALONE, device
    if not trainer.several_processes:
        raise NotSupported(f"the trainer {trainer.name!r} cannot share a run among processes; start one, or use SFT")
    import torch
    from accelerate import PartialState

    if device != "cpu":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device != "cuda":
            raise ConfigError(f"{device!r} would be the GPU of every process; leave the device open", "Pipeline.device")
        if local >= there:
            raise ConfigError(f"process {local} of this machine has no GPU: there are {there}", "Pipeline.device")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    if asks_for_pieces():  # with this, transformers would leave the weights out on all processes but the first
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if not torch.distributed.is_initialized():
        PartialState(cpu=device == "cpu", timeout=PATIENCE)
    return started(), device


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1")


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Parameters in their order, in groups of one dtype and device and not too many numbers."""
    bucket: list[nn.Parameter] = []
    held = 0
    for parameter in parameters:
        alike = not bucket or (parameter.dtype, parameter.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or held + parameter.numel() > BUCKET_NUMBERS):
            yield bucket
            bucket, held = [], 0
        bucket.append(parameter)
        held += parameter.numel()
    if bucket:
        yield bucket
