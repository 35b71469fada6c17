"""bitsandbytes is imported without torch's compiler, and compiles all the same what it would have."""

import subprocess
import sys

import pytest
import torch

from tunekit.core.model.quick_imports import _compiled_when_called

pytest.importorskip("bitsandbytes")

CODE = """
import sys, torch
from tunekit.core.model.quick_imports import import_bitsandbytes
at_once = torch.compile
import_bitsandbytes()
assert "bitsandbytes" in sys.modules
assert torch.compile is at_once
assert "torch._inductor.compile_fx" not in sys.modules, "the compiler was loaded"
"""


def test_bitsandbytes_is_there_without_the_compiler():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [{}, {"backend": "eager"}], ids=str)
def test_what_is_compiled_when_called_is_compiled_once_and_as_asked(options, monkeypatch):
    asked = []

    def compiling(function, **given):
        asked.append(given)
        return function

    def scaled(x, by):
        return x * by

    monkeypatch.setattr(torch, "compile", compiling)
    with _compiled_when_called():
        made = torch.compile(**options)(scaled) if options else torch.compile(scaled)
    assert torch.compile is compiling
    assert asked == []
    assert [made(3, by=2), made(4, by=2)] == [6, 8]
    assert asked == [options]
