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
    "core.common.table",
    "core.common.distributions",
    "core.common.turns",
    "core.common.writing",
    "core.common.free_memory",
    "core.common.threads",
    "core.common.random_states",
    "core.common.fixed_order",
    "core.fields",
    "core.common.secrets",
    "core.common.intervals",
    "core.common.plots",
    "core.common.assets",
    # the contract with plugins
    "core.component",
    "core.outcomes",
    "core.interfaces",
    "core.hookspecs",
    "core.plugin",
    "core.registry",
    "core.recipe",
    # from rows to tokens to batches
    "core.data.conversations",
    "core.data.preferences",
    "core.data.converters",
    "core.data.inverses",
    "core.data.schemas",
    "core.data.input_files",
    "core.data.row_source",
    "core.data.rows",
    "core.data.contract",
    "core.data.template_process",
    "core.data.template",
    "core.data.tokens",
    "core.data.codec",
    "core.data.batching",
    "core.data.encoded_rows",
    "core.data.cache",
    "core.data.encoding",
    "core.data.dataset",
    # the model and what is done with it
    "core.model.trust",
    "core.model.hub_kernels",
    "core.model.added_tokens",
    "core.model.devices",
    "core.model.products",
    "core.model.precision",
    "core.model.hooks",
    "core.model.masters",
    "core.model.base",
    "core.model.fingerprint",
    "core.model.dequantize",
    "core.model.plain",
    "core.model.targets",
    "core.model.trained_tensors",
    "core.model.packed",
    "core.model.quick_imports",
    "core.model.peft_method",
    "core.model.attaching",
    # training adapters with less work
    "core.lean.frozen",
    "core.lean.low_rank",
    "core.lean.forward",
    "core.lean.lora",
    "core.lean.gated",
    "core.lean.norm",
    "core.lean.adalora",
    "core.lean.ia3",
    "core.lean.lycoris",
    "core.lean.loha",
    "core.lean.lokr",
    "core.lean.forwards",
    "core.lean.trial",
    "core.training.prefixes",
    "core.training.excerpts",
    "core.training.float64",
    "core.evaluation.logits",
    "core.evaluation.together",
    "core.evaluation.predicting",
    "core.evaluation.sampling",
    "core.evaluation.answers",
    "core.evaluation.prompted",
    "core.evaluation.statistics",
    "core.training.attention",
    "core.training.few_shapes",
    "core.training.compiled",
    "core.training.accuracy",
    "core.training.frozen",
    "core.training.segments",
    "core.training.padding",
    "core.training.batch",
    "core.training.leaks",
    "core.training.head_loss",
    "core.training.rows_loss",
    "core.memory.budget",
    "core.memory.memory_plan",
    "core.memory.estimate",
    "core.memory.live_bytes",
    "core.memory.weightless",
    "core.inspection.preview",
    # what is wrong with data, before a run
    "core.inspection.row_hashes",
    "core.inspection.row_rules",
    "core.inspection.findings",
    "core.inspection.data_figures",
    "core.inspection.corrected",
    "core.inspection.leakage",
    "core.inspection.examination",
    "core.inspection.report",
    "core.inspection.validation",
    # one run
    "core.training.messages",
    "core.training.parallel",
    "core.training.sharded",
    "core.training.deepspeed",
    "core.run.checkpoint",
    "core.run.observers",
    "core.run.lock",
    "core.run.signals",
    "core.run.files",
    "core.run.background",
    "core.run.run_log",
    "core.run.facts",
    "core.run.resume",
    "core.run.gauge",
    "core.run.measuring",
    "core.run.adapter_files",
    "core.run.plan",
    "core.run.model_card",
    "core.run.export",
    "core.run.reopening",
    "core.run.overview",
    "core.run.html_report",
    "core.run.planned",
    "core.run.run_report",
    "core.run.result",
    # where all meet
    "core.run.compared",
    "core.run.verification",
    "core.run.verify",
    "core.remote.job",
    "core.remote.worker",
    "core.remote.gang",
    "core.remote.ray",
    "core.pipeline",
    "core.opening",
    # several runs
    "core.comparison.budget",
    "core.comparison.shared_base",
    "core.comparison.arm_runs",
    "core.comparison.comparison_report",
    "core.comparison.comparison",
    "core.comparison.arms",
    "core.comparison.probes",
    "core.comparison.trials",
    "core.comparison.compare",
    "core.comparison.ranking",
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
    "ray",
    "deepspeed",
}
IMPORTED_INSIDE = {
    "tunekit.core.memory.live_bytes",
    "tunekit.core.memory.weightless",
    "tunekit.core.training.float64",
    "tunekit.core.training.head_loss",
    *(
        f"tunekit.core.lean.{name}"
        for name in ("frozen", "low_rank", "lora", "gated", "norm", "adalora", "ia3", "lycoris", "loha", "lokr")
    ),
}
"""Modules that import heavy packages at their top, and are imported inside of functions themselves, or by each other."""
LONG = 300
READ_FROM_TOP_TO_BOTTOM = {"core/pipeline.py": 421}
"""The files that may be longer than LONG, because they tell one story that a cut would scatter; and how long."""


def name_of(path: Path) -> str:
    """The dotted name of a module, from `tunekit` on."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}
CORE = sorted(name for name in MODULES if name.startswith("tunekit.core.") and MODULES[name].name != "__init__.py")
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


def test_a_room_of_the_core_says_what_it_is_for_and_imports_nothing() -> None:
    rooms = {
        name for name, path in MODULES.items() if path.parent.parent == SOURCE / "core" and path.stem == "__init__"
    }
    assert rooms
    for room in rooms:
        assert ast.get_docstring(tree_of(room))
        assert imports(room) == set()


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
    heavy = at_top & IMPORTED_INSIDE | {name.partition(".")[0] for name in at_top} & HEAVY
    assert heavy == set() or module in IMPORTED_INSIDE


def test_files_can_be_read_in_one_sitting() -> None:
    lines = {
        str(path.relative_to(SOURCE).as_posix()): len(path.read_text(encoding="utf-8").splitlines())
        for path in MODULES.values()
    }
    long = {name: count for name, count in lines.items() if count > READ_FROM_TOP_TO_BOTTOM.get(name, LONG)}
    assert long == {}
    assert READ_FROM_TOP_TO_BOTTOM.keys() == {name for name, count in lines.items() if count > LONG}
    assert sum(count < 150 for count in lines.values()) > len(lines) / 2
