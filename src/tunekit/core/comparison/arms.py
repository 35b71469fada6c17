"""The arms of a comparison: their names, which are also those of their directories, and their pipelines."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import attrs

from tunekit.core import recipe
from tunekit.core.interfaces import AdapterMethod, Quantizer
from tunekit.core.pipeline import Pipeline
from tunekit.core.registry import default_registry
from tunekit.errors import ConfigError

LONGEST = 60
"""Characters of a name, so that paths stay short enough everywhere."""


@attrs.frozen(kw_only=True)
class Method:
    """A method with a learning rate, before it is run.

    Args:
        name: of the arm.
        pipeline: with this method and learning rate; its seed and the length of its training are still to be set.
    """

    name: str
    pipeline: Pipeline

    @property
    def quantizer(self) -> Quantizer | None:
        """How its base is stored."""
        return self.pipeline._quantizer

    @property
    def stored(self) -> str:
        """What decides how its base is stored: methods with the same can share one, those that write into it last."""
        return repr((self.quantizer, self.pipeline.adapter.trains_base))

    @property
    def quantization(self) -> str | None:
        """The scheme its base is stored in."""
        return self.quantizer.scheme if self.quantizer else None


def methods(
    pipeline: Pipeline, adapters: Sequence[AdapterMethod], learning_rates: Sequence[float] | None
) -> list[Method]:
    """Every method with every learning rate, or with its own; see `tunekit.compare` for the arguments.

    Raises ConfigError for two that are the same, and for what is no adapter method.
    """
    for at, adapter in enumerate(adapters):
        if not isinstance(adapter, AdapterMethod):
            raise ConfigError(f"expected an adapter method, got {adapter!r}", f"compare.adapters[{at}]")
    made = []
    for adapter in adapters:
        for rate in learning_rates or (None,):
            suffix = "" if rate is None else f"-lr-{rate!r}"
            trainer = pipeline.trainer
            if rate is not None or "learning_rate" in attrs.fields_dict(type(trainer)):
                trainer = with_fields(trainer, learning_rate=rate)
            arm = attrs.evolve(pipeline, adapter=adapter, trainer=trainer)
            made.append(Method(name=name_of(adapter) + suffix, pipeline=arm))
    names = [method.name for method in made]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{sorted(twice)[0]} is given twice", "compare.adapters")
    return made


def name_of(adapter: AdapterMethod) -> str:
    """The method's name and every field that is not at its default: "lora-rank-4".

    It depends on nothing else, so that an arm keeps its directory whatever it is compared with. It is safe as a
    directory on any system: where letters had to be changed, or are capital, a hash of the fields makes up for it.
    """
    registry = default_registry()
    table = recipe.to_table(adapter, registry)
    defaults = {field.name: field.default for field in attrs.fields(type(adapter))}
    parts = [str(table["use"])]
    for name, value in table.items():
        if name != "use" and getattr(adapter, name) != defaults[name]:
            parts += [name.replace("_", "-"), *_words(value)]
    plain = "-".join(parts)
    safe = re.sub(r"[^a-z0-9._-]+|\.{2,}", "-", plain.lower()).strip("-.")
    if safe != plain or len(safe) > LONGEST:
        digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:8]
        return f"{safe[: LONGEST - 9]}-{digest}"
    return safe


def with_fields(trainer: Any, **changes: Any) -> Any:
    """The trainer with some fields changed; ConfigError naming the one that it does not have."""
    fields = attrs.fields_dict(type(trainer))
    for name in changes:
        if name not in fields:
            raise ConfigError(
                f"{trainer.name} has no field `{name}` for a comparison to set, as tk.SFT has", "compare.pipeline"
            )
    return attrs.evolve(trainer, **changes)


def _words(value: Any) -> list[str]:
    """A plain value of a recipe in words."""
    if isinstance(value, dict):
        return [word for name, item in value.items() for word in (str(name), *_words(item))]
    if isinstance(value, list):
        return [word for item in value for word in _words(item)]
    return [str(value)]
