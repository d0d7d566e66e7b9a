"""At which proxy does a learned score see what n-grams do not? Loss minus DSIR's against the loss of the proxy.

Reads cells that ``choosing.py`` has left for one pool, in which the variants ``excess SIZE`` are fits by proxies of
several sizes and ``dsir`` is beside them. The proxy's loss is its loss, before the reference is trained, on the upper
data that are held out of that training. Also printed: of a pool with damaged documents (``pools.py``) the share of
them that is kept, and the overlap (Jaccard) of the best fifth with that of the largest proxy.

    python benchmarks/crossing.py CELLS [CELLS ...] --out crossing.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from choosing import paired

from bilect.report.svg import COLOURS, drawing, new_figure, to_svg

METHOD = "excess "
INKS = ("ours", "worse", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, nargs="+", metavar="CELLS")
    parser.add_argument("--out", type=Path, help="figure")
    args = parser.parse_args()
    pools = {folder.name.removeprefix("cells-"): points(folder) for folder in args.cells}
    for pool, sizes in pools.items():
        print(f"\n{pool:8s} {'proxy':>6s}  n  its loss        minus dsir  damaged kept  overlap  TFLOP")
        for size, row in sorted(sizes.items(), key=lambda item: -np.mean(item[1]["proxy"])):
            n, (difference, half) = len(row["proxy"]), row["difference"]
            proxy, kept, overlap, flops = (np.mean(row[k]) for k in ("proxy", "damaged", "overlap", "flops"))
            columns = f"{size:>6s} {n:2d} {proxy:9.3f}  {difference:+7.3f} ± {half:6.3f}"
            print(f"{'':8s} {columns} {kept:13.3f} {overlap:8.2f} {flops:6.1f}")
    if args.out is not None:
        args.out.write_text(figure(pools), encoding="utf-8")
    print(json.dumps(pools))


def points(folder: Path) -> dict[str, dict[str, Any]]:
    """Of every size: losses of the proxy, differences from DSIR, shares damaged, by seed, and the paired difference."""
    found: dict[str, dict[str, Any]] = {}
    variants = sorted(folder.glob(f"*/{METHOD}*"), key=lambda v: -size_of(v.name))
    best = {s: best_fifth(variants[0], s) for s in cells(variants[0])} if variants else {}  # of the largest proxy
    for variant in variants:
        heldout = {"math": "math", "lambada": "lambada"}[variant.parent.name]
        own, base = cells(variant), cells(variant.parent / "dsir")
        seeds = sorted(set(own) & set(base))
        if not seeds:
            continue
        loss = [{s: c[s]["losses"][heldout] for s in seeds} for c in (own, base)]
        found[variant.name.removeprefix(METHOD)] = {
            "proxy": [own[s]["held_out_loss_before"] for s in seeds],
            "by_seed": [loss[0][s] - loss[1][s] for s in seeds],
            "difference": paired(*loss),
            "damaged": [damaged(own[s]["sources"]) for s in seeds],
            "overlap": [jaccard(best[s], best_fifth(variant, s)) for s in seeds if s in best],
            "flops": [own[s]["flops"] / 1e12 for s in seeds],
        }
    return found


def cells(folder: Path) -> dict[int, dict[str, Any]]:
    return {int(f.stem[5:]): json.loads(f.read_text(encoding="utf-8")) for f in folder.glob("seed-*.json")}


def size_of(name: str) -> float:
    """Parameters, of a name that ends like 300k or 3m."""
    return float(name.removeprefix(METHOD)[:-1]) * {"k": 1e3, "m": 1e6}[name[-1]]


def best_fifth(variant: Path, seed: int) -> set[int]:
    scores = np.load(variant / f"seed-{seed}.npy")
    return set(np.argsort(-scores, kind="stable")[: len(scores) // 5].tolist())


def jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b)


def damaged(sources: dict[str, int]) -> float:
    return sum(n for name, n in sources.items() if "/" in name) / sum(sources.values())


def figure(pools: dict[str, dict[str, dict[str, Any]]]) -> str:
    with drawing("crossing"):
        figure = new_figure(3.2)
        axes = figure.subplots()
        axes.axhline(0, color=COLOURS["muted"], linewidth=0.8)
        for ink, (pool, sizes) in zip(INKS, pools.items(), strict=False):
            rows = sorted(sizes.items(), key=lambda item: -np.mean(item[1]["proxy"]))
            axes.plot([np.mean(r["proxy"]) for _, r in rows], [r["difference"][0] for _, r in rows], "-o", markersize=4,
                      color=COLOURS[ink], label=pool)  # fmt: skip
            for size, row in rows:
                axes.plot(row["proxy"], row["by_seed"], ".", color=COLOURS[ink], alpha=0.5, markersize=3)
                axes.annotate(size, (np.mean(row["proxy"]), row["difference"][0]), xytext=(0, 5), fontsize=7,
                              textcoords="offset points", ha="center", color=COLOURS[ink])  # fmt: skip
        axes.invert_xaxis()
        axes.set_xlabel("loss of the warm proxy on the target (better to the right)")
        axes.set_ylabel("held-out loss minus DSIR's")
        axes.set_title("What a proxy of each size gains over n-grams")
        axes.legend()
        drawn = to_svg(figure, "crossing", "Loss minus DSIR's against the loss of the proxy, by pool and proxy size")
    return drawn.file


if __name__ == "__main__":
    main()
