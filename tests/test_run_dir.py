"""Stages: done once, atomic, repeated when what they depend on changes."""

import json

import pytest

from bilect.run_dir import RunDir, content_hash, derive_seed, write_json, write_text


def test_stage_runs_once_per_key(tmp_path):
    calls = []

    def action(scratch):
        calls.append(1)
        (scratch / "round-1").mkdir()
        (scratch / "round-1" / "x.txt").write_text(f"{len(calls)}")
        return {"tokens": 7}

    run = RunDir(tmp_path / "r")
    record = run.stage("a", action, settings={"k": 1})
    assert record["tokens"] == 7 and record["seconds"] >= 0
    assert RunDir(tmp_path / "r").stage("a", action, settings={"k": 1}) == record
    assert len(calls) == 1
    run.stage("a", action, settings={"k": 2})
    assert (tmp_path / "r" / "round-1" / "x.txt").read_text() == "2"
    assert not (tmp_path / "r" / ".partial").exists()


def test_a_stage_depends_on_the_stages_before_it(tmp_path):
    run = RunDir(tmp_path)
    run.stage("a", lambda s: {}, settings=1)
    first = run.stage("b", lambda s: {}, settings=1, after=["a"])["key"]
    run.stage("a", lambda s: {}, settings=2)
    assert run.stage("b", lambda s: {}, settings=1, after=["a"])["key"] != first


def test_a_failing_stage_leaves_earlier_results_alone(tmp_path):
    run = RunDir(tmp_path)

    def good(scratch):
        (scratch / "model").mkdir()
        (scratch / "model" / "w").write_text("old")
        return {}

    def bad(scratch):
        (scratch / "model").mkdir()
        (scratch / "model" / "w").write_text("new")
        raise RuntimeError("power cut")

    run.stage("a", good, settings=1)
    with pytest.raises(RuntimeError):
        run.stage("a", bad, settings=2)
    assert (tmp_path / "model" / "w").read_text() == "old"
    assert json.loads((tmp_path / "run.json").read_text())["stages"]["a"]["key"] == run.key("a", 1)


def test_results_land_beside_those_of_other_stages(tmp_path):
    run = RunDir(tmp_path)

    def writes(*files):
        def action(scratch):
            for file in files:
                path = scratch / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(file)
            return {}

        return action

    run.stage("fit", writes("round-1/metrics.jsonl", "round-1/proxy/w"), settings=1)
    run.stage("train", writes("round-1/target/w", "controls/random/round-1/target/w"), settings=1)
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and p.name != "run.json")
    assert found == ["controls/random/round-1/target/w", "round-1/metrics.jsonl", "round-1/proxy/w", "round-1/target/w"]


def test_manifest_records_where_and_with_what(tmp_path):
    run = RunDir(tmp_path, seed=3)
    run.finish()
    manifest = json.loads((tmp_path / "run.json").read_text())
    assert manifest["seed"] == 3 and manifest["versions"]["torch"] and manifest["started"] <= manifest["finished"]


def test_atomic_writes_keep_the_old_file_on_failure(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "\ud800")
    assert json.loads(file.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_seeds_and_hashes_are_stable(tmp_path):
    assert derive_seed(0, "fit", 1) == derive_seed(0, "fit", 1) != derive_seed(0, "fit", 2) != derive_seed(1, "fit", 2)
    assert 0 <= derive_seed(5, "x") < 2**31
    (tmp_path / "f").write_text("abc")
    assert content_hash(tmp_path / "f") == "ba7816bf8f01cfea"  # SHA-256 of "abc"
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
