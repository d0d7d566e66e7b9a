"""A comparison of a tiny corpus from end to end: cells equal plain runs, variants share, a kill costs nothing."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers.utils import logging

from bilect.compare import compare, grid
from bilect.compare.cells import cells, share
from bilect.compare.plan import plan_cells
from bilect.config import parse_config
from bilect.errors import BilectError
from bilect.pipeline.directory import read_manifest
from bilect.pipeline.stages import run
from bilect.runtime.locks import locked
from tests.corpus import tiny_settings, write_corpus


def settings(corpus, **changes):
    values = tiny_settings(corpus, controls=["dsir"], methods={"dsir": {"length": "mean"}})
    for part in (*values["warmup"].values(), values["training"]):
        part |= {"steps": 6, "decay_steps": 0}
    values["fit"] |= {"steps": 3, "score_learning_rate": 0.1}  # enough for the weights to tell in the choice
    variants = {"naive": {"fit.weighting": "naive", "controls": []}}
    return {**values, "curve": {"every": 3}, "compare": {"seeds": 2, "workers": 2, "variants": variants}, **changes}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 120)
    return folder


@pytest.fixture(scope="module")
def killed_and_finished(corpus, tmp_path_factory):
    """A comparison whose processes are all killed once a seed has trained something, and then started again."""
    out = tmp_path_factory.mktemp("compare") / "out"
    file = out.with_name("config.yaml")
    file.write_text(yaml.safe_dump(settings(corpus)))
    process = subprocess.Popen(
        [sys.executable, "-m", "bilect.cli", "compare", str(file), "--out", str(out)],
        start_new_session=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while not (early := list(out.glob("base/seed-*/round-1/target/model.safetensors"))):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = early[0].stat().st_ino
    assert not (out / "comparison.json").exists()
    return out, compare(parse_config(settings(corpus)), out), (early[0], before)


def test_a_cell_is_a_plain_run_with_its_seed(corpus, killed_and_finished, tmp_path):
    _, comparison, (file, inode) = killed_and_finished
    assert file.stat().st_ino == inode  # what was done before the kill was not done again
    for variant, changes in (("base", {}), ("naive", {"weighting": "naive"})):
        values = settings(corpus, seed=1, controls=["dsir", "random", "full"])
        values["fit"] |= changes
        values.pop("compare")
        alone = run(parse_config(values), tmp_path / variant)
        arms = comparison["variants"][variant]["arms"]
        for arm in ("bliss", "random", "full", "warm"):
            assert arms[arm]["loss"]["values"][1] == alone["heldout_loss"][arm]
    assert comparison["variants"]["base"]["arms"]["dsir"]["loss"]["n"] == 2
    assert "dsir" not in comparison["variants"]["naive"]["arms"]
    losses = [comparison["variants"][v]["arms"]["bliss"]["loss"]["mean"] for v in ("base", "naive")]
    assert losses[0] != losses[1]


def test_a_variant_shares_what_it_does_not_change(killed_and_finished):
    out, _, _ = killed_and_finished
    for part, same in (
        ("controls/random/round-1/target", True),
        ("warmup/proxy", True),
        ("round-1/method/proxy", False),
    ):
        nodes = {(out / v / "seed-0" / part / "model.safetensors").stat().st_ino for v in ("base", "naive")}
        assert (len(nodes) == 1) is same, part
    assert not (out / "naive" / "seed-0" / "controls" / "dsir").exists()


def test_outputs(corpus, killed_and_finished):
    out, comparison, _ = killed_and_finished
    assert json.loads((out / "comparison.json").read_text()) == comparison
    assert len((out / "comparison.csv").read_text().splitlines()) == 1 + 2 * (5 + 4)
    assert "Across variants" in (out / "comparison.html").read_text()
    arm = comparison["variants"]["base"]["arms"]["random"]
    assert [p["tokens"] for p in arm["curve"]] == [0.0, 3 * 4 * 48, 6 * 4 * 48] and arm["tokens"] == 6 * 4 * 48
    assert arm["curve"][-1]["mean"] == pytest.approx(arm["loss"]["mean"])  # without a decay branch, the same model
    assert arm["cost"]["peak_gb"]["mean"] > 0.1 and arm["cost"]["choosing"]["flops"]["mean"] == 0.0
    assert all(line.stages == 0 for line in plan_cells(parse_config(settings(corpus)), out))


def test_a_comparison_may_be_about_random_itself(corpus, tmp_path):
    """What only ways to choose tokens are compared with: ``random`` is the method then, and no control besides."""
    values = settings(corpus, method="random", controls=["random-token"], methods={}, fit={})
    values["compare"] = {"seeds": 2, "workers": 1}
    arms = compare(parse_config(values), tmp_path / "out")["variants"]["base"]["arms"]
    assert list(arms) == ["warm", "random", "random-token", "full"]
    assert arms["random"]["minus_random"]["mean"] is None
    assert arms["full"]["minus_random"]["values"] == [
        a - b for a, b in zip(arms["full"]["loss"]["values"], arms["random"]["loss"]["values"], strict=True)
    ]
    values |= {"controls": ["random"]}
    with pytest.raises(BilectError, match="controls: random is what the run itself is about"):
        compare(parse_config(values), tmp_path / "other")


def test_a_variant_waits_while_another_shares_the_base(corpus, killed_and_finished, tmp_path):
    out, _, _ = killed_and_finished
    cell = next(c for c in cells(parse_config(settings(corpus)), out) if c.variant == "naive")
    cell = type(cell)(cell.variant, cell.config, tmp_path / "naive", cell.base)
    held, release = threading.Event(), threading.Event()

    def hold():
        with locked(cell.base):
            held.set()
            release.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    sharing = threading.Thread(target=share, args=(cell,))
    sharing.start()
    sharing.join(0.3)
    assert sharing.is_alive() and not cell.folder.exists()
    release.set()
    sharing.join(10)
    holder.join()
    assert read_manifest(cell.folder)["stages"]


def test_one_failing_cell_does_not_stop_the_others(monkeypatch, tmp_path):
    class Threads(ThreadPoolExecutor):
        def __init__(self, workers, **kwargs):
            super().__init__(workers)

    def work(cell, repeat):
        if cell.name == "b":
            raise RuntimeError("no memory")
        done.append(cell.name)

    done, said = [], []
    made = [SimpleNamespace(name=n, base=b, folder=tmp_path / n) for n, b in
            (("a", None), ("b", None), ("a2", tmp_path / "a"), ("b2", tmp_path / "b"))]  # fmt: skip
    monkeypatch.setattr(grid, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(grid, "_run", work)
    with pytest.raises(RuntimeError, match="no memory") as error:
        grid.carry_out(made, 1, said.append)
    assert done == ["a", "a2"] and said == ["compare: b: RuntimeError: no memory"]  # a2 builds on a, b2 on what failed
    assert str(tmp_path / "b") in error.value.__notes__[0]


def test_what_is_left_is_planned(corpus, killed_and_finished):
    out, _, _ = killed_and_finished
    values = settings(corpus)
    values["compare"]["variants"]["cold"] = {"fit.kl_coef": 0.0}
    lines = {line.variant: line for line in plan_cells(parse_config(values), out)}
    assert lines["base"].stages == 0 and lines["cold"].stages == 2 * len(
        ["fit", "score", "select", "train bliss", "evaluate bliss", "fidelity", "publish"]
    )


def test_only_done_stages_are_shared(corpus, killed_and_finished, tmp_path):
    out, _, _ = killed_and_finished
    config = parse_config(settings(corpus, compare={"seeds": 2, "variants": {"other": {"training.steps": 5}}}))
    cell = next(c for c in cells(config, out) if c.variant == "other")
    cell = type(cell)(cell.variant, cell.config, tmp_path / "other", cell.base)
    share(cell)
    stages = read_manifest(cell.folder)["stages"]
    assert (cell.folder / "target").is_dir() is ("publish" in stages)
    assert "round 1: fit bliss" in stages and "evaluate warm" in stages and "round 1: train bliss" not in stages


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compare": {"variants": {"x": {"fit.stepz": 3}}}}, "compare.variants.x: unknown key 'fit.stepz'"),
        ({"compare": {"variants": {"x": {"device.y": 3}}}}, "compare.variants.x: device.y: 'device' is not a group"),
        ({"compare": {"variants": {"x": {"seed": 3}}}}, "compare.variants.x: seed is the same for all variants"),
        ({"compare": {"variants": {"x": {"controls": None}}}}, "compare.variants.x: controls: Input should be"),
        ({"compare": {"loss_on": "maths"}}, "'maths' is no held-out set; there are heldout"),
        ({"compare": {"variants": {"x": {"controls": ["dsri"]}}}}, "variant x: controls: there is no method 'dsri'"),
        ({"compare": {"variants": {"base": {}}}}, "'base' is the config without variants"),
        ({"compare": {"seeds": 1}}, "seeds: Input should be greater than or equal to 2"),
    ],
)
def test_wrong_settings_are_one_line_before_anything_starts(corpus, tmp_path, changes, message):
    with pytest.raises(BilectError) as error:
        compare(parse_config(settings(corpus, **changes)), tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("allowed", "own"), [(1, 1), (8, 4)])
def test_a_worker_takes_its_share_of_the_cores_and_no_more_threads_than_it_is_allowed(monkeypatch, allowed, own):
    numbers, taken = queue.Queue(), []
    numbers.put(0)
    for name, value in {"end_with_parent": lambda: None, "cores": lambda: 8, "_messages": None}.items():
        monkeypatch.setattr(grid, name, value)
    monkeypatch.setattr(logging, "disable_progress_bar", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: allowed)  # as OMP_NUM_THREADS says
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    grid._start(queue.Queue(), numbers, 2, [])
    assert taken == [own]
