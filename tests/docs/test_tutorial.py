"""The tutorial as somebody who copies it types it: every command of it, in order, in an empty folder."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bilect.cli.commands import main
from bilect.demo import corpus as demo
from tests.corpus import write_corpus
from tests.docs.pages import ROOT, blocks
from tests.docs.test_code_blocks import commands

LINES = [words for block in blocks(ROOT / "docs" / "tutorial.md", "sh") for words in commands(block)]


def small_corpus(directory: Path) -> None:
    """Stands for the demo's text: the same files, fields and names of sources."""
    write_corpus(directory, 120)
    for file in directory.iterdir():
        text = file.read_text().replace('"weather"', '"scripture"').replace('"maths"', '"factbook"')
        file.write_text(text)


def test_every_command_works_where_the_one_before_has_left_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small: None, small_init: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "build_demo_corpus", small_corpus)
    ran = []
    for words in LINES:
        match words:
            case ["pip", *_]:
                continue
            case ["python", "-c", code]:
                exec(code, {})
            case ["ls", folder]:
                assert sorted(p.name for p in Path(folder).iterdir()) == ["heldout.jsonl", "pool.jsonl", "upper.jsonl"]
            case ["bilect", command, *rest]:
                only_planned = ["--dry-run"] if command == "compare" else []  # tests/compare carries them out
                monkeypatch.setattr(sys, "argv", ["bilect", command, *rest, *only_planned])
                main()
                ran.append(command)
            case _:
                pytest.fail(f"not known here: {shlex.join(words)}")
    assert ran == ["choose", "select", "select", "init", "run", "run", "compare"]
    assert "Plan of runs/mine" in (shown := capsys.readouterr().out) and "Plan of runs/compare" in shown
    kept = pq.read_table(tmp_path / "kept" / "round-1" / "selected" / "kept.parquet").num_rows
    records = (tmp_path / "kept" / "records" / "pool.jsonl").read_text().splitlines()
    assert kept == len(records) > 0 and {"id", "text", "source"} <= set(json.loads(records[0]))
    assert len(list((tmp_path / "kept" / "selections").iterdir())) == 2
    assert set(json.loads((tmp_path / "runs/mine/summary.json").read_text())["heldout_loss"]) == {
        "warm",
        "excess",
        "random",
    }
    for page in ("kept/report.html", "runs/mine/report.html"):
        assert "<main" in (tmp_path / page).read_text(encoding="utf-8")
