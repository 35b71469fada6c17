"""Nothing is fetched from the Hub to be run unless the user asks, though the package that does it is installed."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunekit.core.model import hub_kernels

KERNELS = """
import os

def note(what):
    with open(os.environ["ASKED"], "a") as file:
        file.write(what + "\\n")

note("imported")

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    note(name)
    return lambda *arguments, **options: note(f"{name} called")
"""
BITSANDBYTES = """
import logging
try:
    from kernels import get_kernel
    get_kernel("kernels-community/quantization-bitsandbytes", version=1)
except Exception as error:
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load: %s", error)
"""
PIPELINE = """
import sys
import tunekit as tk
rows = [{"prompt": f"a{n}", "completion": "b"} for n in range(8)]
parts = {"model": tk.TINY, "data": tk.InMemory(rows=rows), "validation": 0}
"""
LORA = f"""{PIPELINE}
pipeline = tk.Pipeline(adapter=tk.LoRA(rank=2), trainer=tk.SFT(max_steps=1, batch_size=2), **parts)
pipeline.plan()
pipeline.run("run").generate("a", max_new_tokens=2)
assert "peft" in sys.modules
import kernels
kernels.get_kernel("asked for by somebody else")
"""
TRAINER = f"""{PIPELINE}
trainer = tk.Transformers(arguments={{"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none"}})
tk.Pipeline(adapter=tk.LastLayers(count=1), trainer=trainer, **parts).run("run")
assert "peft" in sys.modules
"""
IMPORT = "from tunekit.core.model.quick_imports import import_bitsandbytes\nimport_bitsandbytes()\n"
ASKING = ["imported", "get_kernel", "get_kernel called"]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A place with a package `kernels` of a version that transformers takes, which notes whatever is asked of it."""
    from transformers.utils import import_utils

    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(KERNELS)
    metadata = tmp_path / f"kernels-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    return tmp_path


def asked(site: Path, script: str, **environment: str) -> tuple[list[str], str]:
    """What a process that runs `script` asked of the package, each once, and what it printed."""
    variables = {name: value for name, value in os.environ.items() if name != hub_kernels.SWITCH}
    path = os.pathsep.join(filter(None, [str(site), variables.get("PYTHONPATH")]))
    variables |= {"ASKED": str(site / "asked"), "PYTHONPATH": path, "TUNEKIT_PROGRESS": "quiet", **environment}
    made = subprocess.run([sys.executable, "-c", script], cwd=site, env=variables, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    noted = site / "asked"
    return list(dict.fromkeys(noted.read_text().splitlines())) if noted.exists() else [], made.stdout + made.stderr


def test_a_lora_run_asks_nothing_and_whoever_asks_for_the_package_himself_has_it(site):
    noted, printed = asked(site, LORA)
    assert noted == ASKING
    assert "kernels" not in printed


def test_a_run_of_the_trainer_of_transformers_asks_nothing(site):
    noted, printed = asked(site, TRAINER)
    assert noted == []
    assert "kernels" not in printed


@pytest.mark.parametrize("switch", ["", "0", "NO"])
def test_bitsandbytes_is_imported_without_asking_and_without_a_word(site, switch):
    (site / "bitsandbytes.py").write_text(BITSANDBYTES)
    assert asked(site, IMPORT, **{hub_kernels.SWITCH: switch}) == ([], "")


@pytest.mark.parametrize("switch", ["1", "yes"])
def test_who_asks_by_the_switch_of_transformers_is_given_what_he_asks_for(site, switch):
    (site / "bitsandbytes.py").write_text(BITSANDBYTES)
    assert asked(site, IMPORT, **{hub_kernels.SWITCH: switch}) == (ASKING, "")


def test_the_advice_to_install_the_package_is_not_given_and_the_logger_is_as_it_was(monkeypatch, caplog):
    monkeypatch.delenv(hub_kernels.SWITCH, raising=False)
    logger = logging.getLogger(hub_kernels.BITSANDBYTES)
    with caplog.at_level(logging.INFO, logger.name):
        with hub_kernels.kept_out():
            assert importlib.util.find_spec("kernels") is None
            logger.warning("Please make sure you already `pip install kernels`")
        logger.warning("another word")
    assert [record.getMessage() for record in caplog.records] == ["another word"]
    assert sys.modules.get("kernels", "not there") is not None
