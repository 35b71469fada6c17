"""A module that is imported when its component is looked up, not before."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import attrs

import tunekit


@attrs.frozen(kw_only=True)
class Skill(tunekit.Evaluator):
    name = "skill"
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {"skill": "max"}

    def evaluate(self, model, tokenizer, data, context):
        return {"skill": 1.0}
