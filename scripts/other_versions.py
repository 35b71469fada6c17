"""Run the suite over other versions than the tested set: the lowest that pyproject.toml declares, or the newest.

    python scripts/other_versions.py floors
    python scripts/other_versions.py floors --set torch==2.11.0 --set transformers==5.17.0
    python scripts/other_versions.py newest --python python3.13 tests/core/training

What follows goes to pytest. The environment is `.venv-floors` or `.venv-newest`, made anew when its set changes. The
linters have no part in it: types and style are those of the tested set. Warnings are shown and no errors: those of
other versions are theirs.
"""

import argparse
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
OF_CUDA = re.compile(r"Requires-Dist: (nvidia|cuda|triton)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("floors", "newest"))
    parser.add_argument("--python", default=sys.executable, help="the interpreter; this one")
    parser.add_argument("--set", action="append", default=[], metavar="NAME==VERSION", help="another version of one")
    options, for_pytest = parser.parse_known_args()
    pins = {pin.partition("==")[0]: pin for pin in [*(lowest() if options.which == "floors" else []), *options.set]}
    place = ROOT / f".venv-{options.which}"
    install(place, options.python, list(pins.values()))
    python = place / "bin" / "python"
    subprocess.run([python, "-m", "pip", "freeze", "--exclude-editable"], check=True)
    chosen = for_pytest or ["tests"]
    suite = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "-W", "default", *chosen]
    return subprocess.run(suite, cwd=ROOT, check=False).returncode


def lowest() -> list[str]:
    """`torch==2.10` for `torch>=2.10`, of everything that tunekit itself needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [line.partition(";")[0].strip().replace(">=", "==") for line in project["dependencies"]]


def install(place: Path, python: str, pins: list[str]) -> None:
    """The environment with tunekit and its tests' needs, unless it is there with this set."""
    ready, wanted = place / "set.txt", "\n".join([python, *pins])
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([python, "-m", "venv", place], check=True)
    limits = place / "pins.txt"
    limits.write_text("\n".join(pins) + "\n", encoding="utf-8")
    pip = [place / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", limits]
    if sys.platform == "linux" and platform.machine() == "x86_64" and not shutil.which("nvidia-smi"):
        subprocess.run([*pip, "--no-deps", "torch"], check=True)
        without_cuda(next(place.glob("lib/python*/site-packages")))
    subprocess.run([*pip, "-e", f"{ROOT}[test]"], check=True)
    ready.write_text(wanted, encoding="utf-8")


def without_cuda(site: Path) -> None:
    """Spare this machine, which has no GPU, the libraries of CUDA: some 3 GB."""
    metadata = next(site.glob("torch-*.dist-info")) / "METADATA"
    lines = metadata.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not OF_CUDA.match(line)]
    if len(kept) < len(lines):
        metadata.write_text("".join(kept), encoding="utf-8")
        subprocess.run([sys.executable, ROOT / "scripts" / "cuda_stubs.py", site / "torch"], check=True)


if __name__ == "__main__":
    sys.exit(main())
