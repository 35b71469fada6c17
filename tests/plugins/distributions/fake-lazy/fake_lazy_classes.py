"""What fake_lazy names."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import attrs

import tunekit


@attrs.frozen(kw_only=True)
class Honest(tunekit.Evaluator):
    name = "honest"
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {"honest": "max"}

    def evaluate(self, model, tokenizer, data, context):
        return {"honest": 1.0}


class Plain:
    """No component."""
