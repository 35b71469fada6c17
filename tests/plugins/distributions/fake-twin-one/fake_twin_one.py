"""In order, but its component has the same name as one of fake-twin-two."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import attrs

import tunekit


@attrs.frozen(kw_only=True)
class Twin(tunekit.Evaluator):
    name = "twin"
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {"twin": "max"}

    def evaluate(self, model, tokenizer, data, context):
        return {"twin": 1.0}


@tunekit.hookimpl
def tunekit_components():
    return [Twin]
