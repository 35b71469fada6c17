"""Offers an evaluator that claims to be an adapter."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import attrs

import tunekit


@attrs.frozen(kw_only=True)
class Liar(tunekit.Evaluator):
    name = "liar"
    kind = "adapter"
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {"liar": "max"}

    def evaluate(self, model, tokenizer, data, context):
        return {"liar": 1.0}


@tunekit.hookimpl
def tunekit_components():
    return [Liar]
