"""The arrows between the modules of tunekit, and how small its files are: read from the sources, not from the docs."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import tunekit
from tunekit.core.registry import BUILTINS

SOURCE = Path(tunekit.__file__).parent

ORDER = [
    "errors",
    # what is needed everywhere
    "core.table",
    "core.writing",
    "core.fields",
    "core.secrets",
    "core.intervals",
    "core.plots",
    "core.assets",
    # the contract with plugins
    "core.component",
    "core.interfaces",
    "core.hookspecs",
    "core.plugin",
    "core.registry",
    "core.recipe",
    # from rows to tokens to batches
    "core.conversations",
    "core.preferences",
    "core.converters",
    "core.inverses",
    "core.schemas",
    "core.input_files",
    "core.row_source",
    "core.rows",
    "core.contract",
    "core.template_process",
    "core.template",
    "core.tokens",
    "core.codec",
    "core.batching",
    "core.budget",
    "core.encoded_rows",
    "core.cache",
    "core.encoding",
    "core.dataset",
    # the model and what is done with it
    "core.trust",
    "core.added_tokens",
    "core.model",
    "core.fingerprint",
    "core.dequantize",
    "core.targets",
    "core.trained_tensors",
    "core.packed",
    "core.peft_method",
    "core.evaluation",
    "core.answers",
    "core.statistics",
    "core.segments",
    "core.head_loss",
    "core.rows_loss",
    "core.preview",
    # what is wrong with data, before a run
    "core.row_hashes",
    "core.row_rules",
    "core.findings",
    "core.data_figures",
    "core.corrected",
    "core.leakage",
    "core.examination",
    "core.report",
    "core.validation",
    # one run
    "core.parallel",
    "core.checkpoint",
    "core.observers",
    "core.lock",
    "core.signals",
    "core.run",
    "core.resume",
    "core.gauge",
    "core.measuring",
    "core.adapter_files",
    "core.plan",
    "core.model_card",
    "core.export",
    "core.overview",
    "core.run_report",
    "core.result",
    # where all meet
    "core.verification",
    "core.verify",
    "core.pipeline",
    "core.opening",
    # several runs
    "core.comparison",
    "core.arms",
    "core.compare",
]
"""A module imports only what stands before it. A new module of the core gets its place here."""

HEAVY = {
    "torch",
    "transformers",
    "peft",
    "datasets",
    "bitsandbytes",
    "accelerate",
    "numpy",
    "rich",
    "tomli_w",
    "psutil",
}
IMPORTED_INSIDE = {"tunekit.core.head_loss"}
"""Modules that import heavy packages at their top, and are imported inside of functions themselves."""
LONG = 300
READ_FROM_TOP_TO_BOTTOM = {"core/pipeline.py": 355}
"""The files that may be longer than LONG, because they tell one story that a cut would scatter; and how long."""


def name_of(path: Path) -> str:
    """The dotted name of a module, from `tunekit` on."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}
CORE = sorted(name for name in MODULES if name.startswith("tunekit.core."))
PLUGINS = sorted(name for name in MODULES if name.startswith("tunekit.plugins"))
TESTING = sorted(name for name in MODULES if name.startswith("tunekit.testing"))


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def statements(node: ast.AST, *, inside_functions: bool) -> Iterator[ast.AST]:
    """All nodes that run: what is under `if TYPE_CHECKING` does not."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not inside_functions:
            continue
        yield child
        yield from statements(child, inside_functions=inside_functions)


def imports(module: str, *, inside_functions: bool = True) -> set[str]:
    """The modules that `module` imports at run time, by full name."""
    found = set()
    for node in statements(tree_of(module), inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} line {node.lineno}: a relative import; write the name in full"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in whole}
    return found


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] == "tunekit"}


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_every_module_of_the_core_has_its_place_in_the_order() -> None:
    assert {f"tunekit.{name}" for name in ORDER} == {"tunekit.errors", *CORE}
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("module", ["tunekit.errors", *CORE])
def test_a_module_of_the_core_imports_only_what_stands_before_it(module: str) -> None:
    at = ORDER.index(module.removeprefix("tunekit."))
    assert own(imports(module)) <= {f"tunekit.{name}" for name in ORDER[:at]}


def test_the_core_names_plugins_only_where_the_built_ins_are_listed() -> None:
    naming = {
        (module, node.value)
        for module in CORE
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Constant) and str(node.value).startswith("tunekit.plugins")
    }
    assert naming == {("tunekit.core.registry", name) for name in BUILTINS.values()}


@pytest.mark.parametrize("module", PLUGINS)
def test_a_built_in_plugin_imports_only_the_core_the_errors_and_its_own_folder(module: str) -> None:
    folder = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    siblings = [folder] if folder != "tunekit.plugins" else []
    allowed = ["tunekit.core", "tunekit.errors", *siblings]
    assert {name for name in own(imports(module)) if not within(name, *allowed)} == set()


@pytest.mark.parametrize("module", TESTING)
def test_the_test_kit_knows_no_plugin(module: str) -> None:
    allowed = ["tunekit.core", "tunekit.errors", "tunekit.testing"]
    assert {name for name in own(imports(module)) if not within(name, *allowed)} == set()


def test_the_package_itself_imports_none_of_its_modules() -> None:
    assert own(imports("tunekit")) == set()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_packages_are_imported_inside_of_functions(module: str) -> None:
    at_top = imports(module, inside_functions=False)
    assert at_top & IMPORTED_INSIDE == set()
    assert {name.partition(".")[0] for name in at_top} & HEAVY == set() or module in IMPORTED_INSIDE


def test_files_can_be_read_in_one_sitting() -> None:
    lines = {
        str(path.relative_to(SOURCE).as_posix()): len(path.read_text(encoding="utf-8").splitlines())
        for path in MODULES.values()
    }
    long = {name: count for name, count in lines.items() if count > READ_FROM_TOP_TO_BOTTOM.get(name, LONG)}
    assert long == {}
    assert READ_FROM_TOP_TO_BOTTOM.keys() == {name for name, count in lines.items() if count > LONG}
    assert sum(count < 150 for count in lines.values()) > len(lines) / 2
