"""After a run: other selections from its scores, scores of other files, the plan of what is left, single stages."""

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from typer.testing import CliRunner

from bilect.cli.commands import app
from bilect.config import parse_config
from bilect.errors import BilectError
from bilect.pipeline.plan import plan_run
from bilect.pipeline.reuse import score_files, select_again
from bilect.pipeline.stages import run
from tests.corpus import tiny_settings


def scores_of(folder: Path) -> dict[str, dict]:
    return {r["doc_id"]: r for p in folder.glob("*.parquet") for r in pq.read_table(p).to_pylist()}


def texts_of(corpus: Path) -> dict[str, str]:
    return {r["id"]: r["text"] for r in map(json.loads, (corpus / "pool.jsonl").read_text().splitlines())}


def test_another_budget_is_the_top_of_the_same_scores(finished, corpus, tmp_path):
    out, _ = finished
    chosen, folder = select_again(out, tmp_path / "half", {"keep_ratio": 0.5})
    scores = scores_of(out / "round-2" / "scores")
    best = sorted(scores.values(), key=lambda r: (-r["score"], r["doc_id"]))
    kept, dropped = (pq.read_table(folder / f"{n}.parquet").to_pylist() for n in ("kept", "dropped"))
    assert [r["doc_id"] for r in kept + dropped] == [r["doc_id"] for r in best]
    assert [r["rank"] for r in kept + dropped] == list(range(1, len(best) + 1))
    assert {r["reason"] for r in dropped} == {"below the cut"}
    total = sum(r["n_tokens"] for r in best)
    assert chosen.tokens - kept[-1]["n_tokens"] < 0.5 * total <= chosen.tokens == sum(r["n_tokens"] for r in kept)
    texts = texts_of(corpus)
    assert all(r["text"] and texts[r["doc_id"]].startswith(r["text"]) for r in kept)


def test_formats_and_rounds(finished, tmp_path):
    out, _ = finished
    _, parquet = select_again(out, tmp_path / "p", {"top_k": 7}, number=1)
    _, packed = select_again(out, tmp_path / "j", {"top_k": 7, "format": "jsonl.zst"}, number=1)
    with zstandard.open(packed / "kept.jsonl.zst", "rb") as file:
        lines = [json.loads(line) for line in io.TextIOWrapper(file, "utf-8")]
    rows = pq.read_table(parquet / "kept.parquet").to_pylist()
    assert len(rows) == 7 and [r["doc_id"] for r in lines] == [r["doc_id"] for r in rows]
    assert [r["text"] for r in lines] == [r["text"] for r in rows]
    assert set(lines[0]) == {"doc_id", "source", "n_tokens", "score", "rank", "text"}
    assert sorted(p.name for p in packed.iterdir()) == [
        "dropped.parquet",
        "kept.jsonl.zst",
        "records",
        "selection.json",
    ]
    with pytest.raises(BilectError, match="scores of round 1, 2, not of 3"):
        select_again(out, tmp_path / "n", number=3)


def test_the_command_line_selects(finished, tmp_path):
    out, _ = finished
    call = ["select", str(out), "--tokens", "0.5k", "--max-share", "maths=0.5", "--out", str(tmp_path / "s")]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    kept = pq.read_table(tmp_path / "s" / "kept.parquet").to_pylist()
    assert sum(r["n_tokens"] for r in kept if r["source"] == "maths") <= 250
    assert 500 <= sum(r["n_tokens"] for r in kept) < 548
    dropped = pq.read_table(tmp_path / "s" / "dropped.parquet").to_pylist()
    assert any(r["reason"] == "its source is at its maximum share" and r["source"] == "maths" for r in dropped)


