"""A report says what the run directory holds, escaped whole, and a run is finished with or without it."""

import importlib.util
import json
import re
import shutil
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tunekit as tk
from tunekit.core.common.table import html_table
from tunekit.core.data.codec import Codec
from tunekit.core.inspection.preview import of_encoded
from tunekit.core.memory.memory_plan import MemoryPlan
from tunekit.core.run import overview, run_report
from tunekit.core.run.planned import planned_and_measured
from tunekit.core.run.run_log import RunLog
from tunekit.testing import tiny_tokenizer

HOSTILE = "<script>document.title='owned';console.error('owned')</script><img src=x onerror=alert(1)> & \"quoted\""
ROWS = [{"prompt": "long", "completion": "unbroken" * 20}]
ROWS += [{"prompt": f"{HOSTILE} {n}", "completion": f"{n} {n}"} for n in range(12)]
SVG = {"svg", "defs", "g", "path", "use", "text", "clippath", "rect", "style"}
PAGE = {
    "html",
    "head",
    "meta",
    "link",
    "title",
    "body",
    "style",
    "div",
    "main",
    "h1",
    "h2",
    "p",
    "figure",
    "figcaption",
}
TABLES = {"table", "thead", "tbody", "tr", "th", "td", "pre", "b", "span", "ul", "li"}
pytestmark = pytest.mark.figures
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason='pip install "tunekit-sdk[plots]"'
)


class Page(HTMLParser):
    """What a browser would see: tags, attributes, and text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = Counter(), [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run(tiny_directory, tmp_path_factory):
    """One run with hostile rows and the name of a hostile model; to be looked at only."""
    place = tmp_path_factory.mktemp("report")
    model = shutil.copytree(tiny_directory, place / "<script>alert(1)<")
    pipeline = tk.Pipeline(
        model=str(model),
        data=tk.InMemory(rows=ROWS),
        validation=tk.InMemory(rows=ROWS[:3]),
        adapter=tk.LoRA(rank=2),
        trainer=tk.SFT(max_steps=4, batch_size=4, evaluate_every=2, memory=64),
        evaluators=(tk.Perplexity(), tk.TokenAccuracy()),
    )
    return pipeline.run(place / "run'<i>")


@pytest.fixture(scope="module")
def pages(run):
    """The page with its curves drawn, and as it is without matplotlib."""
    drawn = run.report().html()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_report, "find_spec", lambda name: None)
        return {True: drawn, False: run.report().html()}


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run directory, to be changed."""
    return shutil.copytree(run.directory, tmp_path / "run")


