"""`HtmlReport`: a report as one HTML page that needs no network and no scripts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tunekit.core.common import plots
from tunekit.core.common.secrets import redacted
from tunekit.core.common.writing import replace
from tunekit.core.run.model_card import PACKAGES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jinja2 import Template
    from matplotlib.figure import Figure

STYLE, TABLE = "run_report.css", "report_table.html"


class HtmlReport(ABC):
    """Shows itself in a notebook, and writes one HTML file.

    Args:
        directory: of what it reports on.
    """

    title: ClassVar[str]
    """Of the page."""
    body: ClassVar[tuple[str, str]]
    """The package and the name of its template."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @abstractmethod
    def _content(self) -> dict[str, Any]:
        """What the template needs."""

    def html(self) -> str:
        """The page, whole. Everything from the run is escaped."""
        head = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
        head += '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        return f"{head}<title>{self.title}</title></head><body style='margin:0'>\n{self._fragment}\n</body></html>\n"

    def save(self, path: str | Path) -> Path:
        """Write the page, whole or not at all, and return the path."""
        path = Path(path)
        replace(path, self.html())
        return path

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.directory)!r})"

    def _repr_html_(self) -> str:
        return self._fragment

    @cached_property
    def _fragment(self) -> str:
        style = (resources.files("tunekit.core.run") / STYLE).read_text(encoding="utf-8")
        return redacted(f"<style>{style}</style>\n{_template(*self.body).render(self._content())}")


@cache
def _template(package: str, name: str) -> Template:
    """The body of a page; compiled once, since that takes as long as filling it."""
    import jinja2

    macro = (resources.files("tunekit.core.run") / TABLE).read_text(encoding="utf-8")
    body = (resources.files(package) / name).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(macro + body)


def environment_lines(environment: Mapping[str, Any]) -> list[list[str]]:
    """What a run was made with, from its `environment.json`."""
    packages = environment["packages"]
    names = ("device", "dtype", "seed", "python", "platform")
    lines = [[name, str(environment[name])] for name in names]
    lines += [[name, packages[name]] for name in PACKAGES if name in packages]
    return lines + [["plugin " + name, made] for name, made in environment["components"].items()]


def drawn(figure: Figure, name: str) -> str:
    """A figure as an SVG under a caption that names it."""
    (axes,) = figure.axes
    # Most of the time goes into the numbers on the axes; a logarithmic one has few.
    axes.locator_params(axis="y" if axes.get_xscale() == "log" else "both", nbins=6)
    axes.set_ylabel("")  # the caption says it, and a name is nothing for matplotlib to read formulas in
    return plots.svg(figure, name)