def test_scores_of_other_files_are_those_of_the_run(finished, corpus, tmp_path):
    out, _ = finished
    pool = (corpus / "pool.jsonl").read_text().splitlines(keepends=True)
    for number, part in enumerate((pool[:100], pool[100:])):
        (tmp_path / f"part{number}.jsonl").write_text("".join(part).replace('"text"', '"content"'))
    files = [str(tmp_path / "part*.jsonl")]
    with pytest.raises(BilectError, match=r"fields\.txt"):
        score_files(out, files, tmp_path / "scored", fields={"txt": "content"})
    figures = score_files(out, files, tmp_path / "scored", fields={"text": "content"})
    assert figures["documents"] == 240
    found = scores_of(tmp_path / "scored" / "scores")
    assert len(found) == 240 and len(list((tmp_path / "scored" / "scores").iterdir())) == 2
    for doc_id, row in scores_of(out / "round-2" / "scores").items():
        assert found[doc_id]["n_tokens"] == row["n_tokens"] and found[doc_id]["source"] == row["source"]
        assert found[doc_id]["score"] == pytest.approx(row["score"], abs=1e-6)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "scored" / "scores").iterdir()}
    assert score_files(out, files, tmp_path / "scored", fields={"text": "content"}) == figures
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "scored" / "scores").iterdir()}
    _, folder = select_again(tmp_path / "scored", None, {"keep_ratio": 0.1})
    assert folder == tmp_path / "scored" / "selections" / "keep_ratio-0.1"
    kept = pq.read_table(folder / "kept.parquet").to_pylist()
    assert {r["source"] for r in kept} == {"maths"} and all(r["text"] for r in kept)


def test_another_selection_is_replaced_only_when_told(finished, tmp_path):
    out, _ = finished
    select_again(out, tmp_path / "s", {"top_k": 7})
    before = (tmp_path / "s" / "kept.parquet").read_bytes()
    for source, settings, seed in (
        (out, {"top_k": 8}, 0),
        (out, {"top_k": 7}, 1),
        (out / "round-1" / "scores", {"top_k": 7}, 0),
    ):
        with pytest.raises(BilectError, match="holds another selection"):
            select_again(source, tmp_path / "s", settings, seed=seed)
    with pytest.raises(BilectError, match="or a run: say --yes"):
        select_again(out, out, {"top_k": 8})
    assert (tmp_path / "s" / "kept.parquet").read_bytes() == before
    select_again(out, tmp_path / "s", {"top_k": 7})
    call = ["select", str(out), "--top-k", "8", "--out", str(tmp_path / "s")]
    assert "another selection" in str(CliRunner().invoke(app, call).exception)
    assert CliRunner().invoke(app, [*call, "--yes"]).exit_code == 0
    assert pq.read_table(tmp_path / "s" / "kept.parquet").num_rows == 8


def test_other_scores_are_replaced_only_when_told(finished, corpus, tmp_path):
    out, _ = finished
    pool = (corpus / "pool.jsonl").read_text().splitlines(keepends=True)
    file, scored = tmp_path / "some.jsonl", tmp_path / "scored"
    file.write_text("".join(pool[:9]))
    score_files(out, [str(file)], scored)
    before = scores_of(scored / "scores")
    file.write_text("".join(pool[:12]))
    with pytest.raises(BilectError, match=r"some\.jsonl has changed.*say --yes"):
        score_files(out, [str(file)], scored)
    assert scores_of(scored / "scores") == before
    assert score_files(out, [str(file)], scored, repeat=True)["documents"] == 12 == len(scores_of(scored / "scores"))


