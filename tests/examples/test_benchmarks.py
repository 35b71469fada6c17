"""The benchmarks run: on small shapes here, on the shapes they are about where there is a device for them."""

import importlib.util
import json
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import tunekit as tk

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from harness import arms, clock, gate, report, rounds, rows, training, workload  # noqa: E402

WITHOUT_TRL = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="TRL is in the environment of make bench"
)
WORK = workload.Workload(shape="tiny", rows_per_step=3, steps=2, rank=4)


def test_the_memory_of_qlora_is_counted_by_the_formula(capsys):
    pytest.importorskip("bitsandbytes")
    memory = runpy.run_path(str(BENCHMARKS / "qlora_memory.py"))
    expected = memory["main"](["--shape", "tiny", "--steps", "1", "--rank", "4"])
    linear = 2 * (4 * 128 * 128 + 3 * 128 * 320)
    rest = 2 * 1024 * 128 + 5 * 128
    trained = 2 * 4 * (4 * 256 + 3 * 448)
    assert expected == pytest.approx(linear * 4.126953125 / 8 + rest * 2 + trained * 16)
    assert "by the formula" in capsys.readouterr().out


@pytest.mark.gpu
def test_the_memory_of_qlora_on_a_model_of_seven_billion_parameters(capsys):
    import torch

    memory = runpy.run_path(str(BENCHMARKS / "qlora_memory.py"))
    expected = memory["main"](["--shape", "7b"])
    print(capsys.readouterr().out, file=sys.stderr)
    assert expected < torch.cuda.max_memory_allocated() < 2 * expected


def test_the_predicted_memory_is_within_a_tenth_of_the_measured():
    memory = runpy.run_path(str(BENCHMARKS / "memory.py"))
    figures = memory["one"]("small", "LoRA", 32)
    assert figures["predicted"] == pytest.approx(figures["measured"], rel=0.1)


@pytest.mark.real
@pytest.mark.parametrize("shape", ["135m", "stories260k"])
def test_a_tokenizer_of_a_workload_can_pad_as_the_peers_do(shape):
    tokenizer = rows.tokenizer(shape)
    assert tokenizer.pad_token is not None
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


def test_every_method_is_compared_with_lora_both_ways(capsys, tmp_path):
    pytest.importorskip("bitsandbytes")
    methods = runpy.run_path(str(BENCHMARKS / "methods.py"))
    small = ["--shape", "tiny", "--rows", "2", "--tokens", "12", "--steps", "2", "--out", str(tmp_path / "found.json")]
    found = methods["main"](small)
    assert json.loads((tmp_path / "found.json").read_text())["methods"] == found
    assert list(found) == list(methods["METHODS"])
    assert all(figures["seconds"] > 0 for ways in found.values() for figures in ways.values())
    assert [found["LoRA"][way]["to LoRA"] for way in ("lean", "PEFT")] == [1, 1]
    assert capsys.readouterr().out.count("\n") == 1 + len(found)


def test_the_quality_of_methods_is_that_of_their_runs(tiny_directory, tmp_path, capsys):
    quality = runpy.run_path(str(BENCHMARKS / "methods_quality.py"))
    few = ["--rows", "5", "--steps", "1", "--seeds", "0", "--methods", "LoRA", "IA3"]
    places = ["--directory", str(tmp_path / "runs"), "--output", str(tmp_path / "found.json")]
    found = quality["main"](["--model", str(tiny_directory), *few, *places])
    assert json.loads((tmp_path / "found.json").read_text()) == found
    part, runs = (
        found["own rates"],
        [tk.open_run(tmp_path / "runs/own-rates" / arm / "seed-0") for arm in ("lora", "ia3")],
    )
    for figures, run in zip(part["methods"].values(), runs, strict=True):
        assert figures["bits_per_byte"] == run.metrics["bits_per_byte"]
        assert figures["learning_rate"] == run.history[-1]["learning_rate"]
        assert (run.result["rows"]["train"], run.result["rows"]["validation"]) == (4, 1)
    one, other = (run.metrics["bits_per_byte"] for run in runs)
    assert (part["pairs"], part["as_peft"]) == (1, one < other), "PEFT finds LoRA better than IA3"
    assert part["base"] == runs[0].base_metrics["bits_per_byte"]
    assert "1 steps each, seed 0" in capsys.readouterr().out


