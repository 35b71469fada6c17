"""Metrics are those of a second, independent computation, whatever the batches, and leave the model as it was."""

import math

import pytest
import torch

from tunekit import Context, DataError, ExactMatch, Perplexity, TokenAccuracy, TrainingError
from tunekit.core.data.batching import collate
from tunekit.core.data.codec import IGNORED, Codec
from tunekit.core.evaluation import predicting as evaluation
from tunekit.core.evaluation.logits import logits_at
from tunekit.core.evaluation.predicting import evaluating, generate
from tunekit.core.run import measuring
from tunekit.testing import tiny_model, tiny_tokenizer

CONTEXT = Context(model_id="tiny", device="cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def rows(tokenizer):
    codec = Codec(tokenizer)
    pairs = [("a", "b" * 20), ("what is that", "c"), ("d" * 30, "e f g"), ("h", "i"), ("k" * 9, "l" * 7)]
    return [
        codec.encode({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
        for q, a in pairs
    ]


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    return tiny_model(request.param).eval()


def one_by_one(model, rows):
    """Negative log-likelihoods and hits of every supervised token, row by row, in float64 and without padding."""
    losses, hits = [], []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log = model(ids).logits[0].double().log_softmax(-1)
        for at, label in enumerate(row["labels"]):
            if at and label != IGNORED:
                losses.append(-log[at - 1, label].item())
                hits.append(log[at - 1].argmax().item() == label)
    return losses, hits


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_likelihood_and_accuracy_weigh_every_token_alike_whatever_the_batches(
    model, tokenizer, rows, batch_tokens, monkeypatch
):
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", batch_tokens)
    losses, hits = one_by_one(model, rows)
    nll = sum(losses) / len(losses)
    found = Perplexity().evaluate(model, tokenizer, rows, CONTEXT)
    assert found["nll"] == pytest.approx(nll, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert TokenAccuracy().evaluate(model, tokenizer, rows, CONTEXT) == {"token_accuracy": sum(hits) / len(hits)}


def watched(head):
    """How many tokens `head` makes logits of from now on, call by call."""
    counts, plain = [], head.forward

    def counted(x):
        counts.append(x.shape[:-1].numel())
        return plain(x)

    head.forward = counted
    return counts


class Tailed(torch.nn.Module):
    """A language model that does something to its logits, or gives them in another form."""

    def __init__(self, model, tail):
        super().__init__()
        self.model, self.tail, self.config = model, tail, model.config

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, **given):
        out = self.model(**given)
        out.logits = self.tail(out.logits)
        return out


@pytest.mark.parametrize(
    ("tail", "passes"),
    [
        (lambda logits: logits, 1),
        (lambda logits: 3 * torch.tanh(logits / 3), 1),
        (lambda logits: logits[:, -5:] if logits.shape[1] > 5 and len(logits) == 1 else logits, 2),
        (lambda logits: logits.view(2, -1, logits.shape[-1]), 2),
    ],
    ids=["plain", "capped", "cut", "put into rows"],
)
def test_logits_are_made_where_a_token_is_asked_for_and_are_those_of_the_model(tail, passes, rows):
    model = Tailed(tiny_model(), tail).eval()
    batch = collate(rows[:2], 0)
    labels = batch.pop("labels")
    places = [1, 5, 6, 30, 31, 32, labels.shape[1] + 3]
    with torch.no_grad():
        expected = model(**batch).logits.flatten(0, 1)[places]
        counts = watched(model.get_output_embeddings())
        forward = vars(model.get_output_embeddings())["forward"]
        found = logits_at(model, batch, places)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert counts == [len(places), labels.numel()][:passes]
    assert vars(model.get_output_embeddings())["forward"] == forward


def test_logits_of_a_model_that_names_no_output_layer_are_cut_out_of_all(rows):
    model = tiny_model().eval()
    batch = collate(rows[:2], 0)
    del batch["labels"]
    expected = model(**batch).logits.flatten(0, 1)[[2, 9]]
    model.get_output_embeddings = lambda: None
    assert torch.equal(logits_at(model, batch, [2, 9]), expected)


def test_a_few_logits_are_looked_at_at_a_time(model, tokenizer, rows, monkeypatch):
    def found():
        return list(zip(*evaluation.row_predictions(model, tokenizer, rows), strict=True))

    with evaluating(model):
        numbers, logits, labels = (torch.cat(each) for each in found())
        monkeypatch.setattr(evaluation, "LOGITS", 3 * logits.shape[-1])
        parts = found()
    assert {len(each) for each in parts[1]} <= {1, 2, 3}
    for one, other in zip((numbers, logits, labels), map(torch.cat, parts), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_in_bfloat16_the_likelihood_is_that_of_exact_arithmetic_within_its_rounding(
    model, tokenizer, rows, batch_tokens, monkeypatch
):
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", batch_tokens)
    model.bfloat16()
    found = Perplexity().evaluate(model, tokenizer, rows, CONTEXT)["nll"]
    losses, _ = one_by_one(model.double(), rows)
    # Of logits that are rounded by 2**-9 in the mean, and to either side: over 50 tokens little of it is left.
    assert found == pytest.approx(sum(losses) / len(losses), rel=2**-9)


def test_a_mean_of_row_means_would_be_another_number(model, rows):
    means = [sum(losses) / len(losses) for losses in (one_by_one(model, [row])[0] for row in rows)]
    losses = one_by_one(model, rows)[0]
    assert abs(sum(means) / len(means) - sum(losses) / len(losses)) > 1e-3


def test_a_loss_that_the_model_adds_to_is_not_believed(model, tokenizer, rows, monkeypatch):
    honest = Perplexity().evaluate(model, tokenizer, rows, CONTEXT)
    forward = model.forward

    def with_penalty(*arguments, **options):
        output = forward(*arguments, **options)
        output.loss = torch.tensor(1e3)
        return output

    monkeypatch.setattr(model, "forward", with_penalty)
    assert Perplexity().evaluate(model, tokenizer, rows, CONTEXT) == honest


def test_a_batch_of_prompts_is_answered_as_each_alone(model, tokenizer, rows):
    prompts = [row["input_ids"][:length] for row, length in zip(rows, (3, 9, 20, 5, 11), strict=True)]
    together = generate(model, tokenizer, prompts, max_new_tokens=8)
    assert together == [generate(model, tokenizer, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert all(len(answer) <= 8 for answer in together)


def test_generation_stops_before_any_stop_token(model, tokenizer, rows):
    prompt = rows[0]["input_ids"][:10]
    free = generate(model, tokenizer, [prompt], max_new_tokens=6)[0]
    model.generation_config.eos_token_id = [999, free[2]]
    assert generate(model, tokenizer, [prompt], max_new_tokens=6)[0] == free[: free.index(free[2])]


def test_exact_match_counts_answers_that_are_the_reference(model, tokenizer, rows):
    model.generation_config.eos_token_id = None
    end = tokenizer.eos_token_id
    prompts = [row["input_ids"][:12] for row in rows[:4]]
    answers = generate(model, tokenizer, prompts, max_new_tokens=3)
    right = [
        {"input_ids": p + a + [end], "labels": [IGNORED] * 12 + a + [end]}
        for p, a in zip(prompts, answers, strict=True)
    ]
    wrong_token = next(token for token in range(70, 80) if token != answers[3][0])
    wrong = {
        "input_ids": [*prompts[3], wrong_token, *answers[3][1:], end],
        "labels": [IGNORED] * 12 + [wrong_token, *answers[3][1:], end],
    }
    assert ExactMatch(max_new_tokens=3).evaluate(model, tokenizer, right, CONTEXT) == {"exact_match": 1.0}
    found = ExactMatch(max_new_tokens=3).evaluate(model, tokenizer, [*right[:3], wrong], CONTEXT)
    assert found == {"exact_match": 0.75}
    first = ExactMatch(max_new_tokens=3, max_rows=3).evaluate(model, tokenizer, [*right[:3], wrong], CONTEXT)
    assert first == {"exact_match": 1.0}


def test_exact_match_of_plain_texts_is_refused(tokenizer):
    row = Codec(tokenizer).encode({"text": "once"})
    with pytest.raises(DataError, match="needs rows with a prompt"):
        ExactMatch().check_data(tokenizer, [row], CONTEXT)


def test_a_metric_that_is_not_finite_is_refused(tokenizer, rows):
    broken = tiny_model()
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="on the validation rows is nan"):
        measuring.measure([Perplexity()], broken, tokenizer, rows, CONTEXT)


def test_every_module_returns_to_the_mode_it_was_in():
    model = tiny_model().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before


def test_bits_per_byte_divide_by_the_bytes_of_what_is_supervised(model, tokenizer):
    codec = Codec(tokenizer)
    answers = ["Grüße", "two  words", "🌳"]
    talks = [
        {"messages": [{"role": "user", "content": "q" * 9}, {"role": "assistant", "content": answer}] * 2}
        for answer in answers
    ]
    texts = ["a text of its own", "Öl"]
    rows = [codec.encode(row) for row in (*talks, *({"text": text} for text in texts))]
    # Nothing predicts the first token of a text, here its first byte; a letter that it cuts in two counts whole.
    size = 2 * sum(len(answer.encode()) for answer in answers) + sum(len(text.encode()) for text in texts) - 1
    losses, _ = one_by_one(model, rows)
    found = Perplexity().evaluate(model, tokenizer, rows, CONTEXT)["bits_per_byte"]
    assert found == pytest.approx(sum(losses) / math.log(2) / size, rel=1e-6)
    talked = Perplexity().evaluate(model, tokenizer, rows[:3], CONTEXT)["bits_per_byte"]
    told = sum(one_by_one(model, rows[:3])[0])
    assert talked == pytest.approx(told / math.log(2) / (2 * sum(len(answer.encode()) for answer in answers)), rel=1e-6)
