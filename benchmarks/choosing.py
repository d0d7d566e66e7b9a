"""Ways to choose documents on one set of warm models: many settings, several targets, at little cost.

Each RUN is a directory that ``bilect warmup`` has filled, all of one config but for the seed. Its target sets serve as
upper data in turn. Every cell (seed, target, variant) fits a method, scores the first round's shard, keeps the top by
the run's rules and trains the warm target on it as a run does; it is a JSON file in OUT, and is not made again.

    python benchmarks/choosing.py --study benchmarks/choosing.yaml --out OUT RUN [RUN ...]
    python benchmarks/choosing.py --study benchmarks/choosing.yaml --out OUT --table

The study:

    targets: {math: {upper: [math], heldout: math}, lambada-text: {upper: [lambada_text], heldout: lambada}}
    variants: {warm: {}, random: {method: random}, dsir: {method: dsir, settings: {length: mean}}}
    against: dsir

A variant may have a rule of its own (``selection: {temperature: 0.5}``), and in place of a method the sum of
standardised scores that other cells have left (``scores: ["cells/{target}/dsir", "cells/{target}/excess"]``). With
``upper_from_pool: {by: FOLDER_OF_SCORES, documents: 512}`` (or ``by: random``) pieces of the pool are upper data too.
``set: {in_turn: true}`` and ``set: {redundancy: 0.5, scores: [FOLDER]}`` choose as ``_sets.py`` says. The control that
no method may leave out is ``train_upper: 0.25``, the share of the trained tokens that are the upper data themselves;
``steps`` are of its training, for equal operations in place of equal tokens. In the table, ``stable`` is the rank
correlation of scores under two seeds, ``corr`` that of a score model with held-out labels.
"""

import argparse
import json
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from _sets import in_turn, without_redundancy
from scipy.stats import spearmanr, t
from transformers.utils import logging

from bilect import methods
from bilect.config import SelectionConfig, load_config
from bilect.data.tokens import TokenStore, join_tokens, write_rows
from bilect.methods.contract import Inputs
from bilect.pipeline.choosing import rule_of
from bilect.pipeline.context import RunContext
from bilect.runtime.files import write_json
from bilect.runtime.progress import SilentProgress
from bilect.runtime.seeds import derive_seed
from bilect.selection.records import kept_rows
from bilect.selection.scoring import write_scores
from bilect.selection.select import select
from bilect.training import evaluation
from bilect.training.train import train


def main() -> None:
    args = parse_args()
    study = yaml.safe_load(args.study.read_text(encoding="utf-8"))
    if not args.table:
        torch.set_num_threads(1)
        logging.disable_progress_bar()
        for folder in args.runs:
            run = RunContext(folder.resolve(), load_config(folder / "config.yaml"), SilentProgress())
            for target, sets in study["targets"].items():
                for name, variant in study["variants"].items():
                    if target in variant.get("targets", [target]):
                        cell(run, args.out, target, sets, name, variant)
    table(args.out, study)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="of what is there; carry out nothing")
    return parser.parse_args()


def path_of(out: Path, seed: int, target: str, name: str) -> Path:
    return out / target / name / f"seed-{seed}.json"


def cell(run: RunContext, out: Path, target: str, sets: dict[str, Any], name: str, variant: dict[str, Any]) -> None:
    path = path_of(out, run.config.seed, target, name)
    if not {"scores", "set", "train_upper"} & set(variant) and variant.get("method", "random") == "random":
        # the same for all targets
        path = path_of(out, run.config.seed, "any", name)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    started, pool = time.process_time(), run.pool()
    figures: dict[str, Any] = {}
    if name == "warm":
        model = run.load(run.evaluated("warmup/target"))
    else:
        rows, figures = chosen(run, path, sets["upper"], variant)
        figures["choosing_seconds"] = time.process_time() - started
        model = trained(run, rows, sets["upper"], variant)
        figures |= {"documents": len(rows), "sources": shares(pool.sources(rows))}
    losses = {
        k: evaluation.evaluate(model, s, run.pad_id, run.config.score_batch_tokens).loss
        for k, s in run.heldout_sets().items()
    }
    write_json(path, {"losses": losses, **figures, "variant": variant, "seconds": time.process_time() - started})
    print(f"{path.relative_to(out)}: {losses[sets['heldout']]:.4f} ({time.process_time() - started:.0f} s)", flush=True)


