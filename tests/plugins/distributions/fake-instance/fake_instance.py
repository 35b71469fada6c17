"""Offers an instance where a class belongs."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import attrs

import tunekit


@attrs.frozen(kw_only=True)
class Made(tunekit.Evaluator):
    name = "made"
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {"made": "max"}

    def evaluate(self, model, tokenizer, data, context):
        return {"made": 1.0}


@tunekit.hookimpl
def tunekit_components():
    return [Made()]
