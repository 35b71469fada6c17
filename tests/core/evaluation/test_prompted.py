"""The base is asked with training rows before each held-out row: the same shots for all, none of what is evaluated."""

import pytest

import tunekit as tk
from tunekit.core.data import dataset
from tunekit.core.data.codec import IGNORED, Codec
from tunekit.core.evaluation.answers import split
from tunekit.core.evaluation.predicting import row_losses
from tunekit.core.evaluation.prompted import baselines
from tunekit.core.evaluation.statistics import paired_difference
from tunekit.testing import tiny_tokenizer

PAIRS = [("one", "uno"), ("two", "due"), ("three", "tre"), ("four", "quattro"), ("five", "cinque"), ("six", "sei")]
ROWS = [{"prompt": question, "completion": answer} for question, answer in PAIRS]
TRAIN, HELD_OUT = tk.InMemory(rows=ROWS), tk.InMemory(rows=[*ROWS[:2], {"prompt": "seven", "completion": "sette"}])


@pytest.fixture(scope="module")
def codec():
    return Codec(tiny_tokenizer())


def talk(*pairs):
    roles = ("user", "assistant")
    return [{"role": role, "content": said} for pair in pairs for role, said in zip(roles, pair, strict=True)]


def rows_of(prompted, codec, train=TRAIN, validation=HELD_OUT, seed=0, room=256, trainer=None, evaluators=()):
    data = dataset.load(train, validation, trainer or tk.SFT(), codec, 256, seed)
    made = baselines(prompted, train, validation, data, codec, evaluators, room, seed)
    return data.validation, made


def test_every_row_has_the_same_shots_and_none_of_them_is_evaluated(codec):
    own, (made,) = rows_of([tk.Prompted(shots=2)], codec)
    shots = [tuple(message["content"] for message in shot) for shot in made.details["shots"]]
    assert len(set(shots)) == 2
    assert set(shots) <= set(PAIRS[2:]), "the first two are held out as well"
    asked = [*PAIRS[:2], ("seven", "sette")]
    for row, before, pair in zip(made.rows, own, asked, strict=True):
        assert list(row["input_ids"]) == codec.encode({"messages": talk(*shots, pair)})["input_ids"]
        measured = [label for label in row["labels"] if label != IGNORED]
        assert measured == [label for label in before["labels"] if label != IGNORED]
        assert split(row)[0] == codec.prompt(talk(*shots, pair)[:-1]), "as it is asked in use"
    assert made.details["rows"] == {"2 shots": 3}


def test_the_seed_chooses_the_shots_whatever_the_order_of_the_rows(codec):
    def shots(seed, rows=ROWS):
        return rows_of([tk.Prompted(shots=2)], codec, tk.InMemory(rows=rows), seed=seed)[1][0].details["shots"]

    assert shots(0) == shots(0, ROWS[::-1])
    assert len({str(shots(seed)) for seed in range(8)}) > 1
    shared = [{"prompt": f"number {n}", "completion": "a"} for n in range(300)]
    _, (made,) = rows_of([tk.Prompted(shots=3)], codec, tk.InMemory(rows=shared), validation=0.1)
    assert len(made.details["shots"]) == 3
    whispered = [{"prompt": " One", "completion": "UNO "}, *ROWS[1:]]
    with pytest.raises(tk.DataError, match="only 4 training rows are not among the held-out ones"):
        rows_of([tk.Prompted(shots=5)], codec, tk.InMemory(rows=whispered))


def test_a_row_without_room_gets_fewer_shots_and_is_never_cut(codec):
    long = tk.InMemory(rows=[{"prompt": "x" * 60, "completion": "y"}, ROWS[0]])
    own, (made,) = rows_of([tk.Prompted(shots=3)], codec, validation=long, room=120)
    assert sum(made.details["rows"].values()) == 2
    assert len(made.details["rows"]) == 2
    assert [split(row)[1] for row in made.rows] == [split(row)[1] for row in own]
    assert max(len(row["input_ids"]) for row in made.rows) <= 120
    room = len(made.rows[1]["input_ids"])
    _, (tight,) = rows_of([tk.Prompted(shots=3)], codec, validation=long, room=room + 30,
                          evaluators=[tk.ExactMatch(max_new_tokens=64)])  # fmt: skip
    assert all(
        len(split(row)[0]) + 64 <= room + 30
        for row, before in zip(tight.rows, own, strict=True)
        if len(row["input_ids"]) > len(before["input_ids"])
    )
    with pytest.raises(tk.DataError, match="no held-out row has room"):
        rows_of([tk.Prompted(shots=3)], codec, validation=long, room=20)


