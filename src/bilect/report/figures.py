"""The figures of the report. Each takes plain numbers and returns one inline SVG; none touches pyplot or a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bilect.report.scores import FloatArray, ScoreSummary
from bilect.report.svg import COLOURS, drawing, label, new_figure, to_svg
from bilect.report.wording import power, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_SETS = 12
LONG_ARMS = {
    "warm": "warm start",
    "bliss": "bilect (BLISS)",
    "blade": "BLADE tokens",
    "rho1": "RHO-1",
    "random-token": "random tokens",
    "random": "random",
    "full": "full pool",
}


def arms_figure(losses: Mapping[str, float], by_set: Mapping[str, float]) -> str:
    """Each arm's held-out loss as a bar from random's (or the highest); beside it bilect minus random on each set."""
    with drawing("arms"):
        rows = max(len(losses), min(len(by_set), MAX_SETS))
        figure = new_figure(0.95 + 0.34 * rows)
        grid = figure.add_gridspec(1, 2 if by_set else 1, width_ratios=[1.25, 1] if by_set else [1])
        _loss_bars(figure.add_subplot(grid[0]), losses, rows)
        text = "; ".join(f"{LONG_ARMS.get(arm, arm)} {loss:.4f}" for arm, loss in sorted(losses.items(), key=_value))
        if by_set:
            _difference_bars(figure.add_subplot(grid[1]), by_set, rows)
            text += ". bilect minus random: " + "; ".join(f"{name} {signed(d)}" for name, d in by_set.items())
        return to_svg(figure, "arms", f"Bars of held-out loss, lowest first: {label(text, 600)}.")


def _loss_bars(axes: Axes, losses: Mapping[str, float], rows: int) -> None:
    low, high = min(losses.values()), max(losses.values())
    anchor = losses.get("random", high)
    span = max(high - low, 1e-3)
    for y, (arm, loss) in enumerate(sorted(losses.items(), key=_value)):
        colour = COLOURS.get(arm, COLOURS["ours"])
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


def _difference_bars(axes: Axes, by_set: Mapping[str, float], rows: int) -> None:
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
    axes.set_title("bilect minus random, by set")


def _value(pair: tuple[str, float]) -> tuple[float, str]:
    return pair[1], pair[0]


def shares_figure(pool: Mapping[str, float], kept: Mapping[str, float]) -> str:
    """Per source, its share of the pool beside its share of what was kept."""
    with drawing("shares"):
        names = sorted({*pool, *kept}, key=lambda s: (-kept.get(s, 0.0), -pool.get(s, 0.0), s))[:24]
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


def scores_figure(scores: ScoreSummary, threshold: float | None, name: str) -> str:
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


def cost_figure(seconds: Mapping[str, float], flops: Mapping[str, float]) -> str:
    """Time and arithmetic per stage, side by side, stages in the order given."""
    with drawing("cost"):
        stages = list(dict.fromkeys([*seconds, *flops]))[:24]
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
