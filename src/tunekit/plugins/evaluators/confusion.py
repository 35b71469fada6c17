"""What Classification counts: a confusion matrix and the figures made of it, and labels read from free answers."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

Matrix = Sequence[Sequence[int]]
"""Rows by their true class (line) and the class that was answered (column); one column more for unparsed answers."""


class Figures(NamedTuple):
    """Of one class: precision and recall are 0 where there is nothing to divide by; `support` is its rows."""

    precision: float
    recall: float
    f1: float
    support: int


def confusion(truth: Sequence[int], answered: Sequence[int], classes: int) -> list[list[int]]:
    """The confusion matrix, `classes` lines of `classes` + 1 counts; the class number `classes` is "unparsed"."""
    counts = [[0] * (classes + 1) for _ in range(classes)]
    for true, given in zip(truth, answered, strict=True):
        counts[true][given] += 1
    return counts


def figures(matrix: Matrix) -> list[Figures]:
    """Precision, recall, F1 and support of each class (van Rijsbergen, Information Retrieval, 1979, chapter 7)."""
    found = []
    for number, line in enumerate(matrix):
        hits, support, answered = line[number], sum(line), sum(other[number] for other in matrix)
        found.append(
            Figures(
                hits / answered if answered else 0.0,
                hits / support if support else 0.0,
                2 * hits / (support + answered) if support + answered else 0.0,
                support,
            )
        )
    return found


def macro(matrix: Matrix) -> Figures:
    """The plain means over the classes that occur, as the truth or as an answer; F1 is the mean of theirs."""
    answered = [sum(line[number] for line in matrix) for number in range(len(matrix))]
    used = [found for found, given in zip(figures(matrix), answered, strict=True) if found.support or given]
    precision, recall, f1 = (sum(column) / len(used) for column in list(zip(*used, strict=True))[:3])
    return Figures(precision, recall, f1, sum(found.support for found in used))


def fold(text: str) -> str:
    """A label without what does not tell it from others: case, runs of white space, punctuation around it."""
    plain = " ".join(text.casefold().split())
    return plain.strip(string.punctuation + " ") or plain


def parse(answer: str, labels: Sequence[str]) -> int:
    """The number of the label that an answer gives, else `len(labels)`, "unparsed".

    It gives a label by being it, or by having it, and no other label, among its words. Case and punctuation around
    words do not count; a label within a longer one ("good" in "not good") is not read.
    """
    folded, names = fold(answer), [fold(label) for label in labels]
    if folded in names:
        return names.index(folded)
    either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    found = set(re.findall(rf"(?<!\w)(?:{either})(?!\w)", folded))
    return names.index(found.pop()) if len(found) == 1 else len(labels)


def majority(matrix: Matrix) -> tuple[int, list[list[int]]]:
    """The most frequent class, the first of several, and the matrix of always answering it."""
    sizes = [sum(line) for line in matrix]
    number = sizes.index(max(sizes))
    return number, [[size * (at == number) for at in range(len(sizes) + 1)] for size in sizes]


def accuracy(matrix: Matrix) -> float:
    """The share of rows on the diagonal."""
    total: Any = sum(map(sum, matrix))
    return float(sum(line[number] for number, line in enumerate(matrix)) / total)
