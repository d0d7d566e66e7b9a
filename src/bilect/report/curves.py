"""The curves of the bilevel fit: six small multiples over the score steps, the rounds one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bilect.report.inputs import RoundFiles, number
from bilect.report.scores import FloatArray
from bilect.report.svg import COLOURS, Svg, drawing, new_figure, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 400  # per curve
CURVES = {  # title of a panel: what the fit logs it as
    "Proxy lower loss": ("lower_loss",),
    "Upper loss": ("upper_loss",),
    "KL to the target": ("kl",),
    "Solver residual": ("residual",),
    "Effective sample size": ("effective_sample_size",),
    "Scores": ("score_mean", "score_std", "score_min", "score_max"),
}


def learning_figure(rounds: Sequence[RoundFiles]) -> Svg | None:
    """Six small multiples of the bilevel fit, the rounds one after another; None where no metric is there at all."""
    from matplotlib.ticker import LogLocator

    with drawing("learning"):
        figure = new_figure(4.3)
        figure.set_layout_engine("constrained", h_pad=0.1)
        drawn = []
        for i, (title, (key, *_)) in enumerate(CURVES.items()):
            log = key == "residual"
            axes = figure.add_subplot(2, 3, i + 1)
            axes.set_title(title)
            start, count, limits = 0.0, 0, []
            for files in rounds:
                steps = [
                    value if (value := number(row.get("step"))) is not None else float(n)
                    for n, row in enumerate(files.metrics)
                ]
                x = np.array(steps, dtype=np.float64) - (min(steps) if steps else 0) + start
                count += (
                    _score_band(axes, x, files) if key == "score_mean" else _curve(axes, x, _column(files, key), log)
                )
                start = float(x.max()) + 1 if len(x) else start
                limits.append(start)
            for edge in limits[:-1]:
                axes.axvline(edge, color=COLOURS["rule"], linewidth=0.8, zorder=0)
            if count:
                drawn.append(title.lower())
                axes.set_xlim(0, max(start, 1))
                axes.locator_params(axis="x", nbins=4, integer=True)
                if log:
                    axes.set_yscale("log")
                    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
                    axes.yaxis.set_major_formatter(_plain)
                    axes.yaxis.set_minor_formatter("")
                else:
                    axes.locator_params(axis="y", nbins=5)
            else:
                axes.set_yticks([])
                axes.set_xticks([])
                axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=COLOURS["muted"])
            if i >= 3:
                axes.set_xlabel("score step")
        text = (
            f"Curves over the score steps of {len(rounds)} round{'s' if len(rounds) != 1 else ''}: {', '.join(drawn)}."
        )
        return to_svg(figure, "learning", text) if drawn else None


def _plain(value: float, _position: object = None) -> str:
    return f"{value:.3g}"


def _column(files: RoundFiles, key: str) -> FloatArray:
    values = (number(row.get(key)) for row in files.metrics)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _curve(axes: Axes, x: FloatArray, y: FloatArray, log: bool) -> int:
    """One round's curve: the raw values faint, a running mean on top, or dots where values are sparse. Points drawn."""
    there = np.isfinite(y) & ((y > 0) | (not log))
    x, y = thin(x[there], y[there])
    if len(y) and there.mean() < 0.6:
        axes.plot(x, y, ".", markersize=4, color=COLOURS["ours"], linestyle="-", linewidth=0.7)
    elif len(y):
        axes.plot(x, y, color=COLOURS["ours"], linewidth=0.7, alpha=0.35)
        axes.plot(x, _running_mean(y), color=COLOURS["ours"], linewidth=1.5)
    return len(y)


def _score_band(axes: Axes, x: FloatArray, files: RoundFiles) -> int:
    names = ("score_mean", "score_std", "score_min", "score_max")
    mean, std, low, high = (_column(files, name) for name in names)
    for bottom, top, alpha in ((low, high, 0.16), (mean - std, mean + std, 0.34)):
        there = np.isfinite(bottom) & np.isfinite(top)
        if there.any():
            thin_x, thin_bottom = thin(x[there], bottom[there])
            axes.fill_between(
                thin_x, thin_bottom, thin(x[there], top[there])[1], color=COLOURS["ours"], alpha=alpha, linewidth=0
            )
    there = np.isfinite(mean)
    axes.plot(*thin(x[there], mean[there]), color=COLOURS["ours"], linewidth=1.5)
    return int(there.sum())


def thin(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """At most MAX_POINTS points, each the mean of its neighbours."""
    if len(x) <= MAX_POINTS:
        return x, y
    cuts = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)[:-1]
    sizes = np.diff(np.append(cuts, len(x)))
    return np.add.reduceat(x, cuts) / sizes, np.add.reduceat(y, cuts) / sizes


def _running_mean(y: FloatArray) -> FloatArray:
    half = max(len(y) // 30, 1) if len(y) > 8 else 0
    total = np.concatenate([[0.0], np.cumsum(y)])
    at = np.arange(len(y))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(y))
    return np.asarray((total[last] - total[first]) / (last - first), dtype=np.float64)
