"""docs/performance.md says what the committed results say, and no more."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "scripts" / "make_performance.py"))


def arm(rate, peak, ratio, computes="float32"):
    return {
        "about": "an arm",
        "dtype": "float32",
        "computes": computes,
        "step_seconds": {"median": 2.0, "p10": 1.5, "p90": 2.5},
        "real_tokens_per_second": rate,
        "supervised_tokens_per_second": rate / 2,
        "peak_mib": peak,
        "startup_seconds": {"import": 2.0, "first step": 3.0, "total": 5.0},
        "seconds_to_last_loss": 9.0,
        "mfu": 0.4,
        "first_loss": 6.0,
        "last_loss": 5.0,
        "final_loss": 5.5,
        "gradient_cosine": 1.0,
        "others_busy": 0.1,
        "ratio": {"value": ratio, "low": ratio - 0.5, "high": ratio + 0.5},
    }


@pytest.fixture
def result():
    work = {"shape": "135m", "rank": 16, "rows_per_step": 4, "reduced": ["4 rows a step instead of 8"], "steps": 3}
    more = {"tokens_per_step": 800, "supervised_share": 0.5, "padded_per_real_token": 1.3}
    machine = {"processor": "a processor", "threads": 2, "cores": 2, "lacks": ["amx_bf16"], "memory_gib": 23.0}
    return {
        "workload": {**work, **more},
        "machine": {**machine, "python": "3.11", "packages": {"torch": "2.13.0"}, "load": [0.1]},
        "roof_gflops": {"float32": 200.0, "bfloat16": 60.0},
        "rounds": 3,
        "date": "2026-01-01",
        "commit": "abc",
        "arms": {"tunekit": arm(600, 1000, 1), "trl": arm(100, 3000, 6), "transformers-bfloat16": arm(300, 2000, 2)},
        "failed": {"trl-tuned-float32": "not the same work"},
    }


def test_the_page_is_what_the_script_makes_of_the_results(script):
    made = script["page"](script["read"]())
    assert (ROOT / "docs" / "performance.md").read_text(encoding="utf-8") == made, "run scripts/make_performance.py"


def test_every_plot_of_the_page_is_there(script):
    made = script["page"](script["read"]())
    for path in re.findall(r"\]\((images/[^)]+)\)", made):
        assert (ROOT / "docs" / path).exists()


def test_goals_are_reached_or_not_as_the_results_say(script, result):
    page = script["page"]({"speed": result, "remarks": {"plain": "Because."}})
    lines = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}
    shipped = lines["CPU, 135M shape, GSM8K, beside TRL as shipped"]
    assert shipped.endswith("| 5 times the real tokens a second | 6.00 [5.50, 6.50] | yes |  |")
    assert "| 2.00 [1.50, 2.50] | no | Because. |" in lines["the same, beside plain Trainer + PEFT in bfloat16"]
    assert "| 0.33 of it | yes |" in lines["the same"]
    assert "not measured" in lines["the same, beside the fastest of TRL's tuned arms"]
    assert "- trl-tuned-float32: not the same work" in page
    assert "4 rows a step instead of 8" in page
    assert "](images/speed.svg)" in page


def test_memory_is_told_as_it_comes_and_recomputing_as_the_peer_does(script, result):
    result["arms"]["tunekit-recomputing"] = arm(300.0, 500, 2)
    lines = script["page"]({"speed": result}).splitlines()
    told = "0.33 of it; 0.17, and 3.0 times the tokens a second, computing activations again as TRL does | yes |"
    assert any(told in line for line in lines)


def test_what_nobody_measured_is_said_to_be_so(script):
    assert script["page"]({}).count("| not measured |") == 11


def test_methods_and_memory_have_tables_and_goals_of_their_own(script):
    ways = {"lean": {"seconds": 1.5, "to LoRA": 1.1, "to PEFT": 0.7}, "PEFT": {"to LoRA": 1.5}}
    memory = {"machine": {}, "cases": [{"model": "135m", "planned": 1000, "off": 0.05}]}
    page = script["page"]({"methods": {"methods": {"LoHa": ways}}, "memory": memory})
    assert "| LoHa | 1.50 | 1.10 | 1.50 | 0.70 |" in page
    assert "| LoHa, time a step over LoRA's | at most 1.15 | 1.10 | yes |" in page
    assert "| model | planned | off |" in page
    assert "| 135m | 1,000 | 0.05 |" in page


def test_a_quantity_has_its_plot_and_a_row_a_point(script, result, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(script["plot"].__globals__, "IMAGES", tmp_path)
    points = [{"at": at, "arms": {"tunekit": arm(10.0 * at, 1, 1), "trl": arm(5.0 * at, 1, 2)}} for at in (64, 128)]
    found = {"quantity": "length", "title": "tokens of a row", "points": points}
    page = script["page"]({"scaling-length": found})
    assert "| 128 | 1,280 tokens/s, 1 MiB | 640 tokens/s, 1 MiB | 2.00 [1.50, 2.50] |" in page
    script["plot"]("scaling-length", found)
    once = (tmp_path / "scaling-length.svg").read_text()
    script["plot"]("scaling-length", found)
    assert (tmp_path / "scaling-length.svg").read_text() == once
    assert "tokens of a row" in once
