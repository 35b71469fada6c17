"""The documentation is a site without a broken link: `make docs`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason='pip install "tunekit-sdk[docs]"')
pytest.importorskip("material", reason='pip install "tunekit-sdk[docs]"')

ROOT = Path(__file__).parents[2]


def build(configuration, site):
    # Not --quiet, by which mkdocs hears of no warning, and is not strict.
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(configuration), "-d", str(site)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_page_and_every_file_that_a_page_links_to_is_on_the_site(tmp_path):
    done = build(ROOT / "mkdocs.yml", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {page.relative_to(ROOT / "docs").with_suffix("") for page in (ROOT / "docs").rglob("*.md")}
    built = {page.relative_to(tmp_path).with_suffix("") for page in tmp_path.rglob("*.html")}
    assert {page.with_name("index") if page.name == "README" else page for page in pages} <= built
    assert (tmp_path / "project/examples/quickstart.py").read_bytes() == (ROOT / "examples/quickstart.py").read_bytes()
    first = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'href="quickstart.html"' in first
    assert 'href="project/CONTRIBUTING.html"' in first
    assert "https://fonts" not in first  # it is read without a network
