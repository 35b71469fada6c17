"""Plugins are found, checked one by one, and named apart; one that is broken stops no other."""

import functools
import subprocess
import sys
import warnings
from collections.abc import Callable

import attrs
import pytest

import tunekit as tk
from tunekit.core.hookspecs import DISTRIBUTION
from tunekit.core.registry import Registry


@pytest.fixture
def registry_with(install: Callable[..., None]) -> Callable[..., Registry]:
    """`registry_with("fake-working", TUNEKIT_STRICT_PLUGINS="1")`: a registry of its own, which has not looked yet."""

    def make(*fakes: str, **environment: str) -> Registry:
        install(*fakes)
        return Registry(environment=environment)

    return make


def record(registry: Registry, distribution: str) -> tk.Plugin:
    """What the registry has on record of the one plugin of a distribution."""
    (found,) = [plugin for plugin in registry.plugins() if plugin.distribution == distribution]
    return found


# What is in order ------------------------------------------------------------------------------------------------------


def test_a_plugin_of_another_distribution_is_found_and_recorded(registry_with):
    registry = registry_with("fake-working")
    assert record(registry, "fake-working") == tk.Plugin(
        name="working",
        distribution="fake-working",
        version="1.0",
        components=("evaluator/luck", "evaluator/skill"),
    )
    assert registry.find("evaluator", "luck").__name__ == "Luck"
    assert {"luck", "skill", "perplexity"} <= set(registry.names("evaluator"))


def test_a_lazy_component_is_imported_when_it_is_looked_up_and_not_before(registry_with):
    registry = registry_with("fake-working")
    assert "skill" in registry.names("evaluator")
    assert "fake_working_heavy" not in sys.modules
    assert registry.find("evaluator", "skill").__name__ == "Skill"
    assert "fake_working_heavy" in sys.modules


def test_nothing_is_looked_for_before_the_first_lookup(registry_with):
    registry = registry_with("fake-working", "fake-raises")
    assert "fake_working" not in sys.modules
    with pytest.warns(tk.PluginWarning):
        registry.plugins()
    assert "fake_working" in sys.modules


def test_built_ins_come_first_and_the_others_in_the_order_of_their_distributions(registry_with):
    registry = registry_with("fake-twin-two", "fake-working", "fake-shadow", "fake-twin-one")
    distributions = [plugin.distribution for plugin in registry.plugins()]
    others = [name for name in distributions if name != DISTRIBUTION]
    assert distributions[: -len(others)] == [DISTRIBUTION] * (len(distributions) - len(others))
    assert others == sorted(others)


