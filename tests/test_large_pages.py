"""A process that imports tunekit first has large tensors on large pages, where the kernel has any to give."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

OFFERED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SWITCH = "THP_MEM_ALLOC_ENABLE"
CODE = """
import tunekit
import torch
kept = torch.ones(16 << 20)
print(open("/proc/self/smaps_rollup").read())
"""


def large_kib(**variables):
    """KiB on large pages in a process that imports tunekit and then fills 64 MiB."""
    environment = {name: value for name, value in os.environ.items() if name != SWITCH}
    command = [sys.executable, "-c", CODE]
    shown = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"AnonHugePages:\s+(\d+) kB", shown)[1])


@pytest.mark.skipif(
    not OFFERED.exists() or "[madvise]" not in OFFERED.read_text(encoding="ascii"),
    reason="the kernel gives no large pages, or gives them to all",
)
def test_large_tensors_are_on_large_pages_unless_the_user_says_no():
    assert large_kib(**{SWITCH: "0"}) == 0
    assert large_kib() > 32 << 10
