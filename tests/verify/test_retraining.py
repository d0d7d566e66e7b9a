"""Counterfactual value: the statistics on losses that are known sums, and the study on a tiny corpus."""

import gc
import json
import os
import shutil
import signal
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import spearmanr
from typer.testing import CliRunner

from bilect.cli.commands import app
from bilect.config import parse_config
from bilect.errors import BilectError
from bilect.runtime.progress import SilentProgress
from bilect.runtime.seeds import derive_seed
from bilect.verify.retraining import cells, correlation, page
from bilect.verify.retraining import study as studies
from bilect.verify.retraining.scores import VARIANTS, own_variant, random_scores, settings_of
from bilect.verify.retraining.subsets import Study
from tests.corpus import tiny_settings, write_corpus
from tests.killing import in_fork

TWO = {name: VARIANTS[name] for name in ("dsir mean", "bliss adam")}
SIZES = {"subsets": 4, "candidates": 24, "seeds": 2, "workers": 1, "variants": TWO}


@pytest.fixture
def synthetic():
    """60 halves of 100 documents whose loss falls by the sum of known scores; noise as large as that."""
    rng = np.random.default_rng(0)
    member_JN = np.stack([rng.permutation(100) < 50 for _ in range(60)]).astype(float)
    score_N = rng.normal(size=100)
    sums_J = member_JN @ score_N
    return rng, member_JN, score_N, sums_J, sums_J.std() * rng.normal(size=60)


def test_the_true_scores_correlate_perfectly_and_random_ones_within_chance(synthetic):
    rng, member_JN, _, sums_J, noise_J = synthetic
    draws = correlation.draws(60, 1, 0)

    def estimate(predicted_J, actual_J):
        return correlation.estimate(correlation.resampled(predicted_J[None], actual_J, draws))

    assert estimate(sums_J, 7 + 3 * sums_J) == correlation.Estimate(*(pytest.approx(1.0) for _ in range(3)))
    chance = correlation.null(rng.random((400, 100)) @ member_JN.T, sums_J)
    assert abs(chance.value) < 0.03  # 0.13 / sqrt(400), four times over
    deviation = np.sqrt(1 / 60 + 1 / 100)  # of halves, and of documents, which is left when all halves are known
    assert [chance.low, chance.high] == pytest.approx([-1.96 * deviation, 1.96 * deviation], abs=0.03)
    noisy = estimate(sums_J, sums_J + noise_J)
    assert noisy.value == pytest.approx(spearmanr(sums_J, sums_J + noise_J).statistic)
    error = (1 - noisy.value**2) / np.sqrt(59)  # of a correlation of 60 pairs, to first order
    assert noisy.high - noisy.low == pytest.approx(2 * 1.96 * error, rel=0.35)
    assert noisy.low < noisy.value < noisy.high


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    truth = 6 / np.pi * np.arcsin(np.sqrt(0.5) / 2)  # Spearman of a normal pair whose correlation is sqrt(1/2)
    for _ in range(60):
        a, b = rng.normal(size=(2, 60))
        found = correlation.estimate(correlation.resampled(a[None], a + b, correlation.draws(60, 1, 2))[:501])
        covered += found.low < truth < found.high
    assert 53 <= covered <= 59


def test_the_ceiling_is_the_correlation_of_the_truth_with_a_noisy_loss(monkeypatch):
    rng = np.random.default_rng(0)
    truth_J = rng.normal(size=4000)
    one_J, other_J = truth_J + rng.normal(size=(2, 4000))
    monkeypatch.setattr(correlation, "RESAMPLES", 20)
    draws = correlation.draws(4000, 1, 0)
    reliability = correlation.estimate(correlation.resampled(one_J[None], other_J, draws))
    assert correlation.ceiling(reliability) == pytest.approx(float(correlation.spearman(truth_J, one_J)), abs=0.02)
    half = correlation.Estimate(0.4, -0.2, 0.6).over(0.5)
    assert half == correlation.Estimate(0.8, -0.4, 1.2)