def test_of_several_rates_that_of_the_best_mean_counts_and_a_failed_arm_does_not():
    figures = runpy.run_path(str(BENCHMARKS / "methods_quality.py"))["figures"]

    def arm(rate, bits, finished=True):
        return SimpleNamespace(learning_rate=rate, finished=finished, mean=lambda name: (bits, None))

    arms_ = [arm(0.1, 3.0), arm(0.2, 2.0), arm(0.3, 1.0, finished=False), arm(0.1, 5.0), arm(0.2, 6.0), arm(0.3, 7.0)]
    found = figures(SimpleNamespace(arms=arms_), ["LoRA", "IA3"])
    assert [found[name]["learning_rate"] for name in ("LoRA", "IA3")] == [0.2, 0.1]


def test_pairs_of_methods_count_as_clear_where_their_intervals_do_not_overlap():
    agreement = runpy.run_path(str(BENCHMARKS / "methods_quality.py"))["agreement"]
    by_method = {"LoRA": (2.0, 0.1), "IA3": (2.5, 0.1), "AdaLoRA": (2.4, 0.2), "Full": (1.0, None)}
    found = agreement({name: {"bits_per_byte": mean, "interval": half} for name, (mean, half) in by_method.items()})
    # Against PEFT's order (LoRA, Full, IA3, AdaLoRA) are Full before LoRA, not clear without an interval, and AdaLoRA
    # before IA3, whose intervals overlap.
    assert found == {"pairs": 6, "as_peft": 4, "clear_pairs": 2, "clear_as_peft": 2}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("work")
    workload.prepare(WORK, directory)
    return directory


@pytest.fixture(scope="module")
def trained(work: Path):
    """A run of an arm as the gate sees it, each made once."""
    judge = runpy.run_path(str(BENCHMARKS / "final_loss.py"))["main"]
    made: dict[str, dict] = {}

    def of(name: str, capsys: pytest.CaptureFixture[str]) -> dict:
        if name not in made:
            place = work / "records" / name
            place.mkdir(parents=True)
            run = training.train(name, work, clock.Clock(time.time()), place)
            run["cosine"] = gate.cosine(
                place / "gradient.safetensors", work / "records" / arms.REFERENCE / "gradient.safetensors"
            )
            capsys.readouterr()
            judge(str(work), str(place / "adapter.safetensors"))
            run["final_loss"] = list(json.loads(capsys.readouterr().out.splitlines()[-1]).values())[1]
            made[name] = run
        return made[name]

    return of


@pytest.mark.parametrize(
    "name",
    [
        "tunekit",
        "tunekit-levers-off",
        "transformers-bfloat16",
        *(pytest.param(name, marks=WITHOUT_TRL) for name in arms.ARMS if arms.ARMS[name].trainer == "trl"),
    ],
)
def test_every_arm_does_the_work_of_the_reference(name, trained, capsys):
    reference = trained(arms.REFERENCE, capsys)
    run = trained(name, capsys)
    assert gate.faults(run, reference, arms.ARMS[name].computes) == []
    assert run["trained_dtype"] == "float32"
    assert len(run["seconds"]) == WORK.steps
    assert list(run["startup"]) == ["import", "load", "data"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"supervised": [1, 2]}, "supervised tokens"),
        ({"losses": [6.5, 6.4]}, "the loss of the first step"),
        ({"losses": [float("nan"), 6.4]}, "the loss of the first step"),
        ({"cosine": 0.99}, "the cosine"),
        ({"final_loss": 6.0}, "the final loss"),
    ],
)
def test_the_gate_holds_back_an_arm_that_did_other_work(change, said):
    run = {"supervised": [5, 6], "losses": [6.40001, 6.3], "cosine": 0.9999, "final_loss": 6.31}
    assert gate.faults(run, run, "float32") == []
    (fault,) = gate.faults({**run, **change}, run, "bfloat16")
    assert said in fault


def test_the_arithmetic_of_a_step_is_what_torch_counts(work):
    import torch
    from peft import get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(model, workload.lora(WORK))
    ids = torch.arange(10, 26)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    row = {"input_ids": ids[0].tolist(), "labels": ids[0].tolist()}
    size, tokens = WORK.size, 16
    width = size["hidden_size"]
    # Torch multiplies what lies ahead of a token, and makes logits of the last one; and below the first adapter there is
    # nothing to go backward to: the gradient of the first layer's input, by its projections and their adapters.
    masked = 3 * 2 * width * tokens * tokens * size["layers"]
    last = 4 * width * size["vocabulary"]
    unneeded = sum(2 * tokens * (n * m + WORK.rank * n) for n, m in WORK.matrices[:3])
    assert counter.get_total_flops() == WORK.flops([row]) + masked + last - unneeded


