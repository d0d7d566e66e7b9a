"""Choosing: fit the score model, score the shard, keep the top."""

import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from bilect.bilevel.cost import fit_flops
from bilect.bilevel.offline.fit import BilevelFit
from bilect.data.loading import BatchStream, SetStream
from bilect.errors import BilectError
from bilect.methods import choosers
from bilect.methods import load as load_method
from bilect.methods.contract import Inputs
from bilect.models.flops import forward_flops
from bilect.models.loading import load_score_model
from bilect.models.score_model import ScoreModel
from bilect.pipeline.context import Figures, RunContext, target_folder
from bilect.pipeline.last_good import keep_last_good
from bilect.runtime import distributed
from bilect.runtime.checkpoints import all_finite, load_parts, save_parts
from bilect.runtime.files import write_json
from bilect.runtime.seeds import derive_seed
from bilect.selection import select as selection
from bilect.selection.records import attach_text, extremes
from bilect.selection.scoring import score_rows, write_scores

__all__ = ["choose", "fit", "score", "score_pool", "select"]

SHOWN_DOCUMENTS, SHOWN_CHARACTERS = 6, 1500


def fit(run: RunContext, scratch: Path, number: int) -> Figures:
    """Fit the score model on a sample of the shard (BLISS, section 1)."""
    config = run.config
    pool, sets = run.pool(), run.upper_sets()
    rows = run.shard(number, len(pool))
    seed = derive_seed(config.seed, "fit", number)
    size = max(math.ceil(config.fit.sample_fraction * len(rows)), config.fit.lower_batch_size)
    sample = np.random.default_rng(seed).permutation(rows)[:size]
    first = number == 1
    proxy = run.load("warmup/proxy" if first or config.reset_proxy else f"round-{number - 1}/proxy")
    target = run.load(target_folder("bliss", number - 1)) if config.fit.kl_coef else None
    if first or not config.carry_score_model:
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "score head", number))
        score_model = ScoreModel.from_causal_lm(proxy, generator, config.models.score_head)
    else:
        score_model = load_score_model(run.root / f"round-{number - 1}" / "score_model").to(run.device)
    lower_size, lower_seed = config.fit.lower_batch_size, derive_seed(seed, "lower")
    lower = BatchStream(pool, sample, lower_size, run.pad_id, lower_seed, run.device, pool.weight_R)
    stores, weights = [store for _, _, store in sets], [weight for _, weight, _ in sets]
    upper_seed = derive_seed(seed, "upper")
    upper = SetStream(stores, weights, config.fit.upper_batch_size, run.pad_id, upper_seed, run.device)
    names = {name: weight for name, weight, _ in sets}
    bilevel = BilevelFit(proxy, score_model, target, lower, upper, config.fit, upper_sets=names)
    out = scratch / f"round-{number}"
    out.mkdir(parents=True, exist_ok=True)
    with (
        run.progress.task(f"round {number}: fit", config.fit.steps) as task,
        Path(out / "metrics.jsonl" if distributed.is_main() else os.devnull).open("ab") as log,
    ):
        checkpoint = _Checkpoint(scratch / ".fit.pt", bilevel, lower, upper, log)
        task.advance(checkpoint.resume(run.device))
        good_step, good_weights = None, checkpoint.weights()
        while bilevel.steps_done < config.fit.steps:
            before = checkpoint.weights()
            figures = bilevel.step()
            log.write((json.dumps(_finite(figures)) + "\n").encode())
            fine = all(math.isfinite(figures[k]) for k in ("lower_loss", "upper_loss", "score_mean", "d_std"))
            if fine:
                good_step, good_weights = bilevel.steps_done - 1, before
            save = bilevel.steps_done % config.checkpoint_every == 0
            if not fine or ((save or bilevel.steps_done == config.fit.steps) and not checkpoint.is_finite()):
                checkpoint.restore(good_weights)
                kept = keep_last_good(run, scratch, {"proxy": proxy, "score_model": score_model}, good_step)
                raise BilectError(f"fit: a loss is not a number at step {figures['step']} of round {number}; "
                                  f"lower fit.proxy_learning_rate or fit.score_learning_rate; {kept}")  # fmt: skip
            task.advance(1, proxy_loss=figures["lower_loss"], score_spread=figures["score_std"])
            if save and bilevel.steps_done < config.fit.steps:
                checkpoint.save()
    run.save(proxy, out / "proxy")
    if distributed.is_main():
        score_model.save_pretrained(out / "score_model")
    lower_length, upper_length = float(pool.length_R[sample].mean()), upper.mean_length
    flops = fit_flops(config.fit, proxy, score_model, target, lower_length=lower_length, upper_length=upper_length)
    return {"tokens": int(config.fit.steps * lower_size * lower_length), "flops": flops}


def score(run: RunContext, scratch: Path, number: int) -> Figures:
    """Score the whole shard."""
    pool = run.pool()
    model, out = run.root / f"round-{number}" / "score_model", scratch / f"round-{number}" / "scores"
    return score_pool(run, model, run.shard(number, len(pool)), out, f"round {number}: score")


