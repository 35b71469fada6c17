"""Figures of generated answers are those of the reference implementations, and of examples worked out by hand."""

from decimal import Decimal

import pytest

import tunekit as tk
from tunekit import Answer
from tunekit.core.data.codec import Codec
from tunekit.core.evaluation import predicting as evaluation
from tunekit.core.evaluation.predicting import generate
from tunekit.plugins.evaluators.numeric_answer import number
from tunekit.plugins.evaluators.token_f1 import f1
from tunekit.testing import tiny_model, tiny_tokenizer

CONTEXT = tk.Context(model_id="tiny", device="cpu")
# From the README of sacrebleu, with one of its two references a row; and the answers it scores.
GIVEN = ("The dog bit the man.", "It wasn't surprising.", "The man had just bitten him.")
EXPECTED = ("The dog bit the man.", "It was not unexpected.", "The man bit him first.")
SECOND = ("The dog had bit the man.", "No one was surprised.", "The man had bitten the dog.")


@pytest.mark.parametrize(
    ("given", "expected", "value"),
    [
        ("the cat sat", "The cat sat.", 1),
        ("a cat", "cats", 0),
        ("the cat sat on the mat", "a cat sat", 2 * 2 / (4 + 2)),
        ("one one two", "one two two", 4 / 6),
        ("", "", 1),
        ("the", "", 1),
        ("the", "cat", 0),
        ("", "cat", 0),
        ("Grüße!", "grüße", 1),
    ],
)
def test_f1_of_words_by_hand(given, expected, value):
    assert f1(given, expected) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("She has 3 + 4 = 7 eggs.\n#### 7", "7"),
        ("#### 1,234,567", "1234567"),
        ("#### $18.00", "18"),
        ("#### -$1,234.50 a day", "-1234.5"),
        ("#### $-5", "-5"),
        ("#### \u22122", "-2"),
        ("#### - 2", "-2"),
        ("#### +2.", "2"),
        ("#### 7\nQuestion: what is 8?\n#### 9", "7"),
        ("#### none, so 12", "12"),
        ("#### none", None),
        ("5 #### none", "5"),
        ("It is 12, I think", "12"),
        ("first 1, then 2.", "2"),
        ("17-3", "3"),
        ("x-3", "3"),
        ("it is -3", "-3"),
        ("(-3)", "-3"),
        ("1,2", "2"),
        ("10,000,00", "0"),
        ("12345,678", "678"),
        ("a .5 share", ".5"),
        ("3.14.", "3.14"),
        ("\u20ac 1.50", "1.5"),
        ("50%", "50"),
        ("", None),
        ("no number", None),
    ],
)
def test_the_number_of_an_answer_is_the_marked_one_or_the_last(text, value):
    assert number(text) == (None if value is None else Decimal(value))


def test_numeric_answers_are_compared_by_value():
    pairs = [
        Answer("so #### 18", "#### 18.00"),
        Answer("17", "#### 18"),
        Answer("eighteen", "#### 18"),
        Answer("1,800", "1800"),
    ]
    found = tk.NumericAnswer().compare(pairs, CONTEXT)
    assert (found["numeric_answer"], found.scores["numeric_answer"]) == (0.5, [1, 0, 0, 1])
    assert found.details == {"without_number": 1}
    assert tk.NumericAnswer().max_new_tokens == 256
    with pytest.raises(tk.ConfigError, match="must be at least 1"):
        tk.NumericAnswer(max_new_tokens=0)