def test_an_instruction_is_the_system_message_before_the_rows_own(codec):
    own = [{"messages": [{"role": "system", "content": "Be brief."}, *talk(PAIRS[0])]}]
    asked = [
        tk.Prompted(shots=0, instruction="In Italian."),
        tk.Prompted(shots=1, instruction="Now."),
        tk.Prompted(shots=1),
    ]
    _, made = rows_of(asked, codec, validation=tk.InMemory(rows=own))
    assert [one.name for one in made] == ["prompted-0", "prompted-1", "prompted-1-2"]
    system = {"role": "system", "content": "In Italian.\n\nBe brief."}
    assert list(made[0].rows[0]["input_ids"]) == codec.encode({"messages": [system, *talk(PAIRS[0])]})["input_ids"]
    with pytest.raises(tk.ConfigError, match="that is the base itself"):
        tk.Prompted(shots=0)
    with pytest.raises(tk.DataError, match="plain texts have none"):
        rows_of([tk.Prompted()], codec, validation=tk.InMemory(rows=[{"text": "Once"}]))


@pytest.mark.parametrize("train_on", ["last", "all"])
def test_whatever_is_trained_on_the_same_tokens_are_measured(codec, train_on):
    rows, (made,) = rows_of([tk.Prompted(shots=1)], codec, trainer=tk.SFT(train_on=train_on))
    for row, before in zip(made.rows, rows, strict=True):
        measured, own = ([label for label in one["labels"][1:] if label != IGNORED] for one in (row, before))
        assert measured == own, "but for the first token of a row, which nothing predicts"


def test_a_run_shows_base_prompted_and_tuned_side_by_side(tmp_path):
    pipeline = tk.Pipeline(
        model=tk.TINY,
        data=TRAIN,
        validation=HELD_OUT,
        evaluators=(
            tk.Perplexity(),
            tk.ExactMatch(max_new_tokens=4),
            tk.Retention(source=tk.InMemory(rows=[{"text": "The grass is green."}])),
        ),
        baselines=(tk.Prompted(shots=1), tk.Prompted(shots=2, instruction="Translate.")),
        trainer=tk.SFT(max_steps=2),
        seed=5,
    )
    pipeline.save(tmp_path / "recipe.toml")
    assert tk.load(tmp_path / "recipe.toml") == pipeline
    run = pipeline.run(tmp_path / "run")
    assert str(run).splitlines()[0].split() == ["metric", "base", "prompted-1", "prompted-2", "tuned"]
    assert set(run.prompted_metrics["prompted-1"]) == {"perplexity", "nll", "bits_per_byte", "exact_match"}

    # The other way to the figure: the base of the run, asked with what the details say.
    kept, base = run.evaluations["prompted-1"], run._model(tuned=False)
    shot = [message["content"] for message in kept["details"]["prompted"]["shots"][0]]
    nats = tokens = 0
    for pair in [*PAIRS[:2], ("seven", "sette")]:
        row = base.codec.encode({"messages": talk(shot, pair)}, "last")
        (loss,), (count,) = row_losses(base.model, base.codec.tokenizer, [row])
        nats, tokens = nats + loss, tokens + count
    assert run.prompted_metrics["prompted-1"]["nll"] == pytest.approx(nats / tokens, rel=1e-5)
    assert run.prompted_metrics["prompted-1"]["nll"] != run.base_metrics["nll"]

    compared = run.result["intervals"]["metrics"]["nll"]["prompted"]["prompted-1"]
    tuned = run.evaluations["tuned"]
    gain = paired_difference(kept["scores"]["nll"], tuned["scores"]["nll"], tuned["weights"]["nll"], seed=5)
    assert (compared["difference"], compared["p"]) == ([gain.low, gain.high], gain.p)
    page = (tmp_path / "run/report.html").read_text()
    assert "prompted-1" in page
    assert "to prompted-2: " in page
