"""Figures by matplotlib: a curve over steps, a histogram, quality against cost; and figures as SVG within a page."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs

from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


TEN = ("#1f77b4", "#e6700a", "#2a9d3a", "#d43d3d", "#9467bd", "#a0624f", "#dd6fb9", "#808080", "#9c9d16", "#12a5b7")
"""Ten colours that stand out from white and from black, and from each other."""
STYLES = ("-", "--", ":", "-.")


@attrs.frozen
class Point:
    """A method in a plot of quality against cost.

    Args:
        name: in the legend.
        cost: where it is from left to right.
        quality: where it is from bottom to top.
        error: how far its quality may be off, either way; None where that is not known.
        colour: None for the next one.
    """

    name: str
    cost: float
    quality: float
    error: float | None = None
    colour: str | None = None


@attrs.frozen
class Line:
    """A run in a plot of several.

    Args:
        history: what it logged.
        colour: of the line.
        style: of the line, by matplotlib's sign.
        opacity: of the line.
    """

    history: Sequence[Mapping[str, float]]
    colour: str
    style: str
    opacity: float = 1.0


def curve(history: Sequence[Mapping[str, float]], metric: str) -> Figure:
    """A metric over optimizer steps; lines of the history without it are passed over."""
    figure, axes = _figure("step", metric)
    _line(axes, history, metric)
    return figure


def panels(history: Sequence[Mapping[str, float]], metrics: Sequence[str]) -> Figure:
    """Metrics over the same optimizer steps, one above the other."""
    figure, axes = _figure("step", metrics[0])
    figure.clear()
    stacked = list(figure.subplots(len(metrics), sharex=True, squeeze=False)[:, 0])
    for axes, metric in zip(stacked, metrics, strict=True):
        _line(axes, history, metric)
        axes.set_ylabel(metric.replace("_", " "))
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.set_figheight(max(4.8, 2.4 * len(metrics)))
    return figure


def side_by_side(runs: Sequence[Line], metric: str) -> Figure:
    """A metric over the optimizer steps of several runs, those of one name in one colour; without a legend.

    Args:
        runs: with what each of them logged; those that did not log the metric are passed over.
        metric: which.
    """
    figure, axes = _figure("step", metric)
    for run in runs:
        _line(axes, run.history, metric, color=run.colour, linestyle=run.style, alpha=run.opacity)
    return figure


def colours(count: int) -> list[tuple[str, str]]:
    """A colour and a line style for each of so many things, no two the same up to forty."""
    return [(TEN[at % 10], STYLES[at // 10 % len(STYLES)]) for at in range(count)]


def histogram(edges: Sequence[int], counts: Sequence[int], of: str) -> Figure:
    """Bars: `counts[n]` rows have between `edges[n]` and `edges[n + 1]` of what is counted."""
    figure, axes = _figure(of, "rows")
    axes.bar(edges[:-1], counts, width=edges[1] - edges[0], align="edge", edgecolor="white", linewidth=0.5)
    return figure


def svg(figure: Figure, name: str, width: float = 5, height: float = 2.6) -> str:
    """A figure as an `<svg>` to stand in an HTML page, in the colour of the text around it; the same on every call.

    Args:
        figure: what to draw.
        name: one of its own for each figure of a page: what the SVG refers to within itself is named after it.
        width: in inches, to which letters of 10 points are drawn.
        height: in inches.
    """
    import matplotlib

    figure.set_size_inches(width, height)
    written = io.StringIO()
    # As text, not as outlines: it can be read out and searched, and is a third of the size.
    options = {"svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context({**options, "figure.autolayout": False, "figure.constrained_layout.use": False}):
        # Fixed margins: to find the best ones every figure is drawn twice, and a page has many.
        figure.set_layout_engine(None)
        figure.subplots_adjust(left=0.15, right=0.96, top=0.96, bottom=0.2)
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = written.getvalue()
    drawn = re.sub(r"\s*<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    # "line2d_1" is in every figure, and nothing refers to it: in one page it would be there twice.
    drawn = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", drawn)
    return re.sub(r"#000000|black", "currentColor", drawn)


def against(
    points: Sequence[Point],
    axis_names: tuple[str, str],
    better: tuple[Literal["min", "max"], Literal["min", "max"]],
    base: float | None = None,
    *,
    legend: bool = True,
) -> Figure:
    """Quality against cost, with the Pareto front: those that no other is better than in one and as good in the other.

    Args:
        points: the methods.
        axis_names: of cost and quality.
        better: the better direction of each.
        base: the quality without training, a line across; None for none.
        legend: whether the names are in the figure.
    """
    figure, axes = _figure(*axis_names)
    for point in points:
        axes.errorbar(
            [point.cost], [point.quality], yerr=point.error, fmt="o", capsize=3, label=point.name, color=point.colour
        )
    front = pareto(points, better)
    axes.plot([point.cost for point in front], [point.quality for point in front], "--", color="grey", zorder=0)
    if base is not None:
        axes.axhline(base, linestyle=":", color="grey", zorder=0, label="base")
    costs = [point.cost for point in points]
    if costs and min(costs) > 0 and max(costs) > 10 * min(costs):
        _logarithmic(axes)
    if legend:
        figure.legend(loc="outside lower center", ncols=2)  # names beside the points would cover each other
    return figure


def pareto(points: Sequence[Point], better: tuple[str, str]) -> list[Point]:
    """Those points than which no other is better in one and as good in the other, from the least cost on."""
    signs = [1 if direction == "min" else -1 for direction in better]
    keys = {id(point): (signs[0] * point.cost, signs[1] * point.quality) for point in points}

    def beaten(mine: tuple[float, float]) -> bool:
        return any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in keys.values())

    return sorted((point for point in points if not beaten(keys[id(point)])), key=lambda point: point.cost)


def _logarithmic(axes: Axes) -> None:
    """From left to right by powers of ten, with numbers as 300, 1k, 3k, and none in between to run into each other."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _line(axes: Axes, history: Sequence[Mapping[str, float]], metric: str, **options: Any) -> None:
    """A metric over the steps that have it; with points where they are few."""
    lines = [line for line in history if metric in line]
    marker = "." if len(lines) < 50 else ""
    axes.plot([line["step"] for line in lines], [line[metric] for line in lines], marker=marker, **options)
    axes.locator_params(axis="x", integer=True)  # there is no step 2.5


def _figure(horizontal: str, vertical: str) -> tuple[Figure, Axes]:
    """An empty figure of its own: without pyplot there is no backend to choose and nothing to close."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError('plots need matplotlib: pip install "tunekit-sdk[plots]"')
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(horizontal.replace("_", " "))
    axes.set_ylabel(vertical.replace("_", " "))
    axes.grid(alpha=0.3)
    return figure, axes
