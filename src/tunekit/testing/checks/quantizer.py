"""Checks of quantizers: fewer bytes, nearly the same predictions, and weights that can be had back."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from unittest import SkipTest

from tunekit.core.component import Context
from tunekit.core.interfaces import Quantizer
from tunekit.errors import ConfigError
from tunekit.testing.checks.component import unchanged
from tunekit.testing.harness import Harness, quantized
from tunekit.testing.training import logits

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

TOLERANCE = 0.3
"""Largest relative error of weights and logits: 4-bit NF4 has about 0.1, and noise has more than 1."""


def names_its_scheme(quantizer: Quantizer, harness: Harness) -> None:
    """The scheme is a word that adapter methods can list in `supports`."""
    scheme = getattr(quantizer, "scheme", None)
    assert isinstance(scheme, str), f"scheme is {scheme!r}: name how weights are stored, as in 'nf4'"
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", scheme), f"scheme is {scheme!r}: write it in lower case, as in 'nf4'"


def returns_fresh_load_kwargs(quantizer: Quantizer, harness: Harness) -> None:
    """`load_kwargs` is a dict by argument name, a new one on each call."""
    context = _context(quantizer, harness)
    first, second = quantizer.load_kwargs(context), quantizer.load_kwargs(context)
    assert isinstance(first, dict), f"load_kwargs returned {first!r}: return a dict of arguments of from_pretrained"
    assert first is not second, "load_kwargs returned the same dict twice: make a new one, since callers add to it"
    own = first.keys() & {"dtype", "torch_dtype", "device_map", "revision", "trust_remote_code", "use_safetensors"}
    assert not own, f"load_kwargs sets {sorted(own)}: these are the pipeline's to choose"


def stores_fewer_bytes(quantizer: Quantizer, harness: Harness) -> None:
    """A model can be loaded with it, and takes less memory."""
    plain, packed = _bytes(harness.model()), _bytes(_loaded(quantizer, harness))
    assert packed < plain, f"quantized, the model has {packed:,} bytes, and {plain:,} without: nothing is gained"


def predicts_nearly_the_same(quantizer: Quantizer, harness: Harness) -> None:
    """The logits are near those of the base."""
    batch = harness.batch()
    exact = logits(harness.model(), batch)
    found = logits(_loaded(quantizer, harness), batch).float()
    error = float((found - exact).norm() / exact.norm())
    assert error <= TOLERANCE, (
        f"the logits are {error:.0%} away from the base's: check the scales, or leave out the output head"
    )


def gives_weights_back(quantizer: Quantizer, harness: Harness) -> None:
    """`is_quantized` knows the quantized linear layers; `dequantize` of each is its weight, (out, in), in float32."""
    import torch

    before = dict(harness.model().named_modules())
    after = dict(_loaded(quantizer, harness).named_modules())
    changed = {
        name
        for name, module in after.items()
        if isinstance(before.get(name), torch.nn.Linear) and _differs(module, before[name])
    }
    assert changed, "no linear layer is quantized: have load_kwargs or prepare do it"
    said = {name for name, module in after.items() if quantizer.is_quantized(module)}
    assert said == changed, (
        f"is_quantized is wrong about {sorted(said ^ changed)[:3]}: say True for the linear layers that are quantized, "
        "and for nothing else"
    )
    pairs = {name: (quantizer.dequantize(after[name]), before[name].weight.detach()) for name in sorted(changed)}
    for name, (weight, exact) in pairs.items():
        assert weight.dtype == torch.float32, f"dequantize gave {weight.dtype} for {name}: give torch.float32"
        assert weight.shape == exact.shape, (
            f"dequantize gave {tuple(weight.shape)} for {name}: give (out_features, in_features), {tuple(exact.shape)}"
        )
    for name, (weight, exact) in pairs.items():
        error = float((weight.cpu() - exact).norm() / exact.norm())
        assert error <= TOLERANCE, f"dequantize of {name} is {error:.0%} away from the weight that was quantized"


def is_stateless(quantizer: Quantizer, harness: Harness) -> None:
    """Loading a model with it leaves it as it was."""
    with unchanged(quantizer):
        _loaded(quantizer, harness)


def _context(quantizer: Quantizer, harness: Harness) -> Context:
    context = harness.context(quantization=quantizer.scheme)
    try:
        quantizer.check(context)
    except ConfigError as error:
        raise SkipTest(f"it does not work on the CPU: {error}") from None
    return context


def _loaded(quantizer: Quantizer, harness: Harness) -> PreTrainedModel:
    """The tiny model, loaded from disk as the pipeline does."""
    return quantized(harness.model(), quantizer, _context(quantizer, harness))


def _bytes(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _differs(module: nn.Module, plain: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module) is not type(plain) or weight is None or weight.dtype != plain.weight.dtype


CHECKS = (
    names_its_scheme,
    returns_fresh_load_kwargs,
    stores_fewer_bytes,
    predicts_nearly_the_same,
    gives_weights_back,
    is_stateless,
)
