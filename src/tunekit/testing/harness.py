"""What the checks work with: a tiny model, a few rows, a run in a temporary directory, and a plain training loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.assets import TINY
from tunekit.core.batching import collate
from tunekit.core.codec import IGNORED, Codec
from tunekit.core.component import Component, Context
from tunekit.core.evaluation import evaluating
from tunekit.core.interfaces import AdapterMethod, DataSource, Encoded, Evaluator, Example, Quantizer, Trainer
from tunekit.core.observers import Observers
from tunekit.core.pipeline import Pipeline
from tunekit.core.registry import Registry, default_registry
from tunekit.core.run import RunLog
from tunekit.testing.tiny import tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

STEPS = 20
"""Optimizer steps planned in the adapter checks: what `context.total_steps` says."""
LEARNING_RATE = 1e-2

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
        memory: what the checks that share this harness need not do twice.
    """

    architecture: str = "llama"
    rows: tuple[Example, ...] = ROWS
    memory: dict[str, Any] = attrs.field(factory=dict, init=False, eq=False, repr=False)

    def model(self) -> PreTrainedModel:
        """The tiny base model, in evaluation mode, with the same weights on every call."""
        return tiny_model(self.architecture).eval()

    def codec(self) -> Codec:
        """The codec of the tiny tokenizer."""
        return Codec(tiny_tokenizer())

    def encoded(self, trainer: Trainer | None = None) -> list[Encoded]:
        """The rows as tokens: as `trainer` encodes them, else as the codec does."""
        codec = self.codec()
        return [trainer.encode(row, codec) if trainer else codec.encode(row) for row in self.rows]

    def batch(self) -> dict[str, Tensor]:
        """All rows as one batch: `input_ids`, `attention_mask` and `labels`, each (rows, time)."""
        return collate(self.encoded(), pad_id=0)

    def context(self, steps: int = STEPS, directory: Path | None = None, quantization: str | None = None) -> Context:
        """The facts of a run on the tiny model."""
        return Context(
            model_id=TINY,
            model_type=self.architecture,
            device="cpu",
            dtype="float32",
            quantization=quantization,
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
            parts["adapter"] = type("LoRA", (lora,), {"supports": frozenset({component.scheme})})()
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


def train(
    adapter: AdapterMethod,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    steps: int,
    *,
    first: int = 1,
    optimizer: Optimizer | None = None,
    after_backward: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train on one batch, with every slot of the method called as a trainer must; returns the loss of each step.

    Args:
        adapter: the method that was attached.
        model: what it returned.
        batch: what is learned, over and over.
        steps: how many steps to take.
        first: the number of the first of them.
        optimizer: to go on with; None for a new one.
        after_backward: called in each step while the gradients are there.
    """
    optimizer = optimizer or new_optimizer(model)
    losses = []
    model.train()
    for step in range(first, first + steps):
        loss = cross_entropy(model, batch)
        loss.backward()
        extra = adapter.extra_loss(model)
        if extra is not None:
            extra.backward()
        after_backward()
        optimizer.step()
        adapter.after_step(model, step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def attached(adapter: AdapterMethod, harness: Harness) -> nn.Module:
    """The method on a fresh base, from the same seed each time."""
    import torch

    model = harness.model()
    torch.manual_seed(0)
    return adapter.attach(model, harness.context())


def new_optimizer(model: nn.Module) -> Optimizer:
    """AdamW over the trainable parameters, without weight decay."""
    import torch

    return torch.optim.AdamW(trainable(model).values(), lr=LEARNING_RATE, weight_decay=0.0)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen(model: nn.Module) -> dict[str, nn.Parameter]:
    """The other parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, by name."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that are not bit for bit what they were."""
    import torch

    return [name for name in before if name not in after or not torch.equal(before[name], after[name])]


def distance(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference of any two elements."""
    return float((one - other).abs().max())


def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What the model predicts in evaluation mode, (rows, time, vocabulary), without gradients; padding set to zero."""
    with evaluating(model):
        return _forward(model, batch) * batch["attention_mask"][:, :, None]


def cross_entropy(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean cross-entropy of the supervised tokens, in the mode the model is in."""
    from torch.nn import functional

    predicted = _forward(model, batch)[:, :-1].float()
    return functional.cross_entropy(predicted.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)


def _forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    found: Tensor = model(**inputs, use_cache=False).logits
    assert found.shape[:2] == batch["input_ids"].shape, (
        f"the logits are {tuple(found.shape)} for inputs of {tuple(batch['input_ids'].shape)}: return those "
        "of each input token, and cut off those of tokens that the method puts before"
    )
    return found


_NO_PLUGINS = {"TUNEKIT_DISABLE_PLUGINS": "*"}
