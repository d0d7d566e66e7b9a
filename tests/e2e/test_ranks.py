"""A run on several ranks is the run on one: the same scores and kept documents, whatever is shared out."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from bilect.config import parse_config
from bilect.pipeline.stages import run
from tests.corpus import tiny_settings

FEW = ["dsir", "mates", "excess", "blade"]
ALL = [*FEW, "perplexity", "less", "influence", "amortised"]


def settings(corpus, arms):
    values = tiny_settings(corpus, controls=arms, checkpoint_every=2)
    for part in (*values["warmup"].values(), values["training"]):
        part |= {"steps": 8, "decay_steps": 2}
    values["fit"] |= {"steps": 6, "directional": "ghost"}
    values["curve"] = {"every": 4, "documents": 16}
    values["selection"] = {"keep_ratio": 0.2, "max_per_cluster": 3}
    values["online"] = {"method": "full", "sync_every": 4, "reference_steps": 2}
    excess = {"steps": 12, "batch_size": 4}
    methods = {
        "mates": {"probes": 12, "upper_documents": 8},
        "excess": excess,
        "influence": {"directional": "ghost"},  # exact, where differences are of float32
        "amortised": {"of": "excess", "labels": 24, "epochs": 2, "settings": excess},
    }
    values["methods"] = {arm: methods[arm] for arm in arms if arm in methods}
    return values


def start(config_file, out, ranks, **kill):
    """In the environment that torchrun gives its processes; the launcher itself would be one more import of torch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": port}
    arguments = ["run", str(config_file), "--out", str(out)]
    last = [str(Path(__file__).with_name("killed_rank.py"))] if kill else ["-m", "bilect"]
    modules = [["-m", "bilect"]] * (ranks - 1) + [last]
    return [
        subprocess.Popen([sys.executable, *module, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                         text=True, env={**shared, **kill, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r, module in enumerate(modules)
    ]  # fmt: skip


@pytest.fixture(scope="module", params=[FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"])
def arms(request):
    return request.param


@pytest.fixture(scope="module")
def config_file(corpus, arms, tmp_path_factory):
    file = tmp_path_factory.mktemp("ranks") / "config.yaml"
    file.write_text(yaml.safe_dump(settings(corpus, arms)))
    return file


@pytest.fixture(scope="module")
def alone(config_file):
    out = config_file.with_name("alone")
    return out, run(parse_config(yaml.safe_load(config_file.read_text())), out)


def scores(folder: Path):
    rows = [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    return [r["doc_id"] for r in rows], np.array([r["score"] for r in rows], dtype=np.float64)


def check(out, alone, arms):
    one, summary = alone
    assert json.loads((out / "tokens" / "pool.json").read_text()) == json.loads((one / "tokens/pool.json").read_text())
    for folder in ("round-1", *(f"controls/{arm}/round-1" for arm in arms if arm != "blade")):
        (ids, score_R), (ids_one, one_R) = scores(out / folder / "scores"), scores(one / folder / "scores")
        assert ids == ids_one
        assert np.ptp(one_R) > 1e-3, folder
        np.testing.assert_allclose(score_R, one_R, atol=2e-3 * np.std(one_R), err_msg=folder)
        kept = [pq.read_table(base / folder / "selected" / "kept.parquet")["doc_id"].to_pylist() for base in (out, one)]
        assert set(kept[0]) == set(kept[1]), folder
    other = json.loads((out / "summary.json").read_text())
    assert other["tokens"] == summary["tokens"]  # batch sizes are of all ranks
    for arm, loss in summary["heldout_loss"].items():
        assert other["heldout_loss"][arm] == pytest.approx(loss, abs=2e-3), arm
    curve, curve_one = ((base / "round-1" / "target" / "heldout.jsonl").read_text().splitlines() for base in (out, one))
    assert [json.loads(line)["step"] for line in curve] == [json.loads(line)["step"] for line in curve_one]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_stage_on_several_ranks(config_file, alone, arms, ranks):
    out = config_file.with_name(f"of-{ranks}")
    processes = start(config_file, out, ranks)
    try:
        ends = [process.communicate(timeout=280)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * ranks, ends
    finally:
        for process in processes:
            process.kill()
    check(out, alone, arms)


class Advances:
    """The first advance of every task: what it takes over from an attempt before."""

    def __init__(self):
        self.first, self.now = {}, ""

    @contextmanager
    def task(self, name, total=None, unit=None):
        self.now = name
        yield self

    def advance(self, amount=1, **figures):
        if amount:
            self.first.setdefault(self.now, amount)

    def note(self, text):
        pass


def test_a_killed_rank_ends_all_in_one_line_and_one_process_goes_on_in_the_middle(config_file, alone, arms):
    """The ranks have the models in shards; the one that goes on reads weights, moments and selection of both."""
    out = config_file.with_name("killed")
    sharded = yaml.safe_load(config_file.read_text())
    sharded["models"]["shard"] = True
    file = config_file.with_name("sharded.yaml")
    file.write_text(yaml.safe_dump(sharded))
    kill = {"KILL_IN": "round 1: train blade", "KILL_AT": "4"}
    processes = start(file, out, 2, **kill)
    try:
        ends = [process.communicate(timeout=280)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, -signal.SIGKILL], ends
    assert ends[0].strip().splitlines()[-1].startswith("bilect: another rank has ended"), ends[0]
    done = json.loads((out / "run.json").read_text())["stages"]
    (checkpoint,) = (out / ".partial").rglob("checkpoint-*")
    assert checkpoint.name == "checkpoint-4" and (checkpoint / "shards").is_dir()
    assert sorted(file.name for file in checkpoint.glob("selector-*")) == ["selector-0.pt", "selector-1.pt"]

    progress = Advances()
    run(parse_config(yaml.safe_load(config_file.read_text())), out, progress)
    assert progress.first["round 1: train on blade"] == 4
    after = json.loads((out / "run.json").read_text())["stages"]
    assert {"round 1: fit bliss", "warm up target"} <= set(done) and {name: after[name] for name in done} == done
    check(out, alone, arms)
