"""The figures of the comparison page: gains with intervals, cost against gain, learning curves, shares, overlap."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bilect.compare.verdict import cost_ratio
from bilect.report.figures import name_points
from bilect.report.lines import Lines, lines_figure
from bilect.report.svg import COLOURS, drawing, label, new_figure, to_svg

__all__ = ["arm_inks", "cost_figure", "curves_figure", "gains_figure", "heat_figure", "variants_figure"]

_OWN = ("random", "full", "blade", "rho1", "random-token")


def gains_figure(name: str, arms: Mapping[str, Any]) -> str:
    """Difference from random of each arm: every seed, the mean, and its 95% interval."""
    rows = {arm: arms[arm]["minus_random"] for arm in arms if arm not in ("warm", "random")}
    return _intervals(name, rows, {arm: COLOURS[ink] for arm, ink in arm_inks(arms).items()})


def variants_figure(name: str, rows: Mapping[str, Any]) -> str:
    """Difference of one arm from random in each variant."""
    return _intervals(name, rows, dict.fromkeys(rows, COLOURS["ours"]))


def _intervals(name: str, rows: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    shown = sorted(rows, key=lambda arm: rows[arm]["mean"])
    with drawing(name):
        figure = new_figure(0.9 + 0.3 * len(shown))
        axes = figure.add_subplot(xlabel="held-out loss minus random's (left is better): seeds, mean, 95% interval")
        for y, arm in enumerate(shown):
            own = rows[arm]
            if own["low"] is not None:
                axes.plot([own["low"], own["high"]], [y, y], color=colours[arm], linewidth=2, alpha=0.45)
            seeds = [v for v in own["values"] if v is not None]
            axes.plot(seeds, [y] * len(seeds), "|", color=colours[arm], markersize=9)
            axes.plot([own["mean"]], [y], "o", color=colours[arm], markersize=5)
        axes.axvline(0, color=COLOURS["muted"], linewidth=0.8)
        axes.set_yticks(range(len(shown)), [label(arm) for arm in shown], color=COLOURS["ink"])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.grid(axis="x")
        text = "; ".join(f"{arm} {rows[arm]['mean']:+.3f}" for arm in shown)
        return to_svg(figure, name, f"Mean difference from random: {label(text, 600)}.")


def cost_figure(name: str, arms: Mapping[str, Any]) -> str:
    """Each arm's gain over random against what it cost."""
    with drawing(name):
        figure = new_figure(3.2)
        axes = figure.add_subplot(xlabel="FLOPs of choosing and training, times random's",
                                  ylabel="held-out loss minus random's")  # fmt: skip
        inks, points = arm_inks(arms), dict[str, tuple[float, float]]()
        for arm in (a for a in arms if a != "warm"):
            x, y = cost_ratio(arms, arm), arms[arm]["minus_random"]["mean"] or 0.0
            axes.plot([x], [y], "o", color=COLOURS[inks[arm]], markersize=6)
            points[label(arm)] = (x, y)
        name_points(axes, points)
        axes.axhline(0, color=COLOURS["muted"], linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        axes.margins(x=0.15, y=0.15)
        axes.grid(axis="y")
        return to_svg(figure, name, "Gain over random against FLOPs; lower and further left is better.")


def curves_figure(name: str, arms: Mapping[str, Any]) -> str:
    """Held-out loss along the training, against tokens and against FLOPs with those of choosing."""
    shown = {arm: figures for arm, figures in arms.items() if figures["curve"]}
    inks = {arm: ink for arm, ink in arm_inks(shown).items() if ink != "other"}
    tokens, flops = dict[str, list[tuple[float, float]]](), dict[str, list[tuple[float, float]]]()
    for arm, f in shown.items():
        rate = f["cost"]["training"]["flops"]["mean"] / f["tokens"]
        tokens[arm] = [(p["tokens"] / 1e6, p["mean"]) for p in f["curve"]]
        flops[arm] = [((p["choosing_flops"] + rate * p["tokens"]) / 1e12, p["mean"]) for p in f["curve"]]
    panels = [
        Lines(f"against {what}", x, "held-out loss", series, log_x=False, zero=False, inks=inks)
        for what, x, series in (("tokens", "million tokens", tokens),
                                ("FLOPs, choosing included", "TFLOPs", flops))
    ]  # fmt: skip
    return lines_figure(name, panels, "Held-out loss of the undecayed models while they train, mean over seeds.")


def heat_figure(name: str, values: Mapping[str, Mapping[str, float]], columns: Sequence[str], description: str) -> str:
    """A table of shares from 0 to 1, row by row, darker where greater."""
    from matplotlib.patches import Rectangle

    with drawing(name):
        figure = new_figure(0.7 + 0.27 * len(values))
        axes = figure.add_subplot()
        for y, row in enumerate(values.values()):
            for x, column in enumerate(columns):
                if (share := row.get(column)) is not None:
                    box = Rectangle((x - 0.5, y - 0.5), 1, 1, color=COLOURS["ours"], linewidth=0, alpha=0.75 * share)
                    axes.add_patch(box)
                    axes.text(x, y, f"{share:.2f}", ha="center", va="center", color=COLOURS["ink"])
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_yticks(range(len(values)), [label(row, 24) for row in values], color=COLOURS["ink"])
        axes.set_xticks(range(len(columns)), [label(c, 14) for c in columns], color=COLOURS["ink"], rotation=20)
        axes.xaxis.tick_top()
        for spine in axes.spines.values():
            spine.set_visible(False)
        return to_svg(figure, name, description)


def arm_inks(arms: Iterable[str]) -> dict[str, str]:
    """Name of each arm's colour; what the comparison is about is its first method."""
    first = next((arm for arm in arms if arm not in ("warm", *_OWN)), "")
    return {arm: arm if arm in _OWN else "ours" if arm == first else "other" for arm in arms}
