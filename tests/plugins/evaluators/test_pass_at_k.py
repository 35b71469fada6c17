"""Generated programs run where the user allows it; what is hostile is held and fails; pass@k is the unbiased estimate."""

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tunekit as tk
from tunekit.plugins.evaluators import code_process, pass_at_k, sandbox
from tunekit.plugins.evaluators.pass_at_k import Problem, program
from tunekit.plugins.evaluators.sandbox import fault_of
from tunekit.testing import tiny_model, tiny_tokenizer

CONTEXT = tk.Context(model_id="tiny", device="cpu", seed=4)
ADD = {
    "prompt": "def add(a, b):\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n",
    "entry_point": "add",
}
NAME = {"prompt": "import math\n", "test": "assert area(1) == math.pi"}


@pytest.mark.parametrize(("samples", "passed", "k"), list(itertools.product([5], [0, 1, 3, 5], [1, 2, 5])))
def test_the_estimate_is_the_share_of_draws_that_hold_a_right_sample(samples, passed, k):
    draws = list(itertools.combinations([True] * passed + [False] * (samples - passed), k))
    assert pass_at_k.pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


HARMLESS = {
    "comes to its end": "import math, re, typing",
    "writes in its directory": "open('a', 'w').write('b')\nimport os\nos.rename('a', 'c')\nassert os.listdir() == ['c']",
    "knows no secrets": "import os\nassert not set(os.environ) - {'LC_CTYPE'}",
}
HOSTILE = {
    "fails": ("assert 0", "AssertionError"),
    "leaves": ("import sys\nsys.exit(0)", "SystemExit"),
    "leaves at once": ("import os\nos._exit(0)", "ended without"),
    "answers itself": ("import os\n[os.write(n, b'{\"fault\": \"\", \"word\": \"\"}') for n in range(3, 9)]\nos._exit(0)", ""),
    "runs on": ("while True: pass", "ended without"),
    "sleeps": ("import time\ntime.sleep(60)", "took too long"),
    "takes memory": ("x = bytearray(3 << 30)", "MemoryError"),
    "forks": ("import os\nwhile True: os.fork()", "forbidden: os.fork"),
    "starts programs": ("import subprocess\nsubprocess.run(['true'])", "forbidden: subprocess"),
    "kills": ("import os\nos.kill(os.getppid(), 9)", "forbidden: os.kill"),
    "writes elsewhere": ("open({outside!r}, 'w')", "forbidden: open"),
    "goes elsewhere": ("import os\nos.chdir(os.path.dirname({outside!r}))\nopen('outside', 'w')", "forbidden: open"),
    "moves out": ("import os\nos.rename({outside!r}, 'a')", "forbidden: os.rename"),
    "calls": ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "forbidden: socket"),
    "goes behind Python": ("import ctypes\nctypes.CDLL(None).getpid()", "forbidden: ctypes"),
    "fills the disk": ("file = open('a', 'w')\nwhile True: file.write('a' * 10**6)", "OSError"),
    "hides what it does": ("try:\n    import os\n    os.fork()\nexcept BaseException: pass", "forbidden: os.fork"),
}  # fmt: skip


@pytest.mark.parametrize("text", HARMLESS.values(), ids=HARMLESS)
def test_a_program_that_does_no_harm_comes_to_its_end(text):
    assert fault_of(text, seconds=2) == ""


@pytest.mark.parametrize(("text", "fault"), HOSTILE.values(), ids=HOSTILE)
def test_what_a_program_must_not_do_is_a_failure_and_has_no_effect(text, fault, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "START", 0.5 if fault == "took too long" else sandbox.START)
    outside = tmp_path / "outside"
    found = fault_of(text.replace("{outside!r}", repr(str(outside))), seconds=1 if fault != "took too long" else 0.1)
    assert found
    assert fault in found
    assert not outside.exists()


def test_the_system_itself_refuses_writing_and_the_network_where_it_can(tmp_path):
    tried = f"""
import sys, socket
sys.path.insert(0, {str(Path(code_process.__file__).parent)!r})
import code_process, os
code_process._part_from_the_system()
code_process._keep_files({str(tmp_path / "work")!r})
open({str(tmp_path / "work" / "inside")!r}, "w").write("a")
for name, tried in {{"file": lambda: open({str(tmp_path / "outside")!r}, "w"),
                     "network": lambda: socket.create_connection(("192.0.2.1", 9), timeout=0.2),
                     "alone": lambda: os.getpid() == 1 or print("not alone")}}.items():
    try:
        tried()
    except OSError as error:
        print(name, type(error).__name__)
"""
    (tmp_path / "work").mkdir()
    done = subprocess.run([sys.executable, "-I", "-c", tried], capture_output=True, text=True, check=True)
    if "not alone" in done.stdout or "file" not in done.stdout:
        pytest.skip(f"this system has no namespaces or no Landlock for us: {done.stdout!r}")
    assert done.stdout.splitlines() == ["file PermissionError", "network OSError"]
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["inside"]


