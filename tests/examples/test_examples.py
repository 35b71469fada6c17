"""The examples do what they say, run as a user runs them."""

import ast
import importlib.util
import json
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tunekit as tk

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(example: str, *arguments: object) -> str:
    """What an example prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / example, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def within(monkeypatch, capsys):
    """Runs an example within this process, where libraries are imported already, and returns what it prints."""

    def run_within(example: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [example, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
        return capsys.readouterr().out

    return run_within


def test_every_example_is_read_in_one_sitting():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert lengths
    assert max(lengths.values()) < 60, lengths


def test_the_quickstart_takes_exact_match_from_nothing_to_above_four_fifths(tmp_path):
    shown = run("quickstart.py", "--run", tmp_path / "run")
    finished = tk.open_run(tmp_path / "run")
    assert finished.base_metrics["exact_match"] < 0.05
    assert finished.metrics["exact_match"] > 0.8
    assert finished.metrics["perplexity"] < finished.base_metrics["perplexity"] / 100
    for metric in ("perplexity", "exact_match"):
        assert re.search(rf"^{metric} ", shown, re.MULTILINE)
    assert len(re.findall(r"^asked ", shown, re.MULTILINE)) == 2
    assert len(re.findall(r"^tuned +team: \w+ \| urgent: (?:yes|no)$", shown, re.MULTILINE)) == 2
    assert str(tmp_path / "run" / "adapter") in shown


def test_the_quickstart_takes_the_users_own_model_and_data(within, tiny_directory, tmp_path):
    rows = [{"prompt": f"q {n}", "completion": f"a {n}"} for n in range(8)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shown = within(
        "quickstart.py", "--model", tiny_directory, "--data", tmp_path / "own.jsonl", "--run", tmp_path / "run"
    )
    assert (
        tk.open_run(tmp_path / "run").result["rows"]["train"]
        + tk.open_run(tmp_path / "run").result["rows"]["validation"]
        == 8
    )
    assert len(re.findall(r"^asked   q \d$", shown, re.MULTILINE)) >= 1


@pytest.mark.real
def test_a_real_model_learns_real_data_and_plain_peft_reads_what_it_learned(within, shared, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    within("real_data.py", "--shared", shared, "--steps", 25, "--run", tmp_path / "run")
    finished = tk.open_run(tmp_path / "run")
    assert finished.result["training"]["steps"] == 25
    assert finished.metrics["perplexity"] < finished.base_metrics["perplexity"] / 2

    base = AutoModelForCausalLM.from_pretrained(shared / "models/stories260k", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    ours = finished._model(tuned=True)
    ids = torch.tensor([ours.codec.prompt("Tom has 3 apples and eats one. How many are left?")])
    with torch.no_grad():
        assert (theirs(ids).logits - ours.model(ids).logits).abs().max() < 1e-5
        with theirs.disable_adapter():
            assert (theirs(ids).logits - ours.model(ids).logits).abs().max() > 1


def test_methods_are_compared_on_the_users_own_model_and_data(within, tiny_directory, tmp_path):
    rows = [{"prompt": f"q {n}", "completion": f"a {n}"} for n in range(12)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = ("--model", tiny_directory, "--data", tmp_path / "own.jsonl", "--directory", tmp_path / "compare")
    arguments += ("--steps", 2, "--seeds", 0, "--rates", 0.01)
    shown = within("compare_methods.py", *arguments)
    methods = ["lora", "adalora", "ia3", "loha", "lokr"]
    if importlib.util.find_spec("bitsandbytes"):
        methods.append("qlora")
        assert re.search(r"^base, nf4 ", shown, re.MULTILINE)
    assert ("QLoRA is left out" in shown) == ("qlora" not in methods)
    names = [f"{method}-lr-0.01" for method in methods]
    assert re.findall(r"^([a-z0-9]+-lr-\S+) ", shown, re.MULTILINE) == names
    assert re.search(r"^the best by perplexity: \S+-lr-0.01; its first run is in ", shown, re.MULTILINE)
    found = tk.open_comparison(tmp_path / "compare")
    assert [arm.name for arm in found.arms] == names
    assert not found.failures


@pytest.fixture
def few(tiny_directory, tmp_path):
    """Arguments by which an example takes a tiny model and a few rows, and says little."""
    rows = [{"prompt": f"q {n}", "completion": f"a {n}"} for n in range(12)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ("--model", tiny_directory, "--data", tmp_path / "own.jsonl", "--run", tmp_path / "run")


def test_comments_of_patients_are_classified(within, tiny_directory, tmp_path):
    within("sentiment.py", "--model", tiny_directory, "--epochs", 0.1, "--run", tmp_path / "run")
    details = tk.open_run(tmp_path / "run").evaluations["tuned"]["details"]["classification"]
    assert set(details["classes"]) == {"negative", "positive"}
    assert 0.4 < details["majority"]["accuracy"] < 0.6


@pytest.mark.real
def test_reviews_are_classified_well_above_the_majority_with_the_interval_in_the_report(within, shared, tmp_path):
    texts = shared / "data/uci_sentiment/yelp_labelled.txt"
    within("sentiment.py", "--model", shared / "models/stories260k", "--data", texts, "--run", tmp_path / "run",
           "--epochs", 1, "--learning-rate", 6e-3)  # fmt: skip
    finished = tk.open_run(tmp_path / "run")
    details = finished.evaluations["tuned"]["details"]["classification"]
    low, high = details["macro_f1_interval"]
    assert details["majority"]["macro_f1"] < 0.4 < low < finished.metrics["macro_f1"] < high
    shown = f"{finished.metrics['macro_f1']:.4g} ({low:.4g} to {high:.4g})"
    assert shown in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_book_is_learned_and_what_it_costs_is_measured(within, tiny_directory, tmp_path):
    within("domain_text.py", "--model", tiny_directory, "--epochs", 0.3, "--max-length", 48, "--run", tmp_path / "run")
    assert {"perplexity", "forgetting"} <= tk.open_run(tmp_path / "run").metrics.keys()


def test_a_base_in_four_bits_is_trained_on_and_exported(within, few, tmp_path):
    within("qlora.py", *few, "--steps", 2, "--export", tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").is_file()
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))


def test_a_run_that_is_stopped_goes_on_by_the_same_command(within, few, tmp_path):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # these tests run in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    stopped = within("resume.py", *few, "--steps", 4, "--stop-after", 2)
    assert "step-000002 is on the disk" in stopped
    assert "was resumed 1 times" in within("resume.py", *few, "--steps", 4)


def test_shards_are_streamed(within, tiny_directory, tmp_path):
    shown = within("streaming.py", "--model", tiny_directory, "--rows", 200, "--steps", 2, "--run", tmp_path / "run")
    assert tk.open_run(tmp_path / "run").result["rows"]["train"] > 190
    assert "training rows" in shown


def test_an_evaluator_of_ones_own_is_measured_beside_the_built_in_ones(within, tiny_directory, tmp_path):
    within("own_evaluator.py", "--model", tiny_directory, "--steps", 1, "--run", tmp_path / "run")
    assert {"field_accuracy", "exact_match"} <= tk.open_run(tmp_path / "run").metrics.keys()


def test_the_cells_of_the_notebook_show_what_they_end_with(tiny_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    names: dict[str, object] = {}
    shown = []
    for cell in cells:
        cell = cell.replace("tk.TINY", repr(str(tiny_directory))).replace("max_steps=60", "max_steps=1")
        *before, last = ast.parse(cell).body
        exec(compile(ast.Module(before, []), "cell", "exec"), names)
        shown.append(eval(ast.unparse(last), names))
    assert [hasattr(value, "_repr_html_") for value in shown] == [True, True, True, False, True]
    assert isinstance(shown[3], str)
