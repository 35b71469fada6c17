"""The documentation is executed, complete, and up to date.

Blocks of one page share a namespace and a temporary directory, in order. A block ```output is what the Python block
before it prints, `...` standing for the rest of a line. A block whose first line is `# some_module.py` is that file,
or with `, continued` is added to it; a table of entry points installs it.
"""

import contextlib
import importlib
import inspect
import io
import json
import re
import runpy
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tunekit as tk
from tunekit.core import hookspecs
from tunekit.core.interfaces import INTERFACES
from tunekit.core.registry import default_registry
from tunekit.plugins import COMPONENTS

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "docs/quickstart.md",
    "docs/concepts.md",
    "docs/choosing.md",
    "docs/data.md",
    "docs/quantization.md",
    "docs/comparison.md",
    "docs/reliability.md",
    "docs/scale.md",
    "docs/performance.md",
    "docs/writing-a-plugin.md",
    "docs/security.md",
    "CONTRIBUTING.md",
]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "methods").glob("*.md"))
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))
EVERY_PAGE = [*(ROOT / page for page in PAGES), ROOT / "CHANGELOG.md", *REFERENCE]
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a `train.jsonl`, and afterwards a registry and modules that know nothing of the page."""
    rows = [{"prompt": f"What is {a} + {b}?", "completion": str(a + b)} for a in range(3) for b in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    # The page's file is written several times within the resolution of a file system's clock.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    default_registry.cache_clear()
    yield tmp_path
    default_registry.cache_clear()
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_does_what_the_page_says(page: str, workplace: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    printed = ""
    for language, text in blocks(ROOT / page):
        if language == "python" and (file := re.match(r"# (\w+\.py)(, continued)?\n", text)):
            _grow(workplace / file[1], text, bool(file[2]))
        elif language == "python":
            printed = _executed(text, namespace, f"{page}: {text.splitlines()[0]}")
        elif language == "output":
            pattern = ".*".join(map(re.escape, text.strip().split("...")))
            assert re.fullmatch(pattern, printed.strip()), f"{page} says\n{text}\nbut this is printed:\n{printed}"
        elif language == "toml" and "[project.entry-points.tunekit]" in text:
            _install(tomllib.loads(text)["project"], workplace)
        elif language == "toml" and "\nmodel = " in text:
            assert isinstance(tk.Pipeline.from_dict(tomllib.loads(text)), tk.Pipeline)
        elif language == "toml":
            table = {"model": tk.TINY, "data": {"use": "json-lines", "path": "train.jsonl"}, **tomllib.loads(text)}
            assert isinstance(tk.Pipeline.from_dict(table), tk.Pipeline)
        else:
            assert language in ("console", "text", "json"), f"{page} has a block of the language {language}"


def _grow(file: Path, text: str, continued: bool) -> None:
    before = file.read_text(encoding="utf-8") + "\n\n" if continued else ""
    file.write_text(before + text, encoding="utf-8")
    sys.modules.pop(file.stem, None)
    importlib.invalidate_caches()
    default_registry.cache_clear()


def _executed(text: str, namespace: dict[str, Any], where: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(text, where, "exec", dont_inherit=True), namespace)
    return printed.getvalue()


def _install(project: dict[str, Any], directory: Path) -> None:
    """What `pip install -e .` leaves behind, as far as it concerns plugins; and the plugin loads."""
    name, version = project.get("name", "a-plugin"), project.get("version", "0.1")
    place = directory / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    lines = [f"{point} = {module}\n" for point, module in project["entry-points"]["tunekit"].items()]
    (place / "entry_points.txt").write_text("[tunekit]\n" + "".join(lines), encoding="utf-8")
    default_registry.cache_clear()
    assert "loaded" in [plugin.status for plugin in default_registry().plugins() if plugin.distribution == name]


def test_the_reference_is_what_the_source_says(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["make_reference.py", "--check"])
    runpy.run_path(str(ROOT / "scripts" / "make_reference.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("0 of ")


def test_the_snippets_of_a_reference_page_make_one_component_in_python_and_in_a_recipe() -> None:
    for lazy in COMPONENTS:
        page = dict(blocks(ROOT / "docs" / "reference" / f"{lazy.kind}-{lazy.name}.md"))
        namespace: dict[str, Any] = {}
        statement, _, expression = page["python"].rpartition("\n\n")
        exec(statement, namespace)
        (recipe,) = tomllib.loads(page["toml"]).items()
        table = {"model": tk.TINY, "data": {"use": "in-memory", "rows": []}, recipe[0]: recipe[1]}
        found = getattr(tk.Pipeline.from_dict(table), recipe[0])
        assert (found[0] if isinstance(found, tuple) else found) == eval(expression, namespace)


def test_every_hook_stands_in_the_reference_with_its_exact_signature() -> None:
    page = (ROOT / "docs/reference/hooks.md").read_text(encoding="utf-8")
    hooks = [name for name in vars(hookspecs) if name.startswith("tunekit_")]
    assert len(hooks) >= 5
    for name in hooks:
        signature = str(inspect.signature(getattr(hookspecs, name))).replace("'", "")
        assert f"## `{name}`" in page
        assert f"{name}{signature}" in page
        assert inspect.getdoc(getattr(hookspecs, name)).splitlines()[0] in page  # type: ignore[union-attr]


def test_every_interface_and_every_method_of_it_is_documented() -> None:
    page = (ROOT / "docs/reference/interfaces.md").read_text(encoding="utf-8")
    concepts = (ROOT / "docs/concepts.md").read_text(encoding="utf-8")
    for interface in INTERFACES.values():
        assert f"## `tk.{interface.__name__}`" in page
        assert f"`{interface.__name__}`" in concepts
        for name in vars(interface):
            if inspect.isfunction(vars(interface)[name]) and not name.startswith("_"):
                assert f"### `{name}`" in page


def test_the_built_ins_in_the_readme_are_those_of_the_registry() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `tk\.(\w+)` \| (\w+) \| `([\w-]+)` \|", text, re.MULTILINE))
    registry = default_registry()
    builtin = {
        tuple(component.split("/"))
        for plugin in registry.plugins()
        if plugin.distribution == "tunekit-sdk"
        for component in plugin.components
    }
    assert listed == {(registry.find(kind, name).__name__, kind, name) for kind, name in builtin}


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_links_to_what_is_there_and_names_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://", target):
            file, _, heading = target.partition("#")
            path = (page.parent / file) if file else page
            assert path.exists(), f"{page.name} links to {target}"
            assert not heading or heading in _anchors(path), f"{page.name} links to {target}"
    for name in re.findall(r"\b(?:tk|tunekit)\.([A-Z]\w+)", text) + re.findall(r"\btk\.(\w+)", text):
        assert name in dir(tk), f"{page.name} speaks of tk.{name}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_contributing_has_a_line_for_every_file_of_the_package() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "tunekit"
    files = [path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"]
    listed = set(re.findall(r"^\| `([\w/]+\.py)` \| \S", text, re.MULTILINE))
    assert set(files) <= listed, f"not described: {sorted(set(files) - listed)}"
    assert listed <= {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
