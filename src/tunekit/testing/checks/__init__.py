"""The checks, one file a kind; each is a function `(component, harness)` whose assertions say what to change."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

if "pytest" in sys.modules:
    # Must come before the checks are imported; with it a failed assertion shows the values it compared.
    sys.modules["pytest"].register_assert_rewrite(__name__)

from tunekit.testing.checks import adapter, adapter_results, component, evaluator, quantizer, source, trainer

CheckFunction = Callable[[Any, Any], None]

OF_ALL: tuple[CheckFunction, ...] = component.CHECKS
"""What holds for every component."""
OF_KIND: Mapping[str, tuple[CheckFunction, ...]] = {
    "source": source.CHECKS,
    "adapter": (*adapter.CHECKS, *adapter_results.CHECKS),
    "quantizer": quantizer.CHECKS,
    "trainer": trainer.CHECKS,
    "evaluator": evaluator.CHECKS,
}
"""What holds for the components of a kind."""