def evaluated(monkeypatch, answers, rows, **fields):
    """PassAtK with a model that gives these answers, one list a problem."""
    tokenizer = tiny_tokenizer()
    given = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in some] for some in answers]
    monkeypatch.setattr(pass_at_k, "sample", lambda *arguments, **options: given)
    evaluator = tk.PassAtK(source=tk.InMemory(rows=rows), allow_execution=True, **fields)
    evaluator.check(CONTEXT)
    evaluator.check_data(tokenizer, [], CONTEXT)
    return evaluator.evaluate(tiny_model(), tokenizer, [], CONTEXT)


def test_programs_are_made_of_prompt_answer_and_tests(monkeypatch):
    right, wrong = "    return a + b\n", "    return a - b\n"
    rambling = right + "\nprint(add(1, 2))\nraise SystemExit"
    more = {"k": (1, 2), "samples": 4, "temperature": 0.8}
    found = evaluated(monkeypatch, [[right, wrong, rambling, wrong], [wrong] * 4], [ADD, ADD], **more)
    assert found == {"pass_at_1": 0.25, "pass_at_2": pytest.approx((1 - 1 / 6) / 2)}
    assert found.details["passed"] == [2, 0]
    assert found.details["faults"] == {"AssertionError": 6}
    asked = "Here it is:\n```python\ndef area(r):\n    return math.pi * r * r\n```\nIt is a circle."
    assert evaluated(monkeypatch, [[asked]], [NAME], continued=False) == {"pass_at_1": 1.0}
    assert program(Problem("Write f.", "f()", None), "def f(): 0", False) == "def f(): 0\n\nf()\n"


def test_a_model_is_sampled_and_measured_in_a_run_with_a_recipe(tmp_path):
    evaluator = tk.PassAtK(source=tk.InMemory(rows=[ADD]), allow_execution=True, k=(1, 2), samples=2,
                           temperature=1.0, max_new_tokens=4)  # fmt: skip
    pipeline = tk.Pipeline(model=tk.TINY, data=tk.JsonLines(path=tk.ORDERS), evaluators=(evaluator,))
    assert tk.Pipeline.from_dict(pipeline.to_dict()) == pipeline
    pipeline.check()
    pipeline.save(tmp_path / "recipe.toml")
    with pytest.raises(tk.ConfigError, match=r"recipe\.evaluators\[0\]\.allow_execution: lets programs that the model"):
        tk.load(tmp_path / "recipe.toml")
    assert tk.load(tmp_path / "recipe.toml", trust_remote_code=True) == pipeline
    assert pipeline._context().better == {"pass_at_1": "max", "pass_at_2": "max"}
    found = evaluator.evaluate(tiny_model(), tiny_tokenizer(), [], CONTEXT)
    assert found == {"pass_at_1": 0.0, "pass_at_2": 0.0}
    assert sum(found.details["faults"].values()) == 2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"allow_execution": False}, r"PassAtK\.allow_execution: runs programs that the model writes"),
        ({"k": (2,)}, r"PassAtK\.samples: k=2 needs as many"),
        ({"samples": 2}, r"PassAtK\.temperature: greedy samples are all the same"),
        ({"source": tk.Mixture(sources=(tk.InMemory(rows=[ADD]),))}, r"PassAtK\.source: must be a source of rows"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(fields, says):
    fields = {"source": tk.InMemory(rows=[ADD]), "allow_execution": True, **fields}
    with pytest.raises(tk.ConfigError, match=says):
        tk.PassAtK(**fields).check(CONTEXT)


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"prompt": "a", "test": " "}, {**ADD, "entry_point": "a; b"}])
def test_rows_that_are_no_problems_are_refused_with_their_place(row):
    with pytest.raises(tk.DataError, match=r"^row 2: "):
        tk.PassAtK(source=tk.InMemory(rows=[ADD, row])).check_data(tiny_tokenizer(), [], CONTEXT)


@pytest.mark.real
def test_the_solutions_of_humaneval_pass_and_others_do_not(shared, monkeypatch):
    path = shared / "data/humaneval/HumanEval.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()][::12]
    answers = [row["canonical_solution"] for row in rows]
    found = evaluated(monkeypatch, [[answer] for answer in answers], rows)
    assert found == {"pass_at_1": 1.0}, found.details["faults"]
    whole = tk.PassAtK(source=tk.JsonLines(path=path))
    assert len(list(whole._problems())) == 164
    assert evaluated(monkeypatch, [["    return None\n"]] * 4, rows[:4]) == {"pass_at_1": 0.0}
