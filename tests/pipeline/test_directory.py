"""Stages: done once, atomic, repeated when what they depend on changes."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from bilect.errors import BilectError
from bilect.pipeline import directory as run_dir
from bilect.pipeline.directory import RunDir
from bilect.runtime.files import content_hash, write_json, write_text
from bilect.runtime.locks import locked
from bilect.runtime.seeds import derive_seed


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


class Killed(BaseException):
    """Stands for SIGKILL: nothing below the test catches it, and what follows does not happen."""


def test_scratch_of_an_interrupted_stage_is_kept_for_its_key_only(tmp_path):
    found = []

    def action(scratch):
        found.append(sorted(p.name for p in scratch.iterdir() if p.name != ".stage.json"))
        (scratch / ".checkpoint").write_text("half")
        (scratch / "result").write_text("r")
        if len(found) < 4:
            raise Killed
        return {}

    other = []
    for settings in (1, 1, 2, 2):
        run = RunDir(tmp_path / "r")
        try:
            run.stage("round 1: fit/<x>", action, settings=settings)
        except Killed:
            run.stage("other", lambda s: other.append(1) or {}, settings=1)  # leaves the scratch of the first alone
            assert [p.name for p in (tmp_path / "r" / ".partial").iterdir()] == ["round-1-fit-x"]
    assert found == [[], [".checkpoint", "result"], [], [".checkpoint", "result"]]
    assert other == [1]
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["result", "run.json"]


def test_a_kill_at_any_moment_of_the_move_loses_nothing(tmp_path, monkeypatch):
    """One after the other, every change to the disk after the action is the last one before the kill."""
    calls = []

    def write(text):
        def action(scratch):
            calls.append(text)
            for name in ("round-1/model/w", "round-1/model/deep/w", "round-1/a.txt", "b.txt"):
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                (scratch / name).write_text(text)
            return {"text": text}

        return action

    def contents(folder):
        return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.suffix != ".json"
                and p.is_file()}  # fmt: skip

    for moment in range(1, 40):
        folder = tmp_path / str(moment)
        RunDir(folder).stage("a", write("old"), settings=1)
        left = [moment]

        def counting(plain, left=left):
            def change(*arguments, **more):
                left[0] -= 1
                if left[0] == 0:
                    if plain is shutil.rmtree and not arguments[0].name.startswith("."):  # killed within it
                        next(p for p in arguments[0].rglob("*") if p.is_file()).unlink(missing_ok=True)
                    raise Killed
                return plain(*arguments, **more)

            return change

        with monkeypatch.context() as patch:
            patch.setattr(run_dir.os, "replace", counting(os.replace))
            patch.setattr(run_dir.shutil, "rmtree", counting(shutil.rmtree))
            try:
                RunDir(folder).stage("a", write("new"), settings=2)
                break
            except Killed:
                pass
        record = json.loads((folder / "run.json").read_text())["stages"].get("a")
        if record is not None:  # a record is never there without its results
            assert set(contents(folder).values()) >= {record["text"]}
            assert {contents(folder)[n] for n in ("b.txt", "round-1/a.txt", "round-1/model/w")} == {record["text"]}
        finished = (folder / ".partial" / "a" / ".finished.json").is_file()
        done, calls[:] = len(calls), []
        assert RunDir(folder).stage("a", write("new"), settings=2)["text"] == "new" and done
        assert (calls == []) == (finished or (record or {}).get("text") == "new")
        assert contents(folder) == {n: "new" for n in ("round-1/model/w", "round-1/model/deep/w", "round-1/a.txt",
                                                       "b.txt")}  # fmt: skip
        assert not (folder / ".partial").exists()
    assert 8 < moment < 39


def test_going_back_after_a_kill_in_the_move_does_the_stage_again(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    run.stage("a", lambda s: (s / "x").write_text("old") and {}, settings=1)
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "_move", staticmethod(lambda *_: (_ for _ in ()).throw(Killed)))
        with pytest.raises(Killed):
            run.stage("a", lambda s: (s / "x").write_text("new") and {}, settings=2)
    (tmp_path / "x").write_text("new")  # moved, but not recorded
    RunDir(tmp_path).stage("a", lambda s: (s / "x").write_text("old") and {}, settings=1)
    assert (tmp_path / "x").read_text() == "old"


def test_finishing_clears_what_no_stage_wants_any_more(tmp_path):
    run = RunDir(tmp_path)
    with pytest.raises(KeyError):
        run.stage("a", lambda s: {}[0], settings=1)
    assert (tmp_path / ".partial" / "a").is_dir()
    run.finish()
    assert not (tmp_path / ".partial").exists()


def test_two_processes_cannot_share_a_run_directory(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from bilect.runtime.locks import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "r")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        message = f"{tmp_path / 'r'} is in use by process {process.pid} on "
        with pytest.raises(BilectError, match=message) as caught, locked(tmp_path / "r"):
            pass
        assert "\n" not in str(caught.value)
    finally:
        process.kill()
        process.wait()
    for _ in range(2):
        with locked(tmp_path / "r"):  # the dead hold nothing
            assert (tmp_path / "r" / ".lock.holder").read_text().startswith(f"{os.getpid()} on ")


@pytest.mark.parametrize("text", ["{half", "[]", '{"stages": []}', "{}"])
def test_a_broken_manifest_is_one_line(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(BilectError, match=rf"^run: {tmp_path}/run.json is not a manifest .*delete it") as caught:
        RunDir(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_scratch_that_was_half_wiped_is_not_gone_on_from(tmp_path, monkeypatch):
    found = []

    def action(scratch):
        found.append((scratch / "part").exists())
        (scratch / "part").write_text("whole")
        raise Killed

    def wipe(*_, **__):
        raise Killed

    for settings, patched in ((1, False), (2, True), (1, False)):
        with monkeypatch.context() as patch:
            if patched:
                patch.setattr(run_dir.shutil, "rmtree", wipe)
            with pytest.raises(Killed):
                RunDir(tmp_path).stage("a", action, settings=settings)
    assert found == [False, False]
