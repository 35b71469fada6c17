"""Checks of adapter methods over quantized bases: what they say they support, they train on."""

from __future__ import annotations

import importlib.util
from unittest import SkipTest

import attrs

from tunekit.core.interfaces import AdapterMethod, Quantizer
from tunekit.core.registry import default_registry
from tunekit.errors import ConfigError
from tunekit.testing.checks import adapter as plain
from tunekit.testing.harness import Harness

TRAINING = (plain.base_is_frozen, plain.gradients_arrive, plain.evaluation_keeps_gradients, plain.learns)


def trains_on_what_it_supports(adapter: AdapterMethod, harness: Harness) -> None:
    """On a base of every scheme in `supports`, gradients arrive and stay right, it learns, and the base is frozen."""
    quantizers = [quantizer for scheme in sorted(adapter.supports) for quantizer in _of_scheme(scheme)]
    if adapter.supports and not quantizers:
        raise SkipTest(f"no quantizer for {', '.join(sorted(adapter.supports))} is installed")
    for quantizer in quantizers:
        over = attrs.evolve(harness, quantizer=quantizer)
        try:
            adapter.check(over.context())
        except ConfigError:  # refused before anything is loaded: these fields do not go with it
            continue
        for check in TRAINING:
            try:
                check(adapter, over)
            except Exception as error:
                raise AssertionError(
                    f"on a base of the scheme {quantizer.scheme}, which stands in `supports`, {check.__name__} fails: "
                    f"{type(error).__name__}: {error}"
                ) from error


def _of_scheme(scheme: str) -> list[Quantizer]:
    """The first quantizer of that scheme whose packages are installed, if there is one."""
    registry = default_registry()
    found = [registry.find("quantizer", name) for name in registry.names("quantizer")]
    for cls in found:
        if getattr(cls, "scheme", None) == scheme and all(map(importlib.util.find_spec, cls.requires)):
            quantizer = cls()
            assert isinstance(quantizer, Quantizer)
            return [quantizer]
    return []


CHECKS = (trains_on_what_it_supports,)
