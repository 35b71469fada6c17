"""The workers of one run on a Ray cluster: started together, watched together, ended together."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

import attrs

from tunekit.core.remote.worker import Whereabouts, Worker, terminate, variables
from tunekit.errors import ConfigError, TunekitError

logger = logging.getLogger(__name__)

GRACE = 30.0
"""Seconds to wait for the others once one worker raised an error. Where a worker died, the others lose their connection
to it, and raise an error before Ray knows."""
SOON = 10.0
"""Seconds of waiting for room in the cluster after which it is said."""
PATIENCE = 600.0
"""Seconds in which a cluster may grow to what a run asks for; for room that others take, a run waits without end."""


@attrs.frozen
class Stop:
    """What tells the threads that wait for workers to stop waiting.

    Args:
        asked: the workers are to save and end.
        at_once: they are to end.
    """

    asked: threading.Event = attrs.field(factory=threading.Event)
    at_once: threading.Event = attrs.field(factory=threading.Event)


class Lost(Exception):
    """A worker died, or left before the run was done.

    Args:
        who: which worker, and where it was.
        why: what is known of its end.
    """

    def __init__(self, who: str, why: str) -> None:
        super().__init__(f"{who} died: {why}")


class Stopped(Exception):
    """The workers were asked to stop."""


@attrs.define(kw_only=True)
class Gang:
    """The workers of a run.

    Args:
        count: how many.
        each: the resources of each, by Ray's names ("CPU", "GPU").
        stop: what the waiting threads are told.
    """

    count: int
    each: Mapping[str, float]
    stop: Stop
    where: list[Whereabouts] = attrs.field(factory=list, init=False)
    _actors: list[Any] = attrs.field(factory=list, init=False)

    def make(self, packed: bytes) -> None:
        """Start the workers, have them make the run, and end them.

        Raises:
            Lost: one of them died. The others are no more either.
            Stopped: it was asked for, and they saved and ended, or were ended.
            Exception: what one of them raised.
        """
        import ray
        from ray.util import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = placement_group([dict(self.each)] * self.count, strategy="PACK")
        try:
            self._wait_for_room(group)
            actor = ray.remote(Worker).options(
                num_cpus=self.each["CPU"],
                num_gpus=self.each.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group),
            )
            self._actors = [actor.remote() for _ in range(self.count)]
            self.where = self._answers([worker.whereabouts.remote() for worker in self._actors])
            sent = ray.put(packed)
            told = variables(self.where, self.each.get("GPU", 0))
            made = self._answers(
                [worker.make.remote(sent, its) for worker, its in zip(self._actors, told, strict=True)]
            )
            if self.stop.asked.is_set():
                raise Stopped
            if not all(made):
                raise Lost(self._name(made.index(False)), "a signal stopped it")
        finally:
            for worker in self._actors:
                ray.kill(worker)
            remove_placement_group(group)

    def _wait_for_room(self, group: Any) -> None:
        """Wait until all workers have a place. ConfigError if the cluster stays too small for them."""
        import ray

        began, said = time.monotonic(), False
        while not group.wait(timeout_seconds=1):
            if self.stop.asked.is_set():
                raise Stopped
            waited = time.monotonic() - began
            if waited < SOON:
                continue
            there = ray.cluster_resources()
            short = [name for name, number in self.each.items() if there.get(name, 0) < number * self.count]
            wanted = " and ".join(f"{number * self.count:g} {name}" for name, number in self.each.items())
            has = " and ".join(f"{there.get(name, 0):g} {name}" for name in self.each)
            if short and waited > PATIENCE:
                raise ConfigError(f"the run asks for {wanted}, and the cluster has {has}; ask for less", "Ray")
            if not said:
                logger.warning("waiting for room in the cluster: the run asks for %s, there are %s in all", wanted, has)
                said = True

    def _answers(self, calls: Sequence[Any]) -> list[Any]:
        """What each worker answers to its call; see `make` for what is raised."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        waiting = {call: rank for rank, call in enumerate(calls)}
        answers: dict[int, Any] = {}
        errors: list[RayTaskError] = []
        asked, patience = False, float("inf")
        while waiting and time.monotonic() < patience:
            if self.stop.at_once.is_set():
                raise Stopped
            if self.stop.asked.is_set() and not asked:
                self._ask_to_stop()
                asked = True
            ended, _ = ray.wait(list(waiting), timeout=0.5)
            for call in ended:
                rank = waiting.pop(call)
                try:
                    answers[rank] = ray.get(call)
                except RayTaskError as error:
                    errors.append(error)
                    patience = min(patience, time.monotonic() + GRACE)
                except RayError as error:
                    raise Stopped if asked else Lost(self._name(rank), _said(error)) from None
        if errors and asked:
            raise Stopped
        if errors:
            # Where several raised, ours says most. What it was there is the cause, with its traceback.
            said = next((error for error in errors if isinstance(error.cause, TunekitError)), errors[0])
            raise said.cause from said
        return [answers[rank] for rank in range(len(calls))]

    def _ask_to_stop(self) -> None:
        """Send SIGTERM to every worker, from its own machine."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = ray.remote(num_cpus=0, max_retries=0)(terminate)
        for worker in self.where:
            there = NodeAffinitySchedulingStrategy(node_id=worker.node, soft=False)
            task.options(scheduling_strategy=there).remote(worker.pid)

    def _name(self, rank: int) -> str:
        if not self.where:
            return f"worker {rank} of {self.count}, while it started,"
        where = self.where[rank]
        output = f"its output: logs/worker-{where.worker}-* of Ray's session there"
        return f"worker {rank} of {self.count}, {where} ({output})"


def _said(error: Exception) -> str:
    """What Ray says of a death, without its preface, and without all the causes that there may be."""
    return shorten(str(error).strip().splitlines()[-1], 250, placeholder=" ...")
