"""Master weights: trained weights are float32, and computed with as if they were still of the base's dtype."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import tunekit as tk
from tunekit.core.lean.trial import stirred
from tunekit.core.model import masters
from tunekit.core.training import accuracy, compiled, head_loss
from tunekit.core.training.float64 import in_float64
from tunekit.core.training.rows_loss import RowsLoss
from tunekit.plugins.trainers.recomputing import activations_computed_again
from tunekit.testing import tiny_model

IDS = torch.randint(5, 260, (2, 12), generator=torch.Generator().manual_seed(0))
PRODUCTS = ("aten.mm.default", "aten.addmm.default")
"""Those with weights. Of others, some versions of transformers take angles of positions as products in float32."""
PARTS = {
    "all": lambda name, parameter: True,
    "vectors": lambda name, parameter: parameter.dim() == 1,
    "last layer": lambda name, parameter: ".1." in name,
}


def half(architecture: str, part: str = "all"):
    """A tiny model in bfloat16 of which a part is trained, in bfloat16 as yet."""
    model = tiny_model(architecture).bfloat16().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(PARTS[part](name, parameter))
    return model


def held(architecture: str, part: str = "all"):
    """The same with master weights."""
    model = half(architecture, part)
    masters.train_in_float32(model)
    return model


def loss_of(model):
    logits = model(IDS, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), IDS[:, 1:].flatten())


def gradients(model):
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Products(TorchDispatchMode):
    """Notes in which dtypes matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) in PRODUCTS:
            self.dtypes |= {one.dtype for one in args if isinstance(one, torch.Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("part", PARTS)
def test_it_computes_what_the_bfloat16_model_computes_to_the_last_bit(architecture, part):
    plain, model = half(architecture, part), held(architecture, part)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    expected, found = gradients(plain), gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        if name != "transformer.wte.weight":  # tied: the gradients of both ends are added up in float32 here
            assert torch.equal(gradient, expected[name].float()), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_matrices_are_multiplied_in_bfloat16_forward_and_backward(architecture):
    model = held(architecture)
    with Products() as products:
        loss_of(model).backward()
    assert products.dtypes == {torch.bfloat16}


def test_steps_smaller_than_the_distance_of_two_bfloat16_numbers_add_up():
    model = held("llama", "vectors")
    weight = model.model.norm.weight
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for _ in range(16):
        weight.grad = torch.full_like(weight, 2.0**-10)  # a quarter of the distance below 1
        optimizer.step()
    assert torch.equal(weight, torch.full_like(weight, 1 - 2.0**-6))


def test_parameters_and_what_is_saved_are_the_masters_and_nothing_is_left_on_the_modules():
    model, names = held("llama"), list(half("llama").state_dict())
    model(IDS)
    assert list(model.state_dict()) == names
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert not [name for module in model.modules() for name in vars(module) if name in module._parameters]


def test_an_error_amidst_a_pass_leaves_nothing_behind_either():
    model = held("llama")
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS)
    hook.remove()
    assert not [name for module in model.modules() for name in vars(module) if name in module._parameters]
    assert torch.equal(model(IDS).logits, half("llama")(IDS).logits)


def interrupted(model):
    """`model` after a pass that ended by Ctrl-C, and whose weights were changed since."""

    def interrupt(*_):
        raise KeyboardInterrupt  # which torch lets pass without calling any hook

    hook = model.model.layers[1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(IDS)
    hook.remove()
    with torch.no_grad():
        dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"].mul_(2)
    return model


def test_copies_of_a_pass_that_the_user_interrupted_are_not_those_of_the_next():
    model = interrupted(held("llama"))
    assert torch.equal(model(IDS).logits, interrupted(half("llama"))(IDS).logits)
    assert not [name for module in model.modules() for name in vars(module) if name in module._parameters]


def test_copies_of_a_pass_that_the_user_interrupted_are_forgotten_too():
    model = interrupted(held("llama"))
    masters.forget(model)
    assert torch.equal(model(IDS).logits, interrupted(half("llama")).float()(IDS).logits)


def test_a_weight_is_seen_rounded_by_whoever_multiplies_with_it_within_its_layer():
    """Some layers take the weight of a module they do not call, as those with kernels of their own."""
    model = held("llama")
    layer = model.model.layers[0]
    seen = []
    layer.mlp.register_forward_pre_hook(lambda module, _: seen.append(module.down_proj.weight.dtype))
    model(IDS)
    assert seen == [torch.bfloat16]
    assert layer.mlp.down_proj.weight.dtype == torch.float32


@pytest.mark.parametrize("part", ["all", "vectors"])
def test_a_module_is_seen_rounded_by_whoever_casts_to_its_dtype_before_the_call(part):
    """As Mamba does for its last normalization and its head, which are in no layer."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=261, hidden_size=32, num_hidden_layers=2, state_size=8)
    model = MambaForCausalLM(config).bfloat16().eval()
    expected = model(IDS).logits
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(PARTS[part](name, parameter))
    masters.train_in_float32(model)
    assert torch.equal(model(IDS).logits, expected)


def test_layers_keep_their_copies_no_longer_than_they_compute():
    model = held("llama")
    seen = []
    model.model.norm.register_forward_pre_hook(
        lambda *_: seen.extend("weight" in vars(one.mlp.up_proj) for one in model.model.layers)
    )
    model(IDS)
    assert seen == [False, False]


def test_parameters_in_a_list_are_rounded_where_the_list_belongs():
    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = torch.nn.ParameterList([torch.ones(2, dtype=torch.bfloat16)])

        def forward(self, x):
            return x * self.parts[0]

    module = Sum()
    masters.train_in_float32(module)
    assert module(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert module.parts[0].dtype == torch.float32


def test_a_copy_is_a_model_of_its_own():
    model = held("llama")
    twin = copy.deepcopy(model)
    before = model(IDS).logits
    with torch.no_grad():
        twin.model.norm.weight.mul_(2)
    assert not torch.equal(twin(IDS).logits, before)
    assert torch.equal(model(IDS).logits, before)


def test_layers_that_are_recomputed_have_the_same_gradients():
    model = held("llama")
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    model.train()
    with activations_computed_again(model, None):
        found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layers_with_master_weights_are_not_compiled_one_by_one():
    with pytest.raises(tk.NotSupported, match="held in float32 and seen rounded"), compiled.compiled(held("llama")):
        pass


def test_copies_that_are_made_once_are_those_that_would_be_made_each_time():
    model = held("gpt2")
    before = model(IDS).logits
    with masters.rounded(model) as copies:
        assert torch.equal(model(IDS).logits, before)
        assert model.transformer.wte.weight is copies[model.transformer.wte._parameters["weight"]]
    assert model.transformer.wte.weight.dtype == torch.float32
    assert torch.equal(model(IDS).logits, before)


def test_forgotten_every_module_computes_with_its_masters():
    model = held("llama")
    masters.forget(model)
    assert torch.equal(model(IDS).logits, half("llama").float()(IDS).logits)
    assert not [hook for module in model.modules() for hook in module._forward_hooks.values()]


def test_a_model_in_float32_is_left_as_it_is():
    model = tiny_model()
    before = [(vars(module).copy(), len(module._forward_hooks)) for module in model.modules()]
    masters.train_in_float32(model)
    assert [(vars(module), len(module._forward_hooks)) for module in model.modules()] == before


@pytest.mark.parametrize("part", ["all", "last layer"])
def test_the_dtype_it_computes_in_is_told_apart_from_that_of_its_masters(part):
    assert masters.computing_dtype(held("llama", part)) == torch.bfloat16
    assert masters.computing_dtype(tiny_model()) == torch.float32


@pytest.mark.parametrize("options", [{"bias": "all"}, {"bias": "lora_only"}, {"trained_modules": ("lm_head",)}])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_lora_trains_whole_starts_as_the_base_and_is_multiplied_in_bfloat16(architecture, options):
    if architecture == "gpt2" and "trained_modules" in options:
        options = {"trained_modules": ("ln_f",)}
    base = tiny_model(architecture).bfloat16().eval()
    expected = base(IDS).logits
    model = tk.LoRA(rank=2, **options).attach(base, tk.Context(model_id="tiny", dtype="bfloat16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(model(IDS).logits, expected)
    whole = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    found = gradients(model)
    assert all(found[name].any() for name in whole)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_head_in_chunks_multiplies_with_one_copy_and_adds_its_gradient_up_in_float32(architecture, monkeypatch):
    """Compared with the gradient of float64 it is no further off than that of the logits in one piece."""
    monkeypatch.setattr(head_loss, "CHUNK_TOKENS", 3)
    monkeypatch.setattr(head_loss, "CHUNK_NUMBERS", {"cpu": 0})
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS]

    def gradient(model, chunked):
        model.lm_head.weight.requires_grad_(True)
        with Products() as products:
            RowsLoss(model=model, pad_id=0, device="cpu", chunked=chunked)(model, rows).backward()
        return model.lm_head.weight.grad.double(), products.dtypes

    exact, _ = gradient(half(architecture).double(), chunked=False)
    whole, _ = gradient(held(architecture), chunked=False)
    found, dtypes = gradient(held(architecture), chunked=True)
    assert dtypes == {torch.bfloat16}
    assert (found - exact).norm() <= 1.05 * (whole - exact).norm()
    assert (found - exact).norm() <= 2**-6 * exact.norm()


@pytest.mark.parametrize("part", PARTS)
def test_the_truth_in_float64_is_that_of_the_rounded_weights(part):
    """By which the ways to a loss are judged, with weights moved from where they start."""
    model, twin = held("llama", part), half("llama", part)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with stirred(wanted):
        with torch.no_grad():
            for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
                its.copy_(mine)
        twin.double()
        expected = torch.autograd.grad(loss_in_full(twin), [p for p in twin.parameters() if p.requires_grad])
        with in_float64(model):
            found = torch.autograd.grad(loss_in_full(model), wanted)
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() < 1e-6 * other.norm()
    assert accuracy.rounding(model) == torch.finfo(torch.bfloat16).eps


def loss_in_full(model):
    logits = model(IDS, use_cache=False).logits[:, :-1].double()
    return cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