def test_a_recipe_names_a_component_of_another_distribution(install, tmp_path):
    # In a process of its own: the registry that recipes use looks for plugins once.
    install("fake-working")
    script = f"""
import sys
sys.path.insert(0, {sys.path[0]!r})
import tunekit as tk
table = {{"model": tk.TINY, "data": {{"use": "json-lines", "path": tk.ORDERS}}, "evaluators": [{{"use": "skill"}}]}}
pipeline = tk.Pipeline.from_dict(table)
pipeline.save({str(tmp_path / "recipe.toml")!r})
assert tk.load({str(tmp_path / "recipe.toml")!r}) == pipeline
print(type(pipeline.evaluators[0]).__module__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("fake_working_heavy\n", "")


# What is not -----------------------------------------------------------------------------------------------------------

BROKEN = [
    ("fake-raises", "RuntimeError: no licence found"),
    ("fake-exits", "SystemExit: no licence found"),
    ("fake-signature", "stage"),
    ("fake-hook", "'tunekit_component' is no hook of tunekit; did you mean 'tunekit_components'?"),
    ("fake-wrapper", "tunekit_log: hooks observe; a wrapper is not allowed"),
    ("fake-abstract", "fake_abstract.Half is abstract: it must define evaluate"),
    ("fake-undecorated", "fake_undecorated.Bare is not an attrs class: decorate it with @attrs.frozen(kw_only=True)"),
    ("fake-instance", "Made() is no component: it must be a subclass of one of the five interfaces"),
    ("fake-liar", "fake_liar.Liar says that its kind is 'adapter', but its interface is another"),
]


@pytest.mark.parametrize(("fake", "reason"), BROKEN)
def test_a_broken_plugin_is_recorded_with_the_reason_and_stops_no_other(registry_with, fake, reason):
    registry = registry_with(fake, "fake-working")
    with pytest.warns(tk.PluginWarning, match=fake):
        found = record(registry, fake)
    assert found.status == "failed"
    assert reason in found.error
    assert found.components == ()
    assert registry.find("evaluator", "luck")
    assert registry.find("adapter", "lora") is tk.LoRA


@pytest.mark.parametrize(("fake", "reason"), BROKEN)
def test_strict_mode_raises_for_a_broken_plugin(registry_with, fake, reason):
    registry = registry_with(fake, TUNEKIT_STRICT_PLUGINS="1")
    with pytest.raises(tk.PluginError, match=f"of {fake} 1.0 is failed") as caught:
        registry.plugins()
    assert reason in str(caught.value)


def test_a_plugin_for_another_interface_is_incompatible_and_registers_nothing(registry_with):
    registry = registry_with("fake-future")
    with pytest.warns(tk.PluginWarning, match="'future' of fake-future 1.0 is incompatible"):
        found = record(registry, "fake-future")
    assert found.status == "incompatible"
    assert found.error == "written for plugin interface 2, this tunekit has 1"
    assert "later" not in registry.names("evaluator")
    assert "fake-future/future" not in registry.modules()


def test_a_plugin_that_is_set_aside_is_warned_of_once_with_distribution_and_version(registry_with):
    registry = registry_with("fake-raises")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry.plugins()
        registry.names("adapter")
        registry.find("adapter", "lora")
    messages = [str(warning.message) for warning in caught if warning.category is tk.PluginWarning]
    assert messages == ["plugin 'raises' of fake-raises 1.0 is failed: RuntimeError: no licence found"]


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        (
            "evaluator",
            "no-module",
            "names 'fake_nowhere:Thing', which cannot be imported: No module named 'fake_nowhere'",
        ),
        ("evaluator", "no-class", "names 'fake_lazy_classes:Thing', which cannot be imported"),
        ("evaluator", "other-name", "Honest is evaluator/honest, but is offered as evaluator/other-name"),
        ("adapter", "honest", "Honest is evaluator/honest, but is offered as adapter/honest"),
        ("evaluator", "no-component", "is no component"),
    ],
)
def test_a_lazy_component_that_is_not_what_was_announced_is_an_error_when_looked_up(registry_with, kind, name, reason):
    registry = registry_with("fake-lazy")
    assert record(registry, "fake-lazy").status == "loaded"
    with pytest.raises(tk.PluginError) as caught:
        registry.find(kind, name)
    assert reason in str(caught.value)


# Disabling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("disabled", ["working", "fake-working", "*", "other, fake-working"])
def test_a_disabled_plugin_is_recorded_and_not_imported(registry_with, disabled):
    registry = registry_with("fake-working", TUNEKIT_DISABLE_PLUGINS=disabled)
    found = record(registry, "fake-working")
    assert (found.status, found.error, found.components) == ("disabled", "by TUNEKIT_DISABLE_PLUGINS", ())
    assert "fake_working" not in sys.modules
    assert "luck" not in registry.names("evaluator")


def test_disabling_all_plugins_leaves_the_built_ins(registry_with):
    registry = registry_with("fake-working", TUNEKIT_DISABLE_PLUGINS="*")
    assert registry.find("adapter", "lora") is tk.LoRA
    assert {plugin.distribution for plugin in registry.plugins() if plugin.status == "loaded"} == {DISTRIBUTION}


def test_one_built_in_plugin_can_be_disabled_by_its_name(registry_with):
    registry = registry_with(TUNEKIT_DISABLE_PLUGINS="progress")
    assert [plugin.name for plugin in registry.plugins() if plugin.status == "disabled"] == ["progress"]
    assert "tunekit-sdk/progress" not in registry.modules()


# Names -----------------------------------------------------------------------------------------------------------------


def test_a_name_that_two_distributions_offer_is_ambiguous_and_the_error_names_both(registry_with):
    registry = registry_with("fake-twin-one", "fake-twin-two")
    with pytest.raises(tk.AmbiguousComponent) as caught:
        registry.find("evaluator", "twin")
    message = str(caught.value)
    assert "fake-twin-one 1.0 and fake-twin-two 1.0 both offer an evaluator named 'twin'" in message
    assert "write 'fake-twin-one/twin' or 'fake-twin-two/twin'" in message


@pytest.mark.parametrize("distribution", ["fake-twin-one", "fake-twin-two"])
def test_distribution_and_name_pick_one_of_two_and_recipes_write_it_so(registry_with, distribution):
    registry = registry_with("fake-twin-one", "fake-twin-two")
    found = registry.find("evaluator", f"{distribution}/twin")
    assert found.__module__ == distribution.replace("-", "_")
    assert registry.spelling(found) == f"{distribution}/twin"


def test_distribution_and_name_work_where_the_name_alone_would_do(registry_with):
    registry = registry_with("fake-working")
    assert registry.find("evaluator", "fake-working/luck") is registry.find("evaluator", "luck")
    assert registry.find("adapter", "tunekit-sdk/lora") is tk.LoRA


@pytest.mark.parametrize("name", ["luck", "skill"])
def test_recipes_write_the_bare_name_where_it_is_enough(registry_with, name):
    registry = registry_with("fake-working")
    assert registry.spelling(registry.find("evaluator", name)) == name


def test_the_bare_name_of_a_built_in_always_means_the_built_in(registry_with):
    registry = registry_with("fake-shadow")
    other = registry.find("adapter", "fake-shadow/lora")
    assert registry.find("adapter", "lora") is tk.LoRA
    assert other.__module__ == "fake_shadow"
    assert registry.spelling(tk.LoRA) == "lora"
    assert registry.spelling(other) == "fake-shadow/lora"
    assert record(registry, "fake-shadow").components == ("adapter/lora",)


def test_an_unknown_name_brings_a_suggestion_and_the_plugins_that_are_not_there(registry_with):
    registry = registry_with("fake-raises", "fake-working", TUNEKIT_DISABLE_PLUGINS="fake-working")
    with pytest.warns(tk.PluginWarning), pytest.raises(tk.UnknownComponent) as caught:
        registry.find("evaluator", "perplexty")
    message = str(caught.value)
    assert "no evaluator is named 'perplexty'; did you mean 'perplexity'?" in message
    assert "raises of fake-raises 1.0 (failed: RuntimeError: no licence found)" in message
    assert "working of fake-working 1.0 (disabled: by TUNEKIT_DISABLE_PLUGINS)" in message


def test_a_name_nothing_is_near_to_brings_all_there_are(registry_with):
    with pytest.raises(tk.UnknownComponent, match=r"known: .*json-lines"):
        registry_with().find("source", "zzz")


def test_a_component_of_an_unknown_distribution_is_unknown(registry_with):
    with pytest.raises(tk.UnknownComponent, match="'fake-nobody/lora'"):
        registry_with().find("adapter", "fake-nobody/lora")


def test_a_name_is_looked_up_within_its_kind(registry_with):
    with pytest.raises(tk.UnknownComponent, match="no trainer is named 'lora'"):
        registry_with().find("trainer", "lora")
    with pytest.raises(tk.ConfigError, match="'adaptor' is no kind of component; the kinds are source, adapter"):
        registry_with().find("adaptor", "lora")


# Provenance ------------------------------------------------------------------------------------------------------------


def test_provenance_names_component_distribution_and_version(registry_with):
    registry = registry_with("fake-working", "fake-shadow")
    find = functools.partial(registry.find, "evaluator")
    made_by = {"distribution": "fake-working", "version": "1.0"}
    assert registry.provenance(find("luck")) == {"component": "evaluator/luck", **made_by}
    assert registry.provenance(find("skill")) == {"component": "evaluator/skill", **made_by}
    assert registry.provenance(tk.LoRA)["distribution"] == DISTRIBUTION
    assert registry.provenance(registry.find("adapter", "fake-shadow/lora"))["distribution"] == "fake-shadow"


def test_provenance_of_a_class_that_no_plugin_offers_is_its_module(registry_with):
    assert registry_with().provenance(evaluator("home-made")) == {
        "component": "evaluator/home-made",
        "distribution": "local",
        "version": __name__,
    }


# Registering by hand ---------------------------------------------------------------------------------------------------


def evaluator(called: str) -> type[tk.Evaluator]:
    """An evaluator class of that name, new on every call, as when a notebook's cell is run again."""

    @attrs.frozen(kw_only=True)
    class HomeMade(tk.Evaluator):
        name = called
        better = {called: "max"}  # noqa: RUF012 - annotated by the interface

        def evaluate(self, model, tokenizer, data, context):
            return {called: 1.0}

    return HomeMade


