"""``--quiet`` and ``--json``: what a program reads is the result and nothing else."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from typer.testing import CliRunner

from bilect.cli.commands import app
from bilect.cli.output import shown
from bilect.runtime.terminal import PlainConsole, silenced
from tests.corpus import tiny_settings, write_corpus

WITH_RESULT = {"choose", "run", "warmup", "fit", "score", "select", "train", "eval", "compare", "export", "report",
               "verify", "doctor", "inspect", "tasks"}  # fmt: skip


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A folder of scores: of a, 0.0 to 0.9, of b 0.05 to 0.95; documents of 10 tokens."""
    folder = tmp_path_factory.mktemp("scored") / "scores"
    folder.mkdir()
    rows = [(f"{s}{i}", s, 10, i / 10 + (s == "b") / 20) for s in "ab" for i in range(10)]
    names = ("doc_id", "source", "n_tokens", "score")
    pq.write_table(pa.table(dict(zip(names, zip(*rows, strict=True), strict=True))), folder / "00000-x.parquet")
    return folder


def test_the_result_alone_is_on_standard_output(scored, tmp_path):
    """Of a real process, whose output no runner of tests has replaced."""
    words = ["select", scored, "--keep", "0.25", "--out", tmp_path / "kept", "--json"]
    command = [sys.executable, "-m", "bilect", *map(str, words)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=100)
    result = json.loads(process.stdout)
    assert process.returncode == 0 and process.stdout.count("\n") == 1
    assert (result["documents"], result["tokens"], result["pool_tokens"]) == (5, 50, 200)
    assert result["threshold"] == pytest.approx(0.75) and result["kept_share"] == {"a": 0.4, "b": 0.6}
    assert result["out"] == str(tmp_path / "kept") and (tmp_path / "kept" / "kept.parquet").is_file()
    assert "source" in process.stderr  # the table, for people


def test_quiet_says_nothing_but_errors(scored, tmp_path, said):
    assert said("select", scored, "--keep", "0.25", "--out", tmp_path / "kept", "--quiet") == (0, "", "")
    assert pq.read_metadata(tmp_path / "kept" / "kept.parquet").num_rows == 5
    code, out, err = said("select", scored, "--keep", "2", "--out", tmp_path / "no", "--quiet")
    assert (code, out) == (2, "") and err.startswith("bilect: --keep 2: expected a share") and err.count("\n") == 1


def test_an_error_leaves_standard_output_empty(scored, said):
    code, out, err = said("select", scored, "--tokens", "many", "--json")
    assert (code, out) == (2, "") and "--tokens many" in err
    code, out, err = said("select", scored, "--quiet", "--json")
    assert (code, out) == (2, "") and "give one of them" in err


def test_stages_plans_and_reports(tmp_path, said):
    """Of a run by the cheapest method, in one process."""
    write_corpus(tmp_path, pool=60)
    settings = tiny_settings(tmp_path, method="dsir", controls=["random"])
    for part in (*settings["warmup"].values(), settings["training"]):
        part["steps"] = 2
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))

    def result(*words):
        code, out, err = said(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    run = tmp_path / "run"
    plan = result("run", tmp_path / "c.yaml", "--out", run, "--dry-run")
    assert not run.exists() and [s["done"] for s in plan["stages"]] == [False] * len(plan["stages"])
    assert plan["left"]["tokens"] == sum(s["tokens"] for s in plan["stages"]) > 0
    part = result("select", tmp_path / "c.yaml", "--out", run)
    kept = part["stages"]["round 1: select dsir"]
    assert kept["documents"] == pq.read_metadata(run / "round-1" / "selected" / "kept.parquet").num_rows
    assert "made_of" not in kept and not any(": train" in name for name in part["stages"])
    whole = result("run", run)
    summary = json.loads((run / "summary.json").read_text())
    assert {k: whole[k] for k in summary} == summary and whole["report"] == str(run / "report.html")
    assert result("report", run)["files"] == [str(run / "report.html")]
    exported = result("export", run / "round-1" / "selected", "--to", "doc-ids", "--out", tmp_path / "ids")
    assert exported["documents"] == kept["documents"] and exported["tokens"] == kept["tokens"]


def test_every_command_with_a_result_has_both_and_no_other():
    options = {c.callback.__name__: {*inspect.signature(c.callback).parameters} for c in app.registered_commands}
    names = {c.name or c.callback.__name__: options[c.callback.__name__] for c in app.registered_commands}
    assert {name for name, own in names.items() if {"quiet", "as_json"} <= own} == WITH_RESULT


def called(command, *words):
    small = typer.Typer()
    small.command()(shown(command))
    return CliRunner().invoke(small, words)


def test_what_json_cannot_hold_and_the_exit_code():
    def command(name: str = "x") -> object:
        print("for people")
        return {"path": Path("a") / name, "none": float("nan"), "all": [1, (2.5, float("inf"))], "é": "é"}, 3

    result = called(command, "--json", "--name", "b")
    assert result.exit_code == 3 and result.stderr == "for people\n"
    assert result.stdout == '{"path": "a/b", "none": null, "all": [1, [2.5, null]], "é": "é"}\n'
    assert called(command, "--quiet").output == "" and called(command).output == "for people\n"


def test_of_several_ranks_one_speaks(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert called(lambda: {"a": 1}, "--json").stdout == ""


def test_consoles_are_silent_within_only(capsys):
    with silenced():
        PlainConsole(stderr=True).print("progress")
        print("a library")
    PlainConsole(stderr=True).print("later")
    assert capsys.readouterr() == ("", "later\n")
