"""The examples do what they say, run as a user runs them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tunekit as tk

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(example: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / example, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def test_the_quickstart_takes_the_users_own_model_and_data(tiny_directory, tmp_path):
    rows = [{"prompt": f"q {n}", "completion": f"a {n}"} for n in range(8)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shown = run("quickstart.py", "--model", tiny_directory, "--data", tmp_path / "own.jsonl", "--run", tmp_path / "run")
    assert (
        tk.open_run(tmp_path / "run").result["rows"]["train"]
        + tk.open_run(tmp_path / "run").result["rows"]["validation"]
        == 8
    )
    assert len(re.findall(r"^asked   q \d$", shown, re.MULTILINE)) >= 1


@pytest.mark.real
def test_a_real_model_learns_real_data_and_plain_peft_reads_what_it_learned(shared, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run("real_data.py", "--shared", shared, "--steps", 40, "--run", tmp_path / "run")
    finished = tk.open_run(tmp_path / "run")
    assert finished.result["training"]["steps"] == 40
    assert finished.metrics["perplexity"] < finished.base_metrics["perplexity"] / 2

    base = AutoModelForCausalLM.from_pretrained(shared / "models/stories260k", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    ours = finished._model(tuned=True)
    ids = torch.tensor([ours.codec.prompt("Tom has 3 apples and eats one. How many are left?")])
    with torch.no_grad():
        assert (theirs(ids).logits - ours.model(ids).logits).abs().max() < 1e-5
        with theirs.disable_adapter():
            assert (theirs(ids).logits - ours.model(ids).logits).abs().max() > 1


def test_five_methods_are_compared_on_the_users_own_model_and_data(tiny_directory, tmp_path):
    rows = [{"prompt": f"q {n}", "completion": f"a {n}"} for n in range(12)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = ("--model", tiny_directory, "--data", tmp_path / "own.jsonl", "--directory", tmp_path / "compare")
    arguments += ("--steps", 1, "--seeds", 0, "--rates", 0.01)
    shown = run("compare_methods.py", *arguments)
    names = ["lora-lr-0.01", "ia3-lr-0.01", "loha-lr-0.01", "lokr-lr-0.01", "bottleneck-lr-0.01"]
    assert re.findall(r"^([a-z0-9]+-lr-\S+) ", shown, re.MULTILINE) == names
    assert re.search(r"^the best by perplexity: \S+-lr-0.01; its first run is in ", shown, re.MULTILINE)
    found = tk.open_comparison(tmp_path / "compare")
    assert [arm.name for arm in found.arms] == names
    assert not found.failures
