"""Run as a script of its own: what does making this component import and open?

Reads a pickled component from standard input and writes JSON to standard output: `heavy`, the heavy packages that are
imported once its module is imported and it is made and checked; `opened`, the files and connections that making it
opened. It needs a process of its own, since nothing can be un-imported.
"""

import contextlib
import json
import pickle
import sys

import attrs

from tunekit.core.common.assets import TINY
from tunekit.core.component import Component, Context
from tunekit.errors import ConfigError

HEAVY = ("accelerate", "bitsandbytes", "datasets", "numpy", "peft", "torch", "transformers")
_CODE = (".py", ".pyc", ".so", ".pyd")


def main() -> None:
    """Probe the component on standard input."""
    component: Component = pickle.load(sys.stdin.buffer)
    opened: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching and (event == "open" or event.startswith("socket.")) and arguments:
            name = str(arguments[0])
            if not name.endswith(_CODE):
                opened.append(name)

    sys.addaudithook(hook)
    # Unpickling does not run __init__; making it anew from its own fields does.
    component = attrs.evolve(component)
    watching = False
    # A ConfigError says that the component cannot work here: a right answer, and a light one.
    with contextlib.suppress(ConfigError):
        component.check(Context(model_id=TINY))
    found = {"heavy": [name for name in HEAVY if name in sys.modules], "opened": opened}
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
