"""From a method's `targets` to the modules of a model: named groups, names, or a regular expression."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from tunekit.core.fields import did_you_mean
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

ATTENTION = frozenset(
    (
        "self_attn",
        "attn",
        "attention",
        "self_attention",
        "SelfAttention",
        "EncDecAttention",
        "encoder_attn",
        "cross_attn",
        "crossattention",
    )
)
"""What architectures call the block that attends."""
MLP = frozenset(
    ("mlp", "feed_forward", "feedforward", "ffn", "ff", "DenseReluDense", "block_sparse_moe", "intermediate", "output")
)
"""What they call the block after it; BERT's two halves are `intermediate` and `output`."""
MLP_LAYERS = frozenset(("fc1", "fc2"))
"""Where there is no such block (OPT, BART), what its two layers are called."""
ENDS = frozenset(
    (
        "o_proj",
        "out_proj",
        "c_proj",
        "dense",
        "o",
        "out_lin",
        "down_proj",
        "fc2",
        "dense_4h_to_h",
        "wo",
        "w2",
        "lin2",
        "fc_out",
    )
)
"""What they call the linear layer that ends such a block."""
HEADS = frozenset(
    (
        "lm_head",
        "cls",
        "predictions",
        "score",
        "classifier",
        "classification_head",
        "qa_outputs",
        "embed_out",
        "v_head",
    )
)
"""What output heads are called, besides what a model itself answers."""


def select(model: nn.Module, targets: str | Collection[str], where: str = "targets") -> list[str]:
    """The full names of the modules of `model` that `targets` stand for, in the model's order.

    Args:
        model: on any device; the meta device will do.
        targets: "all-linear", "attention" or "mlp": linear layers, never an output head; several names: every module
            whose name is one of them or ends with it after a dot, an output head too; another string: a regular
            expression that a linear layer's whole name must match, never an output head.
        where: what the error is about.

    Experts whose weights are one tensor of three dimensions are no linear layers, and are not selected: a warning says
    so where the group would lead one to think otherwise.

    Raises:
        ConfigError: something is selected by none of the targets, by one of the names, or by the expression.
    """
    fused = _fused(model)
    if not isinstance(targets, str):
        names = [
            name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
        ]
        found = {target: [name for name in names if ends_with(name, target)] for target in targets}
        for target, matched in found.items():
            if not matched:
                stray = [name for name in fused if ends_with(name, target)]
                hint = f"; {_experts(stray)}" if stray else did_you_mean(target, _short(names))
                raise ConfigError(f"no module is named {target!r}{hint}", where)
        chosen = {name for matched in found.values() for name in matched}
        if not chosen:
            raise ConfigError("names no module; leave the default, or name some", where)
        return [name for name in names if name in chosen]

    heads, every = _heads(model), linear_layers(model)
    names = [name for name in every if name not in heads]
    there = f"; its linear layers are {', '.join(_short(every)) or 'none'}"
    if targets in ("all-linear", "attention", "mlp"):
        chosen_names = [name for name in names if targets in ("all-linear", _block(name))]
        if not chosen_names:
            kind, hint = type(model).__name__, f"; {_experts(fused)}" if fused else ""
            raise ConfigError(f"cannot tell which layers of {kind} are {targets!r}{there}; name them{hint}", where)
        if fused and targets != "attention":
            warnings.warn(f"{where}: {targets!r} leaves the experts as they are: {_experts(fused)}", stacklevel=2)
        return chosen_names
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise ConfigError(f"{targets!r} is no group of layers and no regular expression: {error}", where) from None
    matching = [name for name in every if pattern.fullmatch(name)]
    if not matching:
        named = any(ends_with(name, targets) for name in every)
        hint = f'; for every module of this name, write ("{targets}",)' if named else there
        raise ConfigError(f"{targets!r} matches the whole name of no linear layer{hint}", where)
    if not set(matching) - heads:
        raise ConfigError(f"{targets!r} matches only the output head; if it is meant, name it in a tuple", where)
    return [name for name in matching if name not in heads]


