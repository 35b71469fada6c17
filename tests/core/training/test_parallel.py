"""Two processes make the run that one makes: to the rounding of its dtype, for every method, resumed or not."""

import json
import shutil

import attrs
import pytest
import torch
from launching import ACCELERATE, difference, difference_of_ways, launch
from parallel_runs import EVEN, IN_BFLOAT16, METHODS, ROWS, STOP, Stops, check_early, make, theirs

import tunekit as tk
from tunekit.core.run import checkpoint, files
from tunekit.core.training import messages, parallel
from tunekit.core.training.parallel import Processes


@pytest.fixture(scope="module")
def two(tiny_directory, made_once):
    """The runs of every method on two processes."""

    def fill(directory):
        status, said = launch("methods", tiny_directory, directory)
        assert status == 0, said

    return made_once("two-processes", fill)


@pytest.fixture(scope="module")
def one(tiny_directory, tmp_path_factory):
    """AdaLoRA on one process."""
    directory = tmp_path_factory.mktemp("one") / "adalora"
    make(tiny_directory, METHODS["adalora"]).run(directory)
    return directory


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_end_with_the_parameters_of_one(method, two, tiny_directory, tmp_path):
    make(tiny_directory, METHODS[method]).run(tmp_path / "one")
    assert difference(two / method, tmp_path / "one") < 1e-6
    for here, there in zip(files.history(two / method), files.history(tmp_path / "one"), strict=True):
        assert here == pytest.approx(there, rel=1e-4)  # one line a step, of the whole step's loss and gradient
    mine, its = (json.loads((place / "result.json").read_text()) for place in (two / method, tmp_path / "one"))
    assert mine["metrics"] == pytest.approx(its["metrics"], rel=1e-5)
    assert mine["rows"] == its["rows"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_over_bfloat16_they_end_within_its_rounding_of_one(method, two, tiny_directory, tmp_path):
    pipeline = make(tiny_directory, IN_BFLOAT16[method], dtype="bfloat16")
    pipeline.run(tmp_path / "one")
    mine, its = two / "bfloat16" / method, tmp_path / "one"
    assert difference_of_ways(mine, its, tiny_directory) < 2**-8
    for here, there in zip(files.history(mine), files.history(its), strict=True):
        assert here == pytest.approx(there, rel=2**-8)
    found = [json.loads((place / "result.json").read_text())["metrics"] for place in (mine, its)]
    assert found[0] == pytest.approx(found[1], rel=2**-8)


def test_the_trainer_of_transformers_ends_with_the_parameters_of_one_process_too(two, tiny_directory, tmp_path):
    make(tiny_directory, METHODS["lora"], theirs(), EVEN).run(tmp_path / "one")
    assert difference(two / "theirs", tmp_path / "one") < 1e-6
    for here, there in zip(files.history(two / "theirs"), files.history(tmp_path / "one"), strict=True):
        assert here == pytest.approx(there, rel=1e-4)  # one line a step, of the whole step's loss and gradient
    mine, its = (json.loads((place / "result.json").read_text()) for place in (two / "theirs", tmp_path / "one"))
    assert mine["metrics"] == pytest.approx(its["metrics"], rel=1e-5)


def test_the_trainer_of_transformers_takes_the_steps_that_it_plans_for_two_processes(two, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    planned = theirs(2, gradient_accumulation_steps=2).planned_steps(len(ROWS))
    # Five batches of two rows are three for each process, and so two steps an epoch.
    assert planned == json.loads((two / "theirs-uneven" / "result.json").read_text())["training"]["steps"] == 4


def test_a_directory_that_is_taken_is_refused_on_every_process(two):
    assert (two / "refused-0").exists()
    assert (two / "refused-1").exists()


def test_one_process_writes(two):
    lines = (two / "lora" / "log.txt").read_text().splitlines()
    assert sum("started" in line for line in lines) == sum("finished" in line for line in lines) == 1
    assert not list((two / "lora").glob("*.lock"))


def test_all_processes_stop_early_at_the_same_step_and_end_with_the_best(two):
    check_early(two / "early")
    run = tk.open_run(two / "early")
    assert "1 evaluations brought no better perplexity" in run.result["training"]["stopped"]
    assert set(run.evaluations) == {"base", "prompted-1", "step-000001", "step-000002", "step-000003", "tuned"}


def test_a_signal_to_one_process_stops_all_at_the_same_step_with_a_checkpoint(two):
    for name in ("dropout", "dropout-in-bfloat16", "adalora"):
        assert [(two / f"{name}-left-{rank}").read_text() for rank in (0, 1)] == ["143", "143"]
        assert checkpoint.newest(two / "stopped" / name / "checkpoints").step == STOP


@pytest.fixture(scope="module")
def resumed(two, tiny_directory, made_once):
    """Two runs that two processes go on with: one of two processes, with dropout, and one of a single process."""

    def fill(directory):
        for name in ("dropout", "dropout-in-bfloat16"):
            shutil.copytree(two / "stopped" / name, directory / name)
        with pytest.raises(SystemExit):
            make(tiny_directory, METHODS["adalora"]).run(directory / "adalora", observers=[Stops()])
        status, said = launch("resume", tiny_directory, directory, launcher=ACCELERATE)
        assert status == 0, said

    return made_once("two-processes-resumed", fill)


def test_a_run_resumed_on_as_many_processes_is_the_same_to_the_bit_and_accelerate_launches_it(resumed, two):
    assert difference(resumed / "dropout", two / "dropout") == 0
    assert difference(resumed / "dropout-in-bfloat16", two / "bfloat16" / "dropout") == 0


def test_a_run_of_one_process_goes_on_with_two(resumed, one):
    assert difference(resumed / "adalora", one) < 1e-6
    assert "resumed on 2 processes, 1 before" in (resumed / "adalora" / "log.txt").read_text()


def test_a_run_of_two_processes_goes_on_with_one(two, one, tiny_directory, tmp_path):
    directory = shutil.copytree(two / "stopped" / "adalora", tmp_path / "adalora")
    make(tiny_directory, METHODS["adalora"]).run(directory, resume=True)
    assert difference(directory, one) < 1e-6
    assert "resumed on 1 processes, 2 before" in (directory / "log.txt").read_text()


@pytest.mark.parametrize("variable", parallel.SHARDING)
def test_a_launch_that_cuts_the_model_into_pieces_is_refused(variable, monkeypatch, tiny_directory, tmp_path):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(tk.NotSupported, match=variable):
        make(tiny_directory, METHODS["lora"]).run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_trainer_of_one_process_is_refused_for_several(monkeypatch, tiny_directory, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")

    @attrs.frozen(kw_only=True)
    class Alone(tk.SFT):
        name = "alone"
        several_processes = False

    with pytest.raises(tk.NotSupported, match="start one"):
        make(tiny_directory, METHODS["lora"], Alone()).run(tmp_path / "run")


def test_a_comparison_by_several_processes_is_refused(monkeypatch, tiny_directory, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(tk.NotSupported, match="one process"):
        tk.compare(make(tiny_directory, METHODS["lora"]), [METHODS["lora"]], directory=tmp_path / "comparison")
    assert not (tmp_path / "comparison").exists()


@pytest.mark.parametrize("count", range(1, 6))
def test_the_shares_of_a_step_are_its_rows_and_none_is_twice_as_long_without_need(count):
    rows, lengths = [7, 3, 9, 1], [5, 50, 40, 8]
    shares = [Processes(rank=rank, count=count).share(rows, lengths) for rank in range(count)]
    assert sorted(at for share in shares for at in share) == sorted(rows)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_messages_of_processes_with_gpus_go_from_host_to_host(tmp_path, monkeypatch):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        world = torch.distributed.group.WORLD
        assert messages.channel.__wrapped__(world) is None, "they do already"
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "get_backend", lambda: "nccl")
            group = messages.channel.__wrapped__(world)
        assert torch.distributed.get_backend(group) == "gloo"
        found = [None]
        torch.distributed.all_gather_object(found, {"step": 3}, group=group)
        assert found == [{"step": 3}]
    finally:
        torch.distributed.destroy_process_group()


def test_alone_nothing_is_exchanged():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parallel.ALONE.add_gradients([parameter])
    assert parameter.grad is None
    assert parallel.ALONE.gather(3) == parallel.ALONE.together(lambda: 3) == [3]
    assert parallel.ALONE.shared(lambda: 4) == 4


def test_mixed_precision_that_a_launcher_was_told_of_is_not_followed_and_the_run_says_so(
    tiny_directory, tmp_path, monkeypatch
):
    plain = make(tiny_directory, METHODS["lora"]).run(tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert parallel.not_followed() == []  # left behind by somebody in this process
    monkeypatch.setenv("LOCAL_RANK", "0")
    run = make(tiny_directory, METHODS["lora"]).run(tmp_path / "launched")
    assert (
        "mixed_precision: bf16 of accelerate's configuration is not followed" in (run.directory / "log.txt").read_text()
    )
    assert difference(run.directory, plain.directory) == 0
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert parallel.not_followed() == []
