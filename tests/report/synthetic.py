"""Run directories with every file the report reads, made up from a fixed seed."""

from __future__ import annotations

import json
import shutil
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
        "cost": {
            "seconds": {"selection": 122.7, "bliss": 70.0, "random": 69.0},
            "flops": {"selection": 3.8e13, "bliss": 3.39e13, "random": 3.39e13},
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
        write_selection(folder, here)
        for arm in ("bliss", "random"):
            target = (here if arm == "bliss" else folder / f"controls/{arm}/round-{r}") / "target"
            target.mkdir(parents=True)
            lines = [{"step": 10 * i, "loss": 6.0 - 0.01 * i - 0.2 * r} for i in range(1, 101)]
            (target / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        names = list(SOURCES)
        document = {"source": names[0], "n_tokens": 512, "text": "A paragraph of plain prose about rivers.\n\n" * 12}
        best = [{"doc_id": f"b{i}", "score": 0.98 - i / 100, **document} for i in range(4)]
        worst = [{**document, "doc_id": f"w{i}", "score": 0.02 + i / 100, "source": names[-1]} for i in range(4)]
        worst[0] |= {"text": HOSTILE, "source": names[2], "doc_id": "<w0>"}
        (here / "extremes.json").write_text(json.dumps({"best": best, "worst": worst}))
    return folder


def write_selection(folder: Path, here: Path, cut: float = 0.5, keep: str = "selected") -> None:
    """Split the scores in `here` at `cut`; kept documents have their text, that of all is in the token files."""
    scores = pa.concat_tables([pq.read_table(path) for path in sorted((here / "scores").glob("*.parquet"))])
    scores = scores.sort_by([("score", "descending")])
    scores = scores.append_column("rank", pa.array(range(1, len(scores) + 1), pa.int64()))
    texts = [f"{HOSTILE if i % 7 == 3 else 'Rivers and hills'}, document {name}" for i, name in
             enumerate(scores["doc_id"].to_pylist())]  # fmt: skip
    above = pa.array([score >= cut for score in scores["score"].to_pylist()])
    below = pa.array([not found.as_py() for found in above])
    (here / keep).mkdir()
    with_text = scores.append_column("text", pa.array(texts))
    pq.write_table(with_text.filter(above), here / keep / "kept.parquet")
    reasons = ["below the cut" if i % 3 else "near-duplicate of a b" for i in range(sum(b.as_py() for b in below))]
    pq.write_table(scores.filter(below).append_column("reason", pa.array(reasons)), here / keep / "dropped.parquet")
    write_tokens(folder / "tokens/pool", f"{here.name}.arrow", with_text.select(["doc_id", "text"]))


def write_tokens(folder: Path, name: str, table: pa.Table) -> None:
    """A token file, as far as the report reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)


def write_choice(folder: Path) -> Path:
    """A directory that only chose: no target, no held-out results, no summary; returns it."""
    write_run(folder, rounds=1)
    (folder / "summary.json").unlink()
    run = {**run_json(), "stages": {"choose": {"seconds": 3.5, "flops": 1e12, "tokens": 400_000}}}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "config.yaml").write_text("method: dsir\nseed: 17\n")
    (folder / "round-1/metrics.jsonl").unlink()
    shutil.rmtree(folder / "round-1/target")
    shutil.rmtree(folder / "controls")
    return folder


def online(method: str, **changes: Any) -> dict[str, Any]:
    """The content of an online.json: ten entries, synchronised every 100 steps where the method is `blade`."""
    if method == "random-token":
        stated = {"sync_every": None, "reference_steps": 0, "synchronisations": 0, "entries": _random(_entries(False))}
    elif method == "rho1":
        stated = {"sync_every": None, "reference_steps": 90, "synchronisations": 1, "entries": _entries(False)}
    else:
        stated = {"sync_every": 100, "reference_steps": 30, "synchronisations": 3, "entries": _entries(True)}
    return {"method": method, "keep_ratio": 0.6, **stated, **changes}


def _entries(synchronised: bool) -> list[dict[str, Any]]:
    words = ["The", " river", " rose", " over", " its", " banks", ".\n", "<i>", "no", "</i>", " & so", " on"] * 8
    rows = []
    for i in range(10):
        age = i % 3 if synchronised else i
        middle = -0.05 - 0.04 * age
        delta = {str(q): round(middle + 0.9 * (q - 0.5), 4) for q in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)}
        documents = []
        for d in range(2):
            each = [None, *(round(middle + 0.5 * float(np.sin(1.7 * t + d + i)), 4) for t in range(1, len(words)))]
            mask = [x is not None and x > middle - 0.1 for x in each]
            documents.append({"text": words, "delta": each, "mask": mask})
        rows.append(
            {
                "step": 30 * i,
                "kept": 0.6,
                "delta": delta,
                "share_positive": round(0.48 - 0.04 * age, 4),
                "distance_reference": 1.2 + 0.3 * age,
                "distance_last_sync": 0.3 + 0.3 * age,
                "sources": {"books": {"tokens": 512, "kept": 0.5 + 0.01 * i}, "web <b>": {"tokens": 256, "kept": 0.7}},
                "agreement": None if i == 0 else 0.83 - 0.01 * i,
                "oracle_loss": {"selected": 3.1 - 0.02 * i, "all": 3.4 - 0.02 * i},
                "documents": documents,
            }
        )
    return rows


def _random(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As a random selection records them: Delta is the uniform numbers it chose by, and there is no reference."""
    for row in rows:
        row |= {"delta": {q: float(q) for q in row["delta"]}, "share_positive": 1.0, "agreement": None}
        del row["distance_reference"], row["distance_last_sync"], row["oracle_loss"]
        for document in row["documents"]:
            document["delta"] = [None, *(0.37 for _ in document["delta"][1:])]
    return rows


def write_online(folder: Path, rounds: int = 1) -> Path:
    """Write every arm's online.json of each round into the run directory `folder` and return it."""
    for r in range(1, rounds + 1):
        for arm in ("bliss", "random-token", "rho1", "blade"):
            here = folder / ("" if arm == "bliss" else f"controls/{arm}") / f"round-{r}" / "target"
            here.mkdir(parents=True, exist_ok=True)
            (here / "online.json").write_text(json.dumps(online("blade" if arm == "bliss" else arm)))
    return folder
