"""What tests on the simulated device share: the device itself, else why they are skipped; rows and pipelines."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import simulated_cuda
import tunekit as tk

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder where nobody asked for the device: it must be there before torch is."""
    if not simulated_cuda.installed():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no simulated device: make test-sim, or SIMULATED_CUDA=2"))


@pytest.fixture(autouse=True)
def default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the device that is taken where none is named is CUDA, as it is for users."""
    monkeypatch.delenv("TUNEKIT_DEVICE", raising=False)


@pytest.fixture
def second_gpu() -> str:
    """The second GPU, for tests of what takes something of the first."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices: SIMULATED_CUDA=2")
    return "cuda:1"


@pytest.fixture
def taken() -> Callable[..., Any]:
    """How many bytes of a device were taken at most: `with taken(device=1) as bytes: ...; bytes()`."""

    @contextmanager
    def watching(device: int = 0) -> Iterator[Callable[[], int]]:
        gc.collect()
        simulated_cuda.reset_peak(device)
        before = simulated_cuda.counted("now", device)
        yield lambda: simulated_cuda.counted("peak", device) - before

    return watching


@pytest.fixture
def pipeline() -> Callable[..., tk.Pipeline]:
    """A pipeline of the embedded model on twenty rows of several lengths, on CUDA unless it is told otherwise."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} and {n}? " + "Say more. " * (n % 4)},
                {"role": "assistant", "content": f"It is {2 * n}." + " Yes." * (n % 5)},
            ]
        }
        for n in range(20)
    ]

    def made(device: str | None = "cuda", trainer: Any = None, **parts: Any) -> tk.Pipeline:
        trainer = trainer or tk.SFT(max_steps=4, batch_size=4, save_every=2, log_every=99, learning_rate=1e-2)
        given = {"model": tk.TINY, "data": tk.InMemory(rows=rows), "validation": 0, **parts}
        return tk.Pipeline(device=device, trainer=trainer, **given)

    return made
