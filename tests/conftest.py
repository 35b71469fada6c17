"""What all tests share: which ones are skipped here, the fake plugins, and a tiny model on disk."""

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

# Tiny models are fastest on one thread, and many threads make timings noise. Read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test may reach for the network: a Hub id that is not in the cache must fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What is computed does not depend on the processor: not in fixtures of a module, and not in processes that are started.
os.environ["TUNEKIT_CPU_DTYPE"] = "float32"
# Nor does it depend on whether there is a GPU, but for tests that are marked `gpu`.
os.environ["TUNEKIT_DEVICE"] = "cpu"

no_simulated_device = ""
if os.environ.get("SIMULATED_CUDA"):  # how many GPUs; they must be there before torch is imported
    import simulated_cuda

    try:
        simulated_cuda.install()
    except simulated_cuda.NoCompilerError as error:
        no_simulated_device = str(error)

# A busy machine is no reason for a property to fail; half of the usual examples, so that the suite stays short.
settings.register_profile("tunekit", deadline=None, max_examples=50)
settings.load_profile("tunekit")

SHARED = Path(os.environ.get("TUNEKIT_SHARED") or Path(__file__).parents[2] / "shared")
DISTRIBUTIONS = Path(__file__).parent / "plugins" / "distributions"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine lacks the data or the device for."""
    if no_simulated_device:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=no_simulated_device))
    if not SHARED.is_dir():
        place = os.environ.get("TUNEKIT_SHARED") or "../shared"
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(pytest.mark.skip(reason=f"no {place} here (TUNEKIT_SHARED names another folder)"))
    if gpu := [item for item in items if item.get_closest_marker("gpu")]:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what is there by now: looking through torch and all tests takes a third of a second.

    What is made later is looked through whole a tenth as often: at 0.1 s each, that was a thirtieth of the suite.
    """
    gc.freeze()
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, 10 * old)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of encoded rows for the tests alone, also for the processes they start."""
    os.environ["TUNEKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return Path(os.environ["TUNEKIT_CACHE"])


@pytest.fixture(autouse=True)
def default_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests marked `gpu` take the device that users do: CUDA where none is named."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.delenv("TUNEKIT_DEVICE")


@pytest.fixture(scope="module", autouse=True)
def few_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reports have tables in place of figures, as without matplotlib: drawing is the better half of a tiny run."""
    from tunekit.core.run import run_report

    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("figures"):
            patch.setattr(run_report, "find_spec", lambda name: None)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with public data and a small public model; only for tests marked `real`."""
    return SHARED


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Fills a directory once for all workers, whichever needs it first: `made_once("two-processes", fill)`."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def made(name: str, fill: Callable[[Path], None]) -> Path:
        directory, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir()
                fill(directory)
                done.touch()
        return directory

    return made


@pytest.fixture(scope="session")
def tiny_directory(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A model directory as `tunekit.Pipeline(model=...)` takes it: the tiny Llama and its tokenizer."""

    def fill(directory: Path) -> None:
        from tunekit.testing import tiny_model, tiny_tokenizer

        tiny_model().save_pretrained(directory)
        tiny_tokenizer().save_pretrained(directory)

    return made_once("tiny-llama", fill)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs fake distributions for one test: `install("fake-working")`."""

    def install(*names: str) -> None:
        for name in names:
            assert (DISTRIBUTIONS / name).is_dir(), f"no fake distribution {name}"
            monkeypatch.syspath_prepend(str(DISTRIBUTIONS / name))

    yield install
    for module in [name for name in sys.modules if name.startswith("fake_")]:
        del sys.modules[module]


@pytest.fixture
def lean_lora_rounding(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has LoRA's lean forward be off by so many roundings of its dtype: `lean_lora_rounding(3)`."""
    import torch

    from tunekit.core.lean.lora import LeanLoRA

    right = LeanLoRA.compute

    def rounding(times: int) -> None:
        def noisy(self: Any, x: Any) -> Any:
            y = right(self, x)
            off = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).double()
            return y + (y.detach().double() * off * times * torch.finfo(y.dtype).eps / 2).to(y.dtype)

        monkeypatch.setattr(LeanLoRA, "compute", noisy)

    return rounding


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium on the PATH")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def looked_at(browser: Any, tmp_path: Path) -> Callable[[str, int, str], AbstractContextManager[Any]]:
    """Opens a report in the browser, and holds it to what all reports must be: `looked_at(html, width, "dark")`."""

    @contextmanager
    def opened(html: str, width: int, scheme: str) -> Iterator[Any]:
        path = tmp_path / "report.html"
        path.write_text(html, encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        assert said == []
        assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # Only tables may be wider than the page, and scroll.
        assert page.evaluate(
            "[...document.querySelectorAll('pre,figure,svg,p,li,h1')].every(e => e.scrollWidth <= innerWidth)"
        )
        light = page.evaluate("getComputedStyle(document.querySelector('.tunekit-report')).backgroundColor") == (
            "rgb(255, 255, 255)"
        )
        assert light == (scheme == "light")
        assert len(page.screenshot()) > 5000
        yield page
        page.close()

    return opened
