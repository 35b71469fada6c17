"""What every plugin component is: a frozen attrs class whose fields are its hyper-parameters."""

import importlib.util
from abc import ABC
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import attrs

from tunekit.core.fields import check_types
from tunekit.errors import ConfigError

Kind = Literal["source", "adapter", "quantizer", "trainer", "evaluator"]


@attrs.frozen(kw_only=True)
class Context:
    """What a component may know of the run it works in: facts, no services.

    Args:
        model_id: what the user wrote as the model: a Hub id, a directory, or `tunekit:tiny`.
        revision: branch, tag or commit of a Hub model; None for the newest.
        trust_remote_code: whether code in the model's repository may run.
        model_type: the architecture by transformers' name ("llama", "gpt2"); empty while unknown.
        seed: the seed of the run.
        device: "cpu", "cuda" or "cuda:1"; empty while it is not chosen.
        dtype: the dtype of the base weights, by torch's name ("float32", "bfloat16"); empty while not chosen.
        quantization: the scheme in force ("nf4", "int8"), None for a base that is not quantized.
        total_steps: planned optimizer steps; 0 while unknown (no data read yet).
        earliest_end: the step before which the adapter method must not be stopped early.
        learning_rate: the adapter method's own, for a trainer whose user leaves it open.
        better: the metrics that the evaluators return, and which direction is better.
        template: the chat template that the user gave; None for the model's own.
        base_metrics: the evaluators' metrics of the base model; None until it is measured.
        run_directory: where the run writes; None outside of a run.
        added_ids: the tokens added to the model, whose rows of embedding and head are to be trained; none before the
            tokenizer is loaded.
    """

    model_id: str
    revision: str | None = None
    trust_remote_code: bool = False
    model_type: str = ""
    seed: int = 0
    device: str = ""
    dtype: str = ""
    quantization: str | None = None
    total_steps: int = 0
    earliest_end: int = 0
    learning_rate: float = 2e-4
    better: Mapping[str, Literal["min", "max"]] = attrs.field(factory=dict)
    template: str | None = None
    base_metrics: Mapping[str, float] | None = None
    run_directory: Path | None = None
    added_ids: tuple[int, ...] = ()


@attrs.frozen(kw_only=True)
class Component(ABC):
    """Base of the five interfaces. A concrete component is `@attrs.frozen(kw_only=True)`: it is its own configuration.

    Its fields are validated when it is made, in Python and from a recipe alike: every value must be of the annotated
    type. Heavy packages (torch, transformers, ...) are imported inside its methods, never at the top of its module.
    """

    kind: ClassVar[Kind]
    """Which of the five it is; set by the interface."""
    name: ClassVar[str]
    """Its name in recipes, kebab-case; set by the plugin."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Import names of packages it needs beyond tunekit's own; a missing one is a ConfigError with the install line."""

    def __attrs_post_init__(self) -> None:
        check_types(self)

    def check(self, context: Context) -> None:  # noqa: B027 - most components have nothing to check
        """Raise ConfigError if this component cannot work in `context`. Cheap: no torch, no network, no weights."""


def check_requirements(component: Component) -> None:
    """Raise ConfigError with the install line if a package that the component needs is not installed."""
    missing = [name for name in component.requires if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{component.name} needs {', '.join(missing)}: pip install {' '.join(missing)}", type(component).__name__
        )
