"""Whole runs on a tiny corpus: what is chosen, what is written, and what is done again (kills: test_resume.py)."""

import json
import math
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import yaml

from bilect.cli.commands import main
from bilect.config import parse_config
from bilect.errors import BilectError
from bilect.pipeline.stages import run
from tests.corpus import tiny_settings


def test_the_target_domain_is_kept(finished):
    _, summary = finished
    share, pool = summary["kept_share_by_source"]["maths"], summary["pool_share_by_source"]["maths"]
    assert pool == pytest.approx(1 / 3, abs=0.1)
    assert share > 0.9
    assert summary["heldout_loss"]["bliss"] < summary["heldout_loss"]["random"] - 0.05


def test_arms_train_on_equal_tokens(finished):
    _, summary = finished
    tokens = summary["tokens"]
    assert tokens["bliss"] == tokens["random"] == tokens["full"] == 2 * (30 + 4) * 4 * 48


def test_summary_agrees_with_the_files(finished, corpus):
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    kept = pq.read_table(out / "round-2" / "selected" / "kept.parquet").to_pylist()
    scores = {
        r["doc_id"]: r for p in (out / "round-2" / "scores").glob("*.parquet") for r in pq.read_table(p).to_pylist()
    }
    assert summary["rounds"][1]["documents_kept"] == len(kept)
    assert min(r["score"] for r in kept) == pytest.approx(summary["rounds"][1]["threshold"])
    best = sorted(scores.values(), key=lambda r: (-r["score"], r["doc_id"]))[: len(kept)]
    assert [r["doc_id"] for r in kept] == [r["doc_id"] for r in best]
    tokens = sum(r["n_tokens"] for r in scores.values())
    kept_tokens = sum(r["n_tokens"] for r in kept)
    assert kept_tokens - kept[-1]["n_tokens"] < 0.2 * tokens <= kept_tokens
    texts = {r["id"]: r["text"] for r in map(json.loads, (corpus / "pool.jsonl").read_text().splitlines())}
    assert all(texts[r["doc_id"]].startswith(r["text"]) and r["text"] for r in kept)
    for arm in ("warm", "bliss", "random", "full"):
        figures = summary["heldout"][arm]["heldout"]
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert set(summary["heldout_loss"]) == {"warm", "bliss", "random", "full"}
    assert (out / "report.html").stat().st_size > 10_000


def test_rounds_take_disjoint_shards(finished):
    out, _ = finished
    ids = [
        {r for p in (out / f"round-{n}" / "scores").glob("*.parquet") for r in pq.read_table(p)["doc_id"].to_pylist()}
        for n in (1, 2)
    ]
    assert not ids[0] & ids[1] and len(ids[0]) + len(ids[1]) == 180  # a quarter of 240 went into the warm-up


def test_score_model_carries_over_and_proxy_is_reset(finished):
    import torch
    from safetensors.torch import load_file

    out, _ = finished
    metrics = [json.loads(line) for line in (out / "round-2" / "method" / "metrics.jsonl").read_text().splitlines()]
    first = [json.loads(line) for line in (out / "round-1" / "method" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["score_std"] > 3 * first[0]["score_std"]  # round 2 starts with scores that separate already
    warm, one, two = (
        load_file(out / p / "model.safetensors")
        for p in ("warmup/proxy", "round-1/method/proxy", "round-2/method/proxy")
    )
    assert all(not torch.equal(one[k], two[k]) for k in warm if one[k].dim() == 2)
    assert metrics[0]["lower_loss"] > metrics[-1]["lower_loss"]


def test_models_load_with_transformers_alone(finished):
    out, _ = finished
    script = (
        "import sys; from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer;"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/target');"
        "AutoTokenizer.from_pretrained(sys.argv[1] + '/target'); assert 'bilect' not in sys.modules; import bilect;"
        "print(type(AutoModel.from_pretrained(sys.argv[1] + '/score_model')).__name__)"
    )
    command = [sys.executable, "-c", script, str(out)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "ScoreModel"


def test_a_finished_run_is_not_repeated(finished, corpus):
    out, summary = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    again = run(parse_config(tiny_settings(corpus, rounds=2, controls=["random", "full"])), out)
    assert again == summary
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}


def test_only_what_changed_is_repeated(corpus, tmp_path):
    out = tmp_path / "run"
    run(parse_config(tiny_settings(corpus, controls=["random"])), out)
    stages = json.loads((out / "run.json").read_text())["stages"]
    run(parse_config(tiny_settings(corpus, controls=["random"], selection={"keep_ratio": 0.5})), out, repeat=True)
    after = json.loads((out / "run.json").read_text())["stages"]
    changed = {name for name in stages if stages[name]["key"] != after[name]["key"]}
    assert {n for n in changed if "fit" in n or "score" in n or "warm" in n or "tokenise" in n} == set()
    assert {"round 1: select bliss", "round 1: train bliss", "round 1: train random"} <= changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"controls": ["none"]}, "controls"),
        ({"selection": {"keep_ratio": 1.5}}, "selection.keep_ratio"),
        ({"fitt": {}}, "did you mean 'fit'"),
        ({"models": {"proxy": "/nowhere/model"}}, "no directory /nowhere/model"),
        ({"models": {"proxy": {"hidden_size": 8}}}, "model_type"),
    ],
)
def test_bad_settings_are_one_line(corpus, tmp_path, change, message):
    with pytest.raises(BilectError, match=message) as caught:
        run(parse_config(tiny_settings(corpus, **change)), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_cli_errors_exit_with_2(corpus, tmp_path, monkeypatch, capsys):
    config_file = tmp_path / "config.yaml"
    settings = tiny_settings(corpus)
    settings["data"]["lower_data"] = [{"path": str(tmp_path / "missing.jsonl")}]
    config_file.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(sys, "argv", ["bilect", "run", str(config_file), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"bilect: data: no file or directory {tmp_path / 'missing.jsonl'}\n"
    assert not (tmp_path / "out").exists()


def test_held_out_data_must_differ_from_upper_data(corpus, tmp_path):
    settings = tiny_settings(corpus)
    settings["data"]["heldout_data"] = settings["data"]["upper_data"]
    with pytest.raises(BilectError, match="is in upper_data too"):
        run(parse_config(settings), tmp_path / "run")


def test_help_is_quick():
    import time

    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "bilect.cli", "--help"], check=True, capture_output=True, timeout=60)
    first = time.perf_counter() - start
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "bilect.cli", "--help"], check=True, capture_output=True, timeout=60)
    assert min(first, time.perf_counter() - start) < 2.0  # a second on a quiet machine