def test_a_class_of_ones_own_is_registered_by_a_decorator(registry_with):
    registry = registry_with()
    made = evaluator("home-made")
    assert registry.register(made) is made
    assert registry.find("evaluator", "home-made") is made
    assert registry.spelling(made) == "home-made"


def test_a_class_that_is_defined_anew_replaces_the_older_one(registry_with):
    registry = registry_with()
    registry.register(evaluator("home-made"))
    newer = registry.register(evaluator("home-made"))
    assert registry.find("evaluator", "home-made") is newer


@pytest.mark.parametrize(("name", "owner"), [("perplexity", DISTRIBUTION), ("luck", "fake-working 1.0")])
def test_a_name_that_is_taken_cannot_be_registered(registry_with, name, owner):
    registry = registry_with("fake-working")
    with pytest.raises(tk.PluginError, match=f"{owner}.* already offers '{name}'; choose another name"):
        registry.register(evaluator(name))


def test_a_class_that_breaks_a_rule_cannot_be_registered(registry_with):
    class Bare(evaluator("bare")):
        pass

    with pytest.raises(tk.PluginError, match="Bare is not an attrs class"):
        registry_with().register(Bare)


def test_a_class_with_the_name_of_anothers_component_is_not_written_to_a_recipe(registry_with):
    registry = registry_with("fake-working")
    with pytest.raises(tk.PluginError, match=r"named 'luck', which is the evaluator of fake-working 1.0"):
        registry.spelling(evaluator("luck"))


