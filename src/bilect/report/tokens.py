"""Online token selection in pictures: figures, selected share by source, and texts with the chosen tokens marked.

Everywhere `runs` is {name: content of an online.json}; `bilevel.online.diagnostics` describes its entries. The name,
if it is an arm's, or else the run's method sets the colour. Delta_n = l_n(u) - l_n(w), in nats: the loss of a token
under the model in training minus its loss under the reference. Figures: BLADE, arXiv 2606.18650, figures 2 to 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from bilect.report.curves import thin
from bilect.report.inputs import Json, mapping, number, objects
from bilect.report.scores import FloatArray
from bilect.report.svg import COLOURS, Svg, drawing, label, new_figure, to_svg
from bilect.report.wording import DASH, LONG_ARMS, decimal, percent, signed, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Mapping[str, object]
Panels = Mapping[str, Sequence[tuple[str, ...]]]  # title: paths of the figures drawn in it

BANDS = (("0.01", "0.99", 0.14), ("0.05", "0.95", 0.2), ("0.25", "0.75", 0.34))  # quantiles of Delta, opacity
QUANTILES = ("0.5", *(q for low, high, _ in BANDS for q in (low, high)))
STYLES = ("-", "--", ":", "-.")  # of runs that share a colour: the seeds of one method
FEW = 30  # entries up to which each gets a dot
LEVELS = 5  # strengths of a token's background, either way from zero
VIEWS = 4  # entries whose documents are shown
MAX_SOURCES, MAX_DOCUMENTS, MAX_TOKENS, MAX_CHARACTERS = 24, 2, 512, 200
HUGE = 1e100  # no loss or distance; matplotlib's arithmetic overflows not far above


@dataclass(frozen=True)
class _Run:
    """One run as it is drawn; its E entries are in the order of their steps."""

    title: str
    colour: str
    style: str
    step_E: FloatArray
    entries: list[Json]

    def column(self, *path: str) -> FloatArray:
        """The figure at `path` in every entry, (E,); NaN where it is not recorded."""
        return np.array([_value_at(entry, path) for entry in self.entries], dtype=np.float64)


def _value_at(entry: Json, path: Sequence[str]) -> float:
    *folders, key = path
    for folder in folders:
        entry = mapping(entry.get(folder))
    return math.nan if (value := _plain(entry.get(key))) is None else value


def _plain(value: object) -> float | None:
    plain = number(value)
    return None if plain is None or abs(plain) > HUGE else plain


def _read(runs: Runs) -> list[_Run]:
    read: list[_Run] = []
    for name, content in runs.items():
        key = next((k for k in (name, method(content)) if k in LONG_ARMS), "")
        colour = COLOURS.get(key, COLOURS["ours"])
        style = STYLES[sum(run.colour == colour for run in read) % len(STYLES)]
        entries = _entries(content)
        step_E = np.array([step for step, _ in entries], dtype=np.float64)
        read.append(_Run(LONG_ARMS.get(name) or label(name, 24), colour, style, step_E, [e for _, e in entries]))
    return read


def _entries(content: object) -> list[tuple[float, Json]]:
    """(step, entry) in the order of the steps; the position stands in for a step that is missing.

    Random selection records as Delta the random numbers that it chose by; they mean nothing and are left out.
    """
    found = []
    for i, entry in enumerate(objects(mapping(content).get("entries"))):
        if method(content) == "random-token":
            documents = [{**document, "delta": []} for document in objects(entry.get("documents"))]
            entry = {**entry, "delta": {}, "share_positive": None, "documents": documents}
        step = _value_at(entry, ("step",))
        found.append((float(i) if math.isnan(step) else step, entry))
    return sorted(found, key=lambda pair: pair[0])


def method(content: object) -> str:
    """The run's method by its name in the configuration; empty where none is recorded."""
    stated = mapping(content).get("method")
    return label(stated) if isinstance(stated, str) else ""


