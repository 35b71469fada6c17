"""Two processes, each with a piece of the model, make the run that one makes with all of it."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import attrs
import pytest
import torch
from launching import FSDP, difference, difference_of_ways, launch
from parallel_runs import IN_PIECES, METHODS, SHARDED, SHORT, check_early, make, unfinished

import tunekit as tk
from tunekit.core.component import Context
from tunekit.core.run import files
from tunekit.core.training import parallel, sharded
from tunekit.core.training.parallel import ALONE, Processes
from tunekit.core.training.sharded import Pieces
from tunekit.testing import tiny_model


@pytest.fixture(scope="module")
def lora(tiny_directory, made_once):
    """The run of LoRA on one process."""
    return made_once("whole", lambda place: make(tiny_directory, METHODS["lora"], SHORT).run(place / "lora")) / "lora"


@pytest.fixture(scope="module")
def two(lora, tiny_directory, made_once):
    """The runs on two processes."""

    def fill(directory):
        unfinished(lora, directory / "launched")
        status, said = launch("sharded", tiny_directory, directory, launcher=FSDP)
        assert status == 0, said

    return made_once("sharded", fill)


@pytest.mark.parametrize("method", SHARDED)
def test_two_processes_with_a_piece_each_end_with_the_parameters_of_one(method, two, tiny_directory, lora, tmp_path):
    one = lora if method == "lora" else tmp_path / "one"
    if method != "lora":
        make(tiny_directory, SHARDED[method], SHORT).run(one)
    assert difference(two / method, one) < 1e-6
    for here, there in zip(files.history(two / method), files.history(one), strict=True):
        assert here == pytest.approx(there, rel=1e-4)
    mine, its = (json.loads((place / "result.json").read_text()) for place in (two / method, one))
    assert mine["metrics"] == pytest.approx(its["metrics"], rel=1e-5)
    assert mine["base_metrics"] == pytest.approx(its["base_metrics"], rel=1e-5)
    assert mine["parameters"] == its["parameters"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_over_bfloat16_they_end_within_its_rounding_of_one(method, two, tiny_directory, tmp_path):
    make(tiny_directory, METHODS[method], SHORT, dtype="bfloat16").run(tmp_path / "one")
    mine = two / "bfloat16" / method
    assert difference_of_ways(mine, tmp_path / "one", tiny_directory) < 2**-8
    for here, there in zip(files.history(mine), files.history(tmp_path / "one"), strict=True):
        assert here == pytest.approx(there, rel=2**-8)


def test_each_process_keeps_about_half_of_the_model(two):
    for method in SHARDED:
        log = (two / method / "log.txt").read_text()
        kept, there = (int(number.replace(",", "")) for number in re.findall(r"keeps ([\d,]+) of ([\d,]+)", log)[0])
        assert kept < 0.52 * there


@pytest.mark.parametrize("method", SHARDED)
def test_no_second_process_has_the_whole_base_while_the_first_of_the_machine_has(method, two):
    loaded = [json.loads((two / f"{method}-whole-{rank}.json").read_text()) for rank in (0, 1)]
    assert [len(spans) for spans in loaded] == [2, 2]  # to be measured and to be trained
    spans = sorted(span for spans in loaded for span in spans)
    for (_, gone), (asked, _) in pairwise(spans):
        assert gone is not None
        assert gone < asked


@attrs.frozen(kw_only=True)
class Threads(Processes):
    """Processes in threads of this one: what each says is told when all have."""

    said: dict = attrs.field(factory=dict)
    barrier: threading.Barrier

    def gather(self, value):
        self.said[self.rank] = value
        self.barrier.wait(20)
        found = [self.said[rank] for rank in range(self.count)]
        self.barrier.wait(20)
        return found


@pytest.mark.parametrize(
    ("room", "turns"), [(0, [1] * 6), (1, [1] * 6), (2, [1, 2, 2, 1]), (3, [1, 3, 2]), (99, [1, 5])]
)
def test_after_the_first_as_many_go_at_a_time_as_there_is_room_for(room, turns, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    every = [Threads(rank=0, count=6, barrier=threading.Barrier(6))]
    every += [attrs.evolve(every[0], rank=rank) for rank in range(1, 6)]
    turn_of = [turn for turn, number in enumerate(turns) for _ in range(number)]
    begun, together = [], [threading.Barrier(number) for number in turns]

    def work(rank):
        begun.append(turn_of[rank])
        together[turn_of[rank]].wait(20)  # breaks unless all of a turn are at work at the same time
        return rank

    with ThreadPoolExecutor(6) as pool:
        given = [pool.submit(sharded.in_turns, each, partial(work, each.rank), lambda: room) for each in every]
        assert [each.result() for each in given] == list(range(6))
    assert begun == turn_of


@pytest.mark.parametrize("failing", [0, 1])
def test_what_goes_wrong_in_one_turn_ends_all_processes(failing, two):
    for rank in (0, 1):
        assert "the disk is gone" in (two / f"failed-{failing}-{rank}").read_text()


def test_all_pieces_are_those_of_the_best_evaluation(two):
    check_early(two / "early")


def test_one_process_takes_the_adapter_and_generates_with_it(two, tiny_directory):
    run = tk.open_run(two / "lora")
    assert run.generate("repeat 1", max_new_tokens=3) is not None
    loaded = run._model(tuned=True).model
    assert not any(hasattr(parameter, "full_tensor") for parameter in loaded.parameters())


def test_a_run_resumed_on_as_many_processes_is_the_same_to_the_bit(two):
    assert "resumed at step 2" in (two / "resumed" / "log.txt").read_text()
    assert difference(two / "resumed", two / "dropout") == 0


def test_accelerates_own_configuration_cuts_the_model_and_goes_on_with_a_run_of_one_process(two, lora):
    log = (two / "launched" / "log.txt").read_text()
    assert "resumed at step 2" in log
    assert "the model is in 2 pieces" in log
    assert difference(two / "launched", lora) < 1e-6


def test_a_run_in_pieces_goes_on_with_one_process(two, lora, tiny_directory, tmp_path):
    directory = unfinished(two / "lora", tmp_path / "lora")
    make(tiny_directory, METHODS["lora"], IN_PIECES).run(directory, resume=True)
    assert difference(directory, lora) < 1e-6


def test_one_process_has_the_whole_model():
    model = tiny_model()
    pieces = Pieces(trainer=IN_PIECES, context=Context(model_id="tiny"), processes=ALONE)
    assert pieces.usable(3) == 3
    assert pieces.made(lambda: model) is model
    assert not sharded.in_pieces(model)
    with sharded.whole(model):
        assert sharded.put_together({"states": [torch.ones(2)]})["states"][0].sum() == 2


def test_a_model_that_may_be_cut_is_loaded_by_the_cpu_and_a_quantized_one_where_it_is_used():
    context = Context(model_id="tiny", device="cuda:1")
    pieces = Pieces(trainer=IN_PIECES, context=context, processes=Processes(rank=1, count=2))
    quantized = attrs.evolve(pieces, context=attrs.evolve(context, quantization="nf4"))
    found = [each.load(lambda given: given.device) for each in (pieces, quantized, attrs.evolve(pieces, trainer=SHORT))]
    assert found == ["cpu", "cuda:1", "cuda:1"]
    assert pieces.usable(3) is None


def test_blocks_are_those_that_the_model_or_the_launcher_names(monkeypatch):
    model = tiny_model()
    assert sharded.blocks(model) == list(model.model.layers)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP")
    assert sharded.blocks(model) == [layer.mlp for layer in model.model.layers]
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Nothing")
    with pytest.raises(tk.NotSupported, match=r"Nothing.*replicated"):
        sharded.blocks(model)


@pytest.mark.parametrize(
    ("adapter", "trainer", "parts", "names"),
    [
        (METHODS["adalora"], IN_PIECES, {}, "adalora.*LoRA"),
        (METHODS["lora"], IN_PIECES, {"quantizer": tk.Int8()}, "int8.*NF4"),
        (METHODS["lora"], attrs.evolve(IN_PIECES, optimizer="adafactor"), {}, "adafactor.*adamw"),
        (METHODS["lora"], attrs.evolve(IN_PIECES, optimizer="adamw-8bit"), {}, "adamw-8bit.*adamw"),
    ],
)
def test_what_needs_whole_parameters_is_refused_before_anything_is_loaded(adapter, trainer, parts, names):
    with pytest.raises(tk.ConfigError, match=names):
        attrs.evolve(make("nowhere", adapter, trainer), model=tk.TINY, **parts).check()
    attrs.evolve(make("nowhere", adapter, attrs.evolve(trainer, parallel="replicated", optimizer="adamw")),
                 model=tk.TINY, **parts).check()  # fmt: skip


@pytest.mark.parametrize(("installed", "taken"), [("2.11.0+cu130", False), ("2.12.0", True), ("3.0", True)])
def test_a_quantized_base_is_cut_into_pieces_by_a_torch_that_takes_integers(installed, taken, monkeypatch):
    monkeypatch.setattr(sharded, "version", lambda name: installed)
    pipeline = attrs.evolve(make("nowhere", tk.QLoRA(rank=2), IN_PIECES), model=tk.TINY)
    if taken:
        pipeline.check()
        return
    with pytest.raises(tk.ConfigError, match=r"torch 2\.11\.0\+cu130 cuts no quantized base.*install torch 2\.12"):
        pipeline.check()


@pytest.mark.parametrize(
    ("variable", "value", "instead"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "gradient_checkpointing=True"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP"),
    ],
)
def test_a_setting_of_accelerate_that_is_not_followed_is_refused(variable, value, instead, monkeypatch):
    monkeypatch.setenv(parallel.FSDP, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    parallel.check_launch(tk.SFT())
    monkeypatch.setenv(variable, value)
    with pytest.raises(tk.NotSupported, match=instead):
        parallel.check_launch(tk.SFT())


def test_the_trainer_of_transformers_is_refused_under_fsdp(monkeypatch):
    monkeypatch.setenv(parallel.FSDP, "true")
    with pytest.raises(tk.NotSupported, match=r"transformers.*SFT"):
        parallel.check_launch(tk.Transformers())
