"""LoHa and LoKr: the layer's output by their formulas, their ranks by singular values, their counts by shapes."""

import pytest

import tunekit as tk
from tunekit.testing import tiny_model
from tunekit.testing.harness import Harness

CONTEXT = tk.Context(model_id="a/b")
SHAPES = {"q_proj": (32, 32), "k_proj": (16, 32), "up_proj": (64, 32), "down_proj": (32, 64)}


def adapted(adapter, name):
    """A layer under `adapter` whose tensors are all random, its base weight, and these tensors by short name."""
    import torch

    model = adapter.attach(tiny_model(), CONTEXT)
    layer = next(module for full, module in model.named_modules() if full.endswith(f"layers.1.{block(name)}.{name}"))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for full, parameter in layer.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator)
            tensors[full.split(".")[0]] = parameter.detach()
    inputs = torch.randn(5, SHAPES[name][1], generator=generator)
    update = (layer(inputs) - layer.base_layer(inputs)).detach()
    return inputs, update, tensors


def block(name):
    return "self_attn" if name in ("q_proj", "k_proj") else "mlp"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_loha_adds_the_product_of_two_low_rank_products(name, alpha):
    import torch

    inputs, update, t = adapted(tk.LoHa(rank=4, alpha=alpha), name)
    scale = 1.0 if alpha is None else alpha / 4
    delta = scale * torch.einsum(
        "or,ri,os,si->oi", *(t[key] for key in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
    )
    torch.testing.assert_close(update, inputs @ delta.T, rtol=1e-4, atol=1e-3)
    assert delta.shape == SHAPES[name]
    assert torch.linalg.matrix_rank(delta) == 16
    assert sum(value.numel() for value in t.values()) == 2 * 4 * sum(SHAPES[name])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("rank", "factor", "alpha"), [(2, None, None), (2, 4, 6.0), (3, 2, None), (100, None, None)])
def test_lokr_adds_a_kronecker_product(name, rank, factor, alpha):
    import torch

    adapter = tk.LoKr(rank=rank, factor=factor, alpha=alpha)
    inputs, update, t = adapted(adapter, name)
    first = t["lokr_w1"]
    second = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    scale = 1.0 if alpha is None else alpha / rank
    delta = scale * torch.einsum("ab,cd->acbd", first, second).reshape(SHAPES[name])
    torch.testing.assert_close(update, inputs @ delta.T, rtol=1e-4, atol=1e-3)

    out_features, in_features = SHAPES[name]
    assert adapter.effective_rank(in_features, out_features) == torch.linalg.matrix_rank(second)
    assert torch.linalg.matrix_rank(delta) == torch.linalg.matrix_rank(first) * torch.linalg.matrix_rank(second)
    o2, i2 = second.shape
    low = rank < max(o2, i2) / 2
    assert sum(value.numel() for value in t.values()) == first.numel() + (rank * (o2 + i2) if low else o2 * i2)


def test_lokr_says_when_a_higher_rank_changes_nothing():
    # 32 is 4 * 8, so the second factor is (8, 8).
    assert [tk.LoKr(rank=rank).effective_rank(32, 32) for rank in (2, 3, 4, 1000)] == [2, 3, 8, 8]


@pytest.mark.parametrize("method", [tk.LoHa, tk.LoKr])
def test_dropout_drops_whole_rows_and_keeps_the_mean(method):
    import torch

    adapter = method(rank=2, dropout=0.4, targets=("up_proj",))
    model = adapter.attach(tiny_model(), CONTEXT)
    layer = next(module for full, module in model.named_modules() if full.endswith("layers.1.mlp.up_proj"))
    for parameter in layer.parameters():
        parameter.data = torch.rand_like(parameter) + 0.5
    inputs = torch.rand(1, 32)
    whole = (layer.eval()(inputs) - layer.base_layer(inputs)).flatten()
    torch.manual_seed(0)
    some = (layer.train()(inputs) - layer.base_layer(inputs)).flatten()
    kept = some != 0
    assert 0 < kept.sum() < 64
    torch.testing.assert_close(some[kept] / whole[kept], (64 / kept.sum()).expand(int(kept.sum())))


@pytest.mark.parametrize("method", [tk.LoHa, tk.LoKr])
def test_over_packed_weights_it_adds_and_saves_what_it_does_over_plain_ones(method, tmp_path):
    import copy

    import torch
    from safetensors.torch import load_file

    pytest.importorskip("bitsandbytes")
    adapter, ids = method(rank=2, targets=("up_proj", "o_proj")), torch.arange(5, 25)[None]
    stored = {}
    for name, quantizer in (("plain", None), ("packed", tk.NF4())):
        torch.manual_seed(0)
        model = adapter.attach(Harness(quantizer=quantizer).model(), CONTEXT).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape) / 3
        layer = next(module for full, module in model.named_modules() if full.endswith("layers.1.mlp.up_proj"))
        inputs = torch.randn(3, 32)
        update = layer(inputs) - layer.base_layer(inputs)
        torch.testing.assert_close(update, inputs @ layer.get_delta_weight("default").T, rtol=1e-4, atol=1e-5)
        assert not any(parameter.is_meta for parameter in model.parameters())
        again = copy.deepcopy(model)
        for parameter in model.parameters():  # the copy computes by weights of its own
            parameter.data = torch.zeros_like(parameter.data)
        assert again(ids).logits.abs().max() > 0
        (tmp_path / name).mkdir()
        adapter.save(again, tmp_path / name)
        stored[name] = load_file(tmp_path / name / "adapter_model.safetensors")
        loaded = adapter.load(Harness(quantizer=quantizer).model(), tmp_path / name).eval()
        torch.testing.assert_close(loaded(ids).logits, again(ids).logits)
    assert stored["plain"].keys() == stored["packed"].keys()
    assert all(torch.equal(tensor, stored["packed"][name]) for name, tensor in stored["plain"].items())


@pytest.mark.parametrize("quantizer", [None, tk.NF4(), tk.Int8()], ids=repr)
@pytest.mark.parametrize("method", [tk.LoHa, tk.LoKr])
def test_conv1d_is_refused_though_quantization_hides_it(method, quantizer):
    # Quantized layers of GPT-2 are linear, but the model that an export is merged into is not.
    if quantizer is not None:
        pytest.importorskip("bitsandbytes")
    with pytest.raises(
        tk.ConfigError, match=r"cannot adapt the Conv1D layer transformer.h.0.attn.c_attn; LoRA and IA3"
    ):
        method().attach(Harness(architecture="gpt2", quantizer=quantizer).model(), CONTEXT)


@pytest.mark.parametrize("method", [tk.LoHa, tk.LoKr])
def test_dropping_half_of_the_rows_or_more_is_refused(method):
    with pytest.raises(tk.ConfigError, match=r"dropout: must be in \[0, 0\.5\), got 0\.5"):
        method(dropout=0.5)
