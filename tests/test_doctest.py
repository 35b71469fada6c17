"""The examples in docstrings are executed."""

import doctest
import importlib
import pkgutil

import tunekit


def test_the_examples_in_docstrings_do_what_they_show() -> None:
    names = ["tunekit", *(found.name for found in pkgutil.walk_packages(tunekit.__path__, "tunekit."))]
    outcomes = {name: doctest.testmod(importlib.import_module(name)) for name in names}
    assert {name: outcome.failed for name, outcome in outcomes.items() if outcome.failed} == {}
    assert sum(outcome.attempted for outcome in outcomes.values()) > 0
    assert len(names) > 30
