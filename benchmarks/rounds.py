"""One round against several at equal tokens: losses, speed-ups and learning curves of finished runs.

RUN directories are named NAME-SEED. All of one seed start from the same warm models: make these once, copy the
directory for each name, and run each config on its copy. Controls are read from the runs that have them, and go by
their own names; the ``random`` of the same seed is what losses are compared with, ``--against`` another arm besides.

    bilect warmup benchmarks/rounds.yaml --out runs/warm-0 --set seed=0
    cp -r runs/warm-0 runs/four-0 && bilect run benchmarks/rounds.yaml --out runs/four-0 --yes --set rounds=4 ...
    python benchmarks/rounds.py runs/one-0 runs/four-0 runs/one-1 runs/four-1 --loss-on math --against one
"""

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

from bilect.compare.cells import Cell
from bilect.compare.collect import Arm, collect
from bilect.compare.comparison import mean_curve, spent_curve
from bilect.compare.page import interval
from bilect.compare.statistics import estimate, speedup
from bilect.config import load_config
from bilect.report.lines import Lines, lines_figure

Arms = dict[str, dict[int, Arm]]  # by name and seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--loss-on", required=True, help="held-out set")
    parser.add_argument(
        "--against", required=True, help="run or control that the losses are compared with, beside random"
    )
    parser.add_argument("--out", type=Path, help="figure of the learning curves")
    args = parser.parse_args()
    arms = read(args.runs)
    rows = table(arms, args.loss_on, args.against)
    others = [s for s in next(iter(arms["warm"].values())).heldout if s != args.loss_on]
    head = ["arm", "seeds", args.loss_on, "minus random", f"minus {args.against}", "speed-up in tokens", "in FLOPs"]
    print("|", " | ".join([*head, *others, "TFLOPs"]), "|")
    for name, row in sorted(rows.items(), key=lambda item: item[1]["loss"]["mean"]):
        seeds, loss = str(row["loss"]["n"]), f"{row['loss']['mean']:.3f}"
        cells = [name, seeds, loss, interval(row["minus_random"]), interval(row["minus"])]
        cells += ["-" if row[key]["mean"] is None else f"{row[key]['mean']:.2f}" for key in ("speedup", "in_flops")]
        print("|", " | ".join([*cells, *(f"{row['others'][s]:.3f}" for s in others), f"{row['tflops']:.1f}"]), "|")
    if args.out is not None:
        args.out.write_text(figure(arms, args.loss_on), encoding="utf-8")


def read(runs: list[Path]) -> Arms:
    """The arms of all runs; a run's own method goes by the run's name."""
    found: Arms = {}
    for folder in runs:
        name, _, seed = folder.name.rpartition("-")
        config = load_config(folder / "config.yaml")
        for arm, figures in collect(Cell(name, config, folder.resolve(), None)).items():
            found.setdefault(name if arm == config.method else arm, {}).setdefault(int(seed), figures)
    return found


def table(arms: Arms, loss_on: str, against: str) -> dict[str, Any]:
    rows = {}
    for name, own in arms.items():
        loss = {s: own[s].heldout[loss_on]["loss"] for s in sorted(own)}
        pairs = [(own[s], arms["random"][s]) for s in loss if s in arms["random"] and name != "warm"]
        rows[name] = {
            "loss": estimate(list(loss.values())),
            "minus_random": minus(loss, arms["random"] if name != "random" else {}, loss_on),
            "minus": minus(loss, arms[against] if name != against else {}, loss_on),
            "speedup": estimate([faster(arm, control, loss_on, "tokens") for arm, control in pairs]),
            "in_flops": estimate([faster(arm, control, loss_on, "flops_with_choosing") for arm, control in pairs]),
            "others": {k: fmean(own[s].heldout[k]["loss"] for s in loss) for k in next(iter(own.values())).heldout},
            "tflops": fmean(own[s].choosing.get("flops", 0) + own[s].training.get("flops", 0) for s in loss) / 1e12,
        }
    return rows


def minus(loss: dict[int, float], other: dict[int, Arm], loss_on: str) -> dict[str, Any]:
    return estimate([loss[s] - other[s].heldout[loss_on]["loss"] for s in loss if s in other])


def faster(arm: Arm, control: Arm, loss_on: str, key: str) -> float | None:
    """How many times less than random an arm spends to come down to random's final loss."""
    return speedup(*(spent_curve(a, key, loss_on) for a in (arm, control)))


def figure(arms: Arms, loss_on: str) -> str:
    curves = {name: mean_curve(list(own.values()), loss_on) for name, own in arms.items()}
    series = {name: [(p["tokens"] / 1e6, p["mean"]) for p in curve] for name, curve in curves.items() if curve}
    inks = {name: name for name in ("random", "full") if name in series}
    lines = Lines("Held-out loss while training", "million tokens", f"loss on {loss_on}", series, log_x=False,
                  zero=False, inks=inks)  # fmt: skip
    return lines_figure(
        "rounds", [lines], "Held-out loss of the undecayed models while they train, mean over seeds."
    ).file


if __name__ == "__main__":
    main()
