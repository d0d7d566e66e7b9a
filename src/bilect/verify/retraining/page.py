"""The page of plots, ``retrain.html``: one file that loads nothing, in the style of the report."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bilect.report.page import render_template
from bilect.report.svg import COLOURS, drawing, new_figure, to_svg
from bilect.report.wording import power

__all__ = ["interval", "render", "short"]

Rows = Sequence[Mapping[str, Any]]


def render(result: Mapping[str, Any]) -> str:
    """HTML of a ``retrain.json``."""
    rows = [r for r in result["methods"] if r["quality"]["heldout"]["value"] is not None]
    return render_template(
        "verify/retraining/template.html.j2",
        {"short": short, "interval": interval, "digits": lambda value: f"{value:.3g}", "power": power},
        result=result,
        mean_loss=float(np.mean([s["heldout"] for s in result["subsets"]])),
        plots={"quality": _quality(result, rows), "cost": _cost(rows), "sums": _sums(result, rows)},
    )


def short(value: float | None) -> str:
    """Two decimals, without a minus before zero."""
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}"


def interval(estimate: Mapping[str, Any]) -> str:
    """A correlation and its interval."""
    if estimate["value"] is None:
        return "–"
    return f"{short(estimate['value'])} [{short(estimate['low'])}, {short(estimate['high'])}]"


def _quality(result: Mapping[str, Any], rows: Rows) -> str:
    """Correlation with interval per method, held-out above upper, the chance band and the ceiling."""
    chance, ceiling = result["random"]["quality"]["heldout"], result["noise"]["heldout"]["ceiling"]
    with drawing("quality"):
        figure = new_figure(1.1 + 0.36 * max(len(rows), 1))
        axes = figure.add_subplot(xlabel="Spearman with minus the loss after retraining, 95% interval")
        if chance["value"] is not None:
            axes.axvspan(chance["low"], chance["high"], color=COLOURS["rule"], zorder=0, label="random scores, 95%")
        shown = (("heldout", "held-out data", "ours", -0.14), ("upper", "upper data", "warm", 0.14))
        for key, name, ink, shift in shown:
            for y, row in enumerate(rows):
                at = row["quality"][key]
                if at["value"] is not None:
                    axes.plot([at["low"], at["high"]], [y + shift] * 2, color=COLOURS[ink], linewidth=1.4)
                    label = name if y == 0 else None
                    axes.plot(at["value"], y + shift, "o", color=COLOURS[ink], markersize=4.5, label=label)
        axes.axvline(0, color=COLOURS["muted"], linewidth=0.8)
        if ceiling is not None:
            axes.axvline(ceiling, color=COLOURS["ink"], linewidth=0.9, linestyle="--", label="ceiling (held-out)")
        axes.set_yticks(range(len(rows)), [r["name"] for r in rows])
        axes.invert_yaxis()
        axes.grid(axis="x")
        figure.legend(loc="outside lower center", ncols=4)
        text = "; ".join(f"{r['name']} {interval(r['quality']['heldout'])}" for r in rows)
        return to_svg(figure, "quality", f"Rank correlation with held-out loss per method: {text}.")


def _cost(rows: Rows) -> str:
    """FLOPs of fit and scoring against quality; what costs none stands at the left edge."""
    from matplotlib.ticker import NullLocator

    least = min((r["flops"] for r in rows if r["flops"]), default=1.0) / 4
    with drawing("cost"):
        figure = new_figure(3.4)
        axes = figure.add_subplot(xlabel="FLOPs of fit and scoring (left edge: none)", ylabel="Spearman, held-out")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: power(value).partition("× ")[2])
        axes.xaxis.set_minor_locator(NullLocator())
        for row in rows:
            x, y = row["flops"] or least, row["quality"]["heldout"]["value"]
            ours = row["name"].startswith("bliss")
            axes.plot(x, y, "o", color=COLOURS["ours" if ours else "random"], markersize=5)
            axes.annotate(row["name"], (x, y), xytext=(6, 3), textcoords="offset points", fontsize=7.5)
        axes.axhline(0, color=COLOURS["muted"], linewidth=0.8, zorder=0)
        axes.margins(x=0.12)
        axes.grid(axis="y")
        return to_svg(figure, "cost", "FLOPs of fit and scoring of each method against its rank correlation.")


def _sums(result: Mapping[str, Any], rows: Rows) -> str:
    """Sum of scores against held-out loss, a point per half: the best method, and the best of BLISS."""
    shown = list({r["name"]: r for r in (*rows[:1], *[r for r in rows if r["name"].startswith("bliss")][:1])}.values())
    loss_J = [s["heldout"] for s in result["subsets"]]
    with drawing("sums"):
        figure = new_figure(2.9)
        for i, row in enumerate(shown):
            score_N = np.array(row["scores"][0])
            sums_J = [float(score_N[s["members"]].sum()) for s in result["subsets"]]
            axes = figure.add_subplot(1, len(shown), i + 1, title=row["name"], xlabel="sum of the scores of a half")
            if i == 0:
                axes.set_ylabel("held-out loss after retraining")
            axes.plot(sums_J, loss_J, "o", color=COLOURS["ours"], markersize=3.5)
            axes.locator_params(axis="x", nbins=5)
            axes.grid()
        return to_svg(
            figure, "sums", "Sum of scores of the first seed against held-out loss, one point per retrained half."
        )
