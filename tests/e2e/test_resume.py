"""Runs that are killed and go on: nothing is lost, and the result is that of a run that was left alone."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from bilect.config import parse_config
from bilect.errors import BilectError
from bilect.models.loading import load_causal_lm, load_score_model, load_tokenizer
from bilect.pipeline.stages import run
from bilect.runtime.locks import locked
from tests.corpus import tiny_settings, write_corpus
from tests.killing import END, START, KillingProgress, in_fork, run_watched

# stage: the advance at which it is killed, and what its next attempt takes over at once (checkpoints at 7, 14 ...)
MIDDLE = {
    "warm up proxy": (9, 7),
    "warm up target": (12 + 3, 12),  # in the decay branch, before its first checkpoint: the training before is kept
    "round 1: fit bliss": (15, 14),
    "round 1: train bliss": (8, 7),
    "round 1: train random": (12 + 9, 12),  # in the decay branch, after its first checkpoint
}
AT_THE_END = ("tokenise pool", "round 1: select bliss", "round 1: evaluate random", "publish")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, pool=120)
    return folder


def short_settings(corpus, **changes):
    settings = tiny_settings(corpus, checkpoint_every=7, **changes)
    for part in (*settings["warmup"].values(), settings["training"]):
        part |= {"steps": 12, "decay_steps": 10}
    settings["warmup"]["proxy"]["decay_steps"] = 0
    settings["fit"] |= {"steps": 16, "hypergradient": "penalty", "sync_every": 5, "reference_steps": 2}
    settings["online"] = {"sync_every": 5, "reference_steps": 3, "upper_batch_size": 2, "diagnose_every": 4}
    return settings


def results(out: Path):
    """Everything a run leaves but times and paths: numbers, chosen documents, and the bytes of weights and logs."""
    summary = json.loads((out / "summary.json").read_text())
    del summary["seconds"], summary["cost"]["seconds"]
    files = [p for pattern in ("*.safetensors", "*.pt", "*.jsonl", "online.json") for p in out.rglob(pattern)]
    digests = {str(p.relative_to(out)): hashlib.sha256(_content(p)).hexdigest() for p in files}
    return summary, pq.read_table(out / "round-1" / "selected" / "kept.parquet")["doc_id"].to_pylist(), digests


def _content(path: Path) -> bytes:
    """Of a selection's state its values: how torch writes equal ones depends on which of them share memory."""
    if not path.name.startswith("selector-"):
        return path.read_bytes()
    state = torch.load(path, weights_only=True)
    leaves, form = torch.utils._pytree.tree_flatten(state)
    return repr((form, [x.tolist() if isinstance(x, torch.Tensor) else x for x in leaves])).encode()


def test_a_run_killed_in_every_stage_ends_the_same(corpus, tmp_path):
    config = parse_config(short_settings(corpus))
    run(config, tmp_path / "whole")
    stages = list(json.loads((tmp_path / "whole" / "run.json").read_text())["stages"])
    assert set(MIDDLE) | set(AT_THE_END) < set(stages)
    out, log = tmp_path / "killed", tmp_path / "advances"
    for stage in stages:
        at = MIDDLE[stage][0] if stage in MIDDLE else END if stage in AT_THE_END else START
        progress = KillingProgress(log, stage, at)
        assert in_fork(lambda progress=progress: run_watched(config, out, progress)) == -signal.SIGKILL, stage
        assert stage not in (json.loads((out / "run.json").read_text())["stages"] if stage != stages[0] else {})
    run_watched(config, out, KillingProgress(log))
    whole, killed = results(tmp_path / "whole"), results(out)
    assert killed[0] == whole[0]
    assert killed[1] == whole[1]
    assert killed[2] == whole[2]
    assert not (out / ".partial").exists()
    advances = [line.rsplit("=", 1) for line in log.read_text().splitlines()]
    for stage, (at, kept) in MIDDLE.items():
        again = [int(amount) for name, amount in advances if name == stage][at:]
        assert again[0] == kept, stage  # it went on instead of starting again
    random = [int(amount) for name, amount in advances if name == "round 1: train random"][12 + 9 :]
    assert random == [12, 7, 1, 1, 1]


