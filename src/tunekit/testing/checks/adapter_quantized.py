"""Checks of adapter methods over quantized bases: on what they say they support, they do all that they do on others."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from unittest import SkipTest

import attrs

from tunekit.core.interfaces import AdapterMethod, Quantizer
from tunekit.core.model.dequantize import dequantize
from tunekit.core.registry import default_registry
from tunekit.errors import ConfigError, NotSupported
from tunekit.testing.checks import adapter as plain
from tunekit.testing.checks import adapter_results as results
from tunekit.testing.harness import Harness, scratch
from tunekit.testing.training import logits


def trains_on_what_it_supports(adapter: AdapterMethod, harness: Harness) -> None:
    """On a base of every scheme in `supports` it starts as that base and trains as on a plain one."""
    _on_each(
        (
            plain.starts_as_the_base,
            plain.base_is_frozen,
            plain.gradients_arrive,
            plain.evaluation_keeps_gradients,
            plain.checkpointing_keeps_gradients,
            plain.trains_in_bfloat16,
            plain.learns,
            plain.is_deterministic,
        ),
        adapter,
        harness,
    )


def is_saved_and_merged_on_what_it_supports(adapter: AdapterMethod, harness: Harness) -> None:
    """Trained on a base of every scheme in `supports`, it is saved, loaded, and merged onto the dequantized base."""
    _on_each((_is_saved_and_merged,), adapter, harness)


def _is_saved_and_merged(adapter: AdapterMethod, harness: Harness) -> None:
    """Put onto the dequantized base and merged there, as an export does, it predicts the same; or it is NotSupported.

    Quantized layers compute as they do in training: some quantize activations besides when they are evaluated.
    """
    quantizer, exact = harness.quantizer, attrs.evolve(harness, quantizer=None)
    assert quantizer is not None
    model = results.trained_model(adapter, harness)
    results.is_saved(adapter, model, harness)
    expected = logits(model, harness.batch(), training=quantizer.is_quantized)
    with scratch() as directory:
        adapter.save(model, directory)
        loaded = adapter.load(dequantize(harness.model(), quantizer), directory).eval()
    try:
        merged = adapter.merge(loaded, exact.context())
    except NotSupported:
        return
    results.is_merged(merged, exact, expected)


def _on_each(
    checks: Iterable[Callable[[AdapterMethod, Harness], None]], adapter: AdapterMethod, harness: Harness
) -> None:
    """Run `checks` on a base of every scheme that the method supports with these fields."""
    quantizers = [quantizer for scheme in sorted(adapter.supports) for quantizer in _of_scheme(scheme)]
    if adapter.supports and not quantizers:
        raise SkipTest(f"no quantizer for {', '.join(sorted(adapter.supports))} is installed")
    for quantizer in quantizers:
        over = attrs.evolve(harness, quantizer=quantizer)
        try:
            adapter.check(over.context())
        except ConfigError:  # refused before anything is loaded: these fields do not go with it
            continue
        for check in checks:
            try:
                check(adapter, over)
            except Exception as error:
                raise AssertionError(
                    f"on a base of the scheme {quantizer.scheme}, which stands in `supports`, "
                    f"{check.__name__.strip('_')} fails: {type(error).__name__}: {error}"
                ) from error


def _of_scheme(scheme: str) -> Iterator[Quantizer]:
    """The first quantizer of that scheme whose packages are installed, if there is one."""
    registry = default_registry()
    for cls in (registry.find("quantizer", name) for name in registry.names("quantizer")):
        if getattr(cls, "scheme", None) == scheme and all(map(importlib.util.find_spec, cls.requires)):
            quantizer = cls()
            assert isinstance(quantizer, Quantizer)
            yield quantizer
            return


CHECKS = (trains_on_what_it_supports, is_saved_and_merged_on_what_it_supports)
