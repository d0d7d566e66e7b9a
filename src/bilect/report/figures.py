"""The figures of the report. Each takes plain numbers and returns one inline SVG; none touches pyplot or a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bilect.report.choice import LengthBin, Selection
from bilect.report.scores import FloatArray, ScoreSummary
from bilect.report.svg import COLOURS, Svg, drawing, label, new_figure, to_svg
from bilect.report.wording import LONG_ARMS, OWN, power, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_SETS = 12
MAX_SHARES = 24


def arms_figure(losses: Mapping[str, float], by_set: Mapping[str, float], main: str = "bliss") -> Svg:
    """Each arm's held-out loss as a bar from random's (or the highest); beside it main minus random on each set."""
    subject = "bilect" if main in OWN else label(main, 22)
    with drawing("arms"):
        rows = max(len(losses), min(len(by_set), MAX_SETS))
        figure = new_figure(0.95 + 0.34 * rows)
        grid = figure.add_gridspec(1, 2 if by_set else 1, width_ratios=[1.25, 1] if by_set else [1])
        _loss_bars(figure.add_subplot(grid[0]), losses, rows, main)
        text = "; ".join(
            f"{LONG_ARMS.get(arm) or label(arm, 40)} {loss:.4f}" for arm, loss in sorted(losses.items(), key=_value)
        )
        if by_set:
            _difference_bars(figure.add_subplot(grid[1]), by_set, rows, subject)
            text += f". {subject} minus random: " + "; ".join(f"{name} {signed(d)}" for name, d in by_set.items())
        return to_svg(figure, "arms", f"Bars of held-out loss, lowest first: {label(text, 600)}.")


def _loss_bars(axes: Axes, losses: Mapping[str, float], rows: int, main: str) -> None:
    low, high = min(losses.values()), max(losses.values())
    anchor = losses.get("random", high)
    span = max(high - low, 1e-3)
    for y, (arm, loss) in enumerate(sorted(losses.items(), key=_value)):
        colour = COLOURS[arm_ink(arm, main)]
        axes.barh(y, loss - anchor, left=anchor, height=0.46, color=colour)
        if loss == anchor:
            axes.plot([loss], [y], "o", color=colour, markersize=6)
        _note(axes, f"{loss:.4f}", (loss, y), COLOURS["ink"], left=loss < anchor, gap=8)
    axes.axvline(anchor, color=COLOURS["muted"], linewidth=0.8, zorder=0)
    _rows(axes, [LONG_ARMS.get(arm, label(arm, 22)) for arm, _ in sorted(losses.items(), key=_value)], rows)
    axes.set_xlim(low - 0.32 * span, high + 0.28 * span)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("held-out loss, nats per token (left is better)")
    axes.set_title("Held-out loss, as bars from random" if "random" in losses else "Held-out loss")


def _difference_bars(axes: Axes, by_set: Mapping[str, float], rows: int, subject: str) -> None:
    shown = dict(sorted(by_set.items(), key=_value)[:MAX_SETS])
    differences = list(shown.values())
    reach = 1.75 * max(*(abs(d) for d in differences), 1e-6)
    for y, d in enumerate(differences):
        axes.barh(y, d, height=0.46, color=COLOURS["ours" if d < 0 else "worse"])
        _note(axes, signed(d), (d, y), COLOURS["ink"], left=d < 0)
    axes.axvline(0, color=COLOURS["muted"], linewidth=0.8)
    _rows(axes, [label(name, 20) for name in shown], rows)
    axes.set_xlim(-reach if differences[0] < 0 else -0.1 * reach, reach if differences[-1] > 0 else 0.1 * reach)
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel("loss difference (negative is better)")
    axes.set_title(f"{subject} minus random, by set")


def arm_ink(arm: str, main: str) -> str:
    """Name of the colour that an arm has everywhere on the page."""
    return "ours" if arm == main else arm if arm in COLOURS else "other"


def _value(pair: tuple[str, float]) -> tuple[float, str]:
    return pair[1], pair[0]


def shares_figure(pool: Mapping[str, float], kept: Mapping[str, float]) -> Svg:
    """Per source, its share of the pool beside its share of what was kept."""
    with drawing("shares"):
        names = sorted({*pool, *kept}, key=lambda s: (-kept.get(s, 0.0), -pool.get(s, 0.0), s))[:MAX_SHARES]
        figure = new_figure(0.95 + 0.46 * len(names))
        axes = figure.add_subplot()
        for y, source in enumerate(names):
            for share, offset, colour in ((pool.get(source), -0.19, "pool"), (kept.get(source), 0.19, "ours")):
                if share is None:
                    continue
                axes.barh(y + offset, share, height=0.34, color=COLOURS[colour])
                _note(axes, f"{share:.1%}", (share, y + offset), COLOURS["ink" if colour == "ours" else "muted"])
        _rows(axes, [label(source) for source in names])
        reach = max([*pool.values(), *kept.values(), 1e-9])
        axes.set_xlim(0, reach * 1.14)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if reach > 0.08 else f"{value:.1%}")
        _legend(figure, axes, [("share of the pool", "pool"), ("share of what was kept", "ours")])
        axes.set_xlabel("share of tokens")
        text = "; ".join(f"{s}: pool {pool.get(s, 0.0):.1%}, kept {kept.get(s, 0.0):.1%}" for s in names)
        return to_svg(figure, "shares", f"Paired bars of each source's share. {label(text, 600)}.")


def scores_figure(scores: ScoreSummary, threshold: float | None, name: str) -> Svg:
    """A ridge per source, ordered by median, with the kept part (above the threshold) filled in."""
    with drawing(name):
        sources = scores.sources
        low = min(s.quantile(0.002) for s in sources)
        high = max(s.quantile(0.998) for s in sources)
        pad = 0.04 * max(high - low, 1e-9)
        grid: FloatArray = np.linspace(low - pad, high + pad, 240)
        ridges = [s.density(grid) for s in sources]
        figure = new_figure(0.9 + 0.5 * len(sources))
        axes = figure.add_subplot()
        for y, (source, density) in enumerate(zip(sources, ridges, strict=True)):
            ridge = y + 0.34 - 1.12 * density / max(float(density.max()), 1e-12)
            base = np.full_like(grid, y + 0.34)
            axes.fill_between(grid, base, ridge, color=COLOURS["paper"], linewidth=0, zorder=2 * y + 1)
            if threshold is None:
                axes.fill_between(grid, base, ridge, color=COLOURS["ours"], alpha=0.55, linewidth=0, zorder=2 * y + 1)
            else:
                axes.fill_between(grid, base, ridge, color=COLOURS["pool"], alpha=0.6, linewidth=0, zorder=2 * y + 1)
                cut = np.unique(np.append(grid[grid > threshold], np.clip(threshold, grid[0], grid[-1])))
                top = np.interp(cut, grid, ridge)
                axes.fill_between(
                    cut,
                    np.full_like(cut, y + 0.34),
                    top,
                    color=COLOURS["ours"],
                    alpha=0.75,
                    linewidth=0,
                    zorder=2 * y + 1,
                )
            axes.plot(grid, ridge, color=COLOURS["ink"], linewidth=0.8, zorder=2 * y + 2)
            height = float(np.interp(source.median, grid, ridge))
            axes.plot([source.median] * 2, [y + 0.34, height], color=COLOURS["ink"], linewidth=1.1, zorder=2 * y + 2)
        if threshold is not None and grid[0] <= threshold <= grid[-1]:
            axes.axvline(
                threshold, color=COLOURS["worse"], linewidth=1, linestyle=(0, (4, 3)), zorder=2 * len(sources) + 1
            )
        _rows(axes, [f"{label(s.name, 26)}\n{s.documents:,} documents" for s in sources])
        axes.set_ylim(len(sources) - 0.5, -0.92)
        axes.set_xlim(grid[0], grid[-1])
        items = [("kept", "ours"), ("left out", "pool")] if threshold is not None else []
        _legend(figure, axes, items)
        axes.set_xlabel("score (higher means keep); the tick inside each ridge is the median")
        text = "; ".join(f"{s.name} {s.median:.3g}" for s in sources)
        return to_svg(figure, name, f"Score distribution per source, by median, highest first: {label(text, 600)}.")


def histogram_figure(found: Selection) -> Svg:
    """All scores in bins of equal width: kept below, left out on top, and the lowest score kept as a line."""
    with drawing("histogram"):
        figure = new_figure(2.5)
        axes = figure.add_subplot(xlabel="score (higher means keep)", ylabel="documents")
        left = [low for low, *_ in found.histogram]
        width = [high - low for low, high, *_ in found.histogram]
        kept = [k for *_, k, _ in found.histogram]
        axes.bar(left, kept, width, align="edge", color=COLOURS["ours"])
        axes.bar(left, [d for *_, d in found.histogram], width, bottom=kept, align="edge", color=COLOURS["pool"])
        if found.threshold is not None:
            axes.axvline(found.threshold, color=COLOURS["worse"], linewidth=1, linestyle=(0, (4, 3)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.grid(axis="y")
        _legend(figure, axes, [("kept", "ours"), ("left out", "pool")])
        text = f"Histogram of the scores of {found.documents:,} documents, {found.kept:,} of them kept."
        return to_svg(figure, "histogram", text)


def length_figure(bins: Sequence[LengthBin]) -> Svg:
    """Quantiles of the scores, and the share kept, against the length of the documents."""
    with drawing("length"):
        figure = new_figure(2.5)
        x = [b.tokens for b in bins]
        axes = figure.add_subplot(1, 2, 1, title="Score", xlabel="tokens of the document")
        for low, high, alpha in ((0, 4, 0.16), (1, 3, 0.34)):
            bottom, top = [b.quantiles[low] for b in bins], [b.quantiles[high] for b in bins]
            axes.fill_between(x, bottom, top, color=COLOURS["ours"], alpha=alpha, linewidth=0)
        axes.plot(x, [b.quantiles[2] for b in bins], color=COLOURS["ours"], linewidth=1.5, marker="o", markersize=2.5)
        share = figure.add_subplot(1, 2, 2, title="Share of documents kept", xlabel="tokens of the document")
        share.plot(x, [b.kept / b.documents for b in bins], color=COLOURS["ours"], marker="o", markersize=2.5)
        share.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        share.set_ylim(bottom=0)
        for each in (axes, share):
            _log_x(each)
            each.grid(axis="y")
        text = "; ".join(f"about {b.tokens:.0f} tokens: median {b.quantiles[2]:.3g}, {b.kept / b.documents:.0%} kept"
                         for b in bins)  # fmt: skip
        return to_svg(figure, "length", f"Score and share kept against length. {label(text, 600)}.")


def bought_figure(arms: Mapping[str, tuple[float, float]], main: str) -> Svg:
    """What each arm gained over random against what choosing and training cost, in random's."""
    with drawing("bought"):
        figure = new_figure(2.7)
        axes = figure.add_subplot(
            xlabel="FLOPs of choosing and training, times random's", ylabel="held-out loss below random's"
        )
        for arm, (x, y) in arms.items():
            axes.plot([x], [y], "o", color=COLOURS[arm_ink(arm, main)], markersize=6)
        name_points(axes, {LONG_ARMS.get(arm) or label(arm, 22): at for arm, at in arms.items()})
        axes.axhline(0, color=COLOURS["muted"], linewidth=0.8)
        _log_x(axes)
        axes.margins(x=0.2, y=0.2)
        axes.grid(axis="y")
        text = "; ".join(
            f"{LONG_ARMS.get(a) or label(a, 40)} {signed(y)} at {x:.2f} times" for a, (x, y) in arms.items()
        )
        return to_svg(figure, "bought", f"Gain over random against FLOPs. {label(text, 600)}.")