def test_what_is_constant_has_no_correlation():
    none = correlation.Estimate(None, None, None)
    assert (
        correlation.estimate(correlation.resampled(np.zeros((1, 8)), np.arange(8.0), correlation.draws(8, 1, 0)))
        == none
    )
    assert correlation.ceiling(none) is None and correlation.ceiling(correlation.Estimate(-0.1, -1, 1)) is None
    assert correlation.Estimate(0.5, 0, 1).over(None) == none


def test_seeds_are_averaged_and_differences_are_of_the_same_halves_and_seeds():
    rng = np.random.default_rng(3)
    truth_J = rng.normal(size=50)
    sums_KJ = truth_J + rng.normal(size=(3, 50))
    draws = correlation.draws(50, 3, 0)
    values_B = correlation.resampled(sums_KJ, truth_J, draws)
    each = [spearmanr(s, truth_J).statistic for s in sums_KJ]
    assert values_B.shape == (2001,) and values_B[0] == pytest.approx(np.mean(each))
    halves, seeds = draws.halves_BJ[7], draws.seeds_BK[7]
    each = np.array([spearmanr(s[halves], truth_J[halves]).statistic for s in sums_KJ])
    assert values_B[8] == pytest.approx(each.mean() + np.sqrt(3 / 2) * (each[seeds].mean() - each.mean()))
    assert len(set(seeds.tolist())) > 1 and {k for row in draws.seeds_BK for k in row.tolist()} == {0, 1, 2}
    # the same method on another scale differs by nothing in every resample; a nearly equal one by little
    same = correlation.resampled(5 * sums_KJ - 1, truth_J, draws)
    assert correlation.estimate(same - values_B) == correlation.Estimate(0, 0, 0)
    near = correlation.resampled(sums_KJ + 0.1 * rng.normal(size=(3, 50)), truth_J, draws)
    apart, own = correlation.estimate(near - values_B), correlation.estimate(values_B)
    assert apart.low < apart.value < apart.high
    assert apart.high - apart.low < 0.4 * (own.high - own.low)


def test_the_interval_of_two_seeds_is_that_of_their_mean():
    """All halves alike in effect, so that the seeds alone vary it: deviation s / sqrt(2) of the mean of two."""
    rng = np.random.default_rng(4)
    truth_J, noise_KJ = rng.normal(size=3000), rng.normal(size=(2, 3000))
    sums_KJ = np.array([[0.2], [1.0]]) * truth_J + noise_KJ
    each = [spearmanr(s, truth_J).statistic for s in sums_KJ]
    values_B = correlation.resampled(sums_KJ, truth_J, correlation.draws(3000, 2, 0))[1:]
    assert values_B.std() == pytest.approx(np.std(each, ddof=1) / np.sqrt(2), rel=0.06)


def test_ties_have_their_mean_rank():
    rng = np.random.default_rng(0)
    a, b = rng.integers(4, size=(2, 5, 30))
    expected = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(correlation.spearman(a, b), expected)


def test_halves_are_halves_and_differ(tmp_path):
    one = Study(tmp_path, parse_config(tiny_settings(tmp_path)), np.arange(100, 141))
    halves = [one.half(j) for j in range(50)]
    assert all(len(np.unique(h)) == 20 and h.max() < 41 for h in halves)
    overlap = np.mean([len(np.intersect1d(halves[j], halves[j + 1])) for j in range(0, 50, 2)])
    assert overlap == pytest.approx(20 * 20 / 41, abs=1.4)  # hypergeometric: independent of each other
    assert np.array_equal(one.half(3), halves[3])


