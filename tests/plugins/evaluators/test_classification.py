"""Classification agrees with scikit-learn and with figures by hand, and scores labels as one forward pass each does."""

import random

import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from tunekit import Classification, ConfigError, Context, DataError
from tunekit.core.data.codec import Codec
from tunekit.core.evaluation import predicting as evaluation
from tunekit.plugins.evaluators import classification, confusion
from tunekit.testing import tiny_model, tiny_tokenizer

CONTEXT = Context(model_id="tiny", device="cpu")
ANSWERS = ("good", "bad", "good", "so so", "Good", "bad", "good")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def rows(tokenizer):
    return encoded(tokenizer, ANSWERS)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return tiny_model(request.param).eval()


def encoded(tokenizer, answers):
    codec = Codec(tokenizer)
    return [
        codec.encode({"messages": [{"role": "user", "content": "q" * at}, {"role": "assistant", "content": answer}]})
        for at, answer in enumerate(answers)
    ]


def test_figures_by_hand():
    # truth a: a a b, one unparsed; truth b: b a; truth c: b
    matrix = [[2, 1, 0, 1], [1, 1, 0, 0], [0, 1, 0, 0]]
    a, b, c = confusion.figures(matrix)
    assert a == pytest.approx((2 / 3, 2 / 4, 4 / 7, 4))
    assert b == pytest.approx((1 / 3, 1 / 2, 2 / 5, 2))
    assert c == (0, 0, 0, 1)
    assert confusion.macro(matrix)[:3] == pytest.approx((1 / 3, 1 / 3, (4 / 7 + 2 / 5) / 3))
    assert confusion.accuracy(matrix) == 3 / 7
    number, always = confusion.majority(matrix)
    assert number == 0
    assert confusion.accuracy(always) == 4 / 7
    assert confusion.macro(always).f1 == pytest.approx((8 / 11 + 0 + 0) / 3)


@pytest.mark.parametrize("seed", range(30))
def test_figures_are_those_of_scikit_learn(seed):
    draw = random.Random(seed)
    size = draw.randint(2, 5)
    truth = [draw.randrange(size) for _ in range(draw.randint(1, 30))]
    answered = [draw.choice([true, draw.randint(0, size)]) for true in truth]
    matrix = confusion.confusion(truth, answered, size)
    labels = list(range(size))
    assert matrix == confusion_matrix(truth, answered, labels=range(size + 1))[:-1].tolist()
    theirs = precision_recall_fscore_support(truth, answered, labels=labels, zero_division=0)
    assert list(zip(*confusion.figures(matrix), strict=True)) == [pytest.approx(column.tolist()) for column in theirs]
    used = sorted({*truth, *answered} - {size})
    means = precision_recall_fscore_support(truth, answered, labels=used, average="macro", zero_division=0)
    assert confusion.macro(matrix)[:3] == pytest.approx(means[:3])


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("good", 0), (" Good.\n", 0), ("It is good!", 0), ("not good", 1), ("It is NOT  GOOD, sorry", 1),
        ("goods", 2), ("", 2), ("good or not good", 2), ("neither", 2), ("good, good", 0),
    ],
)  # fmt: skip
def test_a_label_is_read_from_an_answer_that_names_it_alone(answer, label):
    assert confusion.parse(answer, ["good", "not good"]) == label


def log_likelihood(model, prompt, answer):
    """By one forward pass without padding, in float64."""
    with torch.no_grad():
        log = model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
    return sum(log[len(prompt) + at - 1, token].item() for at, token in enumerate(answer))


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_labels_are_scored_as_one_at_a_time_whatever_the_batches(model, tokenizer, rows, batch_tokens, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(classification, "AT_ONCE", 3)
    labels = ["bad", "good", "so so"]
    end = tokenizer.eos_token_id
    tokens = [[*tokenizer.encode(label, add_special_tokens=False), end] for label in labels]
    expected = []
    for row in rows:
        prompt = classification.split(row)[0]
        found = [log_likelihood(model, prompt, answer) for answer in tokens]
        expected.append(found.index(max(found)))
    assert list(classification._likeliest(model, tokenizer, rows, tokens)) == expected
    right = sum(labels[at] == answer.lower() for at, answer in zip(expected, ANSWERS, strict=True))
    found = Classification().evaluate(model, tokenizer, rows, CONTEXT)
    assert found["accuracy"] == pytest.approx(right / len(rows))
    assert found["above_majority"] == pytest.approx((right - 4) / len(rows))
    assert found.details["majority"]["label"].lower() == "good"


def test_a_label_that_no_row_has_is_encoded_as_a_row_would_have_it(model, tokenizer, rows):
    named = Classification(labels=("good", "bad", "so so", "other"))
    found = named.evaluate(model, tokenizer, rows, CONTEXT)
    prompt = [classification.split(row)[0] for row in rows]
    tokens = [
        [*tokenizer.encode(label, add_special_tokens=False), tokenizer.eos_token_id]
        for label in ("good", "bad", "so so", "other")
    ]
    scores = [[log_likelihood(model, p, t) for t in tokens] for p in prompt]
    answered = [score.index(max(score)) for score in scores]
    columns = [sum(line[at] for line in found.details["confusion"]["counts"]) for at in range(5)]
    assert columns == [answered.count(at) for at in range(4)] + [0]


def test_generated_answers_that_name_no_label_are_counted_as_unparsed(model, tokenizer, rows):
    found = Classification(method="generation", max_new_tokens=4).evaluate(model, tokenizer, rows, CONTEXT)
    assert found["accuracy"] == 0
    assert found.details["unparsed"] == len(rows)
    assert found.details["classes"]["bad"] == {"precision": 0, "recall": 0, "f1": 0, "support": 2}


def test_what_cannot_be_classified_is_refused_before_there_is_a_model(tokenizer, rows):
    Classification().check_data(tokenizer, rows, CONTEXT)
    with pytest.raises(DataError, match="held-out row 4: the answer 'so so' is none of the labels good, bad"):
        Classification(labels=("good", "bad")).check_data(tokenizer, rows, CONTEXT)
    with pytest.raises(DataError, match="finds 1 different answers"):
        Classification().check_data(tokenizer, rows[:1], CONTEXT)
    with pytest.raises(DataError, match="finds 51 different answers"):
        Classification().check_data(tokenizer, encoded(tokenizer, map(str, range(51))), CONTEXT)
    with pytest.raises(DataError, match="needs rows with a prompt"):
        Classification().check_data(tokenizer, [Codec(tokenizer).encode({"text": "once"})], CONTEXT)
    for labels in (("one",), ("good", "Good."), ()):
        with pytest.raises(ConfigError, match="two labels at least"):
            Classification(labels=labels)