def chosen(run: RunContext, path: Path, upper: list[str], variant: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """Rows kept, and the figures of the fit; scores go beside ``path``."""
    pool, config = run.pool(), run.config
    rows = run.shard(1, len(pool))
    rule = config.selection.model_copy(update=variant.get("selection", {}))
    target = path.parts[-3]
    if "set" in variant:
        return chosen_set(run, rows, upper, target, variant["set"]), {}
    if "scores" in variant:
        scores = combined([folder.format(target=target) for folder in variant["scores"]], config.seed)
        by_row = dict(zip(rows.tolist(), scores.tolist(), strict=True))
        return kept_by(run, rows, lambda some: np.array([by_row[int(r)] for r in some]), rule), {}
    method = methods.make_for(config, variant.get("method", "random"), variant.get("settings"))
    sets = [s for s in run.upper_sets() if s[0] in upper]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if (own := variant.get("upper_from_pool")) is not None:
            near = nearest(rows, {**own, "by": own["by"].format(target=target)}, config.seed)
            write_rows(pool, near, work / "near.arrow")
            sets, rows = [*sets, ("near", 1.0, TokenStore(work / "near.arrow"))], np.setdiff1d(rows, near)
        inputs = inputs_of(run, rows, sets, work / "fit")
        with run.progress.task("fit") as task:
            figures = method.fit(inputs, task)
        saved: dict[int, float] = {}

        def score(some: np.ndarray) -> np.ndarray:
            scores = method.score(pool, some)
            saved.update(zip(some.tolist(), scores.tolist(), strict=True))
            return scores

        kept = kept_by(run, rows, score, rule_of(method, rule), in_order=method.trains_in_order)
    np.save(path.with_suffix(".npy"), np.array([saved[int(r)] for r in rows]))
    np.save(path.with_name(path.stem.replace("seed", "rows") + ".npy"), rows)
    flops = figures["flops"] + method.score_flops(pool, rows)
    return kept, {**figures, "flops": flops}


def inputs_of(run: RunContext, rows: np.ndarray, sets: list[tuple[str, float, TokenStore]], scratch: Path) -> Inputs:
    """What a fit on the warm models is given."""
    return Inputs(
        run.pool(),
        rows,
        sets,
        proxy=run.root / "warmup" / "proxy",
        target=run.root / "warmup" / "target",
        scratch=scratch,
        pad_id=run.pad_id,
        seed=run.config.seed,
        device=run.device,
        batch_tokens=run.config.score_batch_tokens,
        checkpoint_every=10**6,
    )


def chosen_set(
    run: RunContext, rows: np.ndarray, upper: list[str], target: str, settings: dict[str, Any]
) -> np.ndarray:
    """Rows that ``_sets.py`` keeps."""
    texts = run.pool().texts(rows)
    ratio, seed = run.config.selection.keep_ratio, run.config.seed
    assert ratio is not None
    wanted = round(ratio * len(rows))
    if settings.get("in_turn"):
        stores = [store for name, _, store in run.upper_sets() if name in upper]
        examples = [text for store in stores for text in store.texts(np.arange(len(store)))]
        return rows[in_turn(texts, examples, wanted, seed)]
    scores = combined([folder.format(target=target) for folder in settings["scores"]], seed)
    return rows[without_redundancy(texts, scores, wanted, settings["redundancy"])]


def kept_by(run: RunContext, rows: np.ndarray, score: Any, rule: SelectionConfig, in_order: bool = False) -> np.ndarray:
    """Rows that a rule keeps by scores, as a run does."""
    pool = run.pool()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_scores(score, pool, rows, work / "scores")
        select(work / "scores", work / "selected", rule, seed=derive_seed(run.config.seed, "select", 1))
        return kept_rows(work / "selected", pool, in_order=in_order)


def combined(folders: list[str], seed: int) -> np.ndarray:
    """Sum of the standardised scores of other cells."""
    every = [np.load(Path(folder) / f"seed-{seed}.npy") for folder in folders]
    return np.sum([(x - x.mean()) / x.std() for x in every], axis=0)


def nearest(rows: np.ndarray, own: dict[str, Any], seed: int) -> np.ndarray:
    """Rows of the shard that serve as upper data: the best by scores, or as many at random."""
    if own["by"] == "random":
        return np.sort(np.random.default_rng(seed).permutation(rows)[: own["documents"]])
    scores = np.load(Path(own["by"]) / f"seed-{seed}.npy")
    return np.sort(rows[np.argsort(-scores, kind="stable")[: own["documents"]]])


def trained(run: RunContext, rows: np.ndarray, upper: list[str], variant: dict[str, Any]) -> Any:
    """The warm target trained on rows as an arm of a run, decay branch included."""
    before, seed = run.training_of("warmup/target"), derive_seed(run.config.seed, "train", 1)
    config = run.config.training.model_copy(update={"steps": variant.get("steps", run.config.training.steps)})
    model, pool = run.load("warmup/target"), run.pool()
    common: dict[str, Any] = {"context": run.config.data.context, "device": run.device, "checkpoint_every": 10**6}
    with tempfile.TemporaryDirectory() as name, run.progress.task("train") as task:
        if "train_upper" in variant:
            pool, rows, common["weight_R"] = with_upper(run, rows, upper, variant["train_upper"], Path(name) / "joined")
        train(model, pool, rows, Path(name), config, seed=seed, task=task, start_from=before, **common)
        if config.decay_steps:
            train(model, pool, rows, Path(name), config, seed=seed + 1, task=task, start_from=Path(name), decay=True,
                  **common)  # fmt: skip
    return model


def with_upper(
    run: RunContext, rows: np.ndarray, upper: list[str], share: float, path: Path
) -> tuple[TokenStore, np.ndarray, np.ndarray]:
    """Rows of the pool and the upper data as one store; weights give the upper data their share of the tokens."""
    stores = [store for name, _, store in run.upper_sets() if name in upper]
    parts = [path.with_suffix(f".{k}") for k in range(1 + len(stores))]
    write_rows(run.pool(), rows, parts[0])
    for store, part in zip(stores, parts[1:], strict=True):
        write_rows(store, np.arange(len(store)), part)
    join_tokens(parts, path)
    joined = TokenStore(path)
    tokens, weight_R = joined.length_R.astype(float), np.ones(len(joined))
    of_upper = np.arange(len(joined)) >= len(rows)
    weight_R[of_upper] = share / (1 - share) * tokens[~of_upper].sum() / tokens[of_upper].sum()
    return joined, np.arange(len(joined)), weight_R


def shares(sources: list[str]) -> dict[str, int]:
    names, counts = np.unique(sources, return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def table(out: Path, study: dict[str, Any]) -> None:
    summary: dict[str, Any] = {}
    for target, sets in study["targets"].items():
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for name in study["variants"]:
            for folder in (out / target / name, out / "any" / name):
                for file in sorted(folder.glob("seed-*.json")):
                    found.setdefault(name, {})[int(file.stem[5:])] = json.loads(file.read_text(encoding="utf-8"))
        loss = {n: {s: c["losses"][sets["heldout"]] for s, c in cells.items()} for n, cells in found.items()}
        print(f"\n{target:34s} {'loss':>7s} {'n':>2s}  {'minus random':>15s}  {'minus ' + study['against']:>15s}"
              f"  {'stable':>6s} {'corr':>5s} {'TFLOP':>6s} {'s':>4s}")  # fmt: skip
        for name in sorted(loss, key=lambda n: np.mean(list(loss[n].values()))):
            cells, own = found[name], loss[name]
            line = f"{name:34s} {np.mean(list(own.values())):7.3f} {len(own):2d}"
            row = {"loss": float(np.mean(list(own.values()))), "seeds": len(own)}
            for base in ("random", study["against"]):
                difference, half = paired(own, loss.get(base, {}))
                line += f"  {difference:+.3f} ± {half:5.3f}"
                row[f"minus {base}"] = [difference, half]
            corr = [c["label_correlation"] for c in cells.values() if c.get("label_correlation") is not None]
            flops = [c["flops"] / 1e12 for c in cells.values() if "flops" in c]
            seconds = [c.get("choosing_seconds", 0) for c in cells.values()]
            line += f"  {stability(out / target / name):6.2f} {np.mean(corr) if corr else np.nan:5.2f}"
            line += f" {np.mean(flops) if flops else 0:6.2f}"
            print(f"{line} {np.mean(seconds):4.0f}")
            summary.setdefault(target, {})[name] = row
    print(json.dumps(summary))


def stability(folder: Path) -> float:
    """Mean rank correlation of the scores under two seeds, over the pieces that are candidates under both."""
    found = [
        (np.load(f), np.load(f.with_name(f.name.replace("rows", "seed")))) for f in sorted(folder.glob("rows-*.npy"))
    ]
    each = []
    for (rows_a, a), (rows_b, b) in combinations(found, 2):
        _, in_a, in_b = np.intersect1d(rows_a, rows_b, return_indices=True)
        each.append(spearmanr(a[in_a], b[in_b]).statistic)
    return float(np.mean(each)) if each else float("nan")


def paired(a: dict[int, float], b: dict[int, float]) -> tuple[float, float]:
    """Mean difference over common seeds, and half of its 95% interval (Student)."""
    d = np.array([a[s] - b[s] for s in a if s in b])
    if len(d) < 2:
        return (float(d.mean()) if len(d) else float("nan")), float("nan")
    return float(d.mean()), float(t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / len(d) ** 0.5)


if __name__ == "__main__":
    main()
