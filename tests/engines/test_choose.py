"""A choice by two workers, killed again and again, is that of one process: the same files."""

import json
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bilect
from bilect.data.formats import _json
from bilect.errors import BilectError
from bilect.methods import dsir
from bilect.selection import near_duplicates, scoring
from tests.corpus import write_corpus
from tests.pipeline.test_choose import SMALL


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    write_corpus(tmp_path / "pool")
    for name in ("upper", "heldout"):
        (tmp_path / "pool" / f"{name}.jsonl").rename(tmp_path / f"{name}.jsonl")
    for module, name, value in ((_json, "SLICE_BYTES", 8000), (_json, "_BLOCK", 1000), (scoring, "ROWS_AT_ONCE", 50),
                                (dsir, "ROWS_OF_BLOCK", 60), (near_duplicates, "DOCUMENTS", 70)):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    return tmp_path


class KillsWorkers:
    """Kills the workers of this process when a task first moves on: any task, or some."""

    def __init__(self, find, tasks=None):
        self.find, self.tasks = find, tasks
        self.killed = {}
        self.now = ""

    @contextmanager
    def task(self, name, total=None, unit=None):
        self.now = name
        yield self

    def advance(self, amount=1, **figures):
        if self.now not in self.killed and (self.tasks is None or self.now in self.tasks):
            workers = self.find()
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
            self.killed[self.now] = len(workers)

    def note(self, text):
        pass


def children() -> list[int]:
    found = [Path(f"/proc/self/task/{task}/children").read_text().split() for task in os.listdir("/proc/self/task")]
    return [int(pid) for part in found for pid in part]


def actors() -> list[int]:
    """Of the Ray that this process has started."""
    found = psutil.Process().children(recursive=True)
    return [process.pid for process in found if process.name().startswith("ray::_Served")]


def all_end(find, seconds=30) -> bool:
    """Ray ends actors in its own time, after the engine has let go of them."""
    until = time.monotonic() + seconds
    while find() and time.monotonic() < until:
        time.sleep(0.1)
    return not find()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def choose(corpus, name, monkeypatch, progress=None, pool=None, **settings):
    monkeypatch.setenv("BILECT_CACHE", str(corpus / f"cache-{name}"))
    given = {**SMALL, "selection.max_per_cluster": 1, **settings}
    target, out = corpus / "upper.jsonl", corpus / name
    return bilect.choose(
        pool or corpus / "pool", target, out, keep=0.25, method="dsir", settings=given, progress=progress
    )


def same(one, other) -> None:
    assert files(one.scores) == files(other.scores) and files(one.records) == files(other.records)
    assert pq.read_table(one.kept).equals(pq.read_table(other.kept))
    assert files(one.out / "tokens" / "pool") == files(other.out / "tokens" / "pool")
    fitted = "round-1/method/log_ratio.npy"
    assert (one.out / fitted).read_bytes() == (other.out / fitted).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds its children in /proc")
def test_two_workers_that_are_killed_choose_what_one_process_does(corpus, monkeypatch):
    alone = choose(corpus, "alone", monkeypatch)
    assert pq.ParquetFile(next(alone.scores.iterdir())).num_row_groups > 2
    before = set(children())
    progress = KillsWorkers(children)
    several = choose(corpus, "several", monkeypatch, progress, workers=2)
    same(alone, several)
    assert progress.killed["tokenise the pool"] and progress.killed["round 1: score by dsir"]
    assert set(children()) <= before
    times = {file: file.stat().st_mtime_ns for file in several.scores.iterdir()}
    choose(corpus, "several", monkeypatch)  # where work runs is no part of what it depends on
    assert {file: file.stat().st_mtime_ns for file in several.scores.iterdir()} == times


def test_actors_that_are_killed_choose_what_one_process_does(corpus, monkeypatch, started_ray):
    lines = (corpus / "pool" / "pool.jsonl").read_text().splitlines(keepends=True)
    (corpus / "pool" / "pool.jsonl").write_text("".join(lines[:120]))
    table = pa.Table.from_pylist([json.loads(line) for line in lines[120:]])
    pq.write_table(table, corpus / "pool" / "more.parquet", row_group_size=40)
    alone = choose(corpus, "alone", monkeypatch)
    progress = KillsWorkers(actors, ["tokenise the pool"])
    pool = (corpus / "pool").as_uri()
    by_ray = choose(corpus, "ray", monkeypatch, progress, pool, engine="ray", workers=2)
    same(alone, by_ray)
    assert progress.killed["tokenise the pool"] and sorted(files(by_ray.records)) == ["more.parquet", "pool.jsonl"]
    assert not [file for file in by_ray.out.rglob(".bilect*")] and all_end(actors)


def test_ranks_share_the_work_themselves(corpus, monkeypatch):
    monkeypatch.setattr("bilect.runtime.distributed.world_size", lambda: 2)
    with pytest.raises(BilectError, match="engine: the ranks that torchrun has started share the work; leave out ray"):
        choose(corpus, "none", monkeypatch, engine="ray")
    assert not (corpus / "none").exists()
