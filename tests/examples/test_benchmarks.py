"""The benchmarks run: on small shapes here, on the shapes they are about where there is a device for them."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


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


def test_the_arms_of_the_speed_benchmark_do_the_same_work():
    speed = runpy.run_path(str(BENCHMARKS / "speed.py"))
    speed["SHAPES"]["small"] |= {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 200, "intermediate_size": 64}
    _, quick = speed["by_tunekit"]("small", 2, levers=True)
    _, plain = speed["by_tunekit"]("small", 2, levers=False)
    _, theirs = speed["by_transformers"]("small", 2)
    assert quick == pytest.approx(plain, rel=1e-5)
    assert quick == pytest.approx(theirs, rel=1e-3)


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