def ends(model: nn.Module, blocks: Iterable[str], where: str = "targets") -> list[str]:
    """The full names of the linear layers that end the blocks of `model`, one for each block, in the model's order.

    Args:
        model: on any device; the meta device will do.
        blocks: "attention" (attention to an encoder is a block by itself), "mlp", or both.
        where: what the error is about.

    Raises:
        ConfigError: there is no such block, or none or several of its layers have the name and the width of an end.
    """
    config = getattr(model, "config", None)
    width = getattr(config.get_text_config() if config else None, "hidden_size", None)
    layers, found = linear_layers(model), set()
    for block in blocks:
        if block == "mlp" and (fused := _fused(model)):
            raise ConfigError(f"cannot tell what ends a block of experts: {_experts(fused)}; name others", where)
        units: dict[str, list[str]] = {}
        for name in select(model, block, where):
            units.setdefault(_unit(name), []).append(name)
        for unit, within in units.items():
            last = [name for name in within if _ends_block(name) and width in (None, _width(layers[name]))]
            if len(last) != 1:
                raise ConfigError(
                    f"cannot tell which layer ends the {block} block in {unit}, out of {', '.join(within)}; name those "
                    "of all layers",
                    where,
                )
            found.update(last)
    return [name for name in layers if name in found]


def of_layers(names: Iterable[str], layers: Collection[int], where: str = "layers") -> list[str]:
    """Those of `names` that lie in the layers with these numbers; ConfigError for a number that none lies in."""
    numbered = [(name, re.search(r"(?:^|\.)(\d+)\.", name)) for name in names]
    numbers = {int(found[1]) for _, found in numbered if found}
    for layer in layers:
        if layer not in numbers:
            known = f"they are numbered {min(numbers)} to {max(numbers)}" if numbers else "they are not numbered"
            raise ConfigError(f"no layer with targets has the number {layer}; {known}", where)
    return [name for name, found in numbered if found and int(found[1]) in layers]


def shorten(names: Collection[str], model: nn.Module) -> list[str]:
    """The shortest endings of `names` that select exactly them by PEFT's rule, sorted: `q_proj`, or `attn.c_proj`."""
    endings: dict[str, set[str]] = {}
    for name, _ in model.named_modules():
        parts = name.split(".")
        for at in range(len(parts)):
            endings.setdefault(".".join(parts[at:]), set()).add(name)
    chosen, short = set(names), set()
    for name in names:
        parts = name.split(".")
        tails = (".".join(parts[at:]) for at in reversed(range(len(parts))))
        short.add(next((tail for tail in tails if endings[tail] <= chosen), name))
    return sorted(short)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers by full name: torch's, bitsandbytes' and the Conv1D of GPT-2."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def tied(model: nn.Module) -> frozenset[str]:
    """The names of the embedding and the output head if they share one weight; else nothing."""
    ends = [_call(model, "get_input_embeddings"), _call(model, "get_output_embeddings")]
    weights = [getattr(end, "weight", None) for end in ends]
    if weights[0] is None or weights[0] is not weights[1]:
        return frozenset()
    return frozenset(name for name, module in model.named_modules() if any(module is end for end in ends))


def ends_with(name: str, target: str) -> bool:
    """Whether a module's full name is `target`, or ends with it after a dot."""
    return name == target or name.endswith(f".{target}")


def _block(name: str) -> str:
    """Which block a linear layer lies in, by the conventional names; "" where they say nothing."""
    *parents, last = name.split(".")
    if ATTENTION.intersection(parents):
        return "attention"
    return "mlp" if MLP.intersection(parents) or last in MLP_LAYERS else ""


def _unit(name: str) -> str:
    """Where the block that a linear layer lies in is, or the layer of the model that has no such block."""
    parts = name.split(".")
    for at, part in enumerate(parts[:-1]):
        if part in ATTENTION:
            return ".".join(parts[: at + 1])
    at = next((at for at, part in enumerate(parts) if part in MLP), -1)
    return ".".join(parts[:at])


def _ends_block(name: str) -> bool:
    *parents, last = name.split(".")
    return last in ENDS and "intermediate" not in parents  # BERT calls both of its layers `dense`


def _width(layer: Any) -> int:
    """How many features come out of a linear layer."""
    return int(layer.nf if hasattr(layer, "nf") else layer.out_features)


def _heads(model: nn.Module) -> set[str]:
    head = _call(model, "get_output_embeddings")
    return {
        name
        for name, module in model.named_modules()
        if (head is not None and module is head) or HEADS.intersection(name.split("."))
    }


def _fused(model: nn.Module) -> list[str]:
    """The weights of experts that are one tensor for all of them, by their full names."""
    return [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if type(module).__module__.partition(".")[0] != "torch"  # a convolution's are not meant
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    ]


def _experts(fused: Collection[str]) -> str:
    return f"{', '.join(_short(fused))} of the experts are tensors of three dimensions, no linear layers"


def _short(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _call(model: nn.Module, getter: str) -> Any:
    """What a model answers; models that are not transformers' have no such method, some of these raise instead."""
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
