"""Hidden states before the lowest trained layer are kept: the same loss and gradient, and what lies below runs once."""

import pytest
import torch
from sharp_models import sharp
from transformers import GPT2Config, LlamaConfig, MistralConfig

import tunekit as tk
from tunekit.core.data.codec import IGNORED
from tunekit.core.training import frozen
from tunekit.core.training.frozen import FrozenLayers
from tunekit.core.training.rows_loss import RowsLoss, over_frozen
from tunekit.errors import NotSupported

VOCABULARY = 100
WIDE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64, "eos_token_id": 2}
NO_DROPOUT = {"bos_token_id": 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {
    "llama": LlamaConfig(**WIDE),
    "gpt2": GPT2Config(**GPT2, **NO_DROPOUT),
    "mistral-looking-back": MistralConfig(**WIDE, sliding_window=8),
}
CONTEXT = tk.Context(model_id="tiny", total_steps=10)


def make(config, method=None):
    return (method or tk.LastLayers(count=1)).attach(sharp(config), CONTEXT)


def rows():
    torch.manual_seed(1)
    system = torch.randint(5, VOCABULARY, (33,)).tolist()
    ends = [torch.randint(5, VOCABULARY, (length,)).tolist() for length in (7, 13, 5, 21)]
    made = [system + ends[0], system + ends[1], ends[2], ends[3]]
    return [{"input_ids": ids, "labels": [IGNORED] * 3 + ids[3:]} for ids in made]


def loss_and_gradient(way, given):
    way.model.zero_grad()
    with way.training():
        loss = way(way.model, given)
        loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in way.model.parameters() if p.grad is not None])


def plain(model, **fields):
    return RowsLoss(model=model, pad_id=0, device="cpu", **fields)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "fields",
    [{}, {"padding_free": True, "chunked": True}, {"padding_free": True, "chunked": True, "shared": True}],
    ids=["padded", "padding-free", "shared"],
)
def test_the_gradient_is_the_same_and_each_row_goes_through_the_frozen_layers_once(config, fields, tmp_path):
    model = make(config)
    expected, wanted = loss_and_gradient(plain(model), rows())
    way = over_frozen(plain(model, **fields), rows(), tmp_path)
    below = frozen.decoder_layers(model)[1]
    passed = []
    below.register_forward_hook(lambda module, given, out: passed.append(vars(module).get("forward")))
    for _ in range(2):
        loss, gradient = loss_and_gradient(way, rows())
        assert loss == pytest.approx(expected, rel=1e-6)
        assert ((gradient - wanted).norm() / wanted.norm()).item() < 1e-5
    # Two rows were tried at the start; each of the others is computed, and the epochs themselves hand on what is kept.
    assert [forward is None for forward in passed] == [True, True, False, False]
    assert "forward" not in vars(below)
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_of_a_row_does_not_hang_on_its_batch(tmp_path):
    model, kept = make(MODELS["llama"]), []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        way = over_frozen(plain(model, padding_free=True), rows(), tmp_path)
        with way.training():
            way(model, [rows()[at] for at in order])
        kept.append([way.frozen.states([row], pytest.fail) for row in rows()])
    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))


def test_adapters_on_the_last_layers_begin_there_too(tmp_path):
    model = make(MODELS["llama"], tk.LoRA(rank=4, targets=("layers.2.self_attn.q_proj", "layers.2.mlp.up_proj")))
    expected, wanted = loss_and_gradient(plain(model), rows())
    way = over_frozen(plain(model), rows(), tmp_path)
    assert len(way.frozen.below) == 2
    loss, gradient = loss_and_gradient(way, rows())
    assert loss == pytest.approx(expected, rel=1e-6)
    assert ((gradient - wanted).norm() / wanted.norm()).item() < 1e-5


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: make(MODELS["llama"], tk.LoRA(rank=2)), "no layer lies below all that is trained"),
        (
            lambda: make(MODELS["llama"], tk.PromptTuning(virtual_tokens=2, init_text=None)),
            "no layer lies below all that is trained",
        ),
        (lambda: make(GPT2Config(**GPT2, bos_token_id=1)), "dropout is drawn anew"),
    ],
    ids=["all-layers", "before-all", "dropout"],
)
def test_what_cannot_begin_there_is_refused(model, says, tmp_path):
    with pytest.raises(NotSupported, match=says):
        over_frozen(plain(model()), rows(), tmp_path)


def test_a_disk_too_small_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10}))
    with pytest.raises(NotSupported, match=r"of 91 tokens are 11,648 bytes, and .* has 10 left"):
        over_frozen(plain(make(MODELS["llama"])), rows()[:3], tmp_path)


def test_a_layer_that_is_trained_later_is_refused(tmp_path):
    model = make(MODELS["llama"])
    way = over_frozen(plain(model), rows(), tmp_path)
    model.model.layers[0].requires_grad_(True)
    with pytest.raises(NotSupported, match="are trained by now"):
        way(model, rows())


def test_another_loss_is_refused(tmp_path, monkeypatch):
    true = FrozenLayers.states
    monkeypatch.setattr(FrozenLayers, "states", lambda *given: 2 * true(*given))
    with pytest.raises(NotSupported, match=r"cache_frozen_layers: the loss is .* so, and .* plainly"):
        over_frozen(plain(make(MODELS["llama"])), rows(), tmp_path)
