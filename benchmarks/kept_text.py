"""Why does one selection train a better model than another? The kept text itself, without any model.

For every arm of finished runs, mean over the runs: the loss after training on what it kept; how well the *bigrams* of
the kept tokens predict the held-out set that decides; how well those of its most frequent source alone do; how many
different texts there are (documents that pieces were cut from, bytes after compression over bytes before); and how far
scores only tell sources apart (share of the variance of their ranks that lies between sources).

    python benchmarks/kept_text.py runs/compare/base/seed-*
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import zstandard
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata

from bilect.config import load_config
from bilect.data.tokens import TokenStore
from bilect.pipeline.context import RunContext, arm_folder
from bilect.runtime.progress import SilentProgress
from bilect.selection.records import kept_ids

DISCOUNT = 0.75
COLUMNS = ("loss", "bigram_ce", "unigram_ce", "parents", "compressed", "between_sources")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories that differ in their seeds")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for root in args.runs:
        for arm, figures in of_run(root.resolve()).items():
            found[arm].append(figures)
    means = {arm: {c: float(np.mean([r[c] for r in rows])) for c in COLUMNS} for arm, rows in found.items()}
    table = Table(title=f"Kept text, mean over {len(args.runs)} runs")
    for name in ("arm", *COLUMNS):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for arm in sorted(means, key=lambda a: means[a]["loss"]):
        table.add_row(arm, *(f"{means[arm][c]:.3f}" for c in COLUMNS))
    Console(width=110).print(table)
    print(json.dumps(means))


def of_run(root: Path) -> dict[str, dict[str, float]]:
    config = load_config(root / "config.yaml")
    run = RunContext(root, config, SilentProgress())
    pool, heldout = run.pool(), run.heldout_sets()
    name = config.compare.loss_on or next(iter(heldout))
    target = [(ids.numpy(), given) for ids, given in heldout[name].rows(np.arange(len(heldout[name])))]
    shard = run.shard(1, len(pool))
    place = {d: int(r) for d, r in zip(pool.doc_ids(shard), shard, strict=True)}
    arms = [a for a in config.arms if (root / arm_folder(config, a, 1) / "selected").is_dir()]
    figures = {}
    for arm in arms:
        folder = root / arm_folder(config, arm, 1)
        rows = [place[d] for d in kept_ids(folder / "selected")]
        figures[arm] = {**of_text(pool, rows, target, len(run.tokenizer)), "between_sources": between(folder)}
        figures[arm]["loss"] = json.loads((folder / "eval.json").read_text())[name]["loss"]
    generator = np.random.default_rng(0)
    rows = generator.permutation(shard)[: round(len(shard) * (config.selection.keep_ratio or 1.0))].tolist()
    control = json.loads((root / "controls" / "random" / "round-1" / "eval.json").read_text())
    figures["random"] = {**of_text(pool, rows, target, len(run.tokenizer)), "between_sources": 0.0,
                         "loss": control[name]["loss"]}  # fmt: skip
    return figures


def of_text(
    pool: TokenStore, rows: list[int], target: list[tuple[np.ndarray, int]], vocabulary: int
) -> dict[str, float]:
    ids = [ids.numpy() for ids, _ in pool.rows(np.array(rows))]
    text = "\n".join(pool.texts(np.array(rows))).encode()
    bigram, unigram = cross_entropy(ids, target, vocabulary)
    return {
        "bigram_ce": bigram,
        "unigram_ce": unigram,
        "parents": float(len({d.partition("#")[0] for d in pool.doc_ids(np.array(rows))})),
        "compressed": len(zstandard.compress(text, 9)) / len(text),
    }


def cross_entropy(ids: list[np.ndarray], target: list[tuple[np.ndarray, int]], vocabulary: int) -> tuple[float, float]:
    """Nats per response token: bigrams with absolute discounting over smoothed unigrams, and unigrams alone."""
    count_V = np.ones(vocabulary)
    pairs: dict[int, int] = defaultdict(int)
    for d in ids:
        np.add.at(count_V, d, 1)
        for pair, n in zip(*np.unique(d[:-1] * vocabulary + d[1:], return_counts=True), strict=True):
            pairs[int(pair)] += int(n)
    p_V = count_V / count_V.sum()
    keys = np.fromiter(pairs, np.int64, len(pairs))
    n_K = np.fromiter(pairs.values(), float, len(pairs))
    order = np.argsort(keys)
    keys, n_K = keys[order], n_K[order]
    total_V = np.bincount(keys // vocabulary, n_K, vocabulary)
    kinds_V = np.bincount(keys // vocabulary, minlength=vocabulary)
    bigram, unigram, tokens = 0.0, 0.0, 0
    for d, given in target:
        before, after = d[:-1], d[1:]
        before, after = before[max(given - 1, 0) :], after[max(given - 1, 0) :]
        wanted = before * vocabulary + after
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        n = np.where(keys[at] == wanted, n_K[at], 0.0)
        there = total_V[before] > 0
        total = np.maximum(total_V[before], 1)
        p = np.maximum(n - DISCOUNT, 0) / total + np.where(there, DISCOUNT * kinds_V[before] / total, 1.0) * p_V[after]
        bigram, unigram = bigram - np.log(p).sum(), unigram - np.log(p_V[after]).sum()
        tokens += len(after)
    return bigram / tokens, unigram / tokens


def between(folder: Path) -> float:
    """Share of the variance of the scores' ranks that lies between sources."""
    files = str(folder / "scores" / "*.parquet")
    with duckdb.connect() as db:
        rows: list[Any] = db.execute(f"SELECT source, score FROM read_parquet('{files}')").fetchall()
    source, rank = np.array([s for s, _ in rows]), rankdata([x for _, x in rows])
    mean = rank.mean()
    return float(sum((source == s).sum() * (rank[source == s].mean() - mean) ** 2 for s in set(source))
                 / ((rank - mean) ** 2).sum())  # fmt: skip


if __name__ == "__main__":
    main()
