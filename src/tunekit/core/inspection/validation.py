"""Checking data before it is trained on: every row is read once, and what is wrong, odd or costly is reported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import compress
from typing import Any

from tunekit.core.data.dataset import room_for_rows
from tunekit.core.data.rows import held_out_in, sides
from tunekit.core.inspection import corrected
from tunekit.core.inspection.data_figures import Figures, Tally
from tunekit.core.inspection.examination import Examination
from tunekit.core.inspection.findings import Finding, many
from tunekit.core.inspection.leakage import leaks
from tunekit.core.inspection.report import Report
from tunekit.core.interfaces import AdapterMethod, DataSource, Trainer
from tunekit.core.model.base import Base, context_length
from tunekit.core.registry import default_registry
from tunekit.errors import ConfigError, DataError

FEWEST = 10
"""Hosted fine-tuning (OpenAI, Mistral) refuses fewer rows."""
MANY = 100
"""OpenAI's guide sees clear improvements from 50 to 100 rows on; below, its cookbook makes up for it with epochs."""


def validate(
    source: DataSource,
    *,
    model: str | None = None,
    template: str | None = None,
    trainer: Trainer | None = None,
    adapter: AdapterMethod | None = None,
    validation: float | DataSource | None = None,
    seed: int = 0,
    added_tokens: tuple[str, ...] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
    epochs: float | None = None,
    tokens_per_second: float | None = None,
    price_per_million_tokens: float | None = None,
) -> Report:
    """Read every row once, as a run would, and report what is wrong with the data and what is in it.

    Args:
        source: the training rows.
        model: what a pipeline takes as its model; only its tokenizer and configuration are loaded. None counts
            characters instead of tokens, and cannot tell what a run says of template and length.
        template: a Jinja chat template; None takes the model's own.
        trainer: how rows are encoded, how long they may be and what becomes of longer ones; None takes `SFT()`.
        adapter: counts where it takes tokens of the model's context, as prompt tuning does.
        validation: a source of held-out rows, or the share that a run would hold out; None for none.
        seed: of the run; it chooses which rows a share holds out.
        added_tokens: those of the pipeline.
        revision: branch, tag or commit of a Hub model.
        trust_remote_code: whether code in the model's repository may run.
        epochs: passes over the data, for time and cost; None takes the trainer's, else what the report advises.
        tokens_per_second: how fast training is, for the time it takes.
        price_per_million_tokens: in whatever currency, for the cost.

    Raises:
        ConfigError: an argument cannot be used. What is wrong with the data is in the report.
    """
    share = 0.0 if validation is None or isinstance(validation, DataSource) else float(validation)
    if not 0 <= share < 1:
        raise ConfigError(f"a share must be in [0, 1), got {share}", "validate.validation")
    named = {
        "epochs": epochs,
        "tokens_per_second": tokens_per_second,
        "price_per_million_tokens": price_per_million_tokens,
    }
    for name, value in named.items():
        if value is not None and not value > 0:
            raise ConfigError(f"must be positive, got {value}", f"validate.{name}")
    if trainer is None:
        builtin: Any = default_registry().find("trainer", "sft")
        trainer = builtin()
    codec, longest = None, None
    if model is not None:
        base = Base(
            model=model, revision=revision, trust_remote_code=trust_remote_code, added_tokens=tuple(added_tokens)
        )
        base.check()
        codec = base.codec(template)
        longest = room_for_rows(context_length(base.config()), adapter.extra_tokens() if adapter else 0)
    reading = Examination(trainer, codec, longest, seed if share else None)
    train = reading.read(source, "train", "train")
    elsewhere = held_out_in(source, validation)
    held = reading.read(*elsewhere, "validation") if elsewhere else None

    findings = reading.findings
    out = [False] * len(train.taken)
    if held is None and share and out:
        try:
            out = sides(train.ranks, share)
        except DataError as error:
            findings.append(train.of_all(str(error), "error"))
    trained = [not is_out for is_out in out]
    findings += _unusable(train, held, trained, out)
    splits: dict[str, Figures] = {}
    for tally in filter(None, (train, held)):
        splits[tally.split], odd = tally.close(encoded=codec is not None)
        findings += odd
    if held is None:
        leaked = list(leaks(train.prints, trained, train.prints, out))
        kept_out = sum(compress(train.pieces, out))
    else:
        leaked = list(leaks(train.prints, trained, held.prints, [True] * len(held.taken)))
        kept_out = sum(held.pieces)
    findings += leaked

    rows = sum(compress(train.pieces, trained))
    tokens = sum(compress(train.taken, trained)) if codec else None
    advised = advised_epochs(rows)
    passes = epochs or getattr(trainer, "epochs", None) or advised
    spent = tokens * passes if tokens is not None else None
    without = frozenset(found.place for found in findings if found.left_out and found.split == "train")
    return Report(
        problems=tuple(findings),
        splits=splits,
        unit="tokens" if codec else "characters",
        limit=reading.limit,
        context_length=longest,
        over_length=reading.over_length,
        sufficient_length=reading.longest,
        training_rows=rows,
        validation_rows=kept_out,
        leaked=len(leaked),
        tokens=tokens,
        supervised_tokens=sum(compress(train.learned, trained)) if codec else None,
        epochs=passes,
        advised_epochs=advised,
        seconds=spent / tokens_per_second if spent is not None and tokens_per_second else None,
        cost=spent * price_per_million_tokens / 1e6 if spent is not None and price_per_million_tokens else None,
        advice=tuple(_advice(rows, kept_out, reading)),
        write=partial(corrected.write, source=source, without=without, checksum=train.checksum),
    )


