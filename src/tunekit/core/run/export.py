"""From a run to a plain model directory: merged, written beside its place, read again, compared, and then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.component import Context
from tunekit.core.data.codec import Codec
from tunekit.core.data.contract import GOLDEN
from tunekit.core.evaluation.predicting import evaluating, predictions, stop_ids
from tunekit.core.interfaces import AdapterMethod, Encoded, Quantizer
from tunekit.core.model.base import Base, Loaded, no_progress_bars, stop_at
from tunekit.core.run import files
from tunekit.core.run.model_card import model_card
from tunekit.errors import ConfigError, ExportError, NotSupported, RunExists

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

REPORT = "export.json"
CARD = "README.md"
TOLERANCE = 1e-5
"""Of logits in float32, relative to the largest: the same weights by the same code, so only rounding may differ."""


HeldOut = Callable[[Codec], Sequence[Encoded]]
"""Reads and encodes the held-out rows."""


@attrs.frozen(kw_only=True)
class Parts:
    """What the models of a run are made of; each is loaded when it is asked for.

    Args:
        base: where the base is.
        adapter: the method that was trained.
        quantizer: how the base was stored; None for a plain one.
        load: gives the tuned model, or with False the base it started from, as it was in the run.
        load_plain: gives the tuned model over the dequantized base in float32, to be merged into a dtype; None for
            that of the run.
        held_out: reads and encodes the held-out rows.
    """

    base: Base
    adapter: AdapterMethod
    quantizer: Quantizer | None
    load: Callable[[bool], Loaded]
    load_plain: Callable[[str | None], Loaded]
    held_out: HeldOut


def export(run: Path, parts: Parts, directory: Path, dtype: str | None, live: Loaded | None) -> Path:
    """Write the tuned model of `run` into `directory`; see `Run.export`.

    Args:
        run: the run directory.
        parts: what its models are made of.
        directory: where to; new or empty.
        dtype: of the written weights; None for that of the run.
        live: the tuned model over its quantized base, if the merged weights are to be quantized again.
    """
    if directory.exists() and (directory.is_file() or any(directory.iterdir())):
        raise RunExists(f"{directory} is not empty; choose another directory")
    if live and not parts.quantizer:
        raise NotSupported("into_quantized needs a quantizer, and this run has none: leave it out")
    with _beside(directory) as scratch:
        if live and parts.quantizer:
            report = _write_quantized(parts, parts.quantizer, dtype, live, scratch)
        else:
            report = _write_plain(parts, dtype, scratch)
        files.write_json(scratch / REPORT, report)
        (scratch / CARD).write_text(model_card(run, report), encoding="utf-8")
    return directory


def _write_plain(parts: Parts, dtype: str | None, scratch: Path) -> dict[str, Any]:
    """The merged model, rounded once to the dtype; what is read again is compared with the rounded weights."""
    expected, context = _merged_and_written(parts, dtype, scratch)
    reread = attrs.evolve(parts.base, model=str(scratch), revision=None)
    again = _read(reread, context.device, "float32")
    return {"dtype": context.dtype, "quantization": None, "compared": expected.compare(again, reread)}


def _merged_and_written(parts: Parts, dtype: str | None, scratch: Path) -> tuple[_Expected, Context]:
    """The merged model is gone when this returns: in float32, there is not always room for two."""
    loaded = _merged(parts, dtype)
    _round(loaded.model, loaded.context.dtype)
    _save(loaded.model, loaded.codec, scratch)
    # Compared in float32: half precision has no arithmetic on some devices, and its rounding would hide a difference.
    _round(loaded.model, "float32")
    return _Expected.of(loaded.model, loaded), loaded.context


def _merged(parts: Parts, dtype: str | None) -> Loaded:
    """The merged model in float32, to be written in `dtype`."""
    loaded = parts.load_plain(dtype)
    merged = parts.adapter.merge(loaded.model, loaded.context).eval()
    stop_at(merged, loaded.codec)
    return attrs.evolve(loaded, model=merged)


def _write_quantized(
    parts: Parts, quantizer: Quantizer, dtype: str | None, live: Loaded, scratch: Path
) -> dict[str, Any]:
    """The merged model, quantized anew from its float32 weights, and what that costs on the held-out rows."""
    rows = parts.held_out(live.codec)
    plain, merged = scratch / "plain", _merged(parts, dtype)
    _save(merged.model, merged.codec, plain)
    context, codec = attrs.evolve(live.context, dtype=merged.context.dtype), merged.codec
    del merged
    options = quantizer.load_kwargs(context)
    source = attrs.evolve(parts.base, model=str(plain), revision=None)
    quantized = source.load(device=context.device, dtype=context.dtype, options=options)
    try:
        if quantized.config.quantization_config is None:
            raise AttributeError("its configuration does not say how it is quantized")
        _save(quantized, codec, scratch)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise NotSupported(
            f"a model quantized by {quantizer.name} cannot be written ({error}); export without into_quantized"
        ) from error
    shutil.rmtree(plain)
    reread = attrs.evolve(parts.base, model=str(scratch), revision=None)
    # What a quantizer does after loading is done to both: on the CPU, bitsandbytes computes wrongly without it.
    again = quantizer.prepare(_read(reread, context.device, context.dtype), context)
    compared = _Expected.of(quantizer.prepare(quantized, context), live).compare(again, reread)
    nll = {"before": mean_nll(live, rows), "after": mean_nll(attrs.evolve(live, model=again), rows)} if rows else None
    return {"dtype": context.dtype, "quantization": quantizer.scheme, "compared": compared, "nll": nll}


def mean_nll(loaded: Loaded, rows: Sequence[Encoded]) -> float:
    """The mean negative log-likelihood, in nats, of the supervised tokens of `rows`."""
    from torch.nn import functional

    total, count = 0.0, 0
    with evaluating(loaded.model):
        for logits, tokens in predictions(loaded.model, loaded.codec.tokenizer, rows):
            total += float(functional.cross_entropy(logits, tokens, reduction="sum"))
            count += len(tokens)
    return total / count


@contextmanager
def _beside(directory: Path) -> Iterator[Path]:
    """A scratch directory that becomes `directory` when all went well, and is deleted when not."""
    there = next(parent for parent in directory.absolute().parents if parent.is_dir())
    scratch = there / f".{directory.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        yield scratch
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.exists():
            directory.rmdir()
        scratch.rename(directory)
    except OSError as error:
        raise ConfigError(f"cannot write into {directory}: {error.strerror or error}", "directory") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _save(model: PreTrainedModel, codec: Codec, directory: Path) -> None:
    with no_progress_bars():
        model.save_pretrained(directory)
    codec.tokenizer.chat_template = codec.template
    codec.tokenizer.save_pretrained(directory)


def _read(base: Base, device: str, dtype: str) -> PreTrainedModel:
    """What was written, as transformers alone reads it."""
    try:
        return base.load(device=device, dtype=dtype)
    except ConfigError as error:
        raise ExportError(f"transformers does not read what was written: {error.message}") from error


def _round(model: PreTrainedModel, dtype: str) -> None:
    """Cast the parameters alone: `model.to(dtype)` would also round the rotary frequencies, which are not written."""
    import torch

    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))


@attrs.frozen(kw_only=True)
class _Expected:
    """What a model that was written must do when it is read again.

    Args:
        codec: its tokenizer and template.
        added: ids of added tokens.
        rows: the contract's conversation, as a row of training and as a prompt, and with the added tokens behind it.
        logits: what it predicts for them, on the CPU.
        stops: its stop tokens.
    """

    codec: Codec
    added: Sequence[int]
    rows: Sequence[Sequence[int]]
    logits: Sequence[Tensor]
    stops: Any

    @classmethod
    def of(cls, model: PreTrainedModel, loaded: Loaded) -> _Expected:
        """What `model` does."""
        codec, added = loaded.codec, loaded.context.added_ids
        rows = [
            codec.prompt(GOLDEN[-1:]),
            codec.prompt(GOLDEN[:1]),
            codec.encode({"messages": GOLDEN[:2]})["input_ids"],
        ]
        if added:
            rows.append([*rows[0], *added])
        logits = [_logits(model, row) for row in rows]
        return cls(codec=codec, added=added, rows=rows, logits=logits, stops=stop_ids(model))

    def compare(self, again: PreTrainedModel, base: Base) -> Mapping[str, Any]:
        """Compare what was read again of `base`; ExportError if logits, stop tokens, tokens or template differ."""
        reread = Codec(base.tokenizer())
        try:
            reread.check_contract(self.codec.contract())
        except ConfigError as error:
            raise ExportError(f"the tokenizer that was written differs: {error.message}") from error
        if stop_ids(again) != self.stops:
            raise ExportError(f"the stop tokens that were written differ: {stop_ids(again)}, not {self.stops}")
        if self.added and reread.tokenizer.get_vocab() != self.codec.tokenizer.get_vocab():
            raise ExportError("the tokenizer that was written has not the same tokens")
        furthest = 0.0
        for row, expected in zip(self.rows, self.logits, strict=True):
            found = _logits(again, row)
            if expected.shape != found.shape:
                raise ExportError(f"the logits that were written are {[*found.shape]}, not {[*expected.shape]}")
            away = float((expected - found).abs().max())
            if not away <= TOLERANCE * max(1.0, float(expected.abs().max())):
                raise ExportError(f"the logits of what was written are {away:.3g} away from those of the merged model")
            furthest = max(furthest, away)
        return {"rows": len(self.rows), "largest_difference_of_logits": furthest}


def _logits(model: PreTrainedModel, row: Sequence[int]) -> Tensor:
    """What the model predicts for one row, (time, vocabulary), in float32 on the CPU."""
    import torch

    with evaluating(model):
        found: Tensor = model(torch.tensor([list(row)], device=model.device), use_cache=False).logits[0].float().cpu()
    return found
