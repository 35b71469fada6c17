"""bitsandbytes, imported as on a machine without CUDA: its kernels for the CPU serve the simulated device."""

import importlib.util
import sys
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec

from simulated_cuda.device import native

NAME = "bitsandbytes"


class Finder:
    """Finds bitsandbytes as Python does, and has it see no CUDA while it is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        plainly = spec.loader.exec_module

        def without_cuda(module: types.ModuleType) -> None:
            import torch

            before = torch.cuda.is_available, torch.version.cuda
            torch.cuda.is_available, torch.version.cuda = (lambda: False), None
            try:
                plainly(module)
            finally:
                torch.cuda.is_available, torch.version.cuda = before
            native().sim_cover(NAME.encode())

        spec.loader.exec_module = without_cuda
        return spec


def watch_for_it() -> None:
    """Before anybody imports it."""
    sys.meta_path.insert(0, Finder())
