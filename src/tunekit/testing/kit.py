"""The conformance kit: which checks a component has, and running them, as records or as one pytest test a check."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal
from unittest import SkipTest

import attrs

from tunekit.core.common.random_states import random_states_kept, seed_everything
from tunekit.core.component import Component
from tunekit.core.fields import did_you_mean
from tunekit.core.interfaces import Example
from tunekit.errors import ConfigError
from tunekit.testing import checks
from tunekit.testing.checks import CheckFunction
from tunekit.testing.harness import ROWS, Harness

if TYPE_CHECKING:
    import pytest

Status = Literal["passed", "failed", "expected", "skipped"]
_NONE: Mapping[str, str] = MappingProxyType({})


@attrs.frozen(kw_only=True)
class Record:
    """What became of one check.

    Args:
        component: the component's name.
        check: the check's name.
        status: "passed", "failed", "expected" (it failed, as was said beforehand) or "skipped".
        reason: why it is not passed.
    """

    component: str
    check: str
    status: Status
    reason: str = ""


@attrs.frozen(kw_only=True)
class Check:
    """One property of a component; call it with the component. Raises AssertionError that says what to change.

    Args:
        function: the check itself.
        harness: the model, the rows and the run it uses.
        trains: whether it puts the component to work, for which the packages in `requires` must be installed.
    """

    function: CheckFunction
    harness: Harness
    trains: bool

    @property
    def name(self) -> str:
        """The name in test ids and in `expected_failures`."""
        return self.function.__name__

    def __call__(self, component: Component) -> None:
        """Check `component`; unittest.SkipTest, which pytest knows as well, where it does not apply."""
        if not self.trains:
            self.function(component, self.harness)
            return
        missing = [name for name in component.requires if importlib.util.find_spec(name) is None]
        if missing:
            raise SkipTest(f"{', '.join(missing)} is not installed")
        with random_states_kept():  # checks neither see nor move the caller's
            seed_everything(0)
            self.function(component, self.harness)


def checks_for(
    component: Component, *, architecture: str = "llama", rows: Sequence[Example] = ROWS
) -> tuple[Check, ...]:
    """Every check of a component: those of all components, and those of its kind.

    Args:
        component: the component to check.
        architecture: of the tiny model: "llama" or "gpt2".
        rows: what is trained and evaluated on, where the component needs other rows than conversations.
    """
    harness = Harness(architecture=architecture, rows=tuple(rows))
    found = [(False, function) for function in checks.OF_ALL] + [(True, f) for f in checks.OF_KIND[component.kind]]
    return tuple(Check(function=function, harness=harness, trains=trains) for trains, function in found)


def check_component(
    component: Component,
    *,
    expected_failures: Mapping[str, str] = _NONE,
    architecture: str = "llama",
    rows: Sequence[Example] = ROWS,
) -> list[Record]:
    """Run every check of a component and report each.

    Args:
        component: the component to check.
        expected_failures: the names of checks that fail by design, with the reason; one that passes is a failure.
        architecture: of the tiny model: "llama" or "gpt2".
        rows: what is trained and evaluated on, where the component needs other rows than conversations.

    Raises:
        ConfigError: `expected_failures` names a check that this component does not have.
    """
    cases = checks_for(component, architecture=architecture, rows=rows)
    _check_names(expected_failures, cases)
    return [_record(component, check, expected_failures.get(check.name)) for check in cases]


def parametrize(
    *components: Component,
    expected_failures: Mapping[str, str] = _NONE,
    architecture: str = "llama",
    rows: Sequence[Example] = ROWS,
) -> pytest.MarkDecorator:
    """Decorate a test `(component, check)` so that it runs once for each check of each component.

    Args:
        components: the components to check.
        expected_failures: the names of checks that fail by design, with the reason; one that passes is a failure.
        architecture: of the tiny model: "llama" or "gpt2".
        rows: what is trained and evaluated on, where a component needs other rows than conversations.

    Raises:
        ConfigError: `expected_failures` names a check that none of these components has.
    """
    import pytest

    pairs = [
        (component, label, check)
        for component, label in zip(components, labels(components), strict=True)
        for check in checks_for(component, architecture=architecture, rows=rows)
    ]
    _check_names(expected_failures, [check for _, _, check in pairs])
    xfail = {name: [pytest.mark.xfail(reason=reason, strict=True)] for name, reason in expected_failures.items()}
    cases = [
        pytest.param(component, check, id=f"{label}-{check.name}", marks=xfail.get(check.name, []))
        for component, label, check in pairs
    ]
    return pytest.mark.parametrize(("component", "check"), cases)


def labels(components: Sequence[Component]) -> list[str]:
    """A name for each component; where several share one, with the fields in which they differ: `lora-variant=dora`."""

    def label(component: Component) -> str:
        like = [other for other in components if type(other) is type(component)]
        differing = [
            f"{field.name}={getattr(component, field.name)}"
            for field in attrs.fields(type(component))
            if any(getattr(other, field.name) != getattr(component, field.name) for other in like)
        ]
        return "-".join([component.name, *differing])

    return [label(component) for component in components]


def _record(component: Component, check: Check, expected: str | None) -> Record:
    status: Status = "passed"
    reason = ""
    try:
        check(component)
    except SkipTest as skipped:
        status, reason = "skipped", str(skipped)
    except Exception as error:  # a component under test may raise anything, and the other checks are to be run
        shown = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        status, reason = ("failed", shown) if expected is None else ("expected", expected)
    else:
        if expected is not None:
            status, reason = "failed", f"passes, though it is expected to fail ({expected}); take it off the list"
    return Record(component=component.name, check=check.name, status=status, reason=reason)


def _check_names(expected: Mapping[str, str], cases: Sequence[Check]) -> None:
    known = [check.name for check in cases]
    for name in expected:
        if name not in known:
            raise ConfigError(f"no check is named {name!r}{did_you_mean(name, known)}", "expected_failures")