def test_the_plan_agrees_with_the_run(finished, corpus, tmp_path):
    out, _ = finished
    config = parse_config(tiny_settings(corpus, rounds=2, controls=["random", "full"]))
    before = sorted(out.rglob("*"))
    plan = {line.name: line for line in plan_run(config, out)}
    assert sorted(out.rglob("*")) == before
    records = json.loads((out / "run.json").read_text())["stages"]
    assert list(plan) == list(records) and all(line.done for line in plan.values())
    for name, line in plan.items():
        if "train" in name or "warm up" in name:
            assert line.tokens == records[name]["tokens"]
            assert line.flops == pytest.approx(records[name]["flops"], rel=1e-6)
        elif any(word in name for word in ("fit bliss", "score", "evaluate", "pool")):
            assert line.tokens == pytest.approx(records[name]["tokens"], rel=0.25)
            assert line.flops == pytest.approx(records[name]["flops"], rel=0.25)
    changed = config.model_copy(update={"selection": config.selection.model_copy(update={"keep_ratio": 0.4})})
    left = {line.name for line in plan_run(changed, out) if not line.done}
    assert "round 1: select bliss" in left and "round 1: train random" in left
    assert not left & {"warm up proxy", "round 1: fit bliss", "round 1: score bliss"}
    assert (plan["warm up proxy"].batch, plan["round 1: fit bliss"].batch) == ("4 x 48 tokens", "8 + 4 documents")
    fresh = plan_run(config, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists() and not any(line.done for line in fresh)
    assert all(line.seconds >= 0 for line in fresh) and sum(line.seconds for line in fresh) > 0


def test_single_stages_add_up_to_the_run(finished, corpus, tmp_path):
    config = parse_config(tiny_settings(corpus, rounds=2, controls=["random", "full"]))
    out = tmp_path / "run"
    assert list(run(config, out, command="score", number=1))[-4:] == [
        f"round 1: {what} {arm}" for arm in ("bliss", "random") for what in ("fit", "score")
    ]
    assert not (out / "round-1" / "selected").exists() and not (out / "summary.json").exists()
    assert "evaluate warm" not in json.loads((out / "run.json").read_text())["stages"]
    trained = [name for name in run(config, out, command="train") if "train" in name]
    assert trained == [f"round 1: train {a}" for a in ("bliss", "random", "full")]
    assert "round 1: fidelity" in run(config, out, command="eval")  # of the round that is trained
    assert list(run(config, out, command="fit"))[-1] == "round 2: fit random"  # the next one
    with pytest.raises(BilectError, match="round 3: the config has rounds 1 to 2"):
        run(config, out, command="fit", number=3)
    summary, expected = run(config, out), dict(finished[1])
    for some in (summary, expected):
        some["cost"] = some["cost"]["flops"]
        del some["seconds"]
    assert summary == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "missing.yaml", "--out", "o"], "config: cannot read missing.yaml: No such file"),
        (["run", "c.yaml"], "run: --out DIR is missing"),
        (["fit", "."], "fit: . is not a run directory"),
        (["select", ".", "--tokens", "many"], "--tokens many: expected a number of tokens such as 25M"),
        (["select", ".", "--max-share", "0.5"], "--max-share 0.5: expected SOURCE=SHARE"),
        (["select", ".", "--keep", "0.5", "--top-k", "3"], "give one of keep_ratio and top_k|not keep_ratio and top_k"),
        (["select", ".", "--keep", "1.5"], "--keep 1.5: expected a share of the tokens"),
        (["select", "."], "select: no score files in ."),
        (["score", ".", "--data", "x.jsonl", "--out", "o"], "score: . has fitted nothing to score by yet"),
        (["score", ".", "--data", "x", "--field", "text", "--out", "o"], "--field text: expected NAME=FIELD"),
        (["report", "."], "report: . is not a run directory"),
        (["init", "c.yaml"], "init: c.yaml exists"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(yaml.safe_dump({"seed": 0}))
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, BilectError)
    assert any(part in str(result.exception) for part in message.split("|")) and "\n" not in str(result.exception)
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_a_document_that_repeats_a_text_is_not_selected(finished, tmp_path):
    """Its row stays in the token file; neither score nor selection may see it. An id that repeats is told apart."""
    out, _ = finished
    for number, text in enumerate(("sun rain wind " * 9, "proof lemma set " * 9, "sun rain wind " * 9)):
        (tmp_path / f"part{number}.jsonl").write_text(json.dumps({"id": "same", "text": text}) + "\n")
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.yaml").write_text((out / "config.yaml").read_text())
    for name in ("tokenizer", "tokens", "round-2"):
        (copy / name).symlink_to(out / name)
    figures = score_files(copy, [str(tmp_path / "part*.jsonl")], tmp_path / "scored")
    assert figures["documents"] == 2 and figures["skipped"] == {"duplicate text": 1}
    _, folder = select_again(tmp_path / "scored", None, {"keep_ratio": 1.0})
    kept = {r["doc_id"]: r["text"] for r in pq.read_table(folder / "kept.parquet").to_pylist()}
    assert {name: text[:5] for name, text in kept.items()} == {"part0/same": "sun r", "part1/same": "proof"}