def test_the_command_goes_on_after_kill_9(corpus, tmp_path):
    config_file = tmp_path / "config.yaml"
    settings = short_settings(corpus)
    config_file.write_text(yaml.safe_dump(settings))
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "bilect.cli", "run", str(config_file), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "..." in line and "warm up the target" in line:
            with pytest.raises(BilectError, match=rf"{out} is in use by process {process.pid} on .*; wait"):
                run(parse_config(settings), out)
            process.kill()
            break
    process.wait(timeout=60)
    assert not (out / "warmup" / "target").exists()  # nothing half-written
    proxy = (out / "warmup" / "proxy" / "model.safetensors").stat().st_mtime_ns
    summary = run(parse_config(settings), out)
    assert summary["tokens"]["bliss"] == (12 + 10) * 4 * 48
    assert (out / "warmup" / "proxy" / "model.safetensors").stat().st_mtime_ns == proxy
    with locked(out):  # a finished run has let go of it
        pass


# ------------------------------------------------------------------------------------------------------- not a number


def broken(corpus, tmp_path, **changes):
    """The message of a run that stops."""
    settings = short_settings(corpus)
    for part, change in changes.items():
        settings[part] |= change
    with pytest.raises(BilectError) as caught:
        run(parse_config(settings), tmp_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_fit_that_blows_up_keeps_its_last_good_models(corpus, tmp_path):
    rates = {"proxy_learning_rate": 1e30, "reference_learning_rate": 1e-3, "warmup_ratio": 0.3}
    message = broken(corpus, tmp_path, fit=rates)
    folder = tmp_path / "last-good" / "round-1-fit-bliss"
    step = json.loads((folder / "step.json").read_text())["step"]
    assert re.search(
        rf"at step {step + 2} of round 1; lower fit.proxy.* good state \(step {step}\) is in {folder}$", message
    )
    proxy, score_model = load_causal_lm(str(folder / "proxy")), load_score_model(folder / "score_model")
    assert all(p.isfinite().all() for m in (proxy, score_model) for p in m.parameters())
    run(parse_config(short_settings(corpus)), tmp_path)
    assert (folder / "proxy" / "model.safetensors").is_file()  # other settings do not touch it


def test_a_training_that_blows_up_keeps_its_last_good_model(corpus, tmp_path):
    settings = {"proxy": {"steps": 12, "batch_size": 4, "learning_rate": 1e30, "decay_steps": 0}}
    message = broken(corpus, tmp_path, warmup=settings)
    folder = tmp_path / "last-good" / "warm-up-proxy"
    assert re.search(rf"training: the loss is not a number at step \d+ .*lower its.* is in {folder}$", message)
    assert all(p.isfinite().all() for p in load_causal_lm(str(folder)).parameters())
    assert load_tokenizer(str(folder)).eos_token_id is not None
    assert not list((tmp_path / ".partial").rglob("checkpoint-*"))


def test_broken_files_of_a_run_are_one_line(corpus, tmp_path):
    config, out = parse_config(short_settings(corpus)), tmp_path / "run"
    progress = KillingProgress(tmp_path / "log", "round 1: fit bliss", 9)
    assert in_fork(lambda: run_watched(config, out, progress)) == -signal.SIGKILL
    state = out / ".partial" / "round-1-fit-bliss" / ".fit" / "fit.pt"
    metrics = state.parent.parent / "round-1" / "method" / "metrics.jsonl"
    damages = (
        (state, lambda data: data[:-100], f"cannot read {state} .*; delete {state} to fit anew"),
        (metrics, lambda data: data[:50], f"{state} does not fit .*shorter.*; delete {state} to fit"),
        (out / "warmup" / "proxy" / "model.safetensors", lambda data: data[:-8], f"cannot load '{out}/warmup/proxy'"),
    )
    for file, change, message in damages:
        data = file.read_bytes()
        file.write_bytes(change(data))
        with pytest.raises(BilectError, match=message) as caught:
            run(config, out)
        assert "\n" not in str(caught.value)
        file.write_bytes(data)
