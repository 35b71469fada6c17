"""SFT takes the step that the whole batch asks for, token for token, and a resumed run is the same run."""

import math
import shutil

import attrs
import pytest
import torch

from tunekit import SFT, ConfigError, Context, Full, LoRA, NotSupported, TrainingError
from tunekit.core.data import batching
from tunekit.core.data.codec import IGNORED, Codec
from tunekit.core.registry import default_registry
from tunekit.core.run.checkpoint import newest, trained_parameters
from tunekit.core.run.files import create, history
from tunekit.core.run.observers import Observers
from tunekit.core.run.run_log import RunLog
from tunekit.core.training import compiled
from tunekit.core.training.rows_loss import RowsLoss
from tunekit.plugins.trainers import optimization
from tunekit.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CONTEXT = Context(model_id="tiny", device="cpu", seed=3)


def encoded(count):
    """Rows of very different lengths, so that a mean of means would differ from a mean over tokens."""
    codec = Codec(TOKENIZER)
    return [
        codec.encode(
            {
                "messages": [
                    {"role": "user", "content": f"row {n}"},
                    {"role": "assistant", "content": "ab" * (1 + n * n)},
                ]
            }
        )
        for n in range(count)
    ]


def fit(
    trainer,
    directory,
    *,
    rows=7,
    model=None,
    resumed=None,
    after_step=None,
    extra_loss=None,
    validate=None,
    context=CONTEXT,
):
    model = model or tiny_model()
    if resumed is None:
        create(directory)
    else:
        resumed.load_parameters(model)
    log = RunLog(directory=directory, observers=Observers(default_registry()), resumed=resumed)
    torch.manual_seed(0)
    result = trainer.fit(
        model,
        TOKENIZER,
        encoded(rows),
        after_step=after_step or (lambda model, step: None),
        extra_loss=extra_loss or (lambda model: None),
        validate=validate,
        run=log,
        context=context,
    )
    return model, result, history(directory)


def largest_difference(left, right):
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def test_the_step_is_that_of_the_mean_over_all_supervised_tokens(tmp_path):
    trainer = SFT(max_steps=1, batch_size=7, learning_rate=0.1, optimizer="sgd", schedule="constant", warmup=0,
                  max_grad_norm=math.inf)  # fmt: skip
    trained, _, lines = fit(trainer, tmp_path / "run")

    # The second way: one row at a time, without padding, one gradient of the summed loss over all tokens.
    reference = tiny_model()
    rows = encoded(7)
    tokens = sum(label != IGNORED for row in rows for label in row["labels"][1:])
    total = torch.zeros(())
    for row in rows:
        log = reference(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        for at, label in enumerate(row["labels"][1:]):
            if label != IGNORED:
                total = total - log[at, label]
    (total / tokens).backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter -= 0.1 * parameter.grad
    assert lines[0]["loss"] == pytest.approx(total.item() / tokens, rel=1e-6)
    assert lines[0]["tokens"] == tokens
    assert largest_difference(trained, reference) < 1e-6
    assert largest_difference(trained, tiny_model()) > 1e-3


@pytest.mark.parametrize("packing", [1, 40, 10_000])
def test_how_tightly_rows_are_packed_never_changes_a_step(tmp_path, packing):
    common = {"epochs": 2, "batch_size": 5, "learning_rate": 0.05, "optimizer": "sgd", "order": "by-length"}
    alone, _, expected = fit(SFT(**common, micro_batch_size=1), tmp_path / "alone")
    packed, _, lines = fit(SFT(**common, packing=packing), tmp_path / "packed")
    assert largest_difference(alone, packed) < 1e-6
    assert largest_difference(alone, tiny_model()) > 1e-3
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in expected]


def test_packing_takes_the_place_of_micro_batch_size():
    with pytest.raises(ConfigError, match="takes the place of micro_batch_size"):
        SFT(packing=4096, micro_batch_size=2).check(CONTEXT)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5])
def test_how_a_step_is_split_into_forward_passes_never_changes_it(tmp_path, micro_batch_size):
    common = {"epochs": 2, "batch_size": 5, "learning_rate": 0.05, "optimizer": "sgd"}
    whole, _, whole_lines = fit(SFT(**common), tmp_path / "whole")
    split, _, lines = fit(SFT(**common, micro_batch_size=micro_batch_size), tmp_path / "split")
    assert largest_difference(whole, split) < 1e-6
    assert largest_difference(whole, tiny_model()) > 1e-3
    for name in ("loss", "grad_norm", "learning_rate", "tokens"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in whole_lines], abs=1e-5)


