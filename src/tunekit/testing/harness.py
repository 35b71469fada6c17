"""What the checks work with: a tiny model, a few rows, and a run in a temporary directory."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.common.assets import TINY
from tunekit.core.component import Component, Context
from tunekit.core.data.batching import collate
from tunekit.core.data.codec import Codec
from tunekit.core.interfaces import AdapterMethod, DataSource, Encoded, Evaluator, Example, Quantizer, Trainer
from tunekit.core.model import attaching
from tunekit.core.model.base import Base, no_progress_bars
from tunekit.core.pipeline import Pipeline
from tunekit.core.registry import Registry, default_registry
from tunekit.core.run.observers import Observers
from tunekit.core.run.run_log import RunLog
from tunekit.testing.tiny import tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

STEPS = 20
"""Optimizer steps planned in the adapter checks: what `context.total_steps` says."""

_PAIRS = {"one": "uno", "two": "due", "three": "tre", "four": "quattro", "five": "cinque", "six": "sei", "seven": "7"}
ROWS: tuple[Example, ...] = tuple(
    {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
    for asked, answer in _PAIRS.items()
)
"""Seven short conversations of different lengths: a prime number, so that nearly every batch size leaves a rest."""


@attrs.frozen(kw_only=True)
class Harness:
    """Makes what a check needs, anew each time.

    Args:
        architecture: of the tiny model: "llama" or "gpt2".
        rows: what is trained and evaluated on.
        quantizer: what the base is quantized with; None for a plain one.
        dtype: of the base.
        memory: what the checks that share this harness need not do twice.
    """

    architecture: str = "llama"
    rows: tuple[Example, ...] = ROWS
    quantizer: Quantizer | None = None
    dtype: str = "float32"
    memory: dict[str, Any] = attrs.field(factory=dict, init=False, eq=False, repr=False)

    def model(self) -> PreTrainedModel:
        """The tiny base model, in evaluation mode, with the same weights on every call."""
        import torch

        if self.quantizer is None:
            return tiny_model(self.architecture).to(getattr(torch, self.dtype)).eval()
        if "base" not in self.memory:  # loading it from disk takes ten times as long as copying it
            self.memory["base"] = quantized(tiny_model(self.architecture), self.quantizer, self.context())
        return copy.deepcopy(self.memory["base"])

    def codec(self) -> Codec:
        """The codec of the tiny tokenizer."""
        return Codec(tiny_tokenizer())

    def encoded(self, trainer: Trainer | None = None) -> list[Encoded]:
        """The rows as tokens: as `trainer` encodes them, else as the codec does."""
        if trainer:
            codec = self.codec()
            return [trainer.encode(row, codec) for row in self.rows]
        if "encoded" not in self.memory:
            codec = self.codec()
            self.memory["encoded"] = [codec.encode(row) for row in self.rows]
        return copy.deepcopy(self.memory["encoded"])

    def batch(self) -> dict[str, Tensor]:
        """All rows as one batch: `input_ids`, `attention_mask` and `labels`, each (rows, time)."""
        return collate(self.encoded(), pad_id=0)

    def context(self, steps: int = STEPS, directory: Path | None = None, quantization: str | None = None) -> Context:
        """The facts of a run on the tiny model."""
        return Context(
            model_id=TINY,
            model_type=self.architecture,
            device="cpu",
            dtype=self.dtype,
            quantization=self.quantizer.scheme if self.quantizer else quantization,
            total_steps=steps,
            run_directory=directory,
        )

    def pipeline(self, component: Component) -> Pipeline:
        """A pipeline with `component` in its place and built-ins in the others; made without importing torch."""
        source: Any = default_registry().find("source", "in-memory")
        parts: dict[str, Any] = {"data": source(rows=self.rows)}
        if isinstance(component, DataSource):
            parts["data"] = component
        elif isinstance(component, Evaluator):
            parts["evaluators"] = (component,)
        else:
            parts[component.kind] = component
        if isinstance(component, Quantizer):
            lora = default_registry().find("adapter", "lora")
            # Whether a method can train on it is not what is asked here.
            told = {"name": "lora-on-any-base", "supports": frozenset({component.scheme})}
            parts["adapter"] = type("LoRAOnAnyBase", (lora,), told)()
        return Pipeline(model=TINY, **parts)


@contextmanager
def run_log() -> Iterator[RunLog]:
    """A run that writes into a temporary directory and that nobody observes."""
    with scratch() as directory:
        yield RunLog(directory=directory, observers=Observers(Registry(builtins={}, environment=_NO_PLUGINS)))


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty directory, deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="tunekit-") as directory:
        yield Path(directory)


def quantized(model: PreTrainedModel, quantizer: Quantizer, context: Context) -> PreTrainedModel:
    """The model, saved and loaded again with the quantizer, as the pipeline loads a base."""
    with scratch() as directory, no_progress_bars():
        model.save_pretrained(directory)
        loaded = Base(model=str(directory)).load(
            device=context.device, dtype=context.dtype, options=quantizer.load_kwargs(context)
        )
    prepared = quantizer.prepare(loaded, context)
    assert isinstance(prepared, type(model)), f"prepare returned {type(prepared).__name__}: return the model"
    return prepared.eval()


def attached(adapter: AdapterMethod, harness: Harness, steps: int = STEPS) -> nn.Module:
    """The method on a fresh base, from the same seed each time, with so many steps planned."""
    import torch

    model = harness.model()
    torch.manual_seed(0)
    return attaching.attach(adapter, model, harness.context(steps))


_NO_PLUGINS = {"TUNEKIT_DISABLE_PLUGINS": "*"}
