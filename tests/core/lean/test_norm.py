"""A normalization whose weight is frozen computes with fewer passes, and gives the same numbers."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import tunekit as tk
from tunekit.core.lean import norm
from tunekit.core.lean.forwards import lean_forwards, usual_forwards
from tunekit.core.lean.norm import LeanNorm
from tunekit.testing import tiny_model

IDS = torch.arange(5, 65).view(2, 30)
FEATURES = 24


def normalization(kind=LlamaRMSNorm, dtype=torch.float32, epsilon=1e-3):
    torch.manual_seed(0)
    found = kind(FEATURES, eps=epsilon).to(dtype).requires_grad_(False)
    found.weight += torch.randn(FEATURES)
    return found


def passed(forward, dtype):
    """Output and gradient of inputs of several sizes, one of them all zeros."""
    torch.manual_seed(1)
    x = (torch.randn(3, 5, FEATURES) * torch.tensor([0.0, 1e-3, 30.0]).view(3, 1, 1)).to(dtype).requires_grad_()
    weights = torch.randn(3, 5, FEATURES).to(dtype)
    y = forward(x)
    return y.detach(), *torch.autograd.grad((y * weights).sum(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
def test_it_is_the_normalization_of_the_model(kind, dtype):
    plain = normalization(kind, dtype)
    lean = norm.norm(plain)
    assert lean
    (expected, gradient), (found, other) = passed(plain, dtype), passed(lean, dtype)
    assert torch.equal(found, expected)
    assert gradient.dtype == other.dtype == dtype
    # Token by token, since they are of very different sizes; in half precision a rounding of the last digit.
    apart = (other - gradient).float().norm(dim=-1)
    assert (apart <= max(1e-6, torch.finfo(dtype).eps) * gradient.float().norm(dim=-1)).all()


def test_its_gradient_is_that_of_the_formula_in_float64():
    plain = normalization()
    weight = plain.weight.double()

    def formula(x):
        return weight * x / (x.square().mean(-1, keepdim=True) + plain.variance_epsilon).sqrt()

    for one, exact in zip(passed(norm.norm(plain), torch.float32), passed(formula, torch.float64), strict=True):
        assert ((one - exact).norm(dim=-1) <= 3e-7 * exact.norm(dim=-1)).all()


def attached():
    model = tiny_model()
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    model = tk.LoRA(rank=4).attach(model, tk.Context(model_id="tiny", total_steps=20))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.train()


def lean_in(model):
    return [module for module in model.modules() if isinstance(vars(module).get("forward"), LeanNorm)]


def test_all_of_a_model_are_lean_while_it_trains_and_its_numbers_stay():
    model = attached()

    def numbers():
        model.zero_grad()
        with lean_forwards(model):
            logits = model(input_ids=IDS, use_cache=False).logits
            logits.log_softmax(-1)[..., 7].sum().backward()
        return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    with lean_forwards(model):
        assert len(lean_in(model)) == 5
        with usual_forwards(model):
            assert lean_in(model) == []
        assert len(lean_in(model)) == 5
    assert lean_in(model) == []
    found = numbers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "norm", lambda module: None)
        expected = numbers()
    assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[1], expected[1])  # the same sums in another order
    assert (found[1] - expected[1]).norm() < 1e-6 * expected[1].norm()


def test_in_half_precision_no_copy_in_float32_is_kept():
    plain = normalization(dtype=torch.bfloat16)

    def kept(forward):
        bytes_of = []

        def keep(tensor):
            bytes_of.append(tensor.nbytes)
            return tensor

        x = torch.randn(50, FEATURES, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward(x)
        return sum(bytes_of)

    # The input itself, which the model holds anyway, the weight, and a number a token.
    assert kept(norm.norm(plain)) == 2 * 50 * FEATURES + 2 * FEATURES + 4 * 50
    assert kept(plain) >= 4 * 50 * FEATURES


class Cubed(LlamaRMSNorm):
    """Of Llama's code but for one constant."""

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(3).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class Kept(LlamaRMSNorm):
    """Of another name, with Llama's forward."""


def test_one_that_does_anything_else_is_left_alone():
    assert norm.norm(normalization(Kept))
    assert norm.norm(normalization(Cubed)) is None
    assert norm.norm(normalization(GemmaRMSNorm)) is None  # adds one to its weight
    assert norm.norm(nn.LayerNorm(FEATURES).requires_grad_(False)) is None
    assert norm.norm(nn.RMSNorm(FEATURES).requires_grad_(False)) is None
    assert norm.norm(nn.SiLU()) is None
    assert norm.norm(normalization().requires_grad_()) is None  # its gradient is asked for
    hooked = normalization()
    hooked.register_forward_hook(lambda *_: None)
    assert norm.norm(hooked) is None
    replaced = normalization()
    replaced.forward = lambda x: x
    assert norm.norm(replaced) is None


@pytest.mark.parametrize("case", ["autocast", "another dtype", "trained by now"])
def test_where_there_is_more_to_do_the_modules_own_forward_does_it(case, monkeypatch):
    plain = normalization()
    lean = norm.norm(plain)
    monkeypatch.setattr(norm, "_Normalized", None)
    x = torch.randn(5, FEATURES, requires_grad=True)
    if case == "another dtype":
        x = x.bfloat16()
    plain.weight.requires_grad_(case == "trained by now")
    with torch.autocast("cpu", enabled=case == "autocast"):
        y, expected = lean(x), copy.copy(plain)(x)
    assert torch.equal(y, expected)
    assert y.requires_grad
