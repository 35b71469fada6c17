"""What is installed, by which name: ours is `tunekit-sdk`, and on PyPI `tunekit` is somebody else's."""

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tunekit as tk
from tunekit.core.hookspecs import DISTRIBUTION
from tunekit.core.registry import Registry

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INSTALLS_A_STRANGER = re.compile(
    r"""(pip3?|uv|uvx|pipx)\s+(install|add|uninstall)\b[^#\n`]*?[\s'"\\]tunekit(?![-\w./])|"""
    r"""dependencies\s*=\s*\[[^\]]*["']tunekit(?![-\w])"""
)


def texts() -> dict[str, str]:
    """Every text that belongs to the project, by path; this file, which names what must not be written, aside."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    if not any(listed):
        pytest.skip("not a git checkout")
    suffixes = {".py", ".md", ".toml", ".txt", ".html", ".yml", ""}
    return {
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in listed
        if name and Path(name).suffix in suffixes and name != "tests/test_distribution.py" and (ROOT / name).is_file()
    }


def test_no_line_installs_the_other_project():
    found = [(name, match.group()) for name, text in texts().items() for match in INSTALLS_A_STRANGER.finditer(text)]
    # The cure for an installed stranger takes it away.
    assert [one for one in found if "uninstall" not in one[1]] == []


@pytest.mark.parametrize(
    ("line", "strange"),
    [
        ("pip install tunekit", True),
        ("pip install tunekit[plots]", True),
        ('pip install -c constraints.txt "tunekit[plots]"', True),
        (r'match=r"pip install tunekit\[ray\]"', True),
        ("uv add tunekit", True),
        ('dependencies = ["attrs", "tunekit"]', True),
        ('pip install "tunekit-sdk[plots]"', False),
        ("pip install -e . -c constraints.txt", False),
        ("pip install ./tunekit-plugin", False),
        ('dependencies = ["tunekit-sdk"]', False),
    ],
)
def test_a_line_that_installs_the_other_project_is_known(line, strange):
    assert bool(INSTALLS_A_STRANGER.search(line)) == strange


def test_the_name_is_the_one_that_messages_and_plugins_say():
    assert PROJECT["name"] == DISTRIBUTION
    assert importlib.metadata.version(DISTRIBUTION) == PROJECT["version"]


def extra_of(requirement: str, **environment: str) -> bool:
    """Whether a requirement holds on a machine of this kind."""
    found = Requirement(requirement)
    return found.marker is None or found.marker.evaluate(environment)


@pytest.mark.parametrize(
    ("system", "machine", "installed"),
    [
        ("Linux", "x86_64", True),
        ("Linux", "aarch64", True),
        ("Windows", "AMD64", True),
        ("Windows", "ARM64", True),
        ("Darwin", "arm64", True),
        ("Darwin", "x86_64", False),  # these have no wheel of bitsandbytes
        ("Linux", "ppc64le", False),
    ],
)
def test_what_qlora_and_parquet_need_is_installed_by_default_where_there_are_wheels(system, machine, installed):
    names = {
        Requirement(line).name
        for line in PROJECT["dependencies"]
        if extra_of(line, platform_system=system, platform_machine=machine)
    }
    assert "datasets" in names
    assert ("bitsandbytes" in names) == installed


def test_the_tested_set_is_what_the_test_extra_installs_and_nothing_else():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert len(pins) == sum("==" in line for line in lines), "a name is pinned twice"
    needed = closure(DISTRIBUTION, "test")
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    other = {n: needed[n] for n in versions if n in needed and needed[n].partition("+")[0] != versions[n]}
    if other:
        pytest.skip(f"another set is installed: {other}")
    assert set(versions) == set(needed) - {DISTRIBUTION}


def closure(name: str, extra: str) -> dict[str, str]:
    """The versions of what a distribution with an extra needs, and what that needs, as installed here."""
    found: dict[str, str] = {}
    seen = set()
    waiting = [(name, (extra,))]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        distribution = importlib.metadata.distribution(name)
        found[canonicalize_name(name)] = distribution.version
        for line in distribution.requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": one}) for one in (*extras, "")):
                waiting.append((canonicalize_name(needed.name), tuple(sorted(needed.extras))))
    return found


# The other project ------------------------------------------------------------------------------------------------------


@pytest.fixture
def other_project(tmp_path, monkeypatch):
    """`other_project("tunekit/cli.py")`: a distribution `tunekit` that is said to bring these files."""

    def install(*files: str) -> None:
        info = tmp_path / "tunekit-0.3.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tunekit\nVersion: 0.3\n", encoding="utf-8")
        (info / "RECORD").write_text("".join(f"{name},,\n" for name in files), encoding="utf-8")
        # They are there, too: the backport of importlib.metadata, which other packages put in its place, looks.
        for name in files:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def test_an_installed_stranger_is_named_with_the_way_out(other_project):
    other_project("tunekit/__init__.py", "tunekit/cli.py")
    registry = Registry(environment={})
    with pytest.warns(tk.PluginWarning, match=r"tunekit 0.3 .* pip uninstall tunekit, then pip install .* tunekit-sdk"):
        found = registry.find("adapter", "lora")
    assert found is tk.LoRA
    (stranger,) = [plugin for plugin in registry.plugins() if plugin.distribution == "tunekit"]
    assert stranger.status == "incompatible"


def test_strict_about_plugins_a_stranger_is_an_error(other_project):
    other_project("tunekit/__init__.py")
    with pytest.raises(tk.PluginError, match="another project with the import name tunekit"):
        Registry(environment={"TUNEKIT_STRICT_PLUGINS": "1"}).find("adapter", "lora")


def test_a_distribution_of_that_name_which_brings_no_such_package_replaces_nothing(other_project):
    other_project("tunekit-0.3.dist-info/INSTALLER", "__editable__.tunekit.pth")
    assert Registry(environment={}).find("adapter", "lora") is tk.LoRA
