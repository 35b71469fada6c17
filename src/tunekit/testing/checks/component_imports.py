"""Checks of every component in a process of its own, or without a package: what it imports, opens and needs."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import SkipTest

from tunekit.core.component import Component
from tunekit.errors import ConfigError
from tunekit.testing.harness import Harness


def is_light(component: Component, harness: Harness) -> None:
    """Importing its module, making it and checking it imports no heavy package."""
    heavy = _probe(component)["heavy"]
    assert not heavy, (
        f"importing {type(component).__module__}, making {type(component).__name__} and checking it imports "
        f"{', '.join(heavy)}: move those imports into the methods that need them (for types: `if TYPE_CHECKING:`)"
    )


def makes_no_input_or_output(component: Component, harness: Harness) -> None:
    """Making it opens no file and no connection: that is for its methods."""
    opened = _probe(component)["opened"]
    assert not opened, f"making {type(component).__name__} opens {opened}: read where it is used, and test in `check`"


def says_what_to_install(component: Component, harness: Harness) -> None:
    """Without a package that it requires, `Pipeline.check` is a ConfigError with the line that installs it."""
    for name in component.requires:
        said = None
        with _hidden(name):
            try:
                harness.pipeline(component).check()
            except ConfigError as error:
                said = str(error)
            except ImportError as error:
                raise AssertionError(
                    f"without {name}, Pipeline.check raises {error!r}: import {name} only in the methods that run later"
                ) from None
        assert said is not None, f"without {name}, Pipeline.check passes: {name!r} is no import name"
        assert re.search(rf"pip install .*\b{name}\b", said), (
            f"without {name}, Pipeline.check says {said!r}: let tunekit say what to install, and test nothing before"
        )


def _probe(component: Component) -> dict[str, list[str]]:
    """What a new process imports and opens to make and check an equal component."""
    if type(component).__module__ == "__main__":
        raise SkipTest("it is defined in a script; move it to a module of its own")
    try:
        return _probed(pickle.dumps(component))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(f"it cannot be handed to another process: {error}") from None


@cache
def _probed(pickled: bytes) -> dict[str, list[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    # As a file, not by -m, which would import the whole kit; -P keeps the file's folder from hiding other modules.
    command = [sys.executable, "-P", str(Path(__file__).parent.parent / "probe.py")]
    done = subprocess.run(command, input=pickled, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, f"it cannot be made in a new process:\n{done.stderr.decode(errors='replace')[-2000:]}"
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """As if the package `name` were not installed."""
    kept = {module: sys.modules.pop(module) for module in list(sys.modules) if module.split(".")[0] == name}
    sys.modules[name] = None  # type: ignore[assignment]  # how Python itself marks a module that must not be found
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(kept)


CHECKS = (is_light, makes_no_input_or_output, says_what_to_install)
