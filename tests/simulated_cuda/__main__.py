"""`python -m simulated_cuda script.py ARGUMENTS`: any script, as if on a machine with CUDA."""

import runpy
import sys

from simulated_cuda import install

install()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
