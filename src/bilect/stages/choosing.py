"""Choosing: fit the score model, score the shard, keep the top."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bilect.bilevel.cost import fit_flops
from bilect.bilevel.offline import BilevelFit
from bilect.data.loading import cycle_batches
from bilect.data.tokens import TokenStore
from bilect.errors import BilectError
from bilect.models.flops import forward_flops
from bilect.models.score_model import ScoreModel
from bilect.run_dir import derive_seed, write_json
from bilect.runtime import distributed
from bilect.scoring import write_scores
from bilect.selection import select_top
from bilect.stages.context import Figures, RunContext, target_folder

__all__ = ["fit", "score", "select"]

SHOWN_DOCUMENTS, SHOWN_CHARACTERS = 6, 1500


def fit(run: RunContext, scratch: Path, number: int) -> Figures:
    """Fit the score model on a sample of the shard (BLISS, section 1)."""
    config = run.config
    pool, upper = run.pool(), TokenStore(run.root / "tokens" / "upper.arrow")
    rows = run.shard(number, len(pool))
    seed = derive_seed(config.seed, "fit", number)
    size = max(math.ceil(config.fit.sample_fraction * len(rows)), config.fit.lower_batch_size)
    sample = np.random.default_rng(seed).permutation(rows)[:size]
    first = number == 1
    proxy = run.load("warmup/proxy" if first or config.reset_proxy else f"round-{number - 1}/proxy")
    target = run.load(target_folder("bliss", number - 1)) if config.fit.kl_coef else None
    if target is not None and target.config.get_text_config().vocab_size != proxy.config.get_text_config().vocab_size:
        raise BilectError("models: proxy and target have vocabularies of different sizes; the divergence needs equal "
                          "ones (or set fit.kl_coef=0)")  # fmt: skip
    if first or not config.carry_score_model:
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "score head", number))
        score_model = ScoreModel.from_causal_lm(proxy, generator, config.models.score_head)
    else:
        score_model = ScoreModel.from_pretrained(run.root / f"round-{number - 1}" / "score_model").to(run.device)
    lower_size, upper_size = config.fit.lower_batch_size, min(config.fit.upper_batch_size, len(upper))
    fit = BilevelFit(
        proxy,
        score_model,
        target,
        cycle_batches(pool, sample, lower_size, run.pad_id, derive_seed(seed, "lower"), run.device),
        cycle_batches(upper, np.arange(len(upper)), upper_size, run.pad_id, derive_seed(seed, "upper"), run.device),
        config.fit,
    )
    out = scratch / f"round-{number}"
    out.mkdir(parents=True, exist_ok=True)
    with (
        run.progress.task(f"round {number}: fit", config.fit.steps) as task,
        Path(out / "metrics.jsonl" if distributed.is_main() else os.devnull).open("w", encoding="utf-8") as log,
    ):
        for _ in range(config.fit.steps):
            figures = fit.step()
            log.write(json.dumps(_finite(figures)) + "\n")
            if not all(math.isfinite(figures[k]) for k in ("lower_loss", "upper_loss", "score_mean", "d_std")):
                raise BilectError(f"fit: a loss is not a number at step {figures['step']} of round {number}; "
                                  "lower fit.proxy_learning_rate")  # fmt: skip
            task.advance(1, proxy_loss=figures["lower_loss"], score_spread=figures["score_std"])
    run.save(proxy, out / "proxy")
    if distributed.is_main():
        score_model.save_pretrained(out / "score_model")
    lower_length, upper_length = float(pool.length_R[sample].mean()), float(upper.length_R.mean())
    flops = fit_flops(config.fit, proxy, score_model, target, lower_length=lower_length, upper_length=upper_length)
    return {"tokens": int(config.fit.steps * lower_size * lower_length), "flops": flops}


def score(run: RunContext, scratch: Path, number: int) -> Figures:
    """Score the whole shard."""
    pool = run.pool()
    rows = run.shard(number, len(pool))
    score_model = ScoreModel.from_pretrained(run.root / f"round-{number}" / "score_model").to(run.device)
    if distributed.is_main():
        with run.progress.task(f"round {number}: score", len(rows)) as task:
            write_scores(
                score_model,
                pool,
                rows,
                scratch / f"round-{number}" / "scores",
                run.pad_id,
                batch_tokens=run.config.score_batch_tokens,
                bf16=run.config.fit.bf16,
                on_documents=task.advance,
            )
    tokens = int(pool.length_R[rows].sum())
    return {"tokens": tokens, "flops": forward_flops(score_model, tokens, tokens / len(rows))}


def select(run: RunContext, scratch: Path, number: int) -> Figures:
    """Keep the top; account for it by source; show the extremes."""
    if not distributed.is_main():
        return {}
    out, scores = scratch / f"round-{number}", run.root / f"round-{number}" / "scores"
    kept_file = out / "selected" / "kept.parquet"
    chosen = select_top(scores, kept_file, run.config.selection.budget)
    pool = run.pool()
    row_of = {d: i for i, d in enumerate(pool.doc_ids)}
    kept = pq.read_table(kept_file)
    texts = pool.texts([row_of[d] for d in chosen.doc_ids])
    pq.write_table(kept.append_column("text", pa.array(texts)), kept_file)
    table = pq.read_table(scores).sort_by([("score", "descending"), ("doc_id", "ascending")])
    ends = {"best": table.slice(0, SHOWN_DOCUMENTS), "worst": table.slice(max(len(table) - SHOWN_DOCUMENTS, 0))}
    shown = {
        name: [{**r, "text": pool.texts([row_of[r["doc_id"]]])[0][:SHOWN_CHARACTERS]} for r in part.to_pylist()]
        for name, part in ends.items()
    }
    shown["worst"].reverse()
    write_json(out / "extremes.json", shown)
    return {
        "tokens": chosen.tokens,
        "documents": len(chosen.doc_ids),
        "threshold": chosen.threshold,
        "kept_share_by_source": chosen.kept_share,
        "pool_share_by_source": chosen.pool_share,
        "kept_fraction_by_source": chosen.kept_fraction,
        "flops": 0.0,
    }


def _finite(figures: Figures) -> Figures:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