class Sham(rounds.Rounds):
    """Rounds whose runs take no time: ten seconds each by what they say."""

    def _one(self, number, name):
        run = {"round": number, "arm": name, "wall": 10.0, "seconds": [9.0, 1.0 + number]}
        self.runs.append(run)
        with self._log.open("a") as file:
            file.write(json.dumps(run) + "\n")

    def _judge(self):
        if "tunekit-levers-off" in self.names:
            self._fail("tunekit-levers-off", "another loss")


def test_arms_take_turns_until_the_minutes_are_over_and_go_on_where_they_stopped(tmp_path):
    names = ("tunekit", arms.REFERENCE, "tunekit-levers-off")
    first = Sham(tmp_path, names, threads=1, minutes=0.4)
    first.make()
    whole = ["roof", *names]
    assert [run["arm"] for run in first.runs] == whole
    assert first.complete() == 1

    later = Sham(tmp_path, names, threads=1, minutes=0.6, repeats=3)
    later.make()
    passed = ["roof", *names[:2]]
    assert [run["arm"] for run in later.runs] == [*whole, *passed, *passed], "what failed the gate is not run again"
    assert later.complete() == 3


def test_figures_leave_out_the_warm_up_and_count_no_padding():
    rows = [{"input_ids": [1] * n, "labels": [-100] * (n - 2) + [1, 1]} for n in (4, 8, 6, 10)]
    steps = [rows[:2], rows[2:]]

    def run(name, number, seconds):
        step = {"round": number, "arm": name, "seconds": [50.0, seconds], "ends": [60.0, 60.0 + seconds]}
        more = {"supervised": [4, 4], "losses": [6.0, 5.0], "startup": {"import": 2.0, "load": 5.0}}
        return {**step, **more, "peak_mib": 100 + number, "others_busy": 0.0, "trained_dtype": "float32"}

    names = ["tunekit", arms.REFERENCE]
    runs = [
        run(name, n, second)
        for n in range(3)
        for name, second in zip(names, (2.0 + n, (4.0, 9.0, 8.0)[n]), strict=True)
    ]
    roofs = [{"round": n, "arm": "roof", "float32": {"a": 1e6, "b": 2e6}, "bfloat16": {"a": 1e6}} for n in range(3)]
    made = SimpleNamespace(runs=runs + roofs, names=names, failed={}, complete=lambda: 3)
    found = report.figures(WORK, steps, made)
    ours, theirs = found["arms"].values()
    assert ours["real_tokens_per_second"] == pytest.approx(16 / 3, abs=0.01)
    assert ours["supervised_tokens_per_second"] == pytest.approx(4 / 3, abs=0.01)
    assert ours["step_seconds"]["median"] == 3.0
    assert ours["startup_seconds"] == {"import": 2.0, "load": 3.0, "first step": 55.0, "total": 60.0}
    assert ours["mfu"] == pytest.approx(WORK.flops(steps[1]) / 3 / 2e6, abs=1e-4)
    assert theirs["ratio"] == {"value": pytest.approx(8 / 3), "low": 2.0, "high": 3.0}, "drawn round by round"
    assert theirs["peak_mib"] == 101


def test_stages_are_made_while_there_is_time_and_one_that_cannot_be_made_stops_no_other(tmp_path, monkeypatch, capsys):
    import everything

    asked = []

    def measure(work, names, *, minutes, **limits):
        asked.append((names, minutes))
        if len(asked) == 1:
            raise SystemExit("it cannot be made")
        return {"rounds": 1, "arms": {}, "roof_gflops": {}, "runs": [{"round": 0}, {"round": 1}]}

    monkeypatch.setattr(everything, "RESULTS", tmp_path)
    monkeypatch.setattr(everything, "measure", measure)
    monkeypatch.setattr(everything, "scale", asked.append)
    everything.main(["--only", "speed,levers,rank", "--minutes", "10"])
    assert [names for names, _ in asked[:2]] == [arms.SETS["main"], arms.SETS["levers"]]
    assert asked[0][1] == pytest.approx(7, abs=0.1), "the main table has most of the minutes"
    assert asked[2][0] == "rank"
    assert [path.name for path in tmp_path.iterdir()] == ["levers.json"]
    assert json.loads((tmp_path / "levers.json").read_text())["runs"] == [{"round": 0}, {"round": 1}]

    everything.main(["--minutes", "0"])
    assert len(asked) == 3
    assert capsys.readouterr().out.count("no time left") == len(everything.STAGES) + len(everything.TITLES)
