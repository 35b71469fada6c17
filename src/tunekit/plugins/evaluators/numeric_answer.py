"""NumericAnswer: how often the generated answer ends in the right number."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import ClassVar, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.evaluation.answers import Answer, AnswerEvaluator
from tunekit.core.outcomes import Measured
from tunekit.errors import DataError

MARK = "####"
_NUMBER = re.compile(
    r"(?:(?<![\w.)])(?P<sign>[-+\u2212])\s?)?"  # after a digit or a letter it is a minus or a hyphen, and no sign
    r"(?:(?<![^\W\d_])[$\u20ac\u00a3\u00a5\u20b9]\s?(?P<inner>[-+\u2212])?)?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)


@attrs.frozen(kw_only=True)
class NumericAnswer(AnswerEvaluator):
    """The share of rows whose answer is the reference's number, read as in GSM8K (https://arxiv.org/abs/2110.14168).

    The number is the first one after "####", and the last of the text where there is none. Commas between thousands
    are taken out, signs and the decimal point are read, currency before and units behind a number are not part of it;
    18, 18.00 and $18 are the same. Fractions, percentages and numbers in words are not worked out. An answer without a
    number is wrong. Metric: `numeric_answer`, from 0 to 1.

    Args:
        max_new_tokens: an answer is cut after so many tokens; the steps to the number need room.
        max_rows: only so many rows, the first, are asked; None for all.
    """

    name = "numeric-answer"
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {"numeric_answer": "max"}

    max_new_tokens: int = attrs.field(default=256, validator=AnswerEvaluator.__attrs_attrs__.max_new_tokens.validator)

    def check_answer(self, expected: str) -> None:
        """DataError for a row without a number to compare with."""
        if number(expected) is None:
            raise DataError(f"there is no number in the answer {expected[:60]!r}")

    def compare(self, answers: Sequence[Answer], context: Context) -> Mapping[str, float]:
        """The share of right numbers, and how many answers have none."""
        pairs = [(number(given), number(expected)) for given, expected in answers]
        right = [float(given is not None and given == expected) for given, expected in pairs]
        return Measured(
            {"numeric_answer": sum(right) / len(right)},
            scores={"numeric_answer": right},
            details={"without_number": sum(given is None for given, _ in pairs)},
        )


def number(text: str) -> Decimal | None:
    """The final number of an answer; None if there is none."""
    _, mark, after = text.partition(MARK)
    first = _NUMBER.search(after) if mark else None
    if first:
        return _value(first)
    found = list(_NUMBER.finditer(text))
    return _value(found[-1]) if found else None


def _value(match: re.Match[str]) -> Decimal:
    negative = (match["sign"] in {"-", "\u2212"}) != (match["inner"] in {"-", "\u2212"})
    value = Decimal(match["digits"].replace(",", ""))
    return -value if negative else value
