"""Models on the meta device, which compute shapes alone, made to take what they would take on their own device.

Only ever imported from inside of methods, since it imports torch.
"""

from collections.abc import Callable, Mapping
from contextvars import Token
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from tunekit.core.interfaces import Quantizer
from tunekit.core.training.attention import STANDS_FOR, takes_groups

STATE = "quantization_state"
"""The buffer in which a packed layer holds what the quantizer needs besides the packed weight."""


class AsOnDevice(TorchFunctionMode):  # type: ignore[misc]
    """Within it, attention on the meta device keeps what torch's fused kernels keep, and no value is asked for.

    On the meta device torch takes the plain way, which keeps the scores. A condition on a tensor without values counts
    as not met: whether a mask masks nothing, for one, as it does not where rows are padded.

    Args:
        device: where the model will be.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self._before: list[Token[str]] = []
        self.plain = False
        """Whether some attention was not fused: then it keeps the scores, and many short rows are less than a long."""

    def __enter__(self) -> "AsOnDevice":
        """Begin."""
        self._before.append(STANDS_FOR.set(self.device.partition(":")[0]))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        super().__exit__(*error)
        STANDS_FOR.reset(self._before.pop())

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `function`, or what stands for it."""
        given = kwargs or {}
        if function is scaled_dot_product_attention:
            return self._attention(*args, **given)
        if function is dropout and STANDS_FOR.get() == "cuda" and args and args[0].is_meta:
            return _dropped(*args, **given)
        if function in (Tensor.__bool__, Tensor.item) and args[0].is_meta:
            return False
        return function(*args, **given)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        same_sizes = query.dim() == 4 and query.shape[-1] == key.shape[-1] == value.shape[-1]
        fused = same_sizes and (dropout_p == 0 or self.device != "cpu")
        if STANDS_FOR.get() == "cuda" and enable_gqa:
            fused = fused and takes_groups(query, masked=attn_mask is not None)
        if not (query.is_meta and fused):
            self.plain = True
            found: Tensor = scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            return found
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        # All of torch's fused kernels keep queries, keys, values, the result, and a number for each query and head.
        kept = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )
        result: Tensor = kept[0]
        return result


def _dropped(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout as on CUDA, which keeps a mask of one byte a number; the plain one has numbers of the input's dtype."""
    if inplace or not (training and 0 < p < 1):
        return dropout(x, p, training, inplace)
    found: Tensor = torch.ops.aten.native_dropout(x, p, training)[0]
    return found


LEAN = {"nf4": ("cpu", "cuda"), "int8": ("cpu",)}
"""Schemes whose layers have lean forwards over them, and on which devices."""


def pack(model: nn.Module, quantizer: Quantizer, device: str) -> None:
    """Have the base of `model`, on the meta device, take what it takes when it is quantized.

    Frozen linear layers, but for the output layer, then hold `Quantizer.stored_bytes`, and a whole weight for as long
    as they compute.

    Args:
        model: with an adapter.
        quantizer: how the base is stored.
        device: where the model will be.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    whole = set(head.modules()) if head else set()  # PEFT may have wrapped it
    for layer in list(model.modules()):
        if type(layer) is nn.Linear and layer not in whole and not layer.weight.requires_grad:
            lean = device.partition(":")[0] in LEAN.get(quantizer.scheme, ())
            _pack(layer, quantizer, _LeanPacked if lean else _Packed)


def _pack(layer: nn.Linear, quantizer: Quantizer, kind: type[nn.Linear]) -> None:
    packed, state = quantizer.stored_bytes(layer.weight)
    layer.dtype = layer.weight.dtype
    layer.weight = nn.Parameter(torch.empty(packed, dtype=torch.uint8, device="meta"), requires_grad=False)
    layer.register_buffer(STATE, torch.empty(state, dtype=torch.uint8, device="meta"))
    layer.__class__ = kind


class _Packed(nn.Linear):  # type: ignore[misc]
    """A linear layer with a packed weight, which is `dtype` unpacked."""

    def forward(self, inputs: Tensor) -> Tensor:
        shape = torch.Size((self.out_features, self.in_features))
        found: Tensor = _Unpacked.apply(inputs, self.bias, shape, self.dtype)
        return found


class _LeanPacked(_Packed):
    """One that lean forwards know."""

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")


class _Unpacked(torch.autograd.Function):  # type: ignore[misc]
    """A linear layer whose weight is unpacked for the forward pass, and again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.dtype, ctx.before = shape, dtype, inputs.dtype
        weight = inputs.new_empty(shape, dtype=dtype)
        return nn.functional.linear(inputs.to(dtype), weight, bias).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight = gradients[0].new_empty(ctx.shape, dtype=ctx.dtype)
        return (gradients[0].to(ctx.dtype) @ weight).to(ctx.before), None, None, None
