"""In order: an evaluator given as a class, and one named without importing its module."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import attrs

import tunekit


@attrs.frozen(kw_only=True)
class Luck(tunekit.Evaluator):
    name = "luck"
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {"luck": "max"}

    def evaluate(self, model, tokenizer, data, context):
        return {"luck": 1.0}


@tunekit.hookimpl
def tunekit_components():
    return [Luck, tunekit.Lazy("evaluator", "skill", "fake_working_heavy:Skill")]
