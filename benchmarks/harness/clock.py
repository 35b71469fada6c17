"""Time and memory of a process, and what else the machine does meanwhile."""

import os
import platform
import resource
import subprocess
import time
from importlib import metadata
from pathlib import Path

import attrs

PACKAGES = ("tunekit-sdk", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "numpy")


@attrs.define
class Clock:
    """The moments of one run.

    Args:
        started: the wall-clock time at which the process was started.
        marks: seconds from there to the end of each part of the start-up.
        seconds: of each optimizer step.
        ends: seconds from the start of the process to the end of each step.
    """

    started: float
    marks: dict = attrs.field(factory=dict)
    seconds: list = attrs.field(factory=list)
    ends: list = attrs.field(factory=list)
    _begun: float = 0.0

    def mark(self, name):
        """A part of the start-up is over."""
        self.marks[name] = time.time() - self.started

    def begin(self):
        """Steps are counted from here: what happened since the last one is not training."""
        self._begun = time.perf_counter()

    def step(self):
        """A step is over."""
        self.seconds.append(time.perf_counter() - self._begun)
        self.ends.append(time.time() - self.started)


def peak_mib():
    """The most memory this process ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@attrs.define
class Watched:
    """A child process seen from outside: its memory and that of its children, and who else uses the processor."""

    process: subprocess.Popen
    peak_mib: float = 0.0
    cpu_seconds: float = 0.0
    others_busy: float = 0.0

    @classmethod
    def run(cls, command, seconds, **options):
        """Run `command` to its end, at most so many seconds; raises subprocess.TimeoutExpired after killing it."""
        import psutil

        before, began = psutil.cpu_times(), time.monotonic()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        watched = cls(subprocess.Popen(command, **options))
        child = psutil.Process(watched.process.pid)
        while watched.process.poll() is None:
            watched.peak_mib = max(watched.peak_mib, _resident(child))
            if time.monotonic() - began > seconds:
                for process in [*child.children(recursive=True), child]:
                    process.kill()
                watched.process.wait()
                raise subprocess.TimeoutExpired(command, seconds)
            time.sleep(0.5)
        after, now = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = sum(getattr(after, kind) - getattr(before, kind) for kind in ("user", "nice", "system"))
        watched.cpu_seconds = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        watched.others_busy = max(0.0, busy - watched.cpu_seconds) / (time.monotonic() - began)
        return watched


def _resident(process):
    import psutil

    total = 0
    for one in [process, *_children(process)]:
        try:
            total += one.memory_info().rss
        except psutil.Error:
            continue
    return total / 2**20


def _children(process):
    import psutil

    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def machine(threads):
    """The machine and the software, as far as they matter for speed."""
    import psutil

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(map(str.strip, line.split(":", 1)) for line in reversed(info.splitlines()) if ":" in line)
    flags = set(lines.get("flags", "").split())
    telling = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
    return {
        "processor": lines.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": threads,
        "flags": [flag for flag in telling if flag in flags],
        "lacks": [flag for flag in telling if flag not in flags],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES if version(name)},
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def version(name):
    """The version of an installed package; None where it is not."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
