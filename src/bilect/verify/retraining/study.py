"""The study as a whole: warm models, retrained halves, scores, correlations; its table, ``retrain.json`` and page."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from bilect import __version__
from bilect.config import Config
from bilect.errors import BilectError
from bilect.pipeline import stages as pipeline
from bilect.pipeline.context import RunContext
from bilect.runtime.device import pick_device
from bilect.runtime.files import write_json, write_text
from bilect.runtime.locks import locked
from bilect.runtime.progress import Progress, RichProgress, SilentProgress
from bilect.runtime.seeds import derive_seed
from bilect.runtime.workers import cores
from bilect.verify.retraining import correlation
from bilect.verify.retraining.cells import Cell, fill
from bilect.verify.retraining.correlation import Draws, Estimate
from bilect.verify.retraining.page import interval, render
from bilect.verify.retraining.scores import VARIANTS, Variant, own_variant, random_scores, scored, settings_of
from bilect.verify.retraining.subsets import Study, retrained, warm

__all__ = ["run_retraining", "study"]

LEAST_CANDIDATES, LEAST_SUBSETS = 10, 4
REPEATED = 16  # halves that are trained twice, for the ceiling
RANDOM_SEEDS = 200
LOSSES = ("heldout", "upper")


def run_retraining(
    config: Config,
    out: Path,
    *,
    subsets: int = 64,
    candidates: int = 256,
    seeds: int = 1,
    workers: int | None = None,
    variants: Mapping[str, Variant] = VARIANTS,
) -> None:
    """Carry out the study with live progress, print its table, and write ``retrain.json`` and ``retrain.html``.

    Args:
        config: of an ordinary run.
        out: folder; the same call goes on in it.
        subsets: random halves to retrain on.
        candidates: documents they are drawn from.
        seeds: fits of every method.
        workers: processes; by default as many as cores, one on a GPU.
        variants: methods by the name they have in the results, with their settings.

    Raises:
        BilectError: a wrong number, or one line on what is wrong with the input.
    """
    with RichProgress() as progress:
        from transformers.utils import logging

        logging.disable_progress_bar()
        result = study(config, out, progress, subsets=subsets, candidates=candidates, seeds=seeds, workers=workers,
                       variants=variants)  # fmt: skip
        write_json(out / "retrain.json", result)
        write_text(out / "retrain.html", render(result))
        progress.console.print(_table(result))
        for row in result["methods"]:
            if row["error"] is not None:
                progress.note(f"{row['name']} failed: {row['error']}")
        progress.note(noise_note(result))
        progress.note(f"Page: {out / 'retrain.html'}   Numbers: {out / 'retrain.json'}")


def study(
    config: Config,
    out: Path,
    progress: Progress | None = None,
    *,
    subsets: int,
    candidates: int,
    seeds: int = 1,
    workers: int | None = None,
    variants: Mapping[str, Variant] = VARIANTS,
) -> dict[str, Any]:
    """Everything but the files for readers; see ``run_retraining``.

    Returns:
        The content of ``retrain.json``, see docs/verify.md.
    """
    progress = progress or SilentProgress()
    if subsets < LEAST_SUBSETS or candidates < LEAST_CANDIDATES or min(seeds, 1 if workers is None else workers) < 1:
        raise BilectError(f"retrain: it takes at least {LEAST_SUBSETS} --subsets, {LEAST_CANDIDATES} --candidates, one "
                          f"of --seeds and one of --workers, not {subsets}, {candidates}, {seeds} and "
                          f"{'all' if workers is None else workers}")  # fmt: skip
    settings = {name: settings_of(config, variant) for name, variant in variants.items()}  # a wrong one: now
    if workers is None:
        workers = cores() if pick_device(config.device).type == "cpu" else 1
    with locked(out):
        pipeline.run(config, out / "run", progress, command="warmup")
        one = _open(config, out.resolve(), candidates)
        training, warm_target = config.training.model_dump(), ("warm up target",)
        start = Cell(out / "warm.json", one.key("warm", [], warm_target), partial(warm, one))
        halves = [_half_cell(one, training, j, 0) for j in range(subsets)]
        again = [_half_cell(one, training, j, 1) for j in range(min(REPEATED, subsets))]
        methods = {
            name: [_method_cell(one, config, name, variants[name][0], settings[name], k) for k in range(seeds)]
            for name in variants
        }
        with progress.task("retrain on halves", 1 + len(halves) + len(again)) as task:
            fill([start, *halves, *again], workers, task)
        fits = [cell for cells in zip(*methods.values(), strict=True) for cell in cells]  # seed after seed
        with progress.task("fit and score", len(fits)) as task:
            fill(fits, workers, task)
        return _figures(one, _results([start])[0], _results(halves), _results(again),
                        {name: _results(cells) for name, cells in methods.items()}, settings, seeds)  # fmt: skip


def _open(config: Config, out: Path, candidates: int) -> Study:
    run = RunContext(out / "run", config, SilentProgress())
    shard = run.shard(1, len(run.pool()))
    if len(shard) < candidates:
        raise BilectError(f"retrain: round 1 has {len(shard)} documents, fewer than {candidates} candidates; lower "
                          "--candidates or warmup.share, or enlarge data.lower_data")  # fmt: skip
    generator = np.random.default_rng(derive_seed(config.seed, "candidates"))
    return Study(out, config, np.sort(generator.permutation(shard)[:candidates]))


def _half_cell(one: Study, training: Mapping[str, Any], j: int, repeat: int) -> Cell:
    name = f"{j:04d}-again" if repeat else f"{j:04d}"
    key = one.key("half", [training, one.half(j).tolist(), repeat], ("warm up target",))
    return Cell(one.out / "subsets" / f"{name}.json", key, partial(retrained, one, j, repeat))


def _method_cell(one: Study, config: Config, name: str, method: str, settings: Mapping[str, Any], k: int) -> Cell:
    key = one.key(method, [settings, config.fit.bf16, k], ("warm up proxy", "warm up target"))
    path = one.out / "methods" / f"{name.replace(' ', '-')}-{k}.json"
    return Cell(path, key, partial(scored, one, method, settings, k))


def _results(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    found = [cell.read() for cell in cells]
    return [result for result in found if result is not None]  # all are there


def _figures(
    one: Study,
    before: Mapping[str, Any],
    halves: Sequence[Mapping[str, Any]],
    again: Sequence[Mapping[str, Any]],
    methods: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Mapping[str, Any],
    seeds: int,
) -> dict[str, Any]:
    """From the cells to ``retrain.json``."""
    m, seed = len(halves), one.config.seed
    means, means_again = [one.means(h) for h in halves], [one.means(h) for h in again]
    loss_J = {k: np.array([x[k] for x in means]) for k in LOSSES}
    loss_R = {k: np.array([x[k] for x in means_again]) for k in LOSSES}
    draws = correlation.draws(m, seeds, derive_seed(seed, "bootstrap"))
    draws_again = correlation.draws(len(again), 1, derive_seed(seed, "bootstrap", "again"))
    noise: dict[str, Any] = {}
    for k in LOSSES:
        both = correlation.resampled(loss_R[k][None], loss_J[k][: len(again)], draws_again)
        reliability = correlation.estimate(both)
        noise[k] = {
            "reliability": reliability.record(),
            "ceiling": correlation.ceiling(reliability),
            "spread_subsets": float(loss_J[k].std(ddof=1)),
            "spread_seeds": float((loss_R[k] - loss_J[k][: len(again)]).std(ddof=1) / math.sqrt(2)),
        }
    member_JN = np.zeros((m, len(one.rows)))
    for j in range(m):
        member_JN[j, one.half(j)] = 1

    def row(name: str, estimates: Mapping[str, Estimate], **more: Any) -> dict[str, Any]:
        quality = {k: e.record() for k, e in estimates.items()}
        share = {k: e.over(noise[k]["ceiling"]).record() for k, e in estimates.items()}
        return {"name": name, "quality": quality, "of_ceiling": share, "error": None, **more}

    chance_KJ = random_scores(one, RANDOM_SEEDS) @ member_JN.T
    qualities = {name: _qualities(found, member_JN, loss_J, draws) for name, found in methods.items()}
    own, rows = own_variant(one.config), []
    for name, found in methods.items():
        if error := next((f["error"] for f in found if "error" in f), None):
            more: dict[str, Any] = {"error": error, "scores": None, "flops": None, "seconds": None}
        else:
            more = {key: float(np.mean([f[key] for f in found])) for key in ("flops", "seconds")}
            more["scores"] = [f["scores"] for f in found]
        less = {}
        for k in LOSSES if own in methods and own != name else ():
            less[k] = correlation.estimate(qualities[name][k] - qualities[own][k]).record()
        rows.append(row(name, {k: correlation.estimate(qualities[name][k]) for k in LOSSES}, **more,
                        minus_own=less, settings=settings[name]))  # fmt: skip
    return {
        "schema": 1,
        "versions": {"bilect": __version__, "torch": torch.__version__},
        "config": one.config.model_dump(mode="json"),
        "candidates": one.run.pool().doc_ids(one.rows),
        "warm": one.means(before),
        "subsets": [{"members": one.half(j).tolist(), **means[j], "seconds": halves[j]["seconds"]} for j in range(m)],
        "again": means_again,
        "noise": noise,
        "random": row("random", {k: correlation.null(chance_KJ, -loss_J[k]) for k in LOSSES}, seeds=RANDOM_SEEDS),
        "own": own,
        "seeds": seeds,
        "methods": sorted(rows, key=_quality, reverse=True),
    }


def _qualities(
    found: Sequence[Mapping[str, Any]], member_JN: np.ndarray, loss_J: Mapping[str, np.ndarray], draws: Draws
) -> dict[str, np.ndarray]:
    """See ``correlation.resampled``, for each loss; of a method that failed under some seed not a number."""
    if any("scores" not in f for f in found):
        return {k: np.full(1 + len(draws.halves_BJ), np.nan) for k in loss_J}
    sums_KJ = np.array([f["scores"] for f in found]) @ member_JN.T
    return {k: correlation.resampled(sums_KJ, -loss_J[k], draws) for k in loss_J}


def _quality(row: Mapping[str, Any]) -> float:
    value = row["quality"]["heldout"]["value"]
    return -math.inf if value is None else float(value)


def noise_note(result: Mapping[str, Any]) -> str:
    """How much of the spread between halves is noise, in a sentence."""
    noise, mean = result["noise"]["heldout"], np.mean([s["heldout"] for s in result["subsets"]])
    share = f"ceiling {noise['ceiling']:.2f}" if noise["ceiling"] is not None else "no ceiling: two trainings disagree"
    return (f"Held-out loss: warm {result['warm']['heldout']:.4f}, retrained {mean:.4f}, spread over halves "
            f"{noise['spread_subsets']:.4f}, over seeds {noise['spread_seeds']:.4f}; {share} "
            f"(reliability over {len(result['again'])} halves {interval(noise['reliability'])})")  # fmt: skip


def _table(result: Mapping[str, Any]) -> Table:
    halves, candidates = len(result["subsets"]), len(result["candidates"])
    table = Table(
        title=f"Spearman of summed scores with minus the loss after retraining: {halves} halves of {candidates}, "
        f"{result['seeds']} seed{'s' if result['seeds'] > 1 else ''} of each fit"
    )
    for name in ("method", "held-out, 95%", f"minus {result['own']}", "TFLOPs"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in (*result["methods"], result["random"]):
        if row["error"] is not None:
            table.add_row(row["name"], "failed")
            continue
        less = row.get("minus_own", {}).get("heldout")
        table.add_row(row["name"], interval(row["quality"]["heldout"]), interval(less) if less else "",
                      f"{row.get('flops', 0) / 1e12:.3f}")  # fmt: skip
    return table
