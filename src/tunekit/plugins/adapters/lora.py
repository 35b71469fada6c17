"""LoRA: low-rank adaptation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.fields import at_least, between
from tunekit.core.model.peft_method import PeftMethod
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel


@attrs.frozen(kw_only=True)
class LoRA(PeftMethod):
    """Low-rank adaptation: each chosen weight W becomes W + (alpha / rank) * B @ A, and only A and B are trained.

    A has shape (rank, in_features), B (out_features, rank) and starts at zero, so the model starts as its base:
    rank * (in_features + out_features) parameters a weight, and out_features more with "dora".
    Hu et al. 2021, https://arxiv.org/abs/2106.09685.

    Args:
        rank: rank of the update; parameters grow with it.
        alpha: scale of the update, divided by the rank; None means twice the rank.
        dropout: probability of dropping an input of A while training.
        targets: "all-linear" (every linear layer but the output head), "attention", "mlp", names of modules, or a
            regular expression for the whole name of linear layers.
        bias: which biases are trained besides: "none", "all", or those of the targets ("lora_only").
        variant: "standard"; "rslora" divides alpha by the root of the rank (Kalajdzievski 2023); "dora" trains
            magnitude and direction apart (Liu et al. 2024); "pissa" starts from the largest singular values of W and
            keeps the rest of W frozen (Meng et al. 2024, https://arxiv.org/abs/2404.02948): faster at first, but
            attaching decomposes every target, which takes minutes for billions of parameters, and what is saved has
            twice the rank, so that it fits the original W; exactly so in float32, while a bfloat16 W has its rest
            rounded.
        layers: numbers of the layers to adapt, from 0; None for all.
        trained_modules: names of modules trained whole and saved with the adapter, such as a head.
    """

    name = "lora"
    supports = frozenset({"nf4", "int8"})
    trains_added_tokens = True

    rank: int = attrs.field(default=16, validator=at_least(1))
    alpha: float | None = attrs.field(default=None, validator=at_least(0))
    dropout: float = attrs.field(default=0.0, validator=between(0, 1))
    targets: str | tuple[str, ...] = "all-linear"
    bias: Literal["none", "all", "lora_only"] = "none"
    variant: Literal["standard", "rslora", "dora", "pissa"] = "standard"
    layers: tuple[int, ...] | None = None
    trained_modules: tuple[str, ...] = ()

    def check(self, context: Context) -> None:
        """Refuse "pissa" over a quantized base: it starts by taking the base's weights apart."""
        if self.variant == "pissa" and context.quantization:
            raise ConfigError(f"pissa cannot start from {context.quantization} weights; choose another", "LoRA.variant")

    def peft_config(self, context: Context) -> PeftConfig:
        """PEFT's LoraConfig."""
        from peft import LoraConfig

        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
            bias=self.bias,
            use_rslora=self.variant == "rslora",
            use_dora=self.variant == "dora",
            init_lora_weights="pissa" if self.variant == "pissa" else True,
            modules_to_save=list(self.trained_modules) or None,
        )
        # Set afterwards: PEFT refuses it beside a string, which `attach` turns into names.
        config.layers_to_transform = None if self.layers is None else list(self.layers)
        return config

    def place(self, config: PeftConfig, model: PreTrainedModel) -> None:
        """Find the targets; on a model without weights there is nothing for "pissa" to decompose."""
        super().place(config, model)
        if any(parameter.is_meta for parameter in model.parameters()):
            config.init_lora_weights = True

    def attach(self, model: PreTrainedModel, context: Context) -> nn.Module:
        """Wrap `model` by PEFT; "pissa" besides keeps the factors it starts from, and what `save` needs."""
        wrapped = super().attach(model, context)
        if self.variant == "dora":
            for _, layer in _lora_layers(wrapped):
                _measure_rows(layer)
        if self.variant == "pissa":
            for name, layer in _lora_layers(wrapped):
                start = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
                if start[0].shape[0] < self.rank:
                    raise ConfigError(f"{name} has only {start[0].shape[0]} singular values: lower it", "LoRA.rank")
                for at, factor in zip(_START, start, strict=True):
                    layer.register_buffer(at, factor.detach().clone(), persistent=False)
        return wrapped

    def save(self, model: nn.Module, directory: Path) -> None:
        """Write PEFT's files; those of "pissa" hold B @ A - B0 @ A0 as plain LoRA of twice the rank, for the base."""
        super().save(model, directory)
        starts = {name: layer for name, layer in _lora_layers(model) if hasattr(layer, _START[0])}
        if starts:
            _write_difference(starts, directory)


_START = ("start_A", "start_B")


def _lora_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if "default" in getattr(module, "lora_A", ())]


def _measure_rows(layer: nn.Module) -> None:
    """Start DoRA's magnitudes at the lengths of the rows of W, by which they are divided: the model starts as its base.

    PEFT takes them in the dtype of W, and divides by them in float32: in bfloat16, up to 0.4 % off.
    """
    import torch
    from peft.utils.integrations import dequantize_module_weight

    magnitudes = layer.lora_magnitude_vector["default"]
    weight = dequantize_module_weight(layer.get_base_layer()).float()
    lengths = magnitudes.get_weight_norm(weight, torch.zeros((), device=weight.device), 0.0)
    magnitudes.weight.data = lengths.to(magnitudes.weight)


def _write_difference(starts: Mapping[str, nn.Module], directory: Path) -> None:
    """W - B0 @ A0 + B @ A is W + [B, -B0] @ [A; A0]: the adapter over W, at the same scale."""
    import torch
    from safetensors.torch import load_file, save_file

    weights, settings = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    tensors = load_file(weights)
    for name, layer in starts.items():
        for factor, start, axis, sign in (("lora_A", layer.start_A, 0, 1), ("lora_B", layer.start_B, 1, -1)):
            now = tensors[f"{name}.{factor}.weight"]
            tensors[f"{name}.{factor}.weight"] = torch.cat([now, sign * start.to(now)], axis).contiguous()
    save_file(tensors, weights, metadata={"format": "pt"})
    table = json.loads(settings.read_text(encoding="utf-8"))
    table.update(r=2 * table["r"], lora_alpha=2 * table["lora_alpha"], init_lora_weights=True)
    settings.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
