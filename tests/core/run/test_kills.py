"""Killed at any moment, a run goes on and ends as if nobody had: the short form of `make soak`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "soak.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script makes its processes by os.fork, which is not there")
def test_runs_that_are_killed_five_times_end_byte_for_byte_as_those_that_were_not_in_either_dtype():
    command = [sys.executable, str(SCRIPT), "--kills", "10", "--kills-per-run", "5", "--steps", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Two runs, or more where one was done before its fifth.
    told = re.search(r"  10 kills in all, in (\d+) runs of 10 steps, by turns in float32 and bfloat16", done.stdout)
    assert told, done.stdout
    assert int(told[1]) >= 2
    assert "every run ended byte for byte as the one never killed" in done.stdout
