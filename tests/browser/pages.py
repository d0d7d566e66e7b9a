"""The pages that the browser opens: a report, a comparison, verify's, several runs, and a run full of hostile text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bilect.compare.page import render as comparison_page
from bilect.report import write_comparison, write_report
from bilect.verify.page import render as verify_page
from tests.compare import test_comparison
from tests.report import synthetic

SCRIPT = "<script>document.title = 'taken'; alert(1)</script><img src=x onerror=\"alert(2)\"></script><!--<script>"
RIGHT_TO_LEFT = "\u202eevil\u2066 \u05e9\u05dc\u05d5\u05dd \u0000\u001b[31m\u0085\u2028 \U0001f600"
SOURCES = 5000


def write_all(folder: Path) -> dict[str, Path]:
    run = synthetic.write_online(synthetic.write_run(folder / "run", rounds=1), rounds=1)
    dsir = run / "controls/dsir/round-1"
    shutil.copytree(run / "round-1/scores", dsir / "scores")
    synthetic.write_selection(run, dsir, cut=0.6)
    other = shutil.copytree(run, folder / "other")
    (other / "config.yaml").write_text("name: other\nseed: 18\n")
    shutil.rmtree(other / "round-1/selected")
    shutil.copytree(dsir / "selected", other / "round-1/selected")
    pages = {
        "report": write_report(run),
        "choice": write_report(synthetic.write_choice(folder / "choice")),
        "hostile": write_report(write_hostile(folder / "hostile")),
        "several": write_comparison([run, other], folder / "several.html"),
        "comparison": folder / "comparison.html",
        "verify": folder / "verify.html",
    }
    with pytest.MonkeyPatch.context() as patch:
        compared = test_comparison.compared(patch, test_comparison.runs())
    pages["comparison"].write_text(comparison_page(compared), encoding="utf-8")
    pages["verify"].write_text(verify_page(verify_result()), encoding="utf-8")
    return pages


def write_hostile(folder: Path) -> Path:
    """A run whose every text tries to get out of the page, with very many sources and very long lines."""
    here = folder / "round-1"
    (here / "scores").mkdir(parents=True)
    n = 2 * SOURCES
    names = [f"{SCRIPT if i == 0 else RIGHT_TO_LEFT if i == 1 else 'source'} {i}" for i in range(SOURCES)]
    ids = [f"{i}-{SCRIPT}{RIGHT_TO_LEFT}" for i in range(n)]
    score = np.random.default_rng(0).normal(size=n)
    columns = {"doc_id": ids, "source": [names[i % SOURCES] for i in range(n)]}
    table = pa.table({**columns, "n_tokens": pa.array([100] * n, pa.int32()), "score": pa.array(score, pa.float32())})
    pq.write_table(table, here / "scores/00000.parquet")
    kept = pa.array(score > 1)
    (here / "selected").mkdir()
    pq.write_table(table.filter(kept), here / "selected/kept.parquet")
    dropped = table.filter(pa.array(score <= 1))
    pq.write_table(
        dropped.append_column("reason", pa.array([SCRIPT] * len(dropped))), here / "selected/dropped.parquet"
    )
    long = f"{SCRIPT}{'<&>' * 333_333}{RIGHT_TO_LEFT}"
    texts = [long if i % 2000 == 0 else f"{SCRIPT} {RIGHT_TO_LEFT} {i}" for i in range(n)]
    texts[1] = "x" * 1_000_000
    synthetic.write_tokens(folder / "tokens/pool", "0.arrow", pa.table({"doc_id": ids, "text": texts}))
    document = {"doc_id": SCRIPT, "source": SCRIPT, "n_tokens": 9, "score": 0.5, "text": long}
    (here / "extremes.json").write_text(json.dumps({"best": [document], "worst": [document]}))
    (folder / "config.yaml").write_text(f"method: {json.dumps(SCRIPT)}\nname: x\n")
    online = synthetic.online("blade")
    for entry in online["entries"]:
        entry["documents"] = [{"text": [SCRIPT, RIGHT_TO_LEFT] * 300, "delta": [0.5, -0.5] * 300, "mask": [True] * 600}]
        entry["sources"] = {name: {"tokens": 9, "kept": 0.5} for name in names[:100]}
    target = folder / "controls" / "blade" / "round-1" / "target"
    target.mkdir(parents=True)
    (target / "online.json").write_text(json.dumps(online))
    summary = synthetic.summary()
    summary["heldout_loss"] = {SCRIPT: 5.0, "random": 5.2, RIGHT_TO_LEFT: 5.3}
    summary["heldout"] = {arm: {SCRIPT: {"loss": loss}} for arm, loss in summary["heldout_loss"].items()}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "run.json").write_text(json.dumps({**synthetic.run_json(), "name": SCRIPT, "host": {SCRIPT: SCRIPT}}))
    return folder


def verify_result() -> dict[str, Any]:
    """The content of a verify.json, as small as the page takes it."""
    problem = {"problem": "least squares"}
    implicit = [
        {**problem, "solver": s, "damping": 0.1, "k": k, "cosine": 1 - 0.5 / k}
        for s in ("cg", "neumann")
        for k in (1, 2, 4)
    ]
    at = (1, 2, 4)
    figures = {
        "implicit": [*implicit, {**problem, "solver": "identity", "damping": None, "k": 0, "cosine": 0.5}],
        "penalty": [{**problem, "penalty": 10.0 * k, "relative_error": 0.1 / k, "cosine": 0.9} for k in at],
        "steps": [{**problem, "baseline": "model", "optimizer": "adam", "k": k, "cosine": 0.8} for k in at],
        "warm_up": [
            {**problem, "estimator": "penalty", "warm_up": k, "cosine": 0.7, "cosine_unrolled": 0.6}
            for k in at
        ],
        "learning_rate": [
            {**problem, "baseline": b, "optimizer": "adam", "learning_rate": 0.1 * k, "cosine": 0.4}
            for b in ("model", "matched") for k in at
        ],
        "sync": [
            {**problem, "reference": "kept", "baseline": "model", "step": k, "cosine": 0.4, "distance": 0.1} for k in at
        ],
        "selections": [
            {
                **problem, "k": 4, "n": 16, "seed": 0, "best": 0.1,
                "curves": [{"estimate": "exact", "kind": "top", "gap": [1, 0.5, 0.2], "phi": [0.3, 0.2, 0.1]}],
                "rows": [{"choice": "exact, top", "overlap": 0.9, "regret": 0.01, "better": 2.0}],
            }
        ],
    }  # fmt: skip
    claim = {"text": "Neumann's d is exact", "value": 1e-7, "tolerance": "below 1e-6", "why": "theory", "passed": True}
    return {
        "figures": figures, "claims": [claim, {**claim, "text": SCRIPT, "passed": False}], "passed": False,
        "quick": True,
        "reported": [{"text": "cosine of identity", "value": 0.5}], "seconds": 3.0,
        "versions": {"bilect": "0.1.0", "torch": "2.13.0"},
    }  # fmt: skip