def score_pool(run: RunContext, model: Path, rows: np.ndarray, out: Path, title: str) -> Figures:
    """Score rows of the pool by a saved score model into ``out``; files that are there already are kept."""
    pool, score_model = run.pool(), load_score_model(model).to(run.device)
    tokens = int(pool.length_R[rows].sum())
    with run.progress.task(title, tokens, unit="tokens") as task:
        score = partial(
            score_rows,
            score_model,
            pool,
            pad_id=run.pad_id,
            batch_tokens=run.config.score_batch_tokens,
            bf16=run.config.fit.bf16,
            on_tokens=task.advance,
        )
        write_scores(score, pool, rows, out, task.advance)
    return {"tokens": tokens, "flops": forward_flops(score_model, tokens, tokens / len(rows))}


def select(run: RunContext, scratch: Path, number: int) -> Figures:
    """Keep the top, with its text; account for it by source; show the extremes."""
    return _keep(run, run.root / f"round-{number}" / "scores", scratch / f"round-{number}", number)


def choose(run: RunContext, scratch: Path, number: int, arm: str) -> Figures:
    """A control chooses its documents by another method: fit, score the shard, keep the top by the same rules."""
    config, pool, folder = run.config, run.pool(), Path("controls") / arm / f"round-{number}"
    method, rows = choosers(config)[arm], run.shard(number, len(pool))
    inputs = Inputs(
        pool,
        rows,
        run.upper_sets() if method.uses_upper else [],
        proxy=run.root / "warmup" / "proxy",
        target=run.root / target_folder(arm, number - 1),
        scratch=scratch / ".fit",
        pad_id=run.pad_id,
        seed=derive_seed(config.seed, "method", arm, number),
        device=run.device,
        bf16=config.fit.bf16,
        batch_tokens=config.score_batch_tokens,
        checkpoint_every=config.checkpoint_every,
    )
    saved = scratch / ".method"
    with run.progress.task(f"round {number}: fit {arm}") as task:
        if (saved / "flops.json").is_file():  # the fit of an attempt that was interrupted later
            method, flops = load_method(saved, inputs), json.loads((saved / "flops.json").read_text(encoding="utf-8"))
        else:
            flops = method.fit(inputs, task)["flops"]
            method.save(saved)
            if distributed.is_main():
                write_json(saved / "flops.json", flops)
    tokens = int(pool.length_R[rows].sum())
    with run.progress.task(f"round {number}: score by {arm}", tokens, unit="tokens") as task:

        def score(some: np.ndarray) -> np.ndarray:
            scores = method.score(pool, some)
            task.advance(int(pool.length_R[some].sum()))
            return scores

        write_scores(score, pool, rows, scratch / folder / "scores", task.advance)
    figures = _keep(run, scratch / folder / "scores", scratch / folder, number)
    return {**figures, "flops": flops + method.score_flops(pool, rows), "uses_proxy": method.uses_proxy}


def _keep(run: RunContext, scores: Path, out: Path, number: int) -> Figures:
    clusters = run.clusters()
    if not distributed.is_main():
        return {}
    config, pool = run.config, run.pool()
    seed = derive_seed(config.seed, "select", number)
    chosen = selection.select(scores, out / "selected", config.selection, seed=seed, clusters=clusters)
    write_json(out / "extremes.json", extremes(out / "selected", pool, SHOWN_DOCUMENTS, SHOWN_CHARACTERS))
    attach_text(out / "selected", pool, config.selection.format)
    if chosen.note:
        run.progress.note(chosen.note)
    return {
        "tokens": chosen.tokens,
        "documents": chosen.documents,
        "threshold": chosen.threshold,
        "near_duplicates": chosen.near_duplicates,
        "kept_share_by_source": chosen.kept_share,
        "pool_share_by_source": chosen.pool_share,
        "kept_fraction_by_source": chosen.kept_fraction,
        "flops": 0.0,
    }


class _Checkpoint:
    """The fit on disk, at the end of a step: models, optimisers, twins, both streams, and how long the log was."""

    def __init__(self, path: Path, fit: BilevelFit, lower: BatchStream, upper: SetStream, log: BinaryIO) -> None:
        self.path, self.log = path, log
        self.parts: dict[str, Any] = {"fit": fit, "lower": lower, "upper": upper, "log": self}
        self.params = [*fit.params.values(), *fit.score_model.parameters()]

    def save(self) -> None:
        """On the main rank; the others are in the same state."""
        save_parts(self.path, self.parts)

    def resume(self, device: torch.device) -> int:
        """Go on from what an interrupted attempt has saved, and return its steps: 0 where there is nothing."""
        if self.path.is_file():
            load_parts(self.path, self.parts, f"delete {self.path.parent} to start the stage again", device)
        else:
            self.load_state_dict({"bytes": 0})
        return self.parts["fit"].steps_done

    def state_dict(self) -> dict[str, int]:
        """How long the log is, all of it on the disk."""
        self.log.flush()
        os.fsync(self.log.fileno())
        return {"bytes": self.log.tell()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Cut the log back to that."""
        if distributed.is_main():
            if self.log.tell() < state["bytes"]:
                raise ValueError("metrics.jsonl is shorter than it was")
            self.log.truncate(state["bytes"])

    def weights(self) -> list[Tensor]:
        """Copies of the weights of both models."""
        return [p.detach().clone() for p in self.params]

    def restore(self, weights: list[Tensor]) -> None:
        """Put copies back."""
        for p, saved in zip(self.params, weights, strict=True):
            p.data.copy_(saved)

    def is_finite(self) -> bool:
        """Whether the weights of both models are."""
        return all_finite(self.params)


def _finite(figures: Figures) -> Figures:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
