"""The ladder: how a choice of documents changes with the proxy that makes it, and what it is worth to each target.

Reads the runs of a comparison whose variants differ in ``models.proxy`` and ``models.target``. Prints, of every way
to choose, the loss less random's and less DSIR's for the same target, the overlap (Jaccard) of what it keeps with what
the largest proxy makes it keep for the smallest target, and what choosing costs; draws the first and the third.

    bilect compare benchmarks/ladder.yaml --out runs/ladder
    python benchmarks/ladder.py runs/ladder --loss-on math --out ladder.svg
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bilect.compare.cells import Cell
from bilect.compare.collect import Arm, collect
from bilect.compare.page import interval
from bilect.compare.statistics import estimate
from bilect.config import load_config
from bilect.methods import methods_of
from bilect.report.lines import Lines, lines_figure
from bilect.report.wording import markdown_table

Place = tuple[str, str, str]  # target, method, proxy; "" where a method uses none
Arms = Mapping[Place, Mapping[int, Arm]]  # by seed
BASELINES = ("random", "dsir")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="directory of a comparison")
    parser.add_argument("--loss-on", required=True, help="held-out set")
    parser.add_argument("--out", type=Path, help="figure")
    args = parser.parse_args()
    rows = table(read(args.comparison), args.loss_on)
    minus = [f"minus {name}" for name in BASELINES]
    head = ["target", "method", "proxy", "seeds", args.loss_on, *minus, "overlap", "TFLOPs of choosing"]
    lines = []
    for row in rows:
        cells = [row["target"], row["method"], row["proxy"] or "-", str(row["loss"]["n"]), f"{row['loss']['mean']:.3f}"]
        cells += [interval(row[name]) for name in minus]
        cells += ["-" if row["overlap"] is None else f"{row['overlap']:.2f}", f"{row['tflops']:.1f}"]
        lines.append(cells)
    print("\n".join(markdown_table(head, lines)))
    if args.out is not None:
        args.out.write_text(figure(rows, args.loss_on), encoding="utf-8")


def read(comparison: Path) -> Arms:
    """Arms that choose documents, of every run of a comparison."""
    found: dict[Place, dict[int, Arm]] = {}
    for folder in sorted(comparison.glob("*/seed-*")):
        config = load_config(folder / "config.yaml")
        methods = methods_of(config)
        for arm, figures in collect(Cell(folder.parent.name, config, folder.resolve(), None)).items():
            if figures.kept:
                proxy = str(config.models.proxy) if methods[arm].uses_proxy else ""
                found.setdefault((str(config.models.target), arm, proxy), {})[config.seed] = figures
    return found


def table(arms: Arms, loss_on: str) -> list[dict[str, Any]]:
    """A row for each place, by target, then method, then size of the proxy."""
    rows = []
    for place, own in sorted(arms.items(), key=lambda item: (size(item[0][0]), item[0][1], size(item[0][2]))):
        target, method, proxy = place
        row: dict[str, Any] = {"target": target, "method": method, "proxy": proxy, "overlap": overlap(arms, place)}
        row["loss"] = estimate([arm.heldout[loss_on]["loss"] for arm in own.values()])
        for name in BASELINES:
            other = arms.get((target, name, ""), {}) if name != method else {}
            pairs = [(arm, other[seed]) for seed, arm in own.items() if seed in other]
            row[f"minus {name}"] = estimate([a.heldout[loss_on]["loss"] - b.heldout[loss_on]["loss"] for a, b in pairs])
        row["tflops"] = fmean(arm.choosing["flops"] for arm in own.values()) / 1e12
        rows.append(row)
    return rows


def overlap(arms: Arms, place: Place) -> float | None:
    """Jaccard index with what the largest proxy keeps by the same method for the smallest target, mean over seeds."""
    _, method, proxy = place
    if not proxy:
        return None
    every = [other for other in arms if other[1] == method and other[2]]
    of = arms[min(every, key=lambda other: (-size(other[2]), size(other[0])))]
    pairs = [(arm.kept, of[seed].kept) for seed, arm in arms[place].items() if seed in of]
    return fmean(len(a & b) / len(a | b) for a, b in pairs) if pairs else None


def size(preset: str) -> float:
    """Parameters of the trunk by a preset's name, which ends like 300k or 3m; 0 of no model."""
    name = preset.rpartition("-")[2]
    return float(name[:-1]) * {"k": 1e3, "m": 1e6}[name[-1]] if name else 0.0


def figure(rows: Sequence[Mapping[str, Any]], loss_on: str) -> str:
    """Gain over random and overlap against the size of the proxy; a method that uses none is as good at every size."""

    def millions(preset: str) -> float:
        return size(preset) / 1e6

    sizes = sorted({millions(row["proxy"]) for row in rows if row["proxy"]})
    gains, overlaps = dict[str, list[tuple[float, float]]](), dict[str, list[tuple[float, float]]]()
    for row in rows:
        if row["method"] == "random":
            continue
        name, loss = f"{row['method']} for {row['target']}", row["minus random"]["mean"]
        places = [millions(row["proxy"])] if row["proxy"] else [sizes[0], sizes[-1]]
        gains.setdefault(name, []).extend((x, loss) for x in places)
        if row["overlap"] is not None:
            overlaps.setdefault(name, []).append((millions(row["proxy"]), row["overlap"]))
    x = "million parameters of the proxy"
    panels = [
        Lines("What the choice is worth", x, f"loss on {loss_on} less random's", gains),
        Lines("How the choice changes", x, "overlap with the largest proxy's choice", overlaps),
    ]
    return lines_figure("ladder", panels, "Loss less random's, and overlap of the choice, by size of the proxy.").file


if __name__ == "__main__":
    main()
