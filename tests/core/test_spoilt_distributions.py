"""A distribution whose own files are spoilt, or whose import ends in any way, is named, and stops nobody else."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import tunekit as tk
from tunekit.core.common import distributions
from tunekit.core.hookspecs import DISTRIBUTION
from tunekit.core.registry import Registry
from tunekit.core.run import files

NAMED = b"Metadata-Version: 2.1\nName: Spoilt\nVersion: 1.5\n"
OURS = b"[tunekit]\nspoilt = fake_spoilt\n"
SOUND = "import attrs, tunekit as tk\n@tk.hookimpl\ndef tunekit_components():\n    return []\n"


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Installs a distribution that consists of these files: `put("spoilt-1.0.dist-info", {"METADATA": b"..."})`."""

    def put(directory: str, content: dict[str, bytes], module: str = SOUND, place: str = "site") -> Path:
        made = tmp_path / place / directory
        made.mkdir(parents=True)
        for name, text in content.items():
            (made / name).write_bytes(text)
        (tmp_path / place / "fake_spoilt.py").write_text(module)
        monkeypatch.syspath_prepend(str(tmp_path / place))
        sys.modules.pop("fake_spoilt", None)
        return made

    return put


def found(environment: dict[str, str] | None = None) -> list[tk.Plugin]:
    """What is on record of all plugins but our own, and that the built-ins are there whatever the others are."""
    registry = Registry(environment=environment or {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tk.PluginWarning)
        plugins = [plugin for plugin in registry.plugins() if plugin.distribution != DISTRIBUTION]
    assert registry.find("adapter", "lora") is tk.LoRA
    return plugins


# Spoilt files ----------------------------------------------------------------------------------------------------------

SPOILT = {
    "no name in the metadata": (
        "spoilt-1.5.dist-info",
        {"METADATA": b"Metadata-Version: 2.1\nVersion: 1.5\n", "entry_points.txt": OURS},
        ("spoilt", "spoilt", "1.5"),
        "its metadata has no name",
    ),
    "no metadata at all": (
        "spoilt-1.5.dist-info",
        {"entry_points.txt": OURS},
        ("spoilt", "spoilt", "1.5"),
        "its metadata has no name",
    ),
    "metadata in another encoding": (
        "spoilt-1.5.dist-info",
        {"METADATA": NAMED + b"Author: Jos\xe9\n", "entry_points.txt": OURS},
        ("spoilt", "spoilt", "1.5"),
        "its metadata cannot be read: 'utf-8' codec can't decode byte 0xe9",
    ),
    "an egg without a name": (
        "spoilt-1.5-py3.11.egg-info",
        {"PKG-INFO": b"Metadata-Version: 1.2\n", "entry_points.txt": OURS},
        ("spoilt", "spoilt", "1.5"),
        "its metadata has no name",
    ),
    "a line that is not an entry point": (
        "spoilt-1.5.dist-info",
        {"METADATA": NAMED, "entry_points.txt": b"# scripts\n[console_scripts]\nnot a point\n"},
        ("unknown", "Spoilt", "1.5"),
        "its entry_points.txt cannot be read: line 3, 'not a point', is not an entry point",
    ),
    "entry points in another encoding": (
        "spoilt-1.5.dist-info",
        {"METADATA": NAMED, "entry_points.txt": b"[console_scripts]\ncaf\xe9 = a:b\n"},
        ("unknown", "Spoilt", "1.5"),
        "its entry_points.txt cannot be read: UnicodeDecodeError",
    ),
    "neither a name nor entry points": (
        "spoilt-1.5.dist-info",
        {"METADATA": b"", "entry_points.txt": b"[tunekit]\nbroken\n"},
        ("unknown", "spoilt", "1.5"),
        "its metadata has no name",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_distribution_is_recorded_by_name_and_place_and_the_others_work(kind, put, install):
    directory, content, (name, distribution, version), reason = SPOILT[kind]
    install("fake-working")
    place = put(directory, content)
    others = {plugin.distribution: plugin for plugin in found()}
    assert others.pop("fake-working").status == "loaded"
    record = others.pop(distribution)
    assert (record.name, record.version, record.status) == (name, version, "failed")
    assert record.error.startswith(reason)
    assert str(place) in record.error
    assert not others


def test_a_spoilt_distribution_is_warned_of_disabled_by_its_name_and_an_error_in_strict_mode(put):
    put("spoilt-1.5.dist-info", {"METADATA": NAMED, "entry_points.txt": b"[tunekit]\nbroken\n"})
    with pytest.warns(tk.PluginWarning, match=r"of Spoilt 1\.5 is failed: its entry_points\.txt cannot be read"):
        Registry(environment={}).plugins()
    with pytest.raises(tk.PluginError, match=r"of Spoilt 1\.5 is failed"):
        Registry(environment={"TUNEKIT_STRICT_PLUGINS": "1"}).plugins()
    (record,) = found({"TUNEKIT_DISABLE_PLUGINS": "Spoilt"})
    assert record.status == "disabled"


@pytest.mark.parametrize("directory", ["spoilt-1.5.dist-info", "~poilt-1.5.dist-info"])
def test_what_a_broken_removal_leaves_is_not_mentioned_where_it_cannot_be_a_plugin(directory, put):
    put(directory, {"RECORD": b""})
    assert found() == []


def test_of_two_installations_of_one_distribution_the_one_that_is_imported_counts(put):
    put("spoilt-1.0.dist-info", {"METADATA": NAMED.replace(b"1.5", b"1.0"), "entry_points.txt": OURS}, place="last")
    put("Spoilt-1.5.dist-info", {"METADATA": NAMED, "entry_points.txt": OURS}, place="first")
    assert [(plugin.version, plugin.status) for plugin in found()] == [("1.5", "loaded")]
    assert distributions.packages(sys.path)["Spoilt"] == "1.5" == distributions.version("spoilt")


def test_the_versions_of_a_run_are_written_whatever_else_is_installed(put):
    put("spoilt-1.5.dist-info", {"METADATA": b"Version: 1.5\n\xe9"})
    put("nameless-2.0.dist-info", {"METADATA": b"Metadata-Version: 2.1\n"}, place="other")
    put("old-3.0-py3.11.egg-info", {"PKG-INFO": b"Name: old-one\nVersion: 3.0\n\nVersion: 4"}, place="third")
    environment = files.environment(Registry(environment={}), [], "cpu", "float32", 0)
    expected = {"spoilt": "1.5", "nameless": "2.0", "old-one": "3.0"}
    assert {name: environment["packages"].get(name) for name in expected} == expected
    assert environment["packages"]["torch"].startswith("2.")
    assert json.dumps(environment)
    assert distributions.version("nobody-has-this") == "unknown"


# Whatever an import does -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("class Stop(BaseException): ...\nraise Stop('here')", "Stop: here"),
        ("class Stop(KeyboardInterrupt): ...\nraise Stop('here')", "Stop: here"),
        ("import asyncio\nraise asyncio.CancelledError", "CancelledError: "),
        ("raise GeneratorExit", "GeneratorExit: "),
    ],
)
def test_an_import_that_ends_by_anything_but_the_user_is_recorded(module, reason, put):
    put("spoilt-1.5.dist-info", {"METADATA": NAMED, "entry_points.txt": OURS}, module)
    assert [(plugin.name, plugin.status, plugin.error) for plugin in found()] == [("spoilt", "failed", reason)]


@pytest.mark.parametrize("hooks", ["", "\ndef __getattr__(name): raise SystemExit(name)"])
def test_a_lazy_component_whose_module_ends_at_import_is_an_error_that_names_its_plugin(hooks, put, monkeypatch):
    module = "import tunekit as tk\n@tk.hookimpl\ndef tunekit_components():\n"
    module += "    return [tk.Lazy('evaluator', 'late', 'fake_late:Late')]\n"
    place = put("spoilt-1.5.dist-info", {"METADATA": NAMED, "entry_points.txt": OURS}, module)
    (place.parent / "fake_late.py").write_text(hooks or "raise SystemExit(3)")
    monkeypatch.delitem(sys.modules, "fake_late", raising=False)
    with pytest.raises(tk.PluginError, match=r"of Spoilt 1\.5 names 'fake_late:Late', .* imported: SystemExit: "):
        Registry(environment={}).find("evaluator", "late")
    sys.modules.pop("fake_late", None)


def test_the_user_can_interrupt_an_import_and_look_again(put):
    interrupt = (
        "import os, signal\nif not os.environ.pop('FAKE_DONE', ''): signal.raise_signal(signal.SIGINT)\n" + SOUND
    )
    put("spoilt-1.5.dist-info", {"METADATA": NAMED, "entry_points.txt": OURS}, interrupt)
    registry = Registry(environment={})
    with pytest.raises(KeyboardInterrupt):
        registry.plugins()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_DONE", "1")
        assert [p.status for p in registry.plugins() if p.distribution == "Spoilt"] == ["loaded"]
    assert len(registry.plugins()) == len({(p.name, p.distribution) for p in registry.plugins()})