ROUNDING = 2**-8
"""Of one number in bfloat16, at most, in parts of it."""


def over_bfloat16(method):
    """The method on a base in bfloat16, away from its start, where some gradients are zero."""
    torch.manual_seed(0)
    model = method.attach(tiny_model().bfloat16(), IN_BFLOAT16)
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=drawn).to(parameter.dtype), alpha=0.05)
    return model


IN_BFLOAT16 = attrs.evolve(CONTEXT, dtype="bfloat16", total_steps=20)
METHODS = {"lora": LoRA(rank=4), "full": Full()}


def flat(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


@pytest.fixture(scope="module", params=METHODS)
def exact(request):
    """A method, and the gradient of a step in float64, one row at a time."""
    model = over_bfloat16(METHODS[request.param]).double().eval()
    rows = encoded(7)
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], labels[0, 1:], reduction="sum").backward()
    gradient = flat(parameter.grad for parameter in trained_parameters(model).values())
    return METHODS[request.param], gradient / sum(map(batching.supervised_tokens, rows))


WAYS = [
    {"micro_batch_size": 1},
    {"micro_batch_size": 3},
    {"micro_batch_size": 7},
    {"packing": 40},
    {"packing": 10_000},
    {"padding_free": False},
    {"padding_free": False, "micro_batch_size": 3},
    {"chunked_loss": False},
    {"lean": False},
    {"gradient_checkpointing": True},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_in_bfloat16_any_way_through_a_step_is_within_two_roundings_of_exact_arithmetic(tmp_path, exact, way):
    method, gradient = exact
    seen = []
    trainer = SFT(max_steps=1, batch_size=7, optimizer="sgd", warmup=0, max_grad_norm=math.inf, **way)
    fit(
        trainer,
        tmp_path / "run",
        model=over_bfloat16(method),
        after_step=lambda model, step: seen.append(flat(p.grad for p in trained_parameters(model).values())),
        context=IN_BFLOAT16,
    )
    assert ((seen[0] - gradient).norm() / gradient.norm()).item() < 2 * ROUNDING


def test_every_row_is_used_once_an_epoch_the_last_smaller_step_included(tmp_path):
    trainer = SFT(epochs=1, batch_size=3)
    _, result, lines = fit(trainer, tmp_path / "run")
    assert result.steps == trainer.planned_steps(7) == len(lines) == 3
    assert sum(line["tokens"] for line in lines) == sum(1 + 2 * (1 + n * n) for n in range(7))


@pytest.mark.parametrize(
    ("fields", "steps"),
    [({"epochs": 3}, 9), ({"epochs": 0.5}, 2), ({"max_steps": 4}, 4), ({"epochs": 2, "batch_size": 1}, 14)],
    ids=str,
)
def test_the_planned_steps_are_those_taken(tmp_path, fields, steps):
    trainer = SFT(**{"batch_size": 3, **fields})
    counted = []
    _, result, _ = fit(trainer, tmp_path / "run", after_step=lambda model, step: counted.append(step))
    assert result.steps == trainer.planned_steps(7) == steps
    assert counted == list(range(1, steps + 1))


def test_the_slot_after_a_step_comes_when_parameters_moved_and_gradients_are_still_there(tmp_path):
    seen = []

    def after_step(model, step):
        moved = largest_difference(model, tiny_model()) > 0
        seen.append(moved and all(parameter.grad is not None for parameter in model.parameters()))

    fit(SFT(max_steps=2, warmup=0), tmp_path / "run", after_step=after_step)
    assert seen == [True, True]


@pytest.mark.parametrize("micro_batch_size", [1, "auto"])
def test_an_extra_loss_counts_once_a_step_whatever_the_accumulation(tmp_path, micro_batch_size):
    trainer = SFT(max_steps=1, batch_size=7, learning_rate=0.1, optimizer="sgd", schedule="constant", warmup=0,
                  max_grad_norm=math.inf, micro_batch_size=micro_batch_size)  # fmt: skip
    plain, _, _ = fit(trainer, tmp_path / "plain")
    pulled, _, _ = fit(trainer, tmp_path / "pulled", extra_loss=lambda model: 0.5 * model.lm_head.weight.square().sum())
    expected = plain.lm_head.weight - 0.1 * tiny_model().lm_head.weight
    assert torch.allclose(pulled.lm_head.weight, expected, atol=1e-6)


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_nothing(tmp_path):
    _, _, lines = fit(SFT(max_steps=10, learning_rate=1.0, warmup=0.2, schedule="linear"), tmp_path / "run")
    rates = [line["learning_rate"] for line in lines]
    assert rates == pytest.approx([0.0, 0.5, 1.0, *[1 - n / 8 for n in range(1, 8)]])


def test_a_long_gradient_is_scaled_down(tmp_path):
    trainer = SFT(max_steps=1, learning_rate=1.0, optimizer="sgd", schedule="constant", warmup=0, max_grad_norm=0.01)
    trained, _, _ = fit(trainer, tmp_path / "run")
    pairs = zip(trained.parameters(), tiny_model().parameters(), strict=True)
    assert math.sqrt(sum((a - b).square().sum().item() for a, b in pairs)) == pytest.approx(0.01, rel=1e-3)


def test_evaluation_while_training_is_logged_at_its_steps(tmp_path):
    _, _, lines = fit(SFT(max_steps=4, evaluate_every=2), tmp_path / "run", validate=lambda: {"nll": 1.5})
    assert [line["step"] for line in lines if "validation/nll" in line] == [2, 4]


def test_a_gradient_that_is_not_finite_stops_the_run_at_its_step_with_its_rows(tmp_path):
    trainer = SFT(max_steps=9, learning_rate=1e30, optimizer="sgd", warmup=0, max_grad_norm=math.inf)
    says = r"step 2: the norm of the gradient is nan on the encoded training rows 1, 2, 3, 4, 5, 6, 7; row 1 begins '<"
    with pytest.raises(TrainingError, match=says):
        fit(trainer, tmp_path / "run")


class Poisoned(torch.nn.Module):
    """Makes the loss of every row infinite that has a given text in it: a stand-in for what makes real models do so."""

    def __init__(self, inner, text):
        super().__init__()
        self.inner, self.ids = inner, TOKENIZER(text, add_special_tokens=False)["input_ids"]

    def forward(self, ids):
        made = self.inner(ids)
        for row, numbers in enumerate(ids.tolist()):
            if " ".join(map(str, self.ids)) in " ".join(map(str, numbers)):
                made[row] = made[row] * math.inf
        return made


def poisoned(text):
    model = tiny_model()
    model.model.embed_tokens = Poisoned(model.model.embed_tokens, text)
    return model


PLAIN = {"max_steps": 6, "batch_size": 3, "micro_batch_size": 1, "padding_free": False, "chunked_loss": False}


def test_a_loss_that_is_not_finite_names_the_very_row(tmp_path):
    with pytest.raises(TrainingError, match=r"step \d: the loss is nan on the encoded training rows 6; row 6 begins"):
        fit(SFT(**PLAIN), tmp_path / "run", model=poisoned("row 5"))


def test_a_skipped_step_moves_nothing_is_counted_and_leaves_the_schedule_alone(tmp_path):
    trainer = SFT(**PLAIN, on_nonfinite="skip", schedule="linear", warmup=0, learning_rate=0.01)
    seen = {}
    model, result, lines = fit(
        trainer,
        tmp_path / "run",
        model=poisoned("row 5"),
        after_step=lambda model, step: seen.update({step: [p.detach().clone() for p in model.parameters()]}),
    )
    skipped = [line["step"] for line in lines if line.get("skipped")]
    assert result.metrics["skipped_steps"] == len(skipped) == 2, "once an epoch, and there are two"
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.01 * (1 - n / 6) for n in range(6)])
    assert "skipped step" in (tmp_path / "run" / "log.txt").read_text()
    assert sorted(seen) == [step for step in range(1, 7) if step not in skipped]

    # The second way: the same steps without the skipped ones, each by itself.
    twin = tiny_model()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0)
    rows = encoded(7)
    shuffled = batching.RowOrder(lengths=batching.lengths(rows), batch_size=3, seed=CONTEXT.seed, order="shuffled")
    for step in sorted(seen):
        chosen = [rows[at] for at in shuffled.of_step(step)]
        tokens = sum(map(batching.supervised_tokens, chosen))
        for row in sorted(chosen, key=lambda row: -len(row["input_ids"])):
            ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
            logits = twin(ids).logits[0, :-1]
            (torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum") / tokens).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - (step - 1) / 6)
        optimizer.step()
        optimizer.zero_grad()
    assert largest_difference(model, twin) < 1e-5


def test_a_run_whose_every_step_was_skipped_fails(tmp_path):
    with pytest.raises(TrainingError, match="all 6 steps were skipped"):
        fit(SFT(**PLAIN, on_nonfinite="skip"), tmp_path / "run", model=poisoned("row"))


def test_the_checkpoint_of_the_best_evaluation_stays_beside_the_newest(tmp_path):
    values = iter([3.0, 1.0, 2.0, 5.0, 4.0])
    context = attrs.evolve(CONTEXT, better={"nll": "min"})
    trainer = SFT(max_steps=10, batch_size=3, evaluate_every=2, save_every=2, keep=1, keep_best="nll")
    trainer.check(context)
    _, result, _ = fit(trainer, tmp_path / "run", validate=lambda: {"nll": next(values)}, context=context)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000004", "step-000008"]
    assert (result.metrics["best_step"], result.metrics["best_nll"]) == (4, 1.0)


def test_the_best_is_known_to_a_resumed_run_and_may_be_the_last_step(tmp_path):
    trainer = SFT(max_steps=5, batch_size=3, evaluate_every=2, save_every=2, keep=1, keep_best="accuracy")
    context = attrs.evolve(CONTEXT, better={"accuracy": "max"})

    def ended(name, last, **more):
        values = iter([0.7, 0.5, last] if not more else [last])
        measured = lambda: {"accuracy": next(values)}  # noqa: E731
        return fit(trainer, tmp_path / name, validate=measured, context=context, **more)[1].metrics

    assert (ended("first", 0.6)["best_step"], ended("better", 0.9)["best_step"]) == (2, 5)
    create(tmp_path / "resumed")
    shutil.copytree(tmp_path / "first" / "checkpoints", tmp_path / "resumed" / "checkpoints", dirs_exist_ok=True)
    found = newest(tmp_path / "resumed" / "checkpoints")
    assert found.step == 4
    assert ended("resumed", 0.6, resumed=found)["best_step"] == 2


@pytest.mark.parametrize(
    ("fields", "better", "says"),
    [
        ({"keep_best": "nl", "evaluate_every": 2}, {"nll": "min"}, "no evaluator returns 'nl'; did you mean 'nll'"),
        ({"keep_best": "nll"}, {"nll": "min"}, "needs evaluate_every"),
    ],
)
def test_what_cannot_be_best_is_refused_before_any_work(fields, better, says):
    with pytest.raises(ConfigError, match=rf"SFT\.keep_best: {says}"):
        SFT(**fields).check(attrs.evolve(CONTEXT, better=better))


def test_the_best_needs_rows_to_be_measured_on(tmp_path):
    with pytest.raises(ConfigError, match=r"SFT\.keep_best: there are no held-out rows"):
        fit(SFT(keep_best="nll", evaluate_every=1), tmp_path / "run")


def test_checkpoints_are_also_written_by_the_clock(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tunekit.plugins.trainers.loop.time.monotonic", lambda: now[0])

    def a_minute_and_a_half(model, step):
        now[0] += 90

    trainer = SFT(max_steps=7, save_every=100, save_minutes=4, keep=9)
    fit(trainer, tmp_path / "run", after_step=a_minute_and_a_half)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000003", "step-000006"]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd", "adamw-8bit"])
