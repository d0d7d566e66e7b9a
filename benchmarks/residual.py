"""Does a learned sum of cheap features know more of a document than the best of them, within its source?

The label of each of N pieces is its exact metagradient (``verify/retraining/metagradient.py``). The features are DSIR's
weight, the warm proxy's loss, its fall over a short training on the pool (slope), excess, influence and length; the
learned ones are ridge regression and boosted trees on their ranks, judged on documents left out of the fit. Printed is
Spearman's correlation with the label over all pieces, and within sources (mean by number of pieces). The pass mark,
set before: within sources, the better learned one is above the best single feature by 0.05 with an interval above 0.

    python benchmarks/residual.py --upper math --pieces 768 RUN [RUN ...]    # runs that `bilect warmup` has filled
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from choosing import inputs_of, paired
from scipy.stats import rankdata, spearmanr
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from transformers.utils import logging

from bilect import methods
from bilect.config import load_config
from bilect.methods.contract import DocumentMethod, Inputs
from bilect.pipeline.context import RunContext
from bilect.runtime.progress import SilentProgress
from bilect.training.evaluation import document_losses
from bilect.verify.retraining.metagradient import Metagradient, MetagradientConfig

FOLDS, LEAST = 8, 8  # of the judgement; pieces of a source that is looked at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--upper", nargs="+", required=True, help="names of upper sets")
    parser.add_argument("--pieces", type=int, default=768)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    found: dict[str, dict[str, dict[int, float]]] = {"all": {}, "within": {}}
    for folder in args.runs:
        run = RunContext(folder.resolve(), load_config(folder / "config.yaml"), SilentProgress())
        label_N, features, sources, documents = labelled(run, args.upper, args.pieces)
        for name, x in (features | learned(features, label_N, documents)).items():
            found["all"].setdefault(name, {})[run.config.seed] = float(spearmanr(x, label_N).statistic)
            found["within"].setdefault(name, {})[run.config.seed] = within(x, label_N, sources)
        print(f"seed {run.config.seed}: {len(label_N)} pieces", flush=True)
    report(found, ["ridge", "trees"])


def labelled(run: RunContext, upper: list[str], pieces: int) -> tuple[np.ndarray, dict[str, np.ndarray], Any, Any]:
    """Labels and features of a random sample, with the source and the document of each piece."""
    pool, config = run.pool(), run.config
    rows = np.random.default_rng(config.seed).permutation(run.shard(1, len(pool)))[:pieces]
    sets = [s for s in run.upper_sets() if s[0] in upper]

    def scores(method: DocumentMethod[Any]) -> np.ndarray:
        with tempfile.TemporaryDirectory() as scratch, run.progress.task("fit") as task:
            method.fit(inputs_of(run, rows, sets, Path(scratch)), task)
            return method.score(pool, rows)

    def of(name: str, **settings: Any) -> np.ndarray:
        return scores(methods.make(name, settings))

    rate = config.training.learning_rate
    label_N = scores(Metagradient(MetagradientConfig(learning_rate=rate)))
    inputs: Inputs = inputs_of(run, rows, sets, Path())
    excess_N = of("excess")
    features = {
        "dsir": of("dsir", length="mean"),
        "loss": document_losses(inputs.warm_proxy, pool, rows, run.pad_id, config.score_batch_tokens),
        "slope": excess_N - of("excess", control="pool"),
        "excess": excess_N,
        "influence": of("influence"),
        "length": pool.length_R[rows].astype(float),
    }
    documents = [name.partition("#")[0] for name in pool.take("doc_id", rows).to_pylist()]
    return label_N, features, np.array(pool.sources(rows)), np.array(documents)


def learned(features: dict[str, np.ndarray], label_N: np.ndarray, documents: np.ndarray) -> dict[str, np.ndarray]:
    """Predictions for documents that the fit has not seen."""
    x_NF = np.stack([rankdata(x) / len(x) - 0.5 for x in features.values()], axis=1)
    y_N, folds = rankdata(label_N) / len(label_N) - 0.5, GroupKFold(FOLDS)
    models = {
        "ridge": RidgeCV(np.logspace(-3, 3, 13)),
        "trees": HistGradientBoostingRegressor(max_iter=60, max_depth=3),
    }
    return {k: cross_val_predict(m, x_NF, y_N, groups=documents, cv=folds) for k, m in models.items()}


def within(x_N: np.ndarray, y_N: np.ndarray, sources: np.ndarray) -> float:
    """Mean rank correlation within sources, by number of pieces; a constant has none."""
    names, counts = np.unique(sources, return_counts=True)
    kept = [(n, c) for n, c in zip(names, counts, strict=True) if c >= LEAST and np.ptp(x_N[sources == n]) > 0]
    if not kept:
        return float("nan")
    by_source = [spearmanr(x_N[sources == n], y_N[sources == n]).statistic for n, _ in kept]
    return float(np.average(by_source, weights=[c for _, c in kept]))


def report(found: dict[str, dict[str, dict[int, float]]], learned_names: list[str]) -> None:
    def mean(by_seed: dict[int, float]) -> float:
        return float(np.mean(list(by_seed.values())))

    for name in found["all"]:
        print(f"{name:10s} all {mean(found['all'][name]):6.3f}   within sources {mean(found['within'][name]):6.3f}")
    inside = found["within"]
    single = max((n for n in inside if n not in learned_names), key=lambda n: mean(inside[n]))
    best = max(learned_names, key=lambda n: mean(inside[n]))
    difference, half = paired(inside[best], inside[single])
    print(f"{best} minus {single}, within sources: {difference:+.3f} ± {half:.3f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
