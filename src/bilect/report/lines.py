"""Lines over a common x, several pairs of axes side by side."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from bilect.report.svg import COLOURS, Svg, drawing, new_figure, to_svg

__all__ = ["Lines", "group", "lines_figure"]

_INKS = ("ours", "random", "full", "other", "worse", "warm", "ink")
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))


@dataclass(frozen=True)
class Lines:
    """One pair of axes: title, axis labels, named lines of (x, y), which axes are logarithmic, whether y shows 0.

    A line in `inks` has the colour that it has elsewhere on the page; the others have those that are left, in order.
    """

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = True
    log_y: bool = False
    zero: bool = True
    inks: Mapping[str, str] = field(default_factory=dict)


def group(
    rows: Iterable[Mapping[str, Any]], name: Callable[[Any], str], x: str, y: str
) -> dict[str, list[tuple[float, float]]]:
    """Lines from table rows: the mean of y over the rows that share a name and an x."""
    values: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        values.setdefault(name(row), {}).setdefault(float(row[x]), []).append(float(row[y]))
    return {key: [(at, fmean(ys)) for at, ys in sorted(line.items())] for key, line in values.items()}


def lines_figure(name: str, panels: Sequence[Lines], description: str) -> Svg:
    """All axes in rows of two, one legend for all: the same name has the same line everywhere."""
    names = list(dict.fromkeys(key for p in panels for key in p.series))
    styles = _styles(names, {key: ink for p in panels for key, ink in p.inks.items()})
    from matplotlib.ticker import NullLocator

    with drawing(name):
        n_rows = math.ceil(len(panels) / 2)
        figure = new_figure(2.5 * n_rows + 0.22 * math.ceil(len(names) / 3))
        figure.set_layout_engine("constrained", h_pad=0.1)
        handles: dict[str, Any] = {}
        for i, panel in enumerate(panels):
            axes = figure.add_subplot(
                n_rows, min(2, len(panels)), i + 1, title=panel.title, xlabel=panel.x, ylabel=panel.y
            )
            for key, line in panel.series.items():
                drawn = [(x, y) for x, y in line if math.isfinite(y) and (y > 0 or not panel.log_y)]
                (handles[key],) = axes.plot(
                    [x for x, _ in drawn], [y for _, y in drawn], linewidth=1.4, marker="o", markersize=2.5, label=key,
                    color=COLOURS[styles[key][0]], linestyle=styles[key][1],
                )  # fmt: skip
            heights = [y for line in panel.series.values() for _, y in line if math.isfinite(y) and y > 0]
            if panel.log_y and heights and max(heights) < 1.001 * min(heights):  # no range that a scale could show
                axes.set_ylim(min(heights) / 2, 2 * max(heights))
            for log, axis, set_scale in (
                (panel.log_x, axes.xaxis, axes.set_xscale),
                (panel.log_y, axes.yaxis, axes.set_yscale),
            ):
                if log:
                    set_scale("log")
                    axis.set_major_formatter(lambda value, _: f"{value:g}")
                    axis.set_minor_locator(NullLocator())  # hundreds of ticks without labels
            if panel.zero and not panel.log_y:
                axes.axhline(0, color=COLOURS["muted"], linewidth=0.8, zorder=0)
            axes.grid(axis="y")
        figure.legend(handles=[handles[key] for key in names], loc="outside lower center", ncols=3)
        return to_svg(figure, name, description)


def _styles(names: Sequence[str], inks: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    """Colour and dashes of each line, no two alike as long as there are enough of them."""
    left = [ink for ink in _INKS if ink not in {inks[name] for name in names if name in inks}]
    free = [name for name in names if name not in inks]
    styles = {name: (left[n % len(left)], _DASHES[n // len(left) % len(_DASHES)]) for n, name in enumerate(free)}
    return {name: styles.get(name) or (inks[name], _DASHES[0]) for name in names}
