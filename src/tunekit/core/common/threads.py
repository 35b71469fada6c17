"""How many threads torch computes with on the CPU: fewer than it would take where the machine is busy with other work.

Threads of one product wait for each other. Where one of them shares its core with another process, all of them stand
still while that one has its turn: on two busy cores, small products with two threads took many times what they take
with one. The same holds where a container is given less processor time than the cores it sees.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from statistics import median

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""By these a user says how many threads he wants."""
FEATURES = 512
"""Of the product that is measured."""
TOKENS = 64
"""So many for each of torch's threads, which then has to do what a small layer asks, well under a millisecond."""
CALLS, ROUNDS = 10, 5
"""A measurement is the median of so many rounds, of so many products each."""
SLOWER = 1.5
"""So many times the time of half as many threads says that they get in each other's way; idle, it is half of it."""


@contextmanager
def settled(device: str, before: int | None = None, processes: int = 1) -> Iterator[dict[str, str]]:
    """Within it, torch computes with as many threads as are good here; yields their choice in words, if there was one.

    Nothing is changed where the user has chosen, on a GPU, and beside other processes of the same run.

    Args:
        device: where the model is.
        before: with how many a run that goes on has begun: it keeps them, as far as torch has them here.
        processes: of the run.
    """
    import torch

    there = torch.get_num_threads()
    if device != "cpu" or processes > 1 or not _left_open(there):
        yield {}
        return
    count = min(before, there) if before else there
    choice: dict[str, str] = {}
    if not before:
        count, times = fewest_in_the_way(there)
        if count < there:
            choice["threads"] = (
                f"{count} of {there}, since the machine is busy: a small product takes {times[there]:.2g} ms with "
                f"{there}, {times[count]:.2g} ms with {count}; {VARIABLES[0]} in the environment settles it"
            )
    try:
        torch.set_num_threads(count)
        yield choice
    finally:
        torch.set_num_threads(there)


@cache
def fewest_in_the_way(there: int) -> tuple[int, dict[int, float]]:
    """The most threads that are not in each other's way, `there` or a half of it or of that, and their times in ms.

    Once in a process: what is run twice in it is the same to the last bit.
    """
    return most_useful(there, _time)


def most_useful(there: int, timed: Callable[[int, int], float]) -> tuple[int, dict[int, float]]:
    """See `fewest_in_the_way`; `timed` gives the time of some work with so many threads, in ms.

    Halves are compared pairwise, in turns: other work comes and goes.
    """
    count = there
    times: dict[int, float] = {}
    while count > 1:
        half = count // 2
        rounds = [(timed(count, there), timed(half, there)) for _ in range(ROUNDS)]
        mine, theirs = (median(each) for each in zip(*rounds, strict=True))
        times.setdefault(count, mine)
        times[half] = theirs
        if mine <= SLOWER * theirs:
            break
        count = half
    return count, times


def _time(threads: int, there: int) -> float:
    """Milliseconds of one product with so many threads; as much work for each of `there`."""
    import torch

    torch.set_num_threads(threads)
    inputs, weight = torch.ones(TOKENS * there, FEATURES), torch.ones(FEATURES, FEATURES)
    found = inputs @ weight  # threads are made at the first
    begun = time.perf_counter()
    for _ in range(CALLS):
        torch.mm(inputs, weight, out=found)
    return 1000 * (time.perf_counter() - begun) / CALLS


def _left_open(threads: int) -> bool:
    """Whether torch has as many threads as it takes by itself: those of all cores, or of all it may use."""
    import psutil

    if threads == 1 or any(os.environ.get(name) for name in VARIABLES):
        return False
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return threads in (allowed, psutil.cpu_count(), psutil.cpu_count(logical=False))
