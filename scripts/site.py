"""Hooks of mkdocs: the README is the first page, files of the project that pages link to are on the site, and the
navigation lists the generated pages by themselves. Called by `make docs`.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
PROJECT = "project"
"""The folder of the site where files from outside of docs/ are."""
PAGES = ["quickstart", "concepts", "choosing", "data", "quantization", "comparison", "scale", "reliability", "security"]
PAGES += ["performance", "writing-a-plugin"]


def title(path: Path) -> str:
    """The first heading of a page."""
    return path.read_text(encoding="utf-8").split("\n# ", 1)[-1].lstrip("# ").splitlines()[0].replace("`", "")


def on_config(config):
    def folder(name):
        rest = sorted(path for path in (DOCS / name).glob("*.md") if path.name != "README.md")
        return [f"{name}/README.md", *({title(path): f"{name}/{path.name}"} for path in rest)]

    config.nav = [
        {"tunekit": "index.md"},
        *(f"{page}.md" for page in PAGES if (DOCS / f"{page}.md").exists()),
        {"Adapter methods": folder("methods")},
        {"Reference": folder("reference")},
        {"Contributing": f"{PROJECT}/CONTRIBUTING.md"},
        {"Changelog": f"{PROJECT}/CHANGELOG.md"},
    ]
    return config


def place_of(path: Path) -> str:
    """Where a file of the project is on the site."""
    if path == ROOT / "README.md":
        return "index.md"
    within = path.is_relative_to(DOCS)
    return path.relative_to(DOCS).as_posix() if within else f"{PROJECT}/{path.relative_to(ROOT).as_posix()}"


def targets(page: Path) -> list[tuple[str, Path]]:
    """The links of a page to files of the project: as they are written, and the files."""
    found = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        target = Path(os.path.normpath(page.parent / link))
        target = target / "README.md" if target.is_dir() else target
        if target.is_file() and target.is_relative_to(ROOT):
            found.append((link, target))
    return found


def on_files(files, config):
    seen, left = set(), [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        if not path.is_relative_to(DOCS):
            files.append(File.generated(config, place_of(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            left += [target for _, target in targets(path)]
    return files


def on_page_markdown(markdown, page, config, files):
    source = Path(page.file.abs_src_path)
    here = Path(page.file.src_uri).parent
    there = {link: os.path.relpath(place_of(target), here) for link, target in targets(source)}
    return LINK.sub(lambda match: there.get(match[1], match[1]), markdown)
