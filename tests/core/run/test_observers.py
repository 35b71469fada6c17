"""Observers are told what they ask for; one that raises is set aside, and the others and the run go on."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import tunekit as tk
from tunekit.core.registry import Registry
from tunekit.core.run.observers import Observers

NOBODY = Registry(builtins={}, environment={"TUNEKIT_DISABLE_PLUGINS": "*"})
"""A registry without plugins: only the observers given for the run."""


class Keeps:
    """Keeps what it is told, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    @tk.hookimpl
    def tunekit_run_started(self, steps: int) -> None:
        self.seen.append(("started", steps))

    @tk.hookimpl
    def tunekit_log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.seen.append(("log", step, dict(metrics)))

    @tk.hookimpl
    def tunekit_saved(self, directory: Path) -> None:
        self.seen.append(("saved", directory))

    @tk.hookimpl
    def tunekit_run_finished(self, run: object, error: BaseException | None) -> None:
        self.seen.append(("finished", run, error))


class Raises:
    """Fails whenever something is logged."""

    calls = 0

    @tk.hookimpl
    def tunekit_log(self) -> None:
        self.calls += 1
        raise ValueError("dashboard is down")


def log(observers: Observers, step: int) -> None:
    observers.emit("tunekit_log", run=None, step=step, metrics={"loss": 0.5})


def test_an_observer_of_one_run_is_told_everything_in_the_words_it_asks_for() -> None:
    keeps = Keeps()
    observers = Observers(NOBODY, [keeps])
    observers.emit("tunekit_run_started", run="the run", steps=7)
    observers.emit("tunekit_log", run="the run", step=1, metrics={"loss": 0.5})
    observers.emit("tunekit_saved", run="the run", step=1, directory=Path("step-1"))
    observers.emit("tunekit_run_finished", run="the run", error=None)
    assert keeps.seen == [
        ("started", 7),
        ("log", 1, {"loss": 0.5}),
        ("saved", Path("step-1")),
        ("finished", "the run", None),
    ]


def test_an_observer_of_one_run_hears_of_no_other() -> None:
    first, second = Keeps(), Keeps()
    log(Observers(NOBODY, [first]), 1)
    log(Observers(NOBODY, [second]), 2)
    assert first.seen == [("log", 1, {"loss": 0.5})]
    assert second.seen == [("log", 2, {"loss": 0.5})]


def test_a_plugin_observes_every_run(install: Callable[..., None]) -> None:
    install("fake-observer")
    registry = Registry(builtins={}, environment={})
    log(Observers(registry), 1)
    log(Observers(registry), 2)
    assert importlib.import_module("fake_observer").SEEN == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]


def test_an_observer_that_raises_is_set_aside_with_a_warning_and_the_others_go_on() -> None:
    before, raises, after = Keeps(), Raises(), Keeps()
    observers = Observers(NOBODY, [before, raises, after])
    with pytest.warns(tk.PluginWarning, match="raised in tunekit_log and is set aside: ValueError: dashboard is down"):
        log(observers, 1)
    log(observers, 2)
    assert raises.calls == 1
    assert [seen[1] for seen in before.seen] == [seen[1] for seen in after.seen] == [1, 2]


def test_an_observer_may_not_swallow_an_interrupt() -> None:
    class Interrupted:
        @tk.hookimpl
        def tunekit_log(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        log(Observers(NOBODY, [Interrupted()]), 1)


def test_a_hook_that_does_not_exist_is_refused_with_a_suggestion() -> None:
    class Misspelt:
        @tk.hookimpl
        def tunekit_logs(self, step: int) -> None:
            """Never called."""

    with pytest.raises(tk.PluginError, match=r"'tunekit_logs' is no hook of tunekit; did you mean 'tunekit_log'"):
        Observers(NOBODY, [Misspelt()])


def test_an_argument_that_the_hook_does_not_have_is_refused() -> None:
    class AsksForMore:
        @tk.hookimpl
        def tunekit_log(self, model: object) -> None:
            """Never called."""

    with pytest.raises(tk.PluginError, match="model"):
        Observers(NOBODY, [AsksForMore()])


def test_a_wrapper_is_refused() -> None:
    class Wraps:
        @tk.hookimpl(wrapper=True)
        def tunekit_log(self):
            return (yield)

    with pytest.raises(tk.PluginError, match="a wrapper is not allowed"):
        Observers(NOBODY, [Wraps()])


def test_a_hook_that_is_not_marked_is_refused_since_it_would_never_be_called():
    class Unmarked:
        def tunekit_log(self, step):
            """Never called."""

    with pytest.raises(tk.PluginError, match=r"tunekit_log looks like a hook.*mark it with @tunekit\.hookimpl"):
        Observers(NOBODY, [Unmarked()])


def test_a_class_in_the_place_of_an_observer_is_refused():
    class Observer:
        """Not made yet."""

    with pytest.raises(tk.PluginError, match=r"Observer is a class; an observer is an object, write Observer\(\)"):
        Observers(NOBODY, [Observer])


def test_observers_are_told_in_the_order_in_which_they_were_given():
    told = []

    class Observer:
        def __init__(self, name):
            self.name = name

        @tk.hookimpl
        def tunekit_log(self):
            told.append(self.name)

    Observers(NOBODY, [Observer("first"), Observer("second")]).emit("tunekit_log", run=None, step=1, metrics={})
    assert told == ["first", "second"]