def delta_figure(runs: Runs) -> Svg | None:
    """Per run the quantiles of Delta over training steps, and the share of tokens with Delta > 0 (paper, figure 2).

    Bands 1-99%, 5-95% and 25-75%, a line for the median; None where no run has either figure.
    """
    read = _read(runs)
    banded = [run for run in read if any(np.isfinite(run.column("delta", q)).any() for q in QUANTILES)]
    shared = [run for run in read if np.isfinite(run.column("share_positive")).any()]
    cells = len(banded) + bool(shared)
    if not cells:
        return None
    with drawing("delta"):
        columns = min(cells, 2 if cells in (2, 4) else 3)
        lines = -(-cells // columns)
        figure = new_figure(2.15 * lines + 0.3)
        first: Axes | None = None
        for i, run in enumerate(banded):
            axes = figure.add_subplot(lines, columns, i + 1, sharex=first, sharey=first)
            first = first or axes
            for low, high, alpha in BANDS:
                bottom, top = run.column("delta", low), run.column("delta", high)
                there = np.isfinite(bottom) & np.isfinite(top)
                x, bottom = thin(run.step_E[there], bottom[there])
                _, top = thin(run.step_E[there], top[there])
                axes.fill_between(x, bottom, top, color=run.colour, alpha=alpha, linewidth=0)
            _line(axes, run, run.column("delta", "0.5"))
            axes.axhline(0, color=COLOURS["muted"], linewidth=0.8)
            _frame(axes, run.title, "Δ, nats" if i % columns == 0 else "")
        if shared:
            axes = figure.add_subplot(lines, columns, cells, sharex=first)
            for run in shared:
                _line(axes, run, run.column("share_positive"))
            _frame(axes, "Tokens with Δ > 0", "")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            axes.set_ylim(bottom=0)
        _legend(figure, shared)
        medians = _told(banded, ("delta", "0.5"), lambda value: signed(value, 3))
        shares = _told(shared, ("share_positive",), percent)
        text = f"Quantiles of Delta over training steps. Median: {medians}. Share of tokens above 0: {shares}."
        return to_svg(figure, "delta", text)


def distance_figure(runs: Runs) -> Svg | None:
    """||u - w||, to the reference, and ||u - u_last_sync|| over training steps (paper, figure 3)."""
    panels: Panels = {
        "To the reference, ‖u − w‖": [("distance_reference",)],
        "To the last synchronisation": [("distance_last_sync",)],
    }
    return _curves(runs, "distance", "Distance of the model over training steps", panels)


def choice_figure(runs: Runs) -> Svg | None:
    """Agreement of consecutive selections of one batch, |A and B| / |A or B|, and an oracle's loss (paper, figure 4).

    The oracle's mean loss is drawn where it was recorded: strong on the selected tokens, faint on all of them.
    """
    panels: Panels = {
        "Agreement with the selection before": [("agreement",)],
        "Loss of the oracle, nats": [("oracle_loss", "selected"), ("oracle_loss", "all")],
    }
    return _curves(runs, "choice", "The selections over training steps", panels)


def _curves(runs: Runs, name: str, about: str, panels: Panels) -> Svg | None:
    """A panel for each of `panels` of which a run has a figure; the second path of a panel is drawn faint."""
    read = _read(runs)
    has = {path: [r for r in read if np.isfinite(r.column(*path)).any()] for paths in panels.values() for path in paths}
    there = {title: paths for title, paths in panels.items() if any(has[path] for path in paths)}
    if not there:
        return None
    with drawing(name):
        figure = new_figure(2.5)
        text = about
        for i, (title, paths) in enumerate(there.items()):
            axes = figure.add_subplot(1, len(there), i + 1)
            for path, alpha in zip(paths, (1.0, 0.4), strict=False):
                for run in has[path]:
                    _line(axes, run, run.column(*path), alpha)
                if has[path]:
                    text += f". {' '.join(path).replace('_', ' ')}: {_told(has[path], path, lambda v: decimal(v, 3))}"
            _frame(axes, title, "")
        _legend(figure, [run for run in read if any(run in found for found in has.values())])
        return to_svg(figure, name, f"{text}.")


def _line(axes: Axes, run: _Run, value_E: FloatArray, alpha: float = 1.0) -> None:
    there = np.isfinite(value_E)
    x, y = thin(run.step_E[there], value_E[there])
    dot = "o" if len(x) <= FEW else ""
    axes.plot(x, y, color=run.colour, linestyle=run.style, linewidth=1.4, alpha=alpha, marker=dot, markersize=2.6)


def _frame(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("training step")
    axes.set_ylabel(unit)
    axes.locator_params(axis="x", nbins=4, integer=True)
    axes.locator_params(axis="y", nbins=5)
    axes.grid(axis="y")


def _legend(figure: Figure, runs: Sequence[_Run]) -> None:
    from matplotlib.lines import Line2D

    if len(runs) > 1:
        handles = [Line2D([], [], color=run.colour, linestyle=run.style, label=run.title) for run in runs]
        figure.legend(handles=handles, loc="outside upper right", ncols=min(len(runs), 4), handlelength=1.8)


def _told(runs: Iterable[_Run], path: Sequence[str], written: Callable[[object], str]) -> str:
    """First and last figure of each run, in words."""
    told = []
    for run in runs:
        value_E = run.column(*path)
        there = np.flatnonzero(np.isfinite(value_E))
        if len(there):
            ends = [f"{written(float(value_E[i]))} at step {run.step_E[i]:.0f}" for i in (there[0], there[-1])]
            told.append(f"{run.title} {' to '.join(dict.fromkeys(ends))}")
    return label("; ".join(told), 600) or "not recorded"


def settings(runs: Runs) -> list[Json]:
    """What each run chose by, as the file states it, the mean share it kept, and how many entries there are."""
    rows = []
    for name, content in runs.items():
        stated, entries = mapping(content), _entries(content)
        kept = [value for _, entry in entries if not math.isnan(value := _value_at(entry, ("kept",)))]
        keys = ("keep_ratio", "sync_every", "reference_steps", "synchronisations")
        rows.append(
            {
                "arm": name,
                "method": LONG_ARMS.get(method(content)) or method(content) or DASH,
                **{key: number(stated.get(key)) for key in keys},
                "kept": sum(kept) / len(kept) if kept else None,
                "entries": len(entries),
            }
        )
    return rows


def records(runs: Runs) -> tuple[list[str], list[list[Any]]]:
    """Everything that the figures draw, as a table: header and rows, one per run and entry."""
    paths = [("kept",), *(("delta", q) for q in QUANTILES), ("share_positive",), ("distance_reference",),
             ("distance_last_sync",), ("agreement",), ("oracle_loss", "selected"), ("oracle_loss", "all")]  # fmt: skip
    rows = []
    for name, content in runs.items():
        for step, entry in _entries(content):
            values = [_value_at(entry, path) for path in paths]
            rows.append([name, step, *(None if math.isnan(value) else value for value in values)])
    return ["arm", "step", *(" ".join(path) for path in paths)], rows


def source_rows(runs: Runs) -> list[Json]:
    """Selected share of each source's tokens by run: in the last entry, and over all entries, weighted by tokens.

    The MAX_SOURCES sources with the most tokens, runs of a source one after another.
    """
    rows: dict[str, list[Json]] = {}
    tokens_of: dict[str, float] = {}
    for name, content in runs.items():
        seen: dict[str, list[tuple[float, float]]] = {}
        last: dict[str, float] = {}
        for _, entry in _entries(content):
            last = {}
            for source, found in mapping(entry.get("sources")).items():
                count, kept = (_plain(mapping(found).get(key)) for key in ("tokens", "kept"))
                if count is not None and count > 0 and kept is not None:
                    seen.setdefault(source, []).append((count, kept))
                    last[source] = kept
        for source, pairs in seen.items():
            tokens = math.fsum(n for n, _ in pairs)
            mean = math.fsum(n / tokens * kept for n, kept in pairs)
            row = {"source": source, "arm": name, "tokens": tokens, "mean": mean, "last": last.get(source)}
            rows.setdefault(source, []).append(row)
            tokens_of[source] = tokens_of.get(source, 0) + tokens
    shown = sorted(rows, key=lambda source: (-tokens_of[source], source))[:MAX_SOURCES]
    return [row for source in shown for row in rows[source]]


def token_views(runs: Runs) -> list[Json]:
    """Per run the documents of up to VIEWS entries, from the first to the last that has any, cut into pieces.

    A piece has its text, whether it was chosen, its Delta (None where there is none) and a level from -LEVELS to
    LEVELS: Delta in proportion to the 95th percentile of the |Delta| shown here of the run, away from zero; 0 without
    one.
    """
    views = []
    for name, content in runs.items():
        entries = [(step, documents) for step, entry in _entries(content) if (documents := _documents(entry))]
        if not entries:
            continue
        places = np.unique(np.linspace(0, len(entries) - 1, min(VIEWS, len(entries))).round().astype(int))
        shown = [entries[i] for i in places]
        pieces = [piece for _, documents in shown for document in documents for piece in document["pieces"]]
        sizes = [abs(piece["delta"]) for piece in pieces if piece["delta"]]
        scale = float(np.quantile(sizes, 0.95)) if sizes else 1.0
        for piece in pieces:
            size = math.ceil(LEVELS * min(abs(piece["delta"] or 0.0) / scale, 1.0))
            piece["level"] = -size if (piece["delta"] or 0.0) < 0 else size
        views.append({"arm": name, "entries": [{"step": step, "documents": documents} for step, documents in shown]})
    return views


def _documents(entry: Json) -> list[Json]:
    found = []
    for document in objects(entry.get("documents"))[:MAX_DOCUMENTS]:
        text, delta, mask = (value if isinstance(value := document.get(k), list) else [] for k in _COLUMNS)
        pieces = [
            {"text": visible(piece[:MAX_CHARACTERS]), "delta": _plain(d), "chosen": m is True}
            for piece, d, m in zip_longest(text, delta[: len(text)], mask[: len(text)])
            if isinstance(piece, str)
        ]
        if pieces:
            found.append({"pieces": pieces[:MAX_TOKENS], "cut": max(len(pieces) - MAX_TOKENS, 0)})
    return found


_COLUMNS = ("text", "delta", "mask")
