"""`transformers.Trainer` under tunekit's interface: the same step as SFT, the right slot, any of its arguments."""

import sys
from types import SimpleNamespace

import pytest
import torch

from tunekit import SFT, ConfigError, Context, Full, LoRA, NotSupported, Transformers
from tunekit.core.model import attaching
from tunekit.core.registry import default_registry
from tunekit.core.run.checkpoint import Checkpoint
from tunekit.core.run.files import create, history
from tunekit.core.run.observers import Observers
from tunekit.core.run.run_log import RunLog
from tunekit.plugins.trainers import deepspeed
from tunekit.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CONTEXT = Context(model_id="tiny", device="cpu", seed=3)
ROWS = [
    {"input_ids": list(range(10, 10 + n)), "labels": [-100] * (n // 2) + list(range(10 + n // 2, 10 + n))}
    for n in (5, 30, 8, 14, 3, 60, 21)
]


def fit(trainer, directory, *, resumed=None, after_step=lambda model, step: None, extra_loss=lambda model: None):
    create(directory)
    log = RunLog(directory=directory, observers=Observers(default_registry()), resumed=resumed)
    model = tiny_model()
    torch.manual_seed(0)
    result = trainer.fit(
        model, TOKENIZER, ROWS, after_step=after_step, extra_loss=extra_loss, validate=None, run=log, context=CONTEXT
    )
    return model, result, history(directory)


SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0}


@pytest.mark.parametrize("micro", [1, 2, 7])
def test_it_takes_the_same_step_as_sft_however_rows_are_split(tmp_path, micro):
    arguments = {
        **SGD,
        "max_steps": 1,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": -(-7 // micro),
    }
    theirs, _, _ = fit(Transformers(arguments=arguments), tmp_path / "theirs")
    sft = SFT(max_steps=1, batch_size=7, learning_rate=0.1, optimizer="sgd", schedule="constant", warmup=0,
              max_grad_norm=1e9)  # fmt: skip
    ours, _, _ = fit(sft, tmp_path / "ours")
    pairs = list(zip(theirs.parameters(), ours.parameters(), strict=True))
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-6
    assert (
        max((a - b).abs().max().item() for a, b in zip(ours.parameters(), tiny_model().parameters(), strict=True))
        > 1e-3
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_train_epochs": 2, "per_device_train_batch_size": 2},
        {"num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        {"num_train_epochs": 1.5, "per_device_train_batch_size": 3},
        {"num_train_epochs": 1, "per_device_train_batch_size": 2, "dataloader_drop_last": True},
        {"max_steps": 3, "per_device_train_batch_size": 4},
    ],
    ids=str,
)
def test_the_planned_steps_are_those_taken_each_with_its_slot(tmp_path, arguments):
    trainer = Transformers(arguments=arguments)
    seen = []

    def after_step(model, step):
        gradients = all(parameter.grad is not None for parameter in model.parameters())
        seen.append((step, gradients))

    _, result, lines = fit(trainer, tmp_path / "run", after_step=after_step)
    assert seen == [(step, True) for step in range(1, trainer.planned_steps(len(ROWS)) + 1)]
    assert result.steps == len(seen)
    assert [line["step"] for line in lines] == [step for step, _ in seen]


def test_steps_are_planned_for_mixed_precision_on_the_cpu_too():
    assert Transformers(arguments={"bf16": True, "max_steps": 2}).planned_steps(7) == 2


def test_callbacks_of_the_user_are_called(tmp_path):
    from transformers import TrainerCallback

    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

    count = Count()
    fit(Transformers(arguments={"max_steps": 2}, callbacks=(count,)), tmp_path / "run")
    assert count.steps == 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"learning_rat": 1e-3}, "arguments.learning_rat: unknown field; did you mean 'learning_rate'"),
        ({"output_dir": "x"}, "arguments.output_dir: is set by the pipeline"),
    ],
)
def test_an_argument_that_is_not_the_trainers_is_refused(arguments, problem):
    with pytest.raises(ConfigError, match=problem):
        Transformers(arguments=arguments).planned_steps(10)


def test_what_it_cannot_do_right_it_refuses(tmp_path):
    with pytest.raises(NotSupported, match="extra loss once a step; use SFT"):
        fit(Transformers(), tmp_path / "extra", extra_loss=lambda model: torch.zeros(()))
    checkpoint = Checkpoint(directory=tmp_path, step=1, state={})
    with pytest.raises(NotSupported, match="cannot go on with a run; use SFT"):
        fit(Transformers(), tmp_path / "resumed", resumed=checkpoint)


def test_a_deepspeed_configuration_needs_its_package(monkeypatch):
    trainer = Transformers(arguments={"deepspeed": {"zero_optimization": {"stage": 2}}})
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r'pip install "tunekit-sdk\[deepspeed\]"'):
        trainer.check(Context(model_id="tiny"))
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__spec__=object()))
    trainer.check(Context(model_id="tiny"))


def test_zero_3_refuses_weights_that_are_seen_rounded_and_lower_stages_take_them():
    context = Context(model_id="tiny", device="cpu", dtype="bfloat16")
    model = attaching.attach(Full(), tiny_model().bfloat16(), context)
    with pytest.raises(NotSupported, match="ZeRO 3 cannot train weights of a base in bfloat16; set dtype='float32'"):
        deepspeed.check(3, model)
    deepspeed.check(2, model)
    deepspeed.check(3, attaching.attach(LoRA(), tiny_model().bfloat16(), context))
