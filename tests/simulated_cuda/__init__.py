"""A CUDA device that is simulated on the CPU; README.md says what it catches, and what it cannot.

`install()` must come before torch is imported. `tests/conftest.py` does it where the environment says how many GPUs
there are to be (`SIMULATED_CUDA=2 pytest ...`); `python -m simulated_cuda script.py` does it for a script.
"""

from simulated_cuda.build import NoCompilerError
from simulated_cuda.device import counted, install, installed, memory_limit, reset_peak
from simulated_cuda.waits import Counts, counting

__all__ = [
    "Counts",
    "NoCompilerError",
    "counted",
    "counting",
    "install",
    "installed",
    "memory_limit",
    "reset_peak",
]
