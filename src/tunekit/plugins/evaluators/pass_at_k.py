"""PassAtK: how often generated code passes its tests."""

from __future__ import annotations

import ast
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import islice
from math import comb
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import attrs

from tunekit.core.component import Context, check_requirements
from tunekit.core.data.codec import Codec
from tunekit.core.data.row_source import RowSource
from tunekit.core.evaluation.sampling import sample
from tunekit.core.fields import as_tuple, at_least, positive
from tunekit.core.interfaces import DataSource, Encoded, Evaluator
from tunekit.core.outcomes import Measured
from tunekit.errors import ConfigError, DataError
from tunekit.plugins.evaluators.sandbox import fault_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint")
"""Where a function that is gone on with has ended, as Chen et al. have it."""


class Problem(NamedTuple):
    """One of the source's rows: how code begins, or what is asked, its tests, and the function these are given."""

    prompt: str
    test: str
    entry_point: str | None


def _are_counts(instance: Any, attribute: Any, value: Any) -> None:
    if not value or any(type(k) is not int or k < 1 for k in value) or len(set(value)) < len(value):
        raise ConfigError(f"must be different whole numbers above 0, at least one, got {value!r}", "PassAtK.k")


@attrs.frozen(kw_only=True)
class PassAtK(Evaluator):
    """The share of programming problems that one of `k` generated programs solves (Chen et al., arXiv 2107.03374).

    Of each problem `samples` programs are run with its tests; if c of n pass, 1 - C(n - c, k) / C(n, k) is the chance
    that k of them, drawn without putting back, hold a right one. Metrics: `pass_at_1` and the like, means over the
    problems. Details: how many programs passed, and what went wrong with the others.

    Generated code is run, so `allow_execution` must be True. Each program has a process of its own with an empty
    environment and a temporary directory, within limits of time, memory, processes and files, without network where the
    system can take it away, and is killed with all that it started. That holds what goes wrong by itself; for code that
    may be hostile on purpose, run tunekit in a container or a virtual machine that has nothing to lose.

    A recipe cannot allow it by itself: see `tunekit.load`.

    The problems are rows of their own, in the columns of HumanEval: `prompt`; `test`, code with assertions; and
    `entry_point`, for tests that define `check(candidate)`. The held-out rows play no part.

    Args:
        source: where the problems come from, a source of rows such as JsonLines; its split "train" is read.
        allow_execution: whether what the model writes may be run on this machine.
        k: for each number, a metric.
        samples: programs for each problem, at least the greatest `k`.
        temperature: of the draws; 0 is greedy, and then one program is all there is.
        continued: the prompt is the beginning of a program, which the model goes on with; False asks it as a message of
            the user, and takes the first fenced block of the answer, or all of it, as code.
        max_new_tokens: an answer is cut after so many tokens.
        max_rows: only so many problems, the first; None for all.
        seconds: of CPU time for one program.
        memory: for one program, in MiB.
    """

    name = "pass-at-k"
    reads_rows = False

    source: DataSource
    allow_execution: bool = attrs.field(default=False, metadata={"permits": "programs that the model writes"})
    k: tuple[int, ...] = attrs.field(default=(1,), converter=as_tuple, validator=_are_counts)
    samples: int = attrs.field(default=1, validator=at_least(1))
    temperature: float = attrs.field(default=0.0, validator=at_least(0))
    continued: bool = True
    max_new_tokens: int = attrs.field(default=256, validator=at_least(1))
    max_rows: int | None = attrs.field(default=None, validator=at_least(1))
    seconds: float = attrs.field(default=5.0, validator=positive)
    memory: int = attrs.field(default=1024, validator=at_least(128))

    @property
    def better(self) -> Mapping[str, Literal["min", "max"]]:  # type: ignore[override]
        """One metric for each `k`."""
        return {f"pass_at_{k}": "max" for k in self.k}

    def check(self, context: Context) -> None:
        """Execution must be allowed, the source be one of rows, and there be samples enough."""
        if not self.allow_execution:
            raise ConfigError(
                "runs programs that the model writes, with the rights of this process but for a sandbox's limits; "
                "write allow_execution=True if that may be done on this machine",
                "PassAtK.allow_execution",
            )
        if find_spec("resource") is None:
            raise ConfigError("needs a system whose processes can be limited, such as Linux or macOS", "PassAtK")
        if self.samples < max(self.k):
            raise ConfigError(f"k={max(self.k)} needs as many samples at least, got {self.samples}", "PassAtK.samples")
        if self.samples > 1 and not self.temperature:
            raise ConfigError("greedy samples are all the same; set it above 0, to 0.8 say", "PassAtK.temperature")
        if not isinstance(self.source, RowSource):
            raise ConfigError("must be a source of rows, such as tk.JsonLines(path=...)", "PassAtK.source")
        check_requirements(self.source)
        self.source.check(context)

    def check_data(self, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context) -> None:
        """DataError for a row without prompt and tests; the held-out rows do not matter."""
        list(self._problems())

    def evaluate(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context
    ) -> Mapping[str, float]:
        """The share of problems that are solved."""
        if not self.allow_execution:
            self.check(context)
        problems, codec = list(self._problems()), Codec(tokenizer, context.template)
        prompts = [
            codec.encode({"text": problem.prompt})["input_ids"][:-1] if self.continued else codec.prompt(problem.prompt)
            for problem in problems
        ]
        drawn = sample(
            model,
            tokenizer,
            prompts,
            self.max_new_tokens,
            count=self.samples,
            temperature=self.temperature,
            seed=context.seed,
        )
        answers = [[codec.decode(ids) for ids in some] for some in drawn]
        programs = [
            program(problem, answer, self.continued)
            for problem, some in zip(problems, answers, strict=True)
            for answer in some
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            faults = list(pool.map(lambda text: fault_of(text, seconds=self.seconds, memory=self.memory), programs))
        right = [faults[at : at + self.samples].count("") for at in range(0, len(faults), self.samples)]
        scores = {f"pass_at_{k}": [pass_at_k(self.samples, passed, k) for passed in right] for k in self.k}
        return Measured(
            {name: sum(some) / len(some) for name, some in scores.items()},
            scores=scores,
            details={
                "passed": right,
                "faults": dict(Counter(filter(None, faults))),
                "answers": [
                    {"prompt": problem.prompt, "answer": some[0]}
                    for problem, some in zip(problems, answers, strict=True)
                ],
            },
        )

    def _problems(self) -> Iterator[Problem]:
        """The rows of the source; DataError, with its place, for one that is no problem."""
        assert isinstance(self.source, RowSource)
        columns = self.source.columns or {}
        found = False
        for place, row in islice(self.source.read("train"), self.max_rows):
            if isinstance(row, DataError):
                raise row
            prompt, test, entry_point = (row.get(columns.get(name, name)) for name in Problem._fields)
            if not (isinstance(prompt, str) and prompt.strip() and isinstance(test, str) and test.strip()):
                raise DataError(f"{place}: PassAtK needs the columns prompt and test, as text")
            if entry_point is not None and not (isinstance(entry_point, str) and entry_point.isidentifier()):
                raise DataError(f"{place}: entry_point must be the name of a function, got {entry_point!r}")
            found = True
            yield Problem(prompt, test, entry_point)
        if not found:
            raise DataError("PassAtK.source has no rows")


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that `k` of so many samples, of which so many passed, hold one that passed."""
    return 1 - comb(samples - passed, k) / comb(samples, k)


def program(problem: Problem, answer: str, continued: bool) -> str:
    """What is run: the answer's code, and the tests of it."""
    if continued:
        end = min((at for stop in STOPS if (at := answer.find(stop)) >= 0), default=len(answer))
        code = problem.prompt + answer[:end]
    else:
        fenced = re.search(r"```[^\n]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
        code = fenced[1] if fenced else answer
        if _is_code(problem.prompt):  # its imports, and a function that the answer's own takes the place of
            code = f"{problem.prompt}\n{code}"
    tests = f"{code}\n\n{problem.test}\n"
    return tests + (f"\ncheck({problem.entry_point})\n" if problem.entry_point else "")


def _is_code(prompt: str) -> bool:
    try:
        ast.parse(prompt)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
