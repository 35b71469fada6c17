"""Importing tunekit is quick and imports nothing heavy; its public names are one list, and every built-in is in it."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import tunekit as tk
import tunekit.plugins as builtin
from tunekit.core.component import Component

PACKAGE = Path(tk.__file__).parent
HEAVY = ("torch", "transformers", "peft", "datasets", "bitsandbytes", "accelerate", "numpy", "rich", "ray")
WARM_IMPORT = 0.2
"""Seconds that `import tunekit` may take once its files are in the cache of the operating system."""

BUILT_INS = """
import attrs, tunekit as tk
from tunekit.core.registry import default_registry
FIELDS = {"path": tk.ORDERS, "paths": (tk.ORDERS,), "rows": [{"text": "a"}], "id": "a/b", "type": "VERA", "prompts": ("What is 2 + 3?",),
          "metrics": {"arc_easy/acc": "max"}, "forward": tk.JsonLines(path=tk.ORDERS), "reverse": tk.JsonLines(path=tk.ORDERS),
          "source": tk.JsonLines(path=tk.ORDERS), "sources": (tk.JsonLines(path=tk.ORDERS),)}
made = []
for kind in ("source", "adapter", "quantizer", "trainer", "evaluator"):
    for name in default_registry().names(kind):
        cls = default_registry().find(kind, name)
        required = [field.name for field in attrs.fields(cls) if field.default is attrs.NOTHING]
        made.append(cls(**{field: FIELDS[field] for field in required}))
"""
CHECKED = f"""{BUILT_INS}
PARTS = {{"source": "data", "evaluator": "evaluators"}}
for component in made:
    part = PARTS.get(component.kind, component.kind)
    parts = {{"data": tk.JsonLines(path=tk.ORDERS), part: (component,) if part == "evaluators" else component}}
    tk.Pipeline(model=tk.TINY, **parts).save(RECIPE)
    pipeline = tk.load(RECIPE)
    assert component in (pipeline.data, pipeline.adapter, pipeline.quantizer, pipeline.trainer, *pipeline.evaluators)
    try:
        pipeline.check()
    except tk.ConfigError as error:  # a package or a file that is not here: this, too, is found without torch
        print(error)
"""


def in_a_process_of_its_own(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import tunekit", id="import"),
        pytest.param("import tunekit.testing", id="import the test kit"),
        pytest.param("import tunekit; tunekit.plugins()", id="list the plugins"),
        pytest.param("import tunekit; [getattr(tunekit, name) for name in dir(tunekit)]", id="use every public name"),
        pytest.param(BUILT_INS, id="construct every built-in"),
        pytest.param(CHECKED, id="save, load and check every built-in"),
    ],
)
def test_nothing_heavy_is_imported_before_there_is_work_to_do(tmp_path: Path, code: str) -> None:
    after = f"import sys; print('imported:', [name for name in {HEAVY} if name in sys.modules])"
    shown = in_a_process_of_its_own(f"RECIPE = {str(tmp_path / 'recipe.toml')!r}\n{code}\n{after}")
    assert shown.splitlines()[-1] == "imported: []"


def test_a_warm_import_is_quick() -> None:
    code = "import time; began = time.perf_counter(); import tunekit; print(time.perf_counter() - began)"
    # The best of several: on a busy machine any one may be slow, but none is quicker than the import can be.
    assert min(float(in_a_process_of_its_own(code)) for _ in range(5)) < WARM_IMPORT


def declared() -> set[str]:
    """The names that type checkers see."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imported = {alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    return {name for name in imported if name} | {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_names_that_type_checkers_see_are_the_names_there_are() -> None:
    assert declared() == set(dir(tk)) == set(tk.__all__)
    assert len(declared()) > 30


@pytest.mark.parametrize("name", sorted(declared()))
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    found = getattr(tk, name)
    if inspect.isclass(found):
        assert found.__name__ == name
        assert found.__doc__


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tunekit' has no attribute 'Lora'"):
        tk.Lora  # noqa: B018


def test_every_built_in_component_is_a_public_name_and_every_public_component_a_built_in() -> None:
    built_in = {lazy.target.partition(":")[2]: lazy for lazy in builtin.COMPONENTS}
    public = {name for name in dir(tk) if inspect.isclass(cls := getattr(tk, name)) and is_concrete_component(cls)}
    assert public == built_in.keys()
    for name, lazy in built_in.items():
        cls = getattr(tk, name)
        assert (cls.kind, cls.name, f"{cls.__module__}:{cls.__qualname__}") == (lazy.kind, lazy.name, lazy.target)


def is_concrete_component(cls: type) -> bool:
    return issubclass(cls, Component) and not inspect.isabstract(cls) and cls is not Component


def test_type_checkers_may_read_the_annotations() -> None:
    assert (PACKAGE / "py.typed").is_file()
