"""A comparison on one HTML page says what its directory holds, escaped whole, and needs neither network nor scripts."""

import importlib.util
import re
from html import unescape

import attrs
import pytest

import tunekit as tk
from tunekit.core.comparison import comparison_report

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)> & \"quoted\""
ROWS = [{"prompt": f"repeat {n}", "completion": " ".join([str(n)] * (1 + n % 5))} for n in range(12)]
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason='pip install "tunekit-sdk[plots]"'
)


@pytest.fixture(scope="module")
def compared(tiny_directory, tmp_path_factory):
    """Two arms that finished, one that failed with a hostile error."""
    pipeline = tk.Pipeline(
        model=str(tiny_directory),
        data=tk.InMemory(rows=ROWS),
        validation=0.25,
        trainer=tk.SFT(batch_size=4, evaluate_every=1),
        evaluators=(tk.Perplexity(), tk.TokenAccuracy()),
    )
    methods = (tk.LoRA(rank=2), tk.IA3(), tk.LoRA(targets=("nowhere",)))
    place = tmp_path_factory.mktemp("compared") / "methods'<i>"
    found = tk.compare(pipeline, methods, directory=place, budget=tk.Steps(2), seeds=(0, 1))
    failed = attrs.evolve(found.arms[2], runs=tuple(attrs.evolve(run, error=HOSTILE) for run in found.arms[2].runs))
    return attrs.evolve(found, arms=(*found.arms[:2], failed))


@pytest.fixture(scope="module")
def pages(compared):
    """The page with its plots, and as it is without matplotlib."""
    drawn = compared.report().html()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison_report, "find_spec", lambda name: None)
        return {True: drawn, False: compared.report().html()}


def cells_of(page):
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [[unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_the_page_has_the_table_the_best_the_failures_and_how_to_load(compared, pages, tmp_path):
    page = pages[False]
    header, lines = compared.table()
    found = cells_of(page)
    assert [name.replace("_", " ") for name in header] in found
    for line in lines:
        assert line in found
    best = compared.best("perplexity").name
    assert f"<h1>{best} has the best perplexity</h1>" in page
    assert unescape(page).count(f"seed 1: {HOSTILE}") == 1
    assert f"run = comparison.run({best!r})" in unescape(page)
    assert 'tk.open_comparison("methods\'<i>")' in unescape(page)
    assert ["device", "cpu"] in found
    assert "2 steps each, seeds 0, 1" in page
    assert compared.report().save(tmp_path / "page.html").read_text(encoding="utf-8") == compared.report().html()
    assert compared.report()._repr_html_() in compared.report().html()


def test_nothing_becomes_markup_and_nothing_is_loaded(pages):
    for page in pages.values():
        assert "<script" not in page
        assert "<img" not in page
        assert not re.search(r"url\((?!#)|@import|(?:src|href)=\"(?!#|data:)", page)


@needs_matplotlib
def test_each_figure_has_every_arm_in_its_colour(compared, pages):
    page = pages[True]
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    against = ["perplexity against trained parameters", "perplexity against seconds"]
    assert captions[:4] == [*against, "loss", "validation/perplexity"]
    assert len(captions) == 8
    colours = dict(re.findall(r'background:(#\w+)"></span>([\w-]+)</span>', page))
    assert list(colours.values()) == [arm.name for arm in compared.arms]
    figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    for figure in figures:
        drawn = {colour for colour in colours if colour in figure}
        assert {colours[colour] for colour in drawn} == {arm.name for arm in compared.arms if arm.finished}
    names = re.findall(r' id="([^"]+)"', page)
    assert len(names) == len(set(names))


def test_without_matplotlib_the_page_says_so_and_before_any_run_it_says_that(compared, pages, tmp_path):
    assert 'pip install "tunekit-sdk[plots]"' in pages[False]
    assert "<svg" not in pages[False]
    runs = tuple(tk.ArmRun(seed=seed, steps=2, error="not run yet") for seed in compared.seeds)
    empty = attrs.evolve(compared, arms=tuple(attrs.evolve(arm, runs=runs) for arm in compared.arms))
    page = empty.report().html()
    assert "6 runs are not made yet" in page
    assert "What failed" not in page
    assert "<h1>Methods compared</h1>" in page


@pytest.mark.parametrize("drawn", [pytest.param(True, marks=needs_matplotlib), False])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_nothing_overflows_and_nothing_is_logged(pages, looked_at, width, scheme, drawn):
    with looked_at(pages[drawn], width, scheme) as page:
        assert page.title() == "tunekit comparison"