def changed(path, change):
    """A JSON file of a run, changed."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_finished_run_leaves_its_report_and_a_run_that_is_opened_gives_the_same(run, tmp_path):
    page = (run.directory / "report.html").read_text(encoding="utf-8")
    report = tk.open_run(run.directory).report()
    assert report.html() == page
    assert report.save(tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert report._repr_html_() in page


def test_nothing_of_a_run_becomes_markup_and_nothing_is_loaded(run, copied):
    with (copied / "log.txt").open("a") as file:
        file.write(f"2026-01-01T00:00:00+00:00 padding-free was not taken: {HOSTILE}\n")
    answers = {"samples": {"answers": [{"prompt": f"asked {HOSTILE}", "answer": f"answered {HOSTILE}"}]}}
    for name in ("base", "tuned"):
        changed(copied / "evaluations" / f"{name}.json", lambda found: found["details"].update(answers))
    changed(copied / "result.json", lambda found: found["rows"]["changed"].update({f"dropped {HOSTILE}": 2}))
    changed(copied / "environment.json", lambda found: found.update(platform=HOSTILE))
    changed(copied / "overview.json", lambda found: found["preview"][0]["stretches"][0].update(text=HOSTILE))
    with (copied / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, f"$\\frac{HOSTILE}": 1.0}) + "\n")
    text = run_report.RunReport(copied).html()
    page = Page(text)
    assert page.tags.keys() <= SVG | PAGE | TABLES
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    linked = [value for name, value in page.attributes if name in ("href", "src", "xlink:href", "srcset", "action")]
    assert {value[0] for value in linked} <= {"d", "#"}
    assert "data:," in linked
    assert not re.search(r"url\((?!#)|@import", text)
    for beginning in ("asked ", "answered ", "padding-free was not taken: ", "dropped ", "$\\frac"):
        assert beginning + HOSTILE in page.text
    assert "<script>alert(1)<, fine-tuned" in page.text


def test_each_figure_is_that_of_the_run(run, pages):
    text = Page(pages[True]).text
    lines = [re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", row))) for row in rows_of(pages[True])]
    result = run.result
    span = "{:.4g} to {:.4g}".format
    for name in run.metrics:
        found = result["intervals"]["metrics"].get(name)
        base, tuned = f"{run.base_metrics[name]:.4g}", f"{run.metrics[name]:.4g}"
        if found:
            base, tuned = f"{base} ({span(*found['base'])})", f"{tuned} ({span(*found['tuned'])})"
        assert any(line.strip().startswith(f"{name} {base} {tuned} ") for line in lines), name
    stripped = [line.strip() for line in lines]
    assert "optimizer steps 4 4" in stripped
    assert "training rows 13" in stripped
    assert f"tokens in one pass {result['tokens']['train']:,}" in stripped
    assert "device cpu" in stripped
    assert f"torch {json.loads((run.directory / 'environment.json').read_text())['packages']['torch']}" in stripped
    assert 'run = tk.open_run("run\'<i>")' in text
    assert "Answers before and after" not in text


def test_the_planned_peak_stands_beside_what_the_process_grew_by_or_cuda_counted(run):
    planned = json.loads((run.directory / "overview.json").read_text())["planned"]
    assert planned["memory"] == tk.load(run.directory / "recipe.toml").plan().memory
    mebibytes = f"{sum(planned['memory'].values()) / 2**20:,.0f} MiB in a training step"

    def line(planned=planned, **measured):
        rows = planned_and_measured(run.result, planned, measured, run.history)
        return next((row[1:] for row in rows if row[0] == "peak memory"), None)

    grew = "the process grew by 300 MiB, libraries and evaluations included"
    assert line(process_growth=300 * 2**20, peak_memory=None) == [mebibytes, grew]
    assert line(process_growth=None, peak_memory=2**31) == [mebibytes, "2,048 MiB in the whole run"]
    assert line(process_growth=None) == [mebibytes, "-"]
    assert line({"memory": None}, process_growth=300 * 2**20) == ["-", grew]
    assert line({"memory": None}) is None


def test_with_plenty_of_memory_a_long_run_is_planned_when_it_has_finished(tiny_directory, tmp_path, monkeypatch):
    asked = []

    def plan_memory(self, *_, unless_roomy=None):
        asked.append("if it matters" if unless_roomy else "in any case")
        return None if unless_roomy else MemoryPlan(trainer=self, parts={"activations": 3 * 2**20}, budget=2**30)

    monkeypatch.setattr(tk.SFT, "plan_memory", plan_memory)
    monkeypatch.setattr(run_report, "find_spec", lambda name: None)
    trainer = tk.SFT(max_steps=1, batch_size=2)
    pipeline = tk.Pipeline(model=str(tiny_directory), data=tk.InMemory(rows=ROWS), trainer=trainer, evaluators=())
    pipeline.run(tmp_path / "short")
    assert asked == ["if it matters"]
    monkeypatch.setattr(run_report, "LONG_ENOUGH", 0)
    run = pipeline.run(tmp_path / "long")
    assert asked == ["if it matters", "if it matters", "in any case"]
    assert "3 MiB in a training step" in (run.directory / "report.html").read_text(encoding="utf-8")


def test_a_step_that_cannot_be_planned_fails_no_run_and_is_noted(copied):
    def fails():
        raise RuntimeError("no meta device")

    log = RunLog(directory=copied, observers=None)
    assert run_report._planned_late(log, fails) is None
    assert "the memory of a step could not be planned: RuntimeError: no meta device" in (copied / "log.txt").read_text()


def rows_of(page):
    return re.findall(r"<tr>.*?</tr>", page, re.DOTALL)


@needs_matplotlib
def test_every_curve_is_drawn_in_the_colour_of_the_text(pages):
    text = pages[True]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", text) == [
        "loss",
        "validation/perplexity",
        "validation/nll",
        "validation/bits_per_byte",
        "validation/token_accuracy",
        "learning_rate",
        "grad_norm",
        "training rows by length in tokens",
    ]
    assert Page(text).tags["svg"] == 8
    assert "#000000" not in text
    names = [value for name, value in Page(text).attributes if name == "id"]
    assert len(names) == len(set(names))
    assert {value[1:] for name, value in Page(text).attributes if name == "xlink:href"} <= set(names)


def test_without_matplotlib_the_figures_are_a_table_that_says_so(run, pages):
    page = pages[False]
    assert 'pip install "tunekit-sdk[plots]"' in page
    assert "<svg" not in page
    loss = {line["step"]: line["loss"] for line in run.history if "loss" in line}
    for step, value in loss.items():
        assert f'<th scope="row">{step}</th><td>{value:.4g}</td>' in page
    lengths = json.loads((run.directory / "overview.json").read_text())["lengths"]
    assert sum(lengths["counts"]) == 13


def test_a_long_run_shows_some_lines_with_the_first_and_the_last():
    history = [{"step": step, "loss": 1.0} for step in range(3, 1000, 3)]
    lines = run_report._figures(history)["lines"]
    assert (len(lines), lines[0][0], lines[-1][0]) == (20, 3, 999)


def test_answers_are_shown_side_by_side_where_there_are_any(copied):
    for name in ("base", "tuned"):
        answers = [{"prompt": "2 + 3?", "answer": f"{name} says 5"}]
        changed(
            copied / "evaluations" / f"{name}.json",
            lambda found, answers=answers: found["details"].update(samples={"answers": answers}, other={"answers": 3}),
        )
    text = Page(run_report.RunReport(copied).html()).text
    assert text.index("2 + 3?") < text.index("base says 5") < text.index("tuned says 5")


def test_a_run_without_an_overview_has_a_report_without_its_rows(copied):
    (copied / "overview.json").unlink()
    assert "as the model saw them" not in run_report.RunReport(copied).html()


def test_a_long_row_is_shown_in_part_with_the_counts_of_the_whole():
    codec = Codec(tiny_tokenizer())
    row = {"input_ids": list(range(5, 255)), "labels": [-100] * 200 + list(range(205, 255))}
    (whole,) = of_encoded([row], codec)
    (part,) = of_encoded([row], codec, tokens=40)
    assert (part.tokens, part.learned, part.padding) == (whole.tokens, whole.learned, whole.padding) == (250, 50, 0)
    assert part.stretches[-1].text == " ... and 210 tokens more"
    shown = "".join(stretch.text for stretch in part.stretches[:-1])
    assert shown.rstrip("\ufffd")
    assert len(shown) < len("".join(stretch.text for stretch in whole.stretches)) / 4


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=80))
def test_a_histogram_counts_every_length_between_its_edges(lengths):
    found = overview.histogram(lengths)
    edges, counts = found["edges"], found["counts"]
    assert len({high - low for low, high in pairwise(edges)}) == 1
    assert len(counts) <= overview.BINS
    assert counts == [sum(low <= length < high for length in lengths) for low, high in pairwise(edges)]
    assert sum(counts) == len(lengths)


def test_a_report_that_cannot_be_written_fails_no_run_and_is_noted(tiny_directory, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("no ink")

    monkeypatch.setattr(overview, "write", fails)
    trainer = tk.SFT(max_steps=1, batch_size=2)
    pipeline = tk.Pipeline(model=str(tiny_directory), data=tk.InMemory(rows=ROWS), trainer=trainer, evaluators=())
    run = pipeline.run(tmp_path / "run")
    assert (run.directory / "result.json").exists()
    assert not (run.directory / "report.html").exists()
    assert "there is no report.html: OSError: no ink" in (run.directory / "log.txt").read_text()
    run.report().html()


def cells_of(fragment):
    rows = re.findall(r"<tr>(.*?)</tr>", fragment, re.DOTALL)
    return [[unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows]


def test_a_table_has_every_cell_escaped():
    rows = [[HOSTILE, "1"], ["b", HOSTILE]]
    fragment = html_table(["x", HOSTILE], rows)
    assert set(Page(fragment).tags) == {"table", "tr", "th", "td"}
    assert cells_of(fragment) == [["x", HOSTILE], *rows]


def test_a_run_a_plan_and_a_validation_show_themselves_in_a_notebook(run, tiny_directory):
    shown = cells_of(run._repr_html_())
    assert [re.split(r"  +", line) for line in str(run).splitlines()[2:]] == shown[1:]
    rows = [*ROWS, {"prompt": HOSTILE, "completion": "", "extra": 1}]
    pipeline = tk.Pipeline(model=str(tiny_directory), data=tk.InMemory(rows=ROWS))
    plan = pipeline.plan()
    assert [line[0] for line in cells_of(plan._repr_html_())] == [
        re.split(r"  +", line)[0] for number, line in enumerate(str(plan).splitlines()) if number != 1
    ]
    report = tk.validate(tk.InMemory(rows=rows), model=str(tiny_directory))
    page = Page(report._repr_html_())
    assert set(page.tags) <= {"p", "b", "table", "tr", "th", "td", "pre"}
    assert str(report).splitlines()[0] in page.text
    for line in str(report).splitlines():
        for part in re.split(r"  +", line):
            assert part.strip("- ") in page.text


@pytest.mark.parametrize("drawn", [pytest.param(True, marks=needs_matplotlib), False])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_nothing_overflows_and_nothing_is_logged(pages, looked_at, width, scheme, drawn):
    with looked_at(pages[drawn], width, scheme) as page:
        assert page.title() == "tunekit run"
        # Tables may scroll; no word is broken into letters there.
        assert page.evaluate("[...document.querySelectorAll('th')].every(e => !e.textContent || e.offsetWidth > 30)")
