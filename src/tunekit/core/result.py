"""`Run`: a finished run, to read its figures, to ask the model, and to export it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from tunekit.core import run as files
from tunekit.core.codec import Codec, Message
from tunekit.core.component import Context
from tunekit.core.evaluation import generate
from tunekit.core.interfaces import AdapterMethod
from tunekit.core.model import no_progress_bars
from tunekit.core.table import table
from tunekit.errors import ConfigError, RunExists

if TYPE_CHECKING:
    from torch import nn


@attrs.frozen(kw_only=True)
class Loaded:
    """A model in memory and what is needed to talk to it."""

    model: nn.Module
    codec: Codec
    context: Context


class Run:
    """A finished run. Its model is loaded when it is first asked for.

    Args:
        directory: the run directory.
        adapter: the method that was trained.
        load: gives the tuned model, or with `tuned=False` the base it started from.
        load_plain: gives the tuned model over a float32 base without quantization, as merging it into a dtype needs;
            None where it can be merged as it is.
        tuned: the tuned model, where it is in memory already.
    """

    def __init__(
        self,
        directory: Path,
        adapter: AdapterMethod,
        load: Callable[[bool], Loaded],
        load_plain: Callable[[str | None], Loaded | None],
        tuned: Loaded | None = None,
    ) -> None:
        self.directory = directory
        self._adapter = adapter
        self._load = load
        self._load_plain = load_plain
        self._models: dict[bool, Loaded] = {} if tuned is None else {True: tuned}

    @cached_property
    def result(self) -> Mapping[str, Any]:
        """All of `result.json`."""
        found: Mapping[str, Any] = files.read_json(self.directory / files.RESULT)
        return found

    @property
    def metrics(self) -> Mapping[str, float]:
        """The evaluators' metrics of the tuned model."""
        found: Mapping[str, float] = self.result["metrics"]
        return found

    @property
    def base_metrics(self) -> Mapping[str, float]:
        """The same metrics of the base model, measured by the same code before training."""
        found: Mapping[str, float] = self.result["base_metrics"]
        return found

    @cached_property
    def history(self) -> Sequence[Mapping[str, float]]:
        """What was logged, one mapping a log call, each with its "step"."""
        return files.history(self.directory)

    def generate(self, prompt: str | Sequence[Message], *, max_new_tokens: int = 128, tuned: bool = True) -> str:
        """The model's greedy answer, asked through the same template as in training.

        Args:
            prompt: what the user says, or a conversation as messages that ends before the assistant's turn.
            max_new_tokens: the answer is cut after so many tokens.
            tuned: False asks the base model instead.
        """
        loaded = self._model(tuned)
        answer = generate(loaded.model, loaded.codec.tokenizer, [loaded.codec.prompt(prompt)], max_new_tokens)
        return loaded.codec.decode(answer[0])

    def export(self, directory: str | Path, dtype: Literal["float32", "bfloat16", "float16"] | None = None) -> Path:
        """Write the tuned model as a plain transformers directory: merged weights, tokenizer, template, stop tokens.

        A quantized base is dequantized first: what is written is as large as the model was without quantization.

        Args:
            directory: where to; it must be new or empty.
            dtype: of the written weights; None takes that of the base. The sum is made in float32 and rounded once.

        Raises:
            RunExists: the directory is taken.
            NotSupported: the method cannot be merged into its base.
        """
        import torch

        directory = Path(directory)
        if directory.exists() and (directory.is_file() or any(directory.iterdir())):
            raise RunExists(f"{directory} is not empty; choose another directory")
        loaded = self._load_plain(dtype) or self._model(tuned=True)
        merged = self._adapter.merge(loaded.model, loaded.context).to(getattr(torch, loaded.context.dtype))
        with no_progress_bars():
            merged.save_pretrained(directory)
        loaded.codec.tokenizer.chat_template = loaded.codec.template
        loaded.codec.tokenizer.save_pretrained(directory)
        return directory

    def __str__(self) -> str:
        rows = [[name, _show(self.base_metrics.get(name)), _show(value)] for name, value in self.metrics.items()]
        return table(["metric", "base", "tuned"], rows) if rows else f"run in {self.directory}: no metrics"

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r}, metrics={json.dumps(self.metrics)})"

    def _model(self, tuned: bool) -> Loaded:
        if tuned not in self._models:
            if tuned and not (self.directory / files.ADAPTER).is_dir():
                raise ConfigError(f"the run in {self.directory} is not finished: it holds no adapter yet")
            self._models[tuned] = self._load(tuned)
        return self._models[tuned]


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
