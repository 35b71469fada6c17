"""NF4 is what its paper says: the 16 values, the error, the bits; and right on the CPU, where bitsandbytes is not."""

import pytest
import torch
from torch.nn.functional import pad

import tunekit as tk
from tunekit.testing import tiny_model
from tunekit.testing.harness import quantized

bnb = pytest.importorskip("bitsandbytes")

VALUES = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
"""Dettmers et al. 2023, appendix E."""
CONTEXT = tk.Context(model_id="tiny", device="cpu", dtype="float32", quantization="nf4")
PUBLISHED = (0.072798, 0.000074)
"""Mean absolute error on N(0, 1) in blocks of 64, and its deviation over samples of 1024 x 1024 (bitsandbytes' tests)."""


def codes_and_scales(weight):
    """NF4 in plain torch: the number of the nearest value for each weight, and the largest absolute value a block."""
    blocks = pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    return ((blocks / scales)[..., None] - VALUES).abs().argmin(-1), scales


def reference(weight):
    codes, scales = codes_and_scales(weight)
    return (VALUES[codes] * scales).flatten()[: weight.numel()].view_as(weight)


def linear(weight, device="cpu", **fields):
    """A layer of bitsandbytes with these weights, prepared as the pipeline does."""
    nf4 = tk.NF4(**fields)
    layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(
        weight, False, quant_type="nf4", compress_statistics=nf4.double_quantization, module=layer
    )
    return nf4.prepare(torch.nn.Sequential(layer.to(device)), CONTEXT)[0]


def test_packed_weights_are_bit_for_bit_those_of_the_paper():
    weight = torch.randn(100, 64, generator=torch.manual_seed(0))
    codes, scales = codes_and_scales(weight)
    layer = linear(weight, double_quantization=False)
    high, low = codes.flatten()[0::2], codes.flatten()[1::2]
    assert torch.equal(layer.weight.flatten(), (high * 16 + low).to(torch.uint8))
    assert torch.equal(layer.weight.quant_state.absmax, scales.flatten())
    assert torch.equal(tk.NF4().dequantize(layer), reference(weight))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_error_is_the_published_one(device):
    weight = torch.randn(1024, 1024, generator=torch.manual_seed(0))
    found = tk.NF4().dequantize(linear(weight, device, double_quantization=False)).cpu()
    mean, deviation = PUBLISHED
    assert (found - weight).abs().mean().item() == pytest.approx(mean, abs=7 * deviation)
    doubly = tk.NF4().dequantize(linear(weight, device)).cpu()
    assert (doubly - weight).abs().mean().item() == pytest.approx(mean + 1e-4, abs=7 * deviation)


@pytest.mark.parametrize(("double", "bits"), [(False, 4 + 32 / 64), (True, 4 + 8 / 64 + 32 / (64 * 256))])
def test_bits_a_weight_measured_from_what_is_stored(double, bits):
    weight = torch.randn(1024, 1024)
    layer = linear(weight, double_quantization=double)
    state = layer.weight.quant_state
    stored = [layer.weight, state.absmax, *([state.state2.absmax] if double else [])]
    assert 8 * sum(tensor.numel() * tensor.element_size() for tensor in stored) / weight.numel() == bits
    assert bits == (4.126953125 if double else 4.5)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("inputs", [32, 64, 96, 160, 448])
def test_on_the_cpu_rows_of_any_length_have_the_scales_of_their_own_blocks(inputs, double):
    weight = torch.randn(50, inputs, generator=torch.manual_seed(0))
    layer = linear(weight, double_quantization=double)
    found = tk.NF4().dequantize(layer)
    assert (found - reference(weight)).abs().max() <= (0.05 if double else 0)
    identity = torch.eye(inputs).requires_grad_()
    output = layer(identity)
    assert torch.equal(output.T, found), "what it computes with is what dequantize says"
    output.sum().backward()
    torch.testing.assert_close(identity.grad, found.sum(0).expand(inputs, -1), rtol=0, atol=1e-4)


def test_rows_that_the_kernel_of_the_cpu_gets_wrong_are_refused():
    with pytest.raises(tk.ConfigError, match="0 has 48 inputs, no multiple of 32: wrong on the CPU"):
        linear(torch.randn(50, 48))


@pytest.mark.parametrize("prepared", [True, False])
def test_an_evaluation_leaves_the_weights_packed_as_they_are(prepared, monkeypatch):
    # What bitsandbytes does by itself on processors with AVX512-BF16; the second case shows that this is the fault.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    repacked = []
    monkeypatch.setattr(
        "bitsandbytes.nn.modules._convert_weight_packed_for_cpu",
        lambda weight, state: (repacked.append(1), (weight, state))[1],
    )
    model = quantized(tiny_model(), tk.NF4(), CONTEXT)
    if not prepared:
        for module in model.modules():
            if tk.NF4().is_quantized(module):
                module.support_avx512bf16_for_cpu = bnb.nn.modules.has_avx512bf16()
    with torch.no_grad():
        model.eval()(torch.arange(9)[None])
    assert bool(repacked) is not prepared


def test_arithmetic_is_in_the_dtype_of_the_base_unless_another_is_named():
    def config(context_dtype, **fields):
        context = tk.Context(model_id="tiny", device="cpu", dtype=context_dtype)
        return tk.NF4(**fields).load_kwargs(context)["quantization_config"].bnb_4bit_compute_dtype

    assert config("bfloat16") == torch.bfloat16
    assert config("float32") == torch.float32
    assert config("bfloat16", compute_dtype="float32") == torch.float32
    with pytest.raises(tk.ConfigError, match=r"NF4\.compute_dtype: float16 does not train on the CPU"):
        tk.NF4(compute_dtype="float16").check(CONTEXT)
