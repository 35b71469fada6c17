"""The checks, one file a kind; each is a function `(component, harness)` whose assertions say what to change."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

FILES = (
    "adapter",
    "adapter_quantized",
    "adapter_results",
    "component",
    "component_imports",
    "evaluator",
    "quantizer",
    "source",
    "trainer",
)

if "pytest" in sys.modules:
    # Before they are imported, and only where pytest runs: a failed assertion then shows the values it compared.
    sys.modules["pytest"].register_assert_rewrite(*(f"{__name__}.{file}" for file in FILES))

from tunekit.testing.checks import (  # noqa: E402 - the registration above must come first
    adapter,
    adapter_quantized,
    adapter_results,
    component,
    component_imports,
    evaluator,
    quantizer,
    source,
    trainer,
)

CheckFunction = Callable[[Any, Any], None]

OF_ALL: tuple[CheckFunction, ...] = (*component.CHECKS, *component_imports.CHECKS)
"""What holds for every component."""
OF_KIND: Mapping[str, tuple[CheckFunction, ...]] = {
    "source": source.CHECKS,
    "adapter": (*adapter.CHECKS, *adapter_results.CHECKS, *adapter_quantized.CHECKS),
    "quantizer": quantizer.CHECKS,
    "trainer": trainer.CHECKS,
    "evaluator": evaluator.CHECKS,
}
"""What holds for the components of a kind."""