def test_bleu_is_that_of_the_readme_of_sacrebleu():
    # Its two references are two columns there: 48.53 with both. Ours has one a row, so both ways are compared.
    from sacrebleu.metrics import BLEU

    both = BLEU().corpus_score(GIVEN, [EXPECTED, SECOND])
    assert f"{both.score:.2f} {both.bp:.3f} {both.sys_len} {both.ref_len}" == "48.53 0.943 17 18"
    pairs = [Answer(*pair) for pair in zip(GIVEN, EXPECTED, strict=True)]
    found = tk.Bleu().compare(pairs, CONTEXT)
    assert found["bleu"] == pytest.approx(BLEU().corpus_score(GIVEN, [EXPECTED]).score, abs=1e-9)
    assert found.details["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    by_hand = (12 / 17 * 6 / 14 * 4 / 11 * 3 / 8) ** (1 / 4)
    assert found["bleu"] == pytest.approx(100 * by_hand)
    assert (found.details["answer_words"], found.details["reference_words"]) == (17, 17)
    assert not found.scores, "it is no mean over rows"


def test_bleu_and_chrf_at_their_ends():
    same = [Answer(text, text) for text in (*GIVEN, "a longer\nanswer of two lines")]
    other = [Answer("one two three four five", "six seven eight nine ten")] * 2
    assert tk.Bleu().compare(same, CONTEXT)["bleu"] == pytest.approx(100)
    assert tk.Chrf().compare(same, CONTEXT)["chrf"] == pytest.approx(100)
    assert tk.Bleu(tokenize="none").compare(other, CONTEXT)["bleu"] == 0
    assert tk.Bleu(lowercase=True).compare([Answer("ONE two three four", "one TWO three four")], CONTEXT)[
        "bleu"
    ] == pytest.approx(100)


def test_chrf_is_that_of_sacrebleu():
    from sacrebleu.metrics import CHRF

    assert f"{CHRF().corpus_score(GIVEN, [EXPECTED, SECOND]).score:.2f}" == "59.73"
    pairs = [Answer(*pair) for pair in zip(GIVEN, EXPECTED, strict=True)]
    for word_order, name in ((0, "chrF2"), (2, "chrF2++")):
        found = tk.Chrf(word_order=word_order).compare(pairs, CONTEXT)
        assert found["chrf"] == pytest.approx(CHRF(word_order=word_order).corpus_score(GIVEN, [EXPECTED]).score)
        assert f"nw:{word_order}|" in found.details["signature"], name


def test_rouge_by_hand():
    # police killed the gunman / police kill the gunman: Lin 2004, section 3
    pairs = [
        Answer("police kill the gunman", "police killed the gunman"),
        Answer("the gunman kill police", "police killed the gunman"),
    ]
    found = tk.Rouge().compare(pairs, CONTEXT)
    assert found.scores["rouge1"] == pytest.approx([3 / 4, 3 / 4])
    assert found.scores["rouge2"] == pytest.approx([1 / 3, 1 / 3])
    assert found.scores["rougeL"] == pytest.approx([3 / 4, 2 / 4])
    assert found["rougeL"] == pytest.approx(5 / 8)
    assert tk.Rouge(stemmer=True).compare(pairs, CONTEXT).scores["rouge1"] == pytest.approx([1, 1])
    lines = tk.Rouge().compare([Answer("b c\na", "a\nb c")], CONTEXT)
    assert lines["rougeLsum"] == 1 > lines["rougeL"]


EVALUATORS = [
    tk.ExactMatch(max_new_tokens=6),
    tk.TokenF1(max_new_tokens=6),
    tk.NumericAnswer(max_new_tokens=6),
    tk.Bleu(max_new_tokens=6, tokenize="char"),
    tk.Chrf(max_new_tokens=6),
    tk.Rouge(max_new_tokens=6),
    tk.Classification(method="generation", max_new_tokens=6),
]


@pytest.fixture(scope="module")
def asked():
    """A model, its tokenizer, and rows whose references are half of what the model answers, or all of it."""
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    model.lm_head.weight.data[:70] = 0  # letters alone, no control tokens
    codec = Codec(tokenizer)
    prompts = [codec.prompt("q" * at) for at in (1, 30, 7, 90, 2)]
    given = [tokenizer.decode(ids) for ids in generate(model, tokenizer, prompts, 6)]
    rows = [
        codec.encode({"messages": [{"role": "user", "content": "q" * at}, {"role": "assistant", "content": answer}]})
        for at, answer in zip(
            (1, 30, 7, 90, 2), [f"{given[0]}", f"{given[1]}", "5 apples", f"{given[3][:3]} 7", "8"], strict=True
        )
    ]
    return model, tokenizer, rows


@pytest.mark.parametrize("evaluator", EVALUATORS, ids=lambda evaluator: evaluator.name)
def test_neither_batches_nor_order_nor_padding_change_a_figure(asked, evaluator, monkeypatch):
    model, tokenizer, rows = asked
    together = evaluator.evaluate(model, tokenizer, rows, CONTEXT)
    turned = evaluator.evaluate(model, tokenizer, rows[::-1], CONTEXT)
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 1)  # one row at a time: nothing is padded
    alone = evaluator.evaluate(model, tokenizer, rows, CONTEXT)
    assert together == alone == pytest.approx(turned)
    for name, scores in together.scores.items():
        assert scores == alone.scores[name] == turned.scores[name][::-1]


@pytest.mark.parametrize("evaluator", EVALUATORS, ids=lambda evaluator: evaluator.name)
def test_plain_texts_are_refused_before_there_is_a_model(evaluator):
    tokenizer = tiny_tokenizer()
    with pytest.raises(tk.DataError, match="needs rows with a prompt and an answer"):
        evaluator.check_data(tokenizer, [Codec(tokenizer).encode({"text": "once"})], CONTEXT)


def test_a_row_without_a_number_is_refused_with_its_place(asked):
    _, tokenizer, rows = asked
    with pytest.raises(tk.DataError, match="NumericAnswer, held-out row 1: there is no number"):
        tk.NumericAnswer().check_data(tokenizer, rows, CONTEXT)
    tk.NumericAnswer().check_data(tokenizer, rows[2:], CONTEXT)
