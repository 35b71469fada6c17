"""In order, but written for a later plugin interface."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import attrs

import tunekit

TUNEKIT_API = 2


@attrs.frozen(kw_only=True)
class Later(tunekit.Evaluator):
    name = "later"
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {"later": "max"}

    def evaluate(self, model, tokenizer, data, context):
        return {"later": 1.0}


@tunekit.hookimpl
def tunekit_components():
    return [Later]