def test_the_size_of_a_checkpoint_is_known_before(tmp_path, optimizer):
    trainer = SFT(max_steps=2, save_every=1, optimizer=optimizer)
    planned = trainer.checkpoint_bytes(tiny_model().to("meta"))
    fit(trainer, tmp_path / "run")
    (place,) = (tmp_path / "run" / "checkpoints").iterdir()
    written = sum(path.stat().st_size for path in place.iterdir())
    numbers = newest(place.parent).state["random"]["torch"].numel()
    assert planned < written < planned + numbers + 64 * 1024


def test_states_of_other_shapes_are_refused_before_the_first_step():
    def optimizer(shape):
        made = torch.optim.AdamW([torch.nn.Parameter(torch.ones(shape)), torch.nn.Parameter(torch.ones(3, 2))])
        for parameter in made.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        made.step()
        return made

    other = optimizer((4, 2))
    with pytest.raises(TrainingError, match=r"not of parameter 0, of shape \[2, 4\]: they are .*'exp_avg': \[4, 2\]"):
        optimization.restore(optimizer((2, 4)), other.state_dict())
    with pytest.raises(TrainingError, match=r"are of \[2\] parameters \(by group\), this run trains \[1\]"):
        optimization.restore(torch.optim.AdamW([torch.nn.Parameter(torch.ones(4, 2))]), other.state_dict())
    optimization.restore(same := optimizer((4, 2)), other.state_dict())
    assert same.state_dict()["state"].keys() == {0, 1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd", "adamw-8bit"])
def test_a_resumed_run_is_the_same_run_bit_for_bit(tmp_path, optimizer, dtype):
    trainer = SFT(
        max_steps=7, batch_size=3, micro_batch_size=2, save_every=2, keep=9, learning_rate=0.01, optimizer=optimizer
    )

    def model():
        return tiny_model(attention_dropout=0.2).to(getattr(torch, dtype))

    context = attrs.evolve(CONTEXT, dtype=dtype)
    whole, _, lines = fit(trainer, tmp_path / "whole", model=model(), context=context)
    for step in (2, 4, 6):
        place = tmp_path / f"from-{step}"
        create(place)
        kept = tmp_path / "whole" / "checkpoints" / f"step-{step:06d}"
        (place / "checkpoints" / kept.name).symlink_to(kept)
        found = newest(place / "checkpoints")
        resumed, result, rest = fit(trainer, place, model=model(), resumed=found, context=context)
        assert result.steps == 7
        assert rest == [line for line in lines if line["step"] > step]
        assert largest_difference(resumed, whole) == 0
        assert {str(value.dtype) for value in trained_parameters(resumed).values()} == {f"torch.{dtype}"}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch warns of what it does itself while it compiles
@pytest.mark.parametrize("free", [True, False])
def test_a_resumed_run_takes_the_way_to_the_loss_that_it_took_before(tmp_path, monkeypatch, free):
    """What is tried out at the start need not come out the same on trained parameters, and other ways round otherwise."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    trainer = SFT(max_steps=4, batch_size=3, save_every=2, padding_free=free, compile=not free)
    fit(trainer, tmp_path / "whole")
    found = newest(tmp_path / "whole" / "checkpoints")
    # No layer of PEFT's is in it, and no prefix is shared.
    way = {"padding_free": free, "chunked": True, "lean": False, "compiled": not free, "shared": False, "apart": False}
    assert found.state["trainer"]["loss"] == way
    monkeypatch.setattr("tunekit.core.training.rows_loss.choose", lambda *_, **__: pytest.fail("tried again"))
    taken = []
    true = RowsLoss.of
    monkeypatch.setattr(
        RowsLoss,
        "of",
        lambda self, *rest: taken.append((self.padding_free, self.chunked, self.compiled)) or true(self, *rest),
    )
    create(tmp_path / "resumed")
    fit(trainer, tmp_path / "resumed", resumed=found)
    assert set(taken) == {(free, True, not free)}


def with_a_system_prompt():
    prompt = {"role": "system", "content": "Say what comes next, and be brief: letters alone, no numbers. " * 2}
    ask = lambda n: {"role": "user", "content": f"row {n}"}  # noqa: E731
    say = lambda n: {"role": "assistant", "content": "ab" * (1 + n)}  # noqa: E731
    return [Codec(TOKENIZER).encode({"messages": [prompt, ask(n), say(n)]}) for n in range(7)]


def along_the_way(one, other, start):
    """How far two trained models are from each other, in parts of the way from where they started."""
    ends = [flat(trained_parameters(model).values()) for model in (one, other, start)]
    return ((ends[0] - ends[1]).norm() / (ends[0] - ends[2]).norm()).item()


IN_BOTH = pytest.mark.parametrize(
    ("made", "context", "rounding"),
    [(tiny_model, CONTEXT, 1e-6), (lambda: over_bfloat16(METHODS["lora"]), IN_BFLOAT16, 3 * ROUNDING)],
    ids=["float32", "bfloat16"],
)


@IN_BOTH
def test_a_shared_system_prompt_changes_no_step_and_a_resumed_run_shares_it_again(
    tmp_path, monkeypatch, made, context, rounding
):
    monkeypatch.setattr(f"{__name__}.encoded", lambda count: with_a_system_prompt())
    common = {"max_steps": 4, "batch_size": 4, "save_every": 2, "keep": 9, "learning_rate": 0.05, "optimizer": "sgd"}
    apart, _, expected = fit(SFT(**common, shared_prefix=False), tmp_path / "apart", model=made(), context=context)
    shared, _, lines = fit(SFT(**common), tmp_path / "shared", model=made(), context=context)
    ways = [newest(tmp_path / name / "checkpoints").state["trainer"]["loss"]["shared"] for name in ("apart", "shared")]
    assert ways == [False, True]
    assert along_the_way(apart, shared, made()) < rounding
    assert largest_difference(apart, made()) > 1e-3
    for name in ("loss", "grad_norm", "tokens"):
        assert [line[name] for line in lines] == pytest.approx(
            [line[name] for line in expected], rel=max(rounding, 1e-5)
        )

    create(tmp_path / "resumed")
    monkeypatch.setattr("tunekit.core.training.rows_loss.choose", lambda *_, **__: pytest.fail("tried again"))
    kept = tmp_path / "resumed" / "checkpoints" / "step-000002"
    kept.symlink_to(tmp_path / "shared" / "checkpoints" / "step-000002")
    again, _, rest = fit(
        SFT(**common), tmp_path / "resumed", model=made(), resumed=newest(kept.parent), context=context
    )
    assert rest == [line for line in lines if line["step"] > 2]
    assert largest_difference(again, shared) == 0


def with_its_last_layer_to_train(dtype):
    model = tiny_model().requires_grad_(False).to(getattr(torch, dtype))
    model.model.layers[-1].requires_grad_(True)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed-again"])
def test_frozen_layers_computed_once_change_no_step_and_a_resumed_run_is_the_same(tmp_path, again, dtype):
    common = {"epochs": 3, "batch_size": 3, "save_every": 3, "learning_rate": 0.05, "optimizer": "sgd"}
    common |= {"keep": 9, "gradient_checkpointing": again}
    context, rounding = attrs.evolve(CONTEXT, dtype=dtype), 1e-6 if dtype == "float32" else 3 * ROUNDING

    def model():
        return with_its_last_layer_to_train(dtype)

    plain, _, expected = fit(SFT(**common), tmp_path / "plain", model=model(), context=context)
    trainer = SFT(**common, cache_frozen_layers=True)
    cached, _, lines = fit(trainer, tmp_path / "cached", model=model(), context=context)
    assert along_the_way(plain, cached, model()) < rounding
    assert largest_difference(plain, model()) > 1e-3
    assert [line["loss"] for line in lines] == pytest.approx(
        [line["loss"] for line in expected], rel=max(rounding, 1e-5)
    )
    assert "hidden states after 1 frozen layers are kept, up to 0." in (tmp_path / "cached" / "log.txt").read_text()

    create(tmp_path / "resumed")
    kept = tmp_path / "resumed" / "checkpoints" / "step-000003"
    kept.symlink_to(tmp_path / "cached" / "checkpoints" / "step-000003")
    found = newest(kept.parent)
    resumed, _, rest = fit(trainer, tmp_path / "resumed", model=model(), resumed=found, context=context)
    assert rest == [line for line in lines if line["step"] > 3]
    assert largest_difference(resumed, cached) == 0


def test_frozen_layers_are_not_kept_beside_compiled_ones():
    with pytest.raises(ConfigError, match=r"SFT\.cache_frozen_layers: not together with compile"):
        SFT(compile=True, cache_frozen_layers=True).check(CONTEXT)


def test_matrices_decay_and_vectors_do_not():
    groups = optimization.make("adamw", tiny_model("gpt2"), 1e-3, weight_decay=0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(parameter.dim() >= 2 for parameter in groups[0]["params"])
    assert all(parameter.dim() < 2 for parameter in groups[1]["params"])
    counted = sum(len(group["params"]) for group in groups)
    assert counted == len(list(tiny_model("gpt2").parameters()))


def test_an_optimizer_whose_package_is_missing_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"SFT\.optimizer: 'adamw-8bit' needs bitsandbytes: pip install bitsandbytes"):
        SFT(optimizer="adamw-8bit").check(CONTEXT)


def test_activations_are_computed_again_for_the_same_steps(tmp_path):
    ends, calls = [], []
    for again in (False, True):
        model = tiny_model()
        passes = []
        model.model.layers[0].input_layernorm.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        trainer = SFT(max_steps=2, batch_size=7, learning_rate=0.01, gradient_checkpointing=again)
        fit(trainer, tmp_path / str(again), model=model)
        ends.append(model)
        calls.append(len(passes))
        assert not model.is_gradient_checkpointing, "the model is left as it was"
    assert calls[1] - calls[0] == 2, "one more forward pass in each step"
    for kept, again in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        assert torch.allclose(kept, again, atol=1e-6)


def test_a_model_without_gradient_checkpointing_says_so(tmp_path):
    model = tiny_model()
    model.supports_gradient_checkpointing = False
    with pytest.raises(NotSupported, match="knows no gradient checkpointing"):
        fit(SFT(max_steps=1, gradient_checkpointing=True), tmp_path / "run", model=model)
