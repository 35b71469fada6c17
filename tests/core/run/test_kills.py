"""Killed at any moment, a run goes on and ends as if nobody had: the short form of `make soak`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "soak.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script makes its processes by os.fork, which is not there")
def test_a_run_that_is_killed_ten_times_ends_byte_for_byte_as_one_that_was_not():
    command = [sys.executable, str(SCRIPT), "--kills", "10", "--steps", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "  10 kills in all" in done.stdout
    assert "every run ended byte for byte as the one never killed" in done.stdout