def name_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names beside their points: above them, or below where the next higher point is so near that names would meet."""
    heights = [y for _, y in points.values()]
    near, before = 0.08 * (max(heights) - min(heights)), (np.nan, np.nan, False)
    for text, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        below = abs(np.log(x / before[0])) < 0.3 and before[1] - y < near and not before[2]
        axes.annotate(text, (x, y), (6, -11 if below else 4), textcoords="offset points", color=COLOURS["ink"])
        before = (x, y, below)


def _log_x(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter("")


def cost_figure(seconds: Mapping[str, float], flops: Mapping[str, float]) -> Svg:
    """Time and arithmetic per stage, side by side, stages in the order given."""
    with drawing("cost"):
        stages = list(dict.fromkeys([*seconds, *flops]))[:MAX_SHARES]
        figure = new_figure(0.8 + 0.3 * len(stages))
        for i, (title, unit, values) in enumerate((("Wall time", "s", seconds), ("Arithmetic", "FLOPs", flops))):
            axes = figure.add_subplot(1, 2, i + 1)
            top = max([*values.values(), 0.0])
            scale = 10.0 ** int(np.floor(np.log10(top))) if top >= 1e5 else 1.0
            prefix = power(scale).partition("× ")[2] + " " if scale > 1 else ""
            axes.set_title(f"{title} ({prefix}{unit})")
            widths = [values.get(stage, 0.0) / scale for stage in stages]
            axes.barh(range(len(stages)), widths, height=0.5, color=COLOURS["ours"])
            for y, (stage, width) in enumerate(zip(stages, widths, strict=True)):
                share = values.get(stage, 0.0) / max(sum(values.values()), 1e-12)
                text = f"{share:.1%}" if stage in values else "not recorded"
                _note(axes, text, (width, y), COLOURS["muted"])
            _rows(axes, [label(stage, 26) for stage in stages] if i == 0 else [""] * len(stages))
            axes.set_xlim(0, max(top / scale, 1e-12) * 1.24)
            axes.locator_params(axis="x", nbins=4)
        return to_svg(
            figure, "cost", f"Bars of wall time and FLOPs of {len(stages)} stages; the table has the numbers."
        )


def _note(axes: Axes, text: str, at: tuple[float, float], colour: str, left: bool = False, gap: int = 5) -> None:
    """Small text beside the point `at`, to its right unless `left`."""
    axes.annotate(
        text,
        at,
        (-gap if left else gap, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        color=colour,
    )


def _rows(axes: Axes, names: Sequence[str], room: int = 0) -> None:
    """One named row per bar, the first on top, in a frame with room for at least `room` of them."""
    axes.set_yticks(range(len(names)), names, color=COLOURS["ink"])
    axes.set_ylim(max(len(names), room) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _legend(figure: Figure, axes: Axes, items: Sequence[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    if items:
        handles = [Patch(color=COLOURS[colour], label=text) for text, colour in items]
        figure.legend(handles=handles, loc="outside upper right", ncols=len(items), handlelength=1, handleheight=1)