# What users see --------------------------------------------------------------------------------------------------------


def test_plugins_prints_a_table_and_returns_the_records(capsys):
    found = tk.plugins()
    header, rule, first, *others = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "plugin"
    assert set(rule) == {"-", " "}
    assert first.split()[:2] == ["builtin", DISTRIBUTION]
    assert "adapter/lora" in [line.strip() for line in others], "one component a line"
    assert isinstance(found, tk.Plugins)
    assert all(isinstance(plugin, tk.Plugin) for plugin in found)


def test_the_table_shows_the_reason_where_a_plugin_is_not_loaded(registry_with):
    registry = registry_with("fake-raises")
    with pytest.warns(tk.PluginWarning):
        found = registry.plugins()
    (line,) = [line for line in str(found).splitlines() if "fake-raises" in line]
    assert line.split(maxsplit=4) == ["raises", "fake-raises", "1.0", "failed", "RuntimeError: no licence found"]


def test_importing_tunekit_imports_no_plugin(install):
    install("fake-working")
    script = f"""
import sys
sys.path.insert(0, {sys.path[0]!r})
import tunekit as tk
print(sorted(name for name in sys.modules if name.startswith(("fake_", "tunekit.plugins"))))
tk.LoRA, tk.plugins
from tunekit.core.registry import default_registry
default_registry().names("adapter")
print(sorted(name for name in sys.modules if name.startswith("fake_")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n['fake_working']\n"


def test_no_plugin_runs_until_a_component_of_another_is_asked_for_or_a_run_is_observed(install, tmp_path):
    install("fake-working")
    script = f"""
import sys
sys.path.insert(0, {sys.path[0]!r})
import tunekit as tk
def imported():
    print(sorted(name for name in sys.modules if name.startswith("fake_")))
pipeline = tk.Pipeline(model=tk.TINY, data=tk.JsonLines(path=str(tk.ORDERS)), trainer=tk.SFT(max_steps=1, batch_size=1))
pipeline.check()
pipeline.plan()
pipeline.save({str(tmp_path / "recipe.toml")!r})
assert tk.load({str(tmp_path / "recipe.toml")!r}) == pipeline
imported()
table = pipeline.to_dict()
tk.Pipeline.from_dict({{**table, "evaluators": [{{"use": "luck"}}]}})
imported()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n['fake_working']\n", done.stderr


def test_a_built_in_is_found_whatever_other_plugins_do_and_in_strict_mode_their_faults_are_told(registry_with):
    assert registry_with("fake-raises", "fake-shadow").find("adapter", "lora") is tk.LoRA
    registry = registry_with(TUNEKIT_STRICT_PLUGINS="1")
    for _ in range(2):
        with pytest.raises(tk.PluginError, match="fake-raises"):
            registry.find("adapter", "lora")


# More rules ----------------------------------------------------------------------------------------------------------


def test_strict_mode_fails_at_every_lookup_not_only_the_first(registry_with):
    registry = registry_with("fake-raises", TUNEKIT_STRICT_PLUGINS="1")
    for _ in range(2):
        with pytest.raises(tk.PluginError, match="fake-raises"):
            registry.plugins()


def test_an_unknown_name_says_how_a_class_of_ones_own_is_made_known(registry_with):
    with pytest.raises(tk.UnknownComponent, match=r"decorated with @tunekit\.register"):
        registry_with().find("adapter", "mine")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": "My_Score"}, "must be kebab-case"),
        ({"name": "a/b"}, "must be kebab-case"),
        ({"better": None}, "must say in `better`"),
        ({"use": attrs.field(default=1), "__annotations__": {"use": int}}, "no field may be called 'use'"),
    ],
)
def test_a_class_that_could_not_be_used_from_a_recipe_is_refused(changes, problem):
    body = {
        "name": "own-score",
        "better": {"own": "max"},
        "evaluate": lambda self, model, tokenizer, data, context: {"own": 1.0},
        **changes,
    }
    own = attrs.frozen(kw_only=True)(type("Own", (tk.Evaluator,), body))
    with pytest.raises(tk.PluginError, match=problem):
        Registry().register(own)
