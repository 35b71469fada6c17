"""DeepSpeed: what is asked of it, what cannot work with it, and that it ends where training without it ends."""

import importlib.util
import json
import re

import attrs
import pytest
import torch
from launching import DEEPSPEED, difference, launch
from parallel_runs import CONFIGURATION, METHODS, make, theirs

import tunekit as tk
from tunekit.core.run import files
from tunekit.core.training import deepspeed, parallel

installed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or torch.cuda.is_available(),
    reason="needs deepspeed, on a machine without GPUs",
)
STAGE_2 = {"zero_optimization": {"stage": 2}}


@pytest.fixture(scope="module")
def two(tiny_directory, made_once):
    """Runs on two processes: ZeRO 2 by the launcher, ZeRO 3 by an argument, and without."""

    def fill(directory):
        status, said = launch("deepspeed", tiny_directory, directory, launcher=DEEPSPEED)
        assert status == 0, said

    return made_once("deepspeed", fill)


@installed
@pytest.mark.parametrize(
    ("run", "without"), [("launched", "without"), ("lora", "without"), ("loha", "loha-without")], ids=str
)
def test_it_ends_with_the_parameters_of_training_without_it(run, without, two):
    assert difference(two / run, two / without) < 1e-6
    for here, there in zip(files.history(two / run), files.history(two / without), strict=True):
        assert here == pytest.approx(there, rel=1e-4)
    mine, its = (json.loads((two / name / "result.json").read_text()) for name in (run, without))
    assert mine["metrics"] == pytest.approx(its["metrics"], rel=1e-5)


@installed
@pytest.mark.parametrize("name", ["launched", "lora"])
def test_the_loss_falls_and_one_process_takes_the_adapter(name, two):
    losses = [line["loss"] for line in files.history(two / name)]
    assert losses[-1] < losses[0] - 0.05
    run = tk.open_run(two / name)
    assert run.generate("repeat 1", max_new_tokens=3) is not None


@installed
@pytest.mark.parametrize(("name", "share"), [("launched", 1), ("lora", 0.5)])
def test_under_zero_3_a_process_keeps_its_half_of_the_model(name, share, two):
    kept, there = re.findall(r"kept ([\d,]+) of the model's ([\d,]+)", (two / name / "log.txt").read_text())[0]
    assert int(kept.replace(",", "")) / int(there.replace(",", "")) == pytest.approx(share, abs=0.02)


@installed
def test_sft_launched_so_is_refused_and_names_the_trainer_that_can(two):
    for rank in (0, 1):
        assert "tk.Transformers" in (two / f"refused-{rank}").read_text()


@pytest.mark.parametrize(
    ("adapter", "configuration", "parts", "names"),
    [
        (METHODS["adalora"], STAGE_2, {}, "adalora.*LoRA"),
        (METHODS["lora"], CONFIGURATION, {"quantizer": tk.NF4()}, "nf4.*stage 2"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(adapter, configuration, parts, names):
    pipeline = attrs.evolve(make("nowhere", adapter, theirs(deepspeed=configuration)), model=tk.TINY, **parts)
    with pytest.raises(tk.ConfigError, match=names):
        pipeline.check()
    attrs.evolve(pipeline, trainer=theirs()).check()


def test_a_quantized_base_is_fine_up_to_stage_2():
    deepspeed.check(theirs(deepspeed=STAGE_2), METHODS["lora"], tk.NF4())


def test_the_stage_is_that_of_the_arguments_else_of_the_launcher(monkeypatch, tmp_path):
    assert theirs().zero_stage is None
    assert theirs(deepspeed={"bf16": {"enabled": True}}).zero_stage == 0
    monkeypatch.setenv(parallel.DEEPSPEED, "true")
    assert theirs().zero_stage == 2
    monkeypatch.setenv(deepspeed.STAGE, "1")
    assert theirs().zero_stage == 1
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(CONFIGURATION))
    monkeypatch.setenv(deepspeed.FILE, str(file))
    assert theirs().zero_stage == 3
    assert theirs(deepspeed=STAGE_2).zero_stage == 2
    assert tk.SFT().zero_stage is None


@pytest.mark.parametrize(
    "configuration",
    ["nowhere.json", [], {"zero_optimization": 2}, {"zero_optimization": {"stage": 4}}],
    ids=str,
)
def test_what_is_no_configuration_is_refused_with_its_place(configuration):
    with pytest.raises(tk.ConfigError, match=r"Transformers\.arguments\.deepspeed"):
        deepspeed.stage_of(configuration, "Transformers.arguments.deepspeed")


def test_sft_is_refused_under_its_launch_and_transformers_without_any(monkeypatch):
    with pytest.raises(tk.NotSupported, match="torchrun --nproc_per_node=1"):
        parallel.check_launch(theirs(deepspeed=STAGE_2))
    monkeypatch.setenv(parallel.DEEPSPEED, "true")
    monkeypatch.setenv("LOCAL_RANK", "0")
    parallel.check_launch(theirs())
    with pytest.raises(tk.NotSupported, match=r"'sft'.*tk\.Transformers"):
        parallel.check_launch(tk.SFT())


def test_plans_count_the_steps_of_a_run_that_deepspeed_will_make_without_starting_it(tmp_path):
    assert theirs(deepspeed=STAGE_2).planned_steps(9) == 6
