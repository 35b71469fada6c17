"""Tests that need what is not here are skipped and say why; the tiny model on disk is one a pipeline takes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tunekit as tk
from tunekit.core.model.precision import choose_precision
from tunekit.testing import tiny_model

HELD = f"""
import tunekit as tk
from {choose_precision.__module__} import choose_precision
print(choose_precision(None, "cpu", tk.LoRA(), lambda: None))
"""
TESTS = """
import pytest

@pytest.mark.real
def test_real(shared): raise AssertionError

@pytest.mark.gpu
def test_gpu(): raise AssertionError

def test_other(): pass
"""


def test_what_needs_data_or_a_device_that_is_not_here_is_skipped_with_the_reason(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    real\n    gpu\n")
    # Stands in for torch, which would take seconds to import and may see a device.
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {**os.environ, "TUNEKIT_SHARED": "no-such-folder"}
    environment.pop("SIMULATED_CUDA", None)
    shown = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True).stdout
    assert "1 passed, 2 skipped" in shown
    assert "no no-such-folder here" in shown
    assert "torch sees no CUDA device" in shown


def test_the_tiny_directory_is_a_model_to_train(tiny_directory: Path) -> None:
    rows = [{"text": "to be"}, {"text": "or not to be"}]
    plan = tk.Pipeline(model=str(tiny_directory), data=tk.InMemory(rows=rows), validation=0).plan()
    assert plan.rows == 2
    assert 0 < plan.trainable_parameters < plan.total_parameters


@pytest.fixture(scope="module")
def held_by_a_fixture() -> str:
    return str(choose_precision(None, "cpu", tk.LoRA(), tiny_model))


def test_a_base_is_held_in_float32_on_any_processor_in_fixtures_of_a_module_and_in_processes(held_by_a_fixture) -> None:
    said = "float32: TUNEKIT_CPU_DTYPE says so"
    assert held_by_a_fixture == said
    shown = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True).stdout
    assert shown == said + "\n"