def advised_epochs(rows: int) -> int:
    """Passes over so many rows, as OpenAI's data preparation notebook chooses them.

    Three, but for fewer than 34 rows so many that 100 rows are seen, at most 25; and for more than 8,333 rows so few
    that 25,000 are, at least 1.
    """
    if rows * 3 < 100:
        return min(25, 100 // max(rows, 1))
    return 3 if rows * 3 <= 25_000 else max(1, 25_000 // rows)


def _unusable(train: Tally, held: Tally | None, trained: Sequence[bool], out: Sequence[bool]) -> Iterator[Finding]:
    """Errors about all rows together: none, or none left once rows are dropped; and the warning that they are few."""
    if not train.taken:
        yield train.of_all("no row can be used", "error")
        return
    if not any(compress(train.pieces, trained)):
        yield train.of_all("no training row is left once rows are dropped", "error")
    if held is None and any(out) and not any(compress(train.pieces, out)):
        yield train.of_all("no held-out row is left once rows are dropped", "error")
    if held is not None and held.rows and not any(held.pieces):
        yield held.of_all("no held-out row can be used", "error")
    if len(train.taken) < FEWEST:
        rows = many(len(train.taken), "row")
        yield train.of_all(f"only {rows} to train on; hosted fine-tuning wants at least {FEWEST}")


def _advice(rows: int, held_out: int, reading: Examination) -> Iterator[str]:
    if FEWEST <= rows < MANY:
        yield f"{rows} training rows are few: results depend on which they are; {MANY} and more are steadier."
    if not held_out:
        yield "Nothing is held out, so nothing is measured: give validation=0.1, or a source of held-out rows."
    elif held_out < MANY:
        # Half of the widest 95% interval of a share: 1.96 standard errors at one half.
        points, rows_out = 98 / held_out**0.5, many(held_out, "held-out row")
        yield f"An accuracy measured on {rows_out} is known to within {points:.0f} points, 19 times in 20."
    if reading.over_length and reading.context is not None and reading.longest > reading.context:
        yield (
            f"The longest row has {reading.longest:,} tokens and the model takes {reading.context:,}, so no max_length "
            "is enough: shorten or split those rows, or drop or truncate them (on_long)."
        )
    elif reading.over_length:
        yield f"max_length={reading.longest} is the smallest that takes every row whole."
    if reading.codec is None:
        yield "No model was given: tokens, lengths and what the chat template makes of the rows were not checked."
