"""The library behind the device, compiled once for the torch that is installed."""

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
from pathlib import Path

NATIVE = Path(__file__).parent / "native"
CACHE = Path(__file__).parents[2] / "build" / "simulated_cuda"


class NoCompilerError(RuntimeError):
    """There is no C++ compiler on this machine."""


def torch_directory() -> Path:
    """Where torch is; found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed")
    found = Path(spec.origin).parent
    if (found / "lib" / "libtorch_cuda.so").exists():
        raise RuntimeError("this torch is built with CUDA; the simulated device needs a build for the CPU")
    return found


def library() -> Path:
    """The compiled library, from the cache where it is up to date: some 15 seconds of an idle core where it is not.

    Raises:
        NoCompilerError: neither `CXX` of the environment nor g++ nor clang++ is there.
        RuntimeError: this torch has CUDA of its own, or the sources do not compile against it.
    """
    torch = torch_directory()
    sources = sorted(NATIVE.iterdir())
    parts = [str(torch).encode(), (torch / "version.py").read_bytes(), *(source.read_bytes() for source in sources)]
    made = CACHE / f"{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.so"
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        scratch = CACHE / f"{made.name}.{os.getpid()}"  # several processes may be at it
        _compile(torch, scratch)
        scratch.replace(made)
    return made


def _compile(torch: Path, to: Path) -> None:
    compiler = (
        shlex.split(os.environ.get("CXX", "")) or [found for found in ("g++", "clang++") if shutil.which(found)][:1]
    )
    if not compiler or not shutil.which(compiler[0]):
        raise NoCompilerError("no C++ compiler here (g++, clang++, or what CXX names)")
    options = ["-O1", "-fPIC", "-shared", "-w", str(NATIVE / "simulated_cuda.cpp"), "-o", str(to)]
    options += [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    options += [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    for standard in ("c++20", "c++17"):  # from torch 2.12 on, and before
        done = subprocess.run([*compiler, f"-std={standard}", *options], capture_output=True, text=True)
        if done.returncode == 0:
            return
    raise RuntimeError(f"the simulated device does not compile against this torch:\n{done.stderr[-4000:]}")
