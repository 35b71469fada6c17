"""`rank_models`: which base model expects the texts of a domain best, in bits per byte, before anything is trained."""

from __future__ import annotations

import gc
import html
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.common import turns
from tunekit.core.common.secrets import redacted
from tunekit.core.common.table import html_table, table
from tunekit.core.data import dataset
from tunekit.core.data.codec import IGNORED
from tunekit.core.data.tokens import Tokens
from tunekit.core.evaluation.predicting import row_losses
from tunekit.core.evaluation.statistics import mean_interval, paired_difference
from tunekit.core.interfaces import DataSource, Encoded, Example
from tunekit.core.model import devices
from tunekit.core.model.base import Base, context_length
from tunekit.core.model.precision import check_dtype
from tunekit.core.run.files import write_json
from tunekit.errors import ConfigError, DataError, NotSupported

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@attrs.frozen(kw_only=True)
class RankedModel:
    """A base model, and how well it expects the texts.

    Args:
        model: as it was given.
        error: why it could not be measured; None if it was. What follows is then None.
        bits_per_byte: bits of its surprise at all texts by their bytes in UTF-8: less is better.
        interval: of `bits_per_byte`, 95 % over rows.
        p: how likely so great a difference to the best is by luck, by the paired bootstrap; None for the best.
        bytes_per_token: how much text a token of its tokenizer holds here.
        parameters: of the model.
        seconds: loading and measuring it.
    """

    model: str
    error: str | None = None
    bits_per_byte: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    bytes_per_token: float | None = None
    parameters: int | None = None
    seconds: float | None = None


