"""A small run directory with every file the report reads, made up from a fixed seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SOURCES = {"encyclopedia": 0.62, "speeches": 0.55, "code <b>bold</b>": 0.41, "forum & chat": 0.33, "web": 0.27}
HOSTILE = '<script>alert("x")</script> & <img src="http://example.invalid/a.png"> plain words'


def summary() -> dict[str, Any]:
    def results(loss: float) -> dict[str, Any]:
        def one(x: float, accuracy: float | None) -> dict[str, Any]:
            return {"loss": x, "perplexity": float(np.exp(x)), "accuracy": accuracy, "documents": 120, "tokens": 61234}

        return {"encyclopedia": one(loss - 0.3, None), "last word": one(loss + 0.3, 0.2468)}

    losses = {"warm": 5.91234, "bliss": 5.10111, "random": 5.25555, "full": 5.2017}
    return {
        "heldout_loss": losses,
        "heldout": {arm: results(loss) for arm, loss in losses.items()},
        "tokens": {
            "warm": 400_000,
            "bliss": 1_234_567,
            "random": 1_234_567,
            "full": 1_234_567,
            "pool": {"train": 7_654_321},
        },
        "seconds": {
            "tokenise": 4.21,
            "warm-up": 61.5,
            "round-1/fit": 48.9,
            "round-1/score": 12.3,
            "train": 142.0,
            "evaluate": 9.7,
        },
        "flops": {
            "warm-up": 1.1e13,
            "round-1/fit": 2.31e13,
            "round-1/score": 4.4e12,
            "train": 6.78e13,
            "evaluate": 2e12,
        },
        "kept_share_by_source": dict(zip(SOURCES, (0.431, 0.297, 0.142, 0.087, 0.043), strict=True)),
        "pool_share_by_source": dict(zip(SOURCES, (0.213, 0.187, 0.2, 0.2, 0.2), strict=True)),
        "kept_fraction_by_source": dict(zip(SOURCES, (0.52, 0.41, 0.18, 0.11, 0.052), strict=True)),
        "fidelity": [
            {"round": 1, "loss_rank_correlation": 0.912, "change_rank_correlation": 0.433},
            {"round": 2, "loss_rank_correlation": 0.887, "change_rank_correlation": 0.301},
        ],
        "rounds": [
            {"round": 1, "heldout_loss": {"bliss": 5.4, "random": 5.5}, "documents_kept": 1111, "threshold": 0.5123},
            {
                "round": 2,
                "heldout_loss": {"bliss": 5.10111, "random": 5.25555},
                "documents_kept": 1099,
                "threshold": 0.5321,
            },
        ],
        "verdict": "Selection favoured the encyclopedia <i>and</i> the speeches.",
    }


def run_json() -> dict[str, Any]:
    return {
        "name": "demo",
        "bilect_version": "0.1.0",
        "git_revision": "0123abc",
        "seed": 17,
        "started": "2026-01-02T03:04:05Z",
        "finished": "2026-01-02T03:09:05Z",
        "host": {"cpu": "2 cores", "memory": "8 GB"},
        "versions": {"torch": "2.9.0", "transformers": "5.1.0"},
        "stages": {"warm-up": {"seconds": 61.5, "flops": 1.1e13, "tokens": 400_000}},
    }


def write_run(folder: Path, rounds: int = 2) -> Path:
    """Write the run into `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    (folder / "summary.json").write_text(json.dumps(summary()))
    (folder / "run.json").write_text(json.dumps(run_json()))
    (folder / "config.yaml").write_text("name: demo\nseed: 17\nnote: <u>under</u>\n")
    for r in range(1, rounds + 1):
        here = folder / f"round-{r}"
        (here / "scores").mkdir(parents=True)
        rows = []
        for t in range(300):
            decay = float(np.exp(-t / 120))
            rows.append(
                {
                    "step": t,
                    "lower_loss": 5.5 - 0.2 * r + 0.6 * decay + rng.normal(0, 0.12),
                    "upper_loss": 5.1 - 0.2 * r + 0.8 * decay + rng.normal(0, 0.16),
                    "kl": 0.05 + 0.1 * (1 - decay) + abs(rng.normal(0, 0.01)),
                    "residual": 10 ** (-0.4 - t / 400 + rng.normal(0, 0.1)) if t % 20 == 0 else None,
                    "weight_entropy": 2.6,
                    "effective_sample_size": 15.9 - 3 * (1 - decay) + rng.normal(0, 0.3),
                    "score_mean": 0.5 - 0.05 * (1 - decay),
                    "score_std": 0.01 + 0.13 * (1 - decay),
                    "score_min": 0.45 - 0.35 * (1 - decay),
                    "score_max": 0.52 + 0.4 * (1 - decay),
                    "learning_rate": 1e-5,
                    "seconds": 0.11,
                }
            )
        (here / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for part, (source, centre) in enumerate(SOURCES.items()):
            n = 400 + 150 * part
            score = np.clip(rng.normal(centre, 0.09, n) + 0.12 * (rng.random(n) < 0.15), 0.01, 0.99)
            table = pa.table(
                {
                    "doc_id": [f"{source}-{i}" for i in range(n)],
                    "source": [source] * n,
                    "n_tokens": rng.integers(50, 1024, n),
                    "score": pa.array(score, pa.float32()),
                }
            )
            pq.write_table(table, here / "scores" / f"part-{part}.parquet")
        names = list(SOURCES)
        document = {"source": names[0], "n_tokens": 512, "text": "A paragraph of plain prose about rivers.\n\n" * 12}
        best = [{"doc_id": f"b{i}", "score": 0.98 - i / 100, **document} for i in range(4)]
        worst = [{**document, "doc_id": f"w{i}", "score": 0.02 + i / 100, "source": names[-1]} for i in range(4)]
        worst[0] |= {"text": HOSTILE, "source": names[2], "doc_id": "<w0>"}
        (here / "extremes.json").write_text(json.dumps({"best": best, "worst": worst}))
    return folder
