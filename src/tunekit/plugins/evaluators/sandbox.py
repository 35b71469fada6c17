"""Running a generated program in a process of its own, without rights, and within limits of time and memory."""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

PATIENCE = 3.0
"""So many times its CPU seconds may a program take by the clock; it may sleep, or the machine be busy."""
START = 5.0
"""Seconds by the clock for the process to start."""
LONGEST_ANSWER = 4096


def fault_of(program: str, *, seconds: float = 5.0, memory: int = 1024) -> str:
    """Run a Python program in a sandbox and return what went wrong; an empty text if it came to its end.

    The process has an empty environment, a temporary directory to write in, no network and no other processes where
    the system lets it give these up; it is killed with all that it started. It may read what the user may read. It is
    a guard against programs that go wrong: it is not known to hold one that was written to break out.

    Args:
        program: its text.
        seconds: of CPU time, rounded up to whole ones; three times as much by the clock.
        memory: of address space, in MiB.
    """
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="tunekit-", ignore_cleanup_errors=True) as place:
        directory, answer = Path(place, "work"), Path(place, "answer")
        directory.mkdir()
        with answer.open("xb") as file:
            limits = [str(file.fileno()), str(math.ceil(seconds)), str(memory * 2**20)]
            process = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).with_name("code_process.py")), str(directory), *limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=directory,
                env={},
                pass_fds=[file.fileno()],
                start_new_session=True,
            )
            try:
                process.communicate(json.dumps({"word": word, "program": program}).encode(), START + PATIENCE * seconds)
            except subprocess.TimeoutExpired:
                return "took too long"
            except BrokenPipeError:
                pass  # it ended early; that is told below
            finally:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        with answer.open("rb") as file:
            said = file.read(LONGEST_ANSWER)
    try:
        found = json.loads(said)
        fault = str(found["fault"]) or ("" if found["word"] == word else "a forged answer")
    except (ValueError, TypeError, KeyError):
        fault = "ended without coming to its end"
    return fault