@attrs.frozen(kw_only=True)
class Ranking:
    """What `tunekit.rank_models` returns; prints as a table, the best first.

    Args:
        models: the best first, those that could not be measured last.
        rows: texts, the same for all.
        text_bytes: their bytes in UTF-8.
        context: tokens that a model sees at most.
    """

    models: tuple[RankedModel, ...]
    rows: int
    text_bytes: int
    context: int

    @property
    def best(self) -> str:
        """The model with the fewest bits per byte, as it was given; ConfigError if none could be measured."""
        if not self.models or self.models[0].error:
            raise ConfigError("; ".join(f"{found.model}: {found.error}" for found in self.models), "rank_models")
        return self.models[0].model

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return attrs.asdict(self)

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, whole or not at all, and return the path."""
        write_json(Path(path), self.to_dict())
        return Path(path)

    def __str__(self) -> str:
        return "\n\n".join(filter(None, [self._title, table(*self._table()), "\n".join(self._failures)]))

    def _repr_html_(self) -> str:
        failed = "".join(f"<p>{html.escape(line)}</p>" for line in self._failures)
        return f"<p>{html.escape(self._title)}</p>{html_table(*self._table())}{failed}"

    @property
    def _failures(self) -> list[str]:
        return [f"failed: {found.model}: {found.error}" for found in self.models if found.error]

    @property
    def _title(self) -> str:
        return f"{self.rows:,} rows, {self.text_bytes:,} bytes, at most {self.context:,} tokens of context"

    def _table(self) -> tuple[list[str], list[list[str]]]:
        header = ["model", "bits per byte", "95 % interval", "p", "bytes a token", "parameters", "seconds"]
        return header, [_cells(found) for found in self.models]


def rank_models(
    models: Sequence[str | Path],
    source: DataSource,
    *,
    rows: int = 200,
    context: int = 1024,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Ranking:
    """Rank base models by bits per byte of a domain's texts, one model in memory at a time.

    A row's text is what stands in it, contents of turns parted by blank lines, without any template: so every model is
    asked for the same bytes, all of them. Each token is predicted from what stands before it in its row, the first from
    the tokenizer's token of beginning. Of a row that is longer than the context, each token sees at least half of it.
    Bits per byte do not depend on how a tokenizer cuts the text, as perplexity does (Gao et al. 2020, The Pile,
    https://arxiv.org/abs/2101.00027, section 3.1). It says how well a model knows the texts as it is; which of two
    close ones learns a task better, only training says.

    Args:
        models: Hub ids or directories.
        source: of the texts; its first split is read.
        rows: of so many rows, evenly spread over the source.
        context: tokens, and fewer for a model that was made for fewer.
        device: as for a `Pipeline`.
        dtype: of the weights; None takes bfloat16 on CUDA and float32 on the CPU.
        trust_remote_code: whether code in the repositories of the models may run.

    Raises:
        ConfigError, DataError: no models, one twice, or no rows. What is wrong with a single model is its `error`.
    """
    names = [str(model) for model in models]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"must be different models, at least one, got {names!r}", "rank_models.models")
    for name, value in (("rows", rows), ("context", context)):
        if value < 4:
            raise ConfigError(f"must be at least 4, got {value}", f"rank_models.{name}")
    texts = _texts(source, rows)
    chosen = devices.choose(device)
    check_dtype(dtype, chosen)
    chosen_dtype = dtype or ("bfloat16" if chosen.startswith("cuda") else "float32")
    found: dict[str, RankedModel] = {}
    bits: dict[str, list[float]] = {}
    for name in names:
        began = time.monotonic()
        try:
            base = Base(model=name, trust_remote_code=trust_remote_code)
            with turns.turn("rank_models"):
                bits[name], tokens, parameters = _measure(base, texts, context, chosen, chosen_dtype)
            found[name] = RankedModel(
                model=name,
                bytes_per_token=sum(map(_size, texts)) / tokens,
                parameters=parameters,
                seconds=round(time.monotonic() - began, 3),
            )
        except Exception as error:  # what one model lacks does not stop the others
            found[name] = RankedModel(model=name, error=redacted(f"{type(error).__name__}: {error}"))
        gc.collect()
        if chosen.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()
    return _ranked(found, bits, [_size(text) for text in texts], context)


def _ranked(
    found: Mapping[str, RankedModel], bits: Mapping[str, Sequence[float]], sizes: Sequence[int], context: int
) -> Ranking:
    order = sorted(bits, key=lambda name: sum(bits[name]))
    scores = {name: [one / size for one, size in zip(bits[name], sizes, strict=True)] for name in order}
    ranked = []
    for name in order:
        interval = mean_interval(scores[name], sizes)
        ranked.append(
            attrs.evolve(
                found[name],
                bits_per_byte=sum(bits[name]) / sum(sizes),
                interval=(interval.low, interval.high),
                p=paired_difference(scores[order[0]], scores[name], sizes).p if name != order[0] else None,
            )
        )
    failed = [one for one in found.values() if one.error]
    return Ranking(models=(*ranked, *failed), rows=len(sizes), text_bytes=sum(sizes), context=context)


def _texts(source: DataSource, count: int) -> list[str]:
    """The texts of up to `count` rows, evenly spread."""
    every, _ = dataset.rows(source, 0.0, 0)
    chosen = [every[at * len(every) // min(count, len(every))] for at in range(min(count, len(every)))]
    texts = [text for row in chosen if (text := _text(row))]
    if not texts:
        raise DataError("rank_models.source: no row has any text")
    return texts


def _text(row: Example) -> str:
    """What stands in a row, without a template; of a preference what was chosen."""
    found: list[str] = []
    for name in ("text", "messages", "prompt", "chosen"):
        value = row.get(name, ())
        found += [value] if isinstance(value, str) else [str(turn.get("content") or "") for turn in value]
    return "\n\n".join(filter(None, found))


def _size(text: str) -> int:
    return len(text.encode(errors="replace"))


def _measure(base: Base, texts: Sequence[str], context: int, device: str, dtype: str) -> tuple[list[float], int, int]:
    """Bits of each text, tokens of all, and parameters."""
    base.check()
    tokenizer = base.tokenizer()
    tokens = Tokens(tokenizer)
    encoded = [tokens.ids(tokens.neutral(text)) for text in texts]
    _check_whole(tokenizer, encoded)
    longest = context_length(base.config())
    width = min(context, longest or context)
    cut = [(at, window) for at, ids in enumerate(encoded) for window in _windows(ids, _start(tokenizer), width)]
    model = base.load(device=device, dtype=dtype)
    nats, _ = row_losses(model, tokenizer, [window for _, window in cut])
    bits = [0.0] * len(texts)
    for (at, _), loss in zip(cut, nats, strict=True):
        bits[at] += loss / math.log(2)
    if not all(map(math.isfinite, bits)):
        raise NotSupported("its predictions are not finite: the model is broken, or the dtype too coarse for it")
    return bits, sum(map(len, encoded)), sum(parameter.numel() for parameter in model.parameters())


def _start(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before a text; NotSupported for a tokenizer that has none that could."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise NotSupported("its tokenizer has no token of beginning or end, to predict the first token from")


def _windows(ids: Sequence[int], start: int, width: int) -> Iterator[Encoded]:
    """The tokens of a text in windows of up to `width`; each is supervised once, after half a window or all before."""
    room, step = width - 1, (width - 1) // 2
    done = 0
    while done < len(ids):
        begin = 0 if done == 0 else done - (room - step)
        end = min(len(ids), begin + room)
        yield {
            "input_ids": [start, *ids[begin:end]],
            "labels": [IGNORED] * (1 + done - begin) + list(ids[done:end]),
        }
        done = end


def _check_whole(tokenizer: PreTrainedTokenizerBase, encoded: Iterable[Sequence[int]]) -> None:
    """Raise NotSupported where a part of the text is an unknown token: to predict that is not to predict the text."""
    unknown = tokenizer.unk_token_id
    count = sum(list(ids).count(unknown) for ids in encoded) if unknown is not None else 0
    if count:
        raise NotSupported(f"its tokenizer has no tokens for some of the text: {count:,} are unknown to it")


def _cells(found: RankedModel) -> list[str]:
    if found.error or found.bits_per_byte is None or found.interval is None:
        return [found.model, "failed", *["-"] * 5]
    return [
        found.model,
        f"{found.bits_per_byte:.4g}",
        f"{found.interval[0]:.4g} to {found.interval[1]:.4g}",
        "" if found.p is None else f"{found.p:.2g}",
        f"{found.bytes_per_token:.3g}",
        f"{found.parameters:,}",
        f"{found.seconds:,.1f}",
    ]
