"""tunekit: fine-tune Hugging Face language models, composed of parts that are all plugins.

Every public name stands in `__init__.pyi`, where type checkers look. Each is imported when it is first used, so that
importing tunekit imports no torch.
"""

import importlib
import os
import re
from pathlib import Path
from typing import Any

# torch's own switch for large pages, which it reads when it first allocates: transformers does so while it is imported.
# What a tensor of 2 MiB and more leaves then fits the next, and the process grows less (docs/performance.md). Where the
# kernel has none, torch would warn.
if Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_HOMES = {
    name: module
    for module, name in re.findall(
        r"^from (\.\S+) import (\w+)",
        Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
}
_PACKAGES = ("plugins", "testing")

__all__ = sorted([*_HOMES, "plugins"])


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
