"""Peft: every method of the installed peft that has no class of its own here, by its name."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.component import Context
from tunekit.core.fields import check_type, did_you_mean, positive
from tunekit.core.model.peft_method import PeftMethod
from tunekit.errors import ConfigError, NotSupported
from tunekit.plugins.adapters import virtual_tokens

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel

OWN = {
    "LORA": "LoRA",
    "ADALORA": "AdaLoRA",
    "IA3": "IA3",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "PROMPT_TUNING": "PromptTuning",
    "PREFIX_TUNING": "PrefixTuning",
}
"""Types that have a class of their own, where what PEFT leaves to its user is done."""
CANNOT = {
    "MULTITASK_PROMPT_TUNING": "it needs the number of a task beside each row, which tunekit's rows do not have",
    "POLY": "it needs the number of a task beside each row, which tunekit's rows do not have",
    "CPT": "its loss is its own, weighted by the types of tokens beside each row; tunekit takes the loss from logits",
    "FROD": "it is set up from the values of weights, which a plan does not load",
    "SHIRA": "it is set up from the values of weights, which a plan does not load",
    "XLORA": "it mixes adapters that are trained already, and has none to start from",
}
"""Types that cannot work in a pipeline, and why."""
MOVED = frozenset({"C3A", "CARTRIDGE", "FOURIERFT", "P_TUNING", "UNILORA", "VBLORA"})
"""Types that do not start as their base, by PEFT's defaults."""
OURS = ("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping")
"""Options that the pipeline sets."""


@attrs.frozen(kw_only=True)
class Peft(PeftMethod):
    """A method of PEFT by name: W becomes what `type` makes of it, with the fields of PEFT's configuration as options.

    For methods that have no class of their own here: what is trained, its shapes and its count are PEFT's, and so are
    the defaults. Type and options are checked against the installed version before anything is loaded. Those that need
    more than rows of text, such as a task's number, are refused with the reason. Over a quantized base it is not
    offered. https://huggingface.co/docs/peft

    Args:
        type: a `peft.PeftType` in capitals: "VERA", "OFT", "BOFT", "HRA", "LN_TUNING", "P_TUNING", ...
        options: fields of that type's configuration class by name; `target_modules` may be a group of layers
            ("all-linear", "attention", "mlp") or names, as in LoRA's targets.
        learning_rate: the peak where the trainer leaves it open; good ones differ between types by a factor of 100.
    """

    name = "peft"

    type: str
    options: Mapping[str, Any] = attrs.field(factory=dict)
    learning_rate: float = attrs.field(default=2e-4, validator=positive)

    @property
    def starts_as_base(self) -> bool:  # type: ignore[override]
        """Whether its type does by PEFT's defaults, as far as that is known of it."""
        return self.type not in MOVED

    def check(self, context: Context) -> None:
        """Refuse what is known without PEFT; the rest needs its configuration classes, which import torch."""
        if self.type in OWN:
            raise ConfigError(f"{self.type} has a class of its own: use tk.{OWN[self.type]}", "Peft.type")
        if self.type in CANNOT:
            raise ConfigError(f"{self.type} cannot be used: {CANNOT[self.type]}", "Peft.type")
        for name in self.options:
            if name in OURS:
                raise ConfigError("is set by the pipeline", f"Peft.options.{name}")

    def extra_tokens(self) -> int:
        """The virtual tokens of a type that has such; ConfigError for a type or options that PEFT does not know."""
        config = self._config()
        return int(config.num_virtual_tokens) if config.is_prompt_learning else 0

    def peft_config(self, context: Context) -> PeftConfig:
        """The configuration of the type."""
        return self._config()

    def place(self, config: PeftConfig, model: PreTrainedModel) -> None:
        """See `PeftMethod.place`."""
        try:
            super().place(config, model)
        except ConfigError as error:
            raise ConfigError(error.message, "Peft.options.target_modules") from None

    def attach(self, model: PreTrainedModel, context: Context) -> nn.Module:
        """See `PeftMethod.attach`; ConfigError with PEFT's reason if the type does not fit the model."""
        try:
            return self._hidden(super().attach(model, context))
        except (TypeError, ImportError, NotImplementedError) as error:
            raise ConfigError(f"{self.type} does not fit {type(model).__name__}: {error}", "Peft") from error

    def load(self, model: PreTrainedModel, directory: Path) -> nn.Module:
        """See `PeftMethod.load`."""
        return self._hidden(super().load(model, directory))

    def merge(self, model: nn.Module, context: Context) -> PreTrainedModel:
        """See `PeftMethod.merge`; NotSupported with the reason for a type that PEFT cannot merge."""
        if not hasattr(model.base_model, "merge_and_unload"):
            raise NotSupported(
                f"{self.type} cannot be merged into its base; keep the adapter and the base side by side"
            )
        try:
            return super().merge(model, context)
        except (NotImplementedError, ValueError, TypeError) as error:
            raise NotSupported(f"{self.type} cannot be merged: {error}") from error

    def _hidden(self, model: Any) -> nn.Module:
        hidden: nn.Module = virtual_tokens.hide(model) if model.active_peft_config.is_prompt_learning else model
        return hidden

    def _config(self) -> PeftConfig:
        """PEFT's configuration, anew each time; ConfigError for what it does not know or takes in another type."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        classes = {str(kind.value): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if self.type not in classes:
            offered = classes.keys() - OWN.keys() - CANNOT.keys()
            raise ConfigError(f"unknown type {self.type!r}{did_you_mean(self.type.upper(), offered)}", "Peft.type")
        cls = classes[self.type]
        known = {name: field for name, field in cls.__dataclass_fields__.items() if field.init and name not in OURS}
        annotations = typing.get_type_hints(cls)
        options = {}
        for name, value in self.options.items():
            where = f"Peft.options.{name}"
            if name not in known:
                raise ConfigError(f"unknown option of {self.type}{did_you_mean(name, known)}", where)
            options[name] = list(value) if isinstance(value, tuple) else value
            default = known[name].default  # not always of the type that PEFT says
            if (type(value), value) != (type(default), default):
                check_type(options[name], annotations[name], where)
        try:
            return cls(task_type="CAUSAL_LM", **options)
        except (ValueError, TypeError, ImportError) as error:
            raise ConfigError(f"{self.type}: {error}", "Peft.options") from error