def small(corpus: Path, **changes):
    values = tiny_settings(corpus, **changes)
    values["models"]["target"] = values["models"]["proxy"]
    for part in (*values["warmup"].values(), values["training"]):
        part |= {"steps": 4, "decay_steps": 0}
    values["fit"] |= {"steps": 3}
    return values


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, pool=120)
    return folder


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """Two halves are trained twice; and the Trainer, which collects garbage every time, looks at new objects only."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "REPEATED", 2)
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return out, studies.study(parse_config(small(corpus)), out, **SIZES)


@pytest.fixture
def made(monkeypatch):
    """Names of the cells that are computed."""
    names, fill = list[str](), cells.Cell.fill
    monkeypatch.setattr(cells.Cell, "fill", lambda cell: (names.append(cell.path.stem), fill(cell)))
    return names


def test_the_random_control_is_another_order_under_every_seed(finished):
    out, result = finished
    one = Study(out, parse_config(result["config"]), np.arange(24))
    scores_KN = random_scores(one, 50)
    assert len({tuple(row) for row in scores_KN}) == 50 and all(len(set(row)) == 24 for row in scores_KN)
    quality = result["random"]["quality"]["heldout"]
    assert quality["low"] < quality["value"] - 0.1 and quality["value"] + 0.1 < quality["high"]


def test_figures_follow_from_the_cells(finished):
    out, result = finished
    json.dumps(result, allow_nan=False)
    assert {r["name"] for r in result["methods"]} == set(TWO) and len(result["subsets"]) == 4
    losses = [json.loads((out / "subsets" / f"000{j}.json").read_text())["result"] for j in range(4)]
    quality = {}
    for row in result["methods"]:
        file = out / "methods" / row["name"].replace(" ", "-")
        cells = [json.loads(file.with_name(f"{file.name}-{k}.json").read_text())["result"] for k in range(2)]
        assert row["scores"] == [c["scores"] for c in cells] and row["flops"] == np.mean([c["flops"] for c in cells])
        sums = [[np.array(c["scores"])[s["members"]].sum() for s in result["subsets"]] for c in cells]
        for name in ("heldout", "upper"):
            expected = np.mean([spearmanr(s, [-x[name][name] for x in losses]).statistic for s in sums])
            quality[row["name"], name] = expected
            assert row["quality"][name]["value"] == pytest.approx(expected)
    minus = next(r for r in result["methods"] if r["name"] == "dsir mean")["minus_own"]
    assert (
        result["own"] == "bliss adam"
        and next(r for r in result["methods"] if r["name"] != "dsir mean")["minus_own"] == {}
    )
    draws = correlation.draws(4, 2, derive_seed(0, "bootstrap"))
    member_JN = np.array([[i in s["members"] for i in range(24)] for s in result["subsets"]])
    for name in ("heldout", "upper"):
        assert minus[name]["value"] == pytest.approx(quality["dsir mean", name] - quality["bliss adam", name])
        actual_J = -np.array([x[name][name] for x in losses])
        ours, theirs = (
            correlation.resampled(np.array(r["scores"]) @ member_JN.T, actual_J, draws)
            for r in sorted(result["methods"], key=lambda r: r["name"], reverse=True)
        )
        assert minus[name] == pytest.approx(correlation.estimate(ours - theirs).record())
    assert len(set(json.dumps(s) for s in result["subsets"])) == 4 and len(result["again"]) == 2
    assert result["again"][0]["heldout"] != result["subsets"][0]["heldout"]  # another order of the documents
    first, second = (next(r for r in result["methods"] if r["name"] == n) for n in TWO)
    assert first["flops"] == 0 and second["flops"] > 0
    assert second["scores"][0] != second["scores"][1]  # another seed of the fit


def test_the_page_has_three_plots_and_loads_nothing(finished):
    _, result = finished
    broken = {**result["methods"][0], "name": "<b>&", "error": "a loss is <no> number"}
    broken["quality"] = {k: {"value": None, "low": None, "high": None} for k in ("heldout", "upper")}
    html = page.render({**result, "methods": [*result["methods"], broken]})
    drawings = [part[: part.index("</svg>") + 6] for part in html.split("<svg")[1:]]
    assert len(drawings) == 3
    for drawing in drawings:
        ET.fromstring("<svg" + drawing)
    assert "&lt;b&gt;&amp;" in html and "a loss is &lt;no&gt; number" in html and "<script>alert" not in html


def test_a_killed_study_goes_on_and_repeats_no_cell(corpus, finished, tmp_path, made):
    (before, expected), out = finished, tmp_path / "study"
    shutil.copytree(before / "run", out / "run")
    config, write = parse_config(small(corpus)), cells.write_json

    def write_or_die(path, value):
        if path.name == "0001.json":
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, value)

    def child():
        cells.write_json = write_or_die
        studies.study(config, out, **SIZES)

    assert in_fork(child) == -signal.SIGKILL
    assert {p.name for p in out.rglob("*.json") if p.parent.name in ("study", "subsets", "methods")} == {
        "warm.json", "0000.json"
    }  # fmt: skip
    again = studies.study(config, out, **SIZES)
    assert made == ["0001", "0002", "0003", "0000-again", "0001-again", "dsir-mean-0", "bliss-adam-0",
                    "dsir-mean-1", "bliss-adam-1"]  # fmt: skip

    def without_times(result):
        return json.loads(json.dumps(result), object_hook=lambda d: {k: v for k, v in d.items() if k != "seconds"})

    assert without_times(again) == without_times(expected)


def _value(x):
    return {"value": x, "threads": torch.get_num_threads()}


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_processes_fill_cells_and_a_killed_one_is_one_line(tmp_path):
    some = [cells.Cell(tmp_path / f"{x}.json", "k", partial(_value, x)) for x in range(3)]
    with SilentProgress().task("t") as task:
        cells.fill(some, 2, task)
        assert [c.read() for c in some] == [{"value": x, "threads": 1} for x in range(3)]
        dead = [cells.Cell(tmp_path / f"{x}.json", "other", _die) for x in range(3)]
        with pytest.raises(BilectError, match=r"a worker process was killed.*fewer --workers"):
            cells.fill(dead, 2, task)
    assert [c.read() for c in some] == [{"value": x, "threads": 1} for x in range(3)]


def test_a_changed_config_redoes_what_depends_on_it(corpus, finished, tmp_path, made):
    before, out = finished[1], tmp_path / "study"
    shutil.copytree(finished[0], out)
    # where the study lies is none of its settings
    assert studies.study(parse_config(small(corpus)), out, **SIZES) == before and made == []
    changed = small(corpus)
    changed["fit"] |= {"score_learning_rate": 1e-2}
    studies.study(parse_config(changed), out, **SIZES)
    assert made == ["bliss-adam-0", "bliss-adam-1"]
    made.clear()
    studies.study(parse_config(changed), out, **{**SIZES, "seeds": 3})
    assert made == ["dsir-mean-2", "bliss-adam-2"]
    made.clear()
    result = studies.study(parse_config(changed), out, **{**SIZES, "subsets": 5})
    assert made == ["0004"] and result["subsets"][:4] == before["subsets"]
    made.clear()
    changed["training"] |= {"decay_steps": 1}
    result = studies.study(parse_config(changed), out, **{**SIZES, "variants": {}})
    assert made == ["0000", "0001", "0002", "0003", "0000-again", "0001-again"]
    assert result["subsets"][0]["heldout"] != before["subsets"][0]["heldout"] and result["methods"] == []


def test_a_fit_that_breaks_down_is_a_finding(corpus, finished):
    broken = {"broken": ("bliss", {"proxy_learning_rate": 1e30})}
    result = studies.study(parse_config(small(corpus)), finished[0], **{**SIZES, "variants": broken})
    (row,) = result["methods"]
    assert "a loss is not a number" in row["error"] and row["quality"]["heldout"]["value"] is None


def test_a_method_that_fails_under_one_seed_has_failed(corpus, finished, tmp_path, made):
    out = tmp_path / "study"
    shutil.copytree(finished[0], out)
    file = out / "methods" / "bliss-adam-1.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "result": {"error": "a loss is not a number"}}))
    result = studies.study(parse_config(small(corpus)), out, **SIZES)
    by_name = {r["name"]: r for r in result["methods"]}
    failed, other = by_name["bliss adam"], by_name["dsir mean"]
    none = {"value": None, "low": None, "high": None}
    assert made == [] and failed["error"] == "a loss is not a number" and failed["scores"] is None
    assert failed["quality"] == {"heldout": none, "upper": none} and other["quality"]["heldout"]["value"] is not None
    assert other["minus_own"] == {"heldout": none, "upper": none}  # there is nothing to compare with
    assert "a loss is not a number" in page.render(result)


def test_the_runs_own_fit_by_the_penalty_is_that_of_the_run(corpus):
    values = small(corpus, controls=["bliss-penalty"], methods={"bliss-penalty": {"sync_every": 7}})
    values["fit"] |= {"hypergradient": "penalty", "sync_every": 2}
    config = parse_config(values)
    assert own_variant(config) == "bliss-penalty"
    settings = settings_of(config, VARIANTS["bliss-penalty"])
    expected = config.fit.model_dump(mode="json") | {"reference_learning_rate": config.fit.proxy_learning_rate}
    assert {k: settings[k] for k in expected} == expected


def test_settings_are_the_fits_before_the_variants(corpus):
    values = small(corpus, controls=["mates", "bliss-penalty"], methods={"mates": {"probes": 40}})
    config = parse_config(values)
    assert settings_of(config, VARIANTS["mates"])["probes"] == 40
    cg, penalty = (settings_of(config, VARIANTS[n]) for n in ("bliss cg", "bliss-penalty"))
    assert (cg["solver"], cg["hypergradient"], cg["steps"], cg["score_learning_rate"]) == ("cg", "implicit", 3, 3e-3)
    assert (penalty["hypergradient"], penalty["reference_learning_rate"]) == ("penalty", pytest.approx(1e-4))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"candidates": 91}, "round 1 has 90 documents, fewer than 91 candidates; lower --candidates"),
        (
            {"subsets": 3},
            "it takes at least 4 --subsets, 10 --candidates, one of --seeds and one of --workers, not 3, 24, 2 and 1",
        ),
        ({"seeds": 0}, "one of --seeds and one of --workers, not 4, 24, 0 and 1"),
        ({"variants": {"x": ("dsir", {"lenght": "sum"})}}, "dsir: unknown key 'lenght'; did you mean 'length'"),
    ],
)
def test_wrong_input_is_one_line(corpus, finished, sizes, message):
    with pytest.raises(BilectError, match=message) as error:
        studies.study(parse_config(small(corpus)), finished[0], **{**SIZES, **sizes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subsets", "8"], "verify: --subsets belongs to --retrain CONFIG"),
        (["--set", "seed=1"], "verify: --set belongs to --retrain CONFIG"),
        (["--quick", "--retrain", "x.yaml"], "two studies"),
        (["--retrain", "x.yaml"], "config: cannot read x.yaml"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, arguments, message):
    done = CliRunner().invoke(app, ["verify", "--out", str(tmp_path / "new"), *arguments])
    assert isinstance(done.exception, BilectError) and message in str(done.exception)
    assert not (tmp_path / "new").exists()


def test_the_command_prints_a_table_and_writes_both_files(corpus, finished, tmp_path, monkeypatch):
    out, _ = finished
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(small(corpus)))
    defaults = {**studies.run_retraining.__kwdefaults__, "variants": TWO}
    monkeypatch.setattr(studies.run_retraining, "__kwdefaults__", defaults)
    words = ["verify", "--out", str(out), "--retrain", str(tmp_path / "c.yaml"), "--subsets", "4", "--candidates", "24",
             "--seeds", "2", "--workers", "1"]  # fmt: skip
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0 and "minus bliss adam" in done.output and "spread over halves" in done.output
    assert len(json.loads((out / "retrain.json").read_text())["candidates"]) == 24 and (out / "retrain.html").is_file()
    as_json = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert as_json.exit_code == 0 and as_json.stdout.count("\n") == 1 and "spread over halves" in as_json.stderr
    assert json.loads(as_json.stdout) == json.loads((out / "retrain.json").read_text())
