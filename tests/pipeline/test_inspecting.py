"""``bilect inspect``: every kind of thing, told from its files, and what is none of them."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from typer.testing import CliRunner

import bilect
from bilect.cli.commands import app
from bilect.config import SelectionConfig, parse_config
from bilect.errors import BilectError
from bilect.models.loading import load_causal_lm
from bilect.models.score_model import ScoreModel
from bilect.pipeline.inspecting import inspect
from bilect.pipeline.stages import run
from bilect.runtime.checkpoints import save_state
from bilect.selection.select import BELOW_THE_CUT, SOURCE_FULL, select
from tests.corpus import TINY, tiny_settings, write_corpus

NAMES = ("doc_id", "source", "n_tokens", "score")


def settings(corpus, **changes):
    values = tiny_settings(corpus, method="dsir", controls=["random"], **changes)
    for part in (*values["warmup"].values(), values["training"]):
        part["steps"] = 2
    return values


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, pool=60)
    return folder


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run by the cheapest method; not to be written to."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, run(parse_config(settings(corpus)), out)


@pytest.fixture
def scored(tmp_path):
    """A folder, with the sign of a partition in its path: scores of a 0.0 to 0.9, of b 0.05 to 0.95; 10 tokens each."""
    folder = tmp_path / "source=x" / "scores"
    folder.mkdir(parents=True)
    rows = [(f"{s}{i}", s, 10, i / 10 + (s == "b") / 20) for s in "ab" for i in range(10)]
    for n, part in enumerate((rows[:7], rows[7:])):
        pq.write_table(pa.table(dict(zip(NAMES, zip(*part, strict=True), strict=True))), folder / f"{n:05d}-x.parquet")
    return folder


def test_a_finished_run(finished):
    out, summary = finished
    found = inspect(out)
    assert (found["kind"], found["method"], found["controls"]) == ("run", "dsir", ["random"])
    assert {*found["done"]} == {*json.loads((out / "run.json").read_text())["stages"]}
    assert found["left"] == found["begun"] == found["changed"] == [] and found["note"] == ""
    assert found["heldout_loss"] == summary["heldout_loss"] and found["verdict"] == summary["verdict"]
    own, control = found["kept"]
    assert (own["arm"], control["arm"]) == ("dsir", "random")
    assert (own["documents"], own["tokens"]) == tuple(
        summary["rounds"][0][k] for k in ("documents_kept", "tokens_kept")
    )
    assert own["kept_share_by_source"] == summary["kept_share_by_source"]
    assert found["next"][-1] == f"bilect export {out}/round-1/selected --to parquet --out NEW_FOLDER"
    assert (out / "round-1" / "selected" / "kept.parquet").is_file()


def test_a_run_that_stopped_and_one_whose_settings_changed(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    manifest = json.loads((out / "run.json").read_text())
    last = "round 1: train random"
    del manifest["stages"][last], manifest["finished"]
    (out / "run.json").write_text(json.dumps(manifest))
    (out / ".partial" / "round-1-train-random").mkdir(parents=True)
    found = inspect(out)
    assert (found["left"][0], found["begun"]) == (last, [last]) and found["next"] == [f"bilect run {out}"]
    assert found["changed"] == found["left"][1:]  # the evaluation read what is to be made anew
    assert found["heldout_loss"] == {} and found["verdict"] == ""
    shutil.copy(finished[0] / "run.json", out / "run.json")
    config = yaml.safe_load((out / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump({**config, "selection": {"keep_ratio": 0.5}}))
    found = inspect(out)
    assert "round 1: select dsir" in found["changed"] and "round 1: score dsir" in found["done"]
    assert found["next"] == [f"bilect run {out} --yes"]


def test_a_run_whose_inputs_are_gone(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    config = yaml.safe_load((out / "config.yaml").read_text())
    config["data"]["lower_data"][0]["path"] = str(tmp_path / "gone.jsonl")
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    found = inspect(out)
    assert found["left"] == [] and found["note"] == ""  # the run remembers what they held
    manifest = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "inputs"}))
    found = inspect(out)
    assert found["left"] == [] and "gone.jsonl" in found["note"]


def test_a_choice(corpus, tmp_path):
    small = {"data.vocab_size": 320, "data.context": 48}
    chosen = bilect.choose(corpus / "pool.jsonl", corpus / "upper.jsonl", tmp_path / "k", method="dsir", settings=small)
    found = inspect(tmp_path / "k")
    assert (found["kind"], found["left"]) == ("choice", []) and not any("train" in name for name in found["done"])
    assert [(k["documents"], k["pool_documents"]) for k in found["kept"]] == [(chosen.documents, 60)]


def test_scores(scored):
    found = inspect(scored)
    assert (found["kind"], found["files"], found["documents"], found["tokens"]) == ("scores", 2, 20, 200)
    assert found["without_score"] == 0 and {*found["sources"]} == {"a", "b"}
    assert found["quantiles"] == pytest.approx(
        {"least": 0, "5%": 0.0475, "25%": 0.2375, "50%": 0.475, "75%": 0.7125, "95%": 0.9025, "greatest": 0.95}
    )
    b = found["sources"]["b"]
    assert (b["documents"], b["tokens"]) == (10, 100) and b["quantiles"]["50%"] == pytest.approx(0.5)
    assert inspect(scored.parent)["next"] == [f"bilect select {scored.parent} --keep 0.2"]


def test_scores_that_are_no_numbers(tmp_path):
    pq.write_table(pa.table(dict(zip(NAMES, (["x", "y"], ["s", None], [3, 4], [float("nan"), 1.0]), strict=True))),
                   tmp_path / "0.parquet")  # fmt: skip
    found = inspect(tmp_path)
    assert found["without_score"] == 1 and found["quantiles"]["least"] == 1.0
    assert found["sources"]["s"]["quantiles"]["50%"] is None and found["sources"]["(no source)"]["tokens"] == 4


def test_a_selection(scored, tmp_path):
    out = tmp_path / "selected"
    select(scored, out, SelectionConfig(top_k=6, max_share={"b": 1 / 3}))
    found = inspect(out)
    assert (found["kind"], found["kept"]) == ("selection", {"documents": 6, "tokens": 60})
    assert found["dropped"] == {"documents": 14, "tokens": 140}
    assert found["threshold"] == pytest.approx(0.6) and list(found["sources"]) == ["a", "b"]
    assert found["sources"]["b"] == {
        "kept": {"documents": 2, "tokens": 20}, "dropped": {"documents": 8, "tokens": 80},
    }  # fmt: skip
    reasons = pq.read_table(out / "dropped.parquet")["reason"].to_pylist()
    assert (
        found["reasons"] == {r: reasons.count(r) for r in (BELOW_THE_CUT, SOURCE_FULL)} and len(found["reasons"]) == 2
    )
    (out / "dropped.parquet").unlink()
    alone = inspect(out)
    assert alone["dropped"] is None and alone["reasons"] == {} and alone["kept"]["documents"] == 6


def test_models(tmp_path):
    model = load_causal_lm(TINY, vocab_size=64)
    model.save_pretrained(tmp_path / "lm")
    found = inspect(tmp_path / "lm")
    assert (found["kind"], found["architecture"], found["vocabulary"]) == ("model", "gpt_neox", 64)
    assert found["parameters"] == sum(p.numel() for p in model.parameters()) and found["stored_as"] == ["F32"]
    assert found["step"] is None and not found["tokenizer"] and str(tmp_path / "lm") in found["next"][0]
    (tmp_path / "lm" / "trainer_state.json").write_text('{"global_step": 500}')
    assert inspect(tmp_path / "lm")["step"] == 500
    scores = ScoreModel.from_causal_lm(model, torch.Generator().manual_seed(0))
    scores.save_pretrained(tmp_path / "score")
    found = inspect(tmp_path / "score")
    assert (found["kind"], found["architecture"], found["head"]) == ("score model", "gpt_neox", "sigmoid")
    assert found["parameters"] == sum(p.numel() for p in scores.parameters()) and found["next"] == []
    weights = tmp_path / "lm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(BilectError, match=r"cannot read .*model\.safetensors"):
        inspect(tmp_path / "lm")


def test_checkpoints(tmp_path):
    save_state(tmp_path / "fit.pt", {"fit": {"proxy": {"w": torch.zeros(3, 4)}, "steps_done": 40,
               "optimizers": [{"state": {0: {"step": torch.tensor(7.0)}}}]}, "stream": {"at": 3}})  # fmt: skip
    found = inspect(tmp_path / "fit.pt")
    assert (found["kind"], found["step"]) == ("checkpoint", 40)
    assert found["parts"] == {"fit": {"tensors": 2, "numbers": 13}, "stream": {"tensors": 0, "numbers": 0}}
    save_state(tmp_path / "optimizer.pt", {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(5)}}})
    assert inspect(tmp_path / "optimizer.pt")["step"] == 7
    save_state(tmp_path / "plain.pt", {"w": torch.zeros(2)})
    assert inspect(tmp_path / "plain.pt")["step"] is None


def test_what_is_none_of_these(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.pt").write_text("x")
    (tmp_path / "other").mkdir()
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "other" / "x.parquet")
    for name, word in (("a.jsonl", "is a file, and none"), ("empty", "is a folder of nothing, and none"),
                       ("gone", "nothing is at"), ("broken.pt", "cannot read"),
                       ("other", "is a folder of x.parquet, and none")):  # fmt: skip
        with pytest.raises(BilectError) as error:
            inspect(tmp_path / name)
        message = str(error.value)
        assert word in message and "a run directory (config.yaml), a selection" in message and "\n" not in message


def test_the_command(finished, scored, tmp_path):
    out, summary = finished
    save_state(tmp_path / "fit.pt", {"fit": {"w": torch.zeros(1234), "steps_done": 40}})
    select(scored, tmp_path / "selected", SelectionConfig(top_k=6))
    for path, *words in (
        (out, "a run", "round 1: train dsir", "maths", summary["verdict"][:30], f"Next: bilect report {out}"),
        (scored, "20 documents, 200 tokens, 2 files", "in all", "0.475"),
        (tmp_path / "selected", "threshold 0.7", "below the cut: 14", "bilect export"),
        (out / "target", "gpt_neox", "with a tokenizer"),
        (tmp_path / "fit.pt", "after step 40", "1,234"),
    ):
        result = CliRunner().invoke(app, ["inspect", str(path)], env={"COLUMNS": "300"})
        assert result.exit_code == 0, result.output
        assert [word for word in words if word not in result.output] == [], result.output
    told = json.loads(CliRunner().invoke(app, ["inspect", str(scored), "--json"]).stdout)
    assert told["path"] == str(scored) and told["quantiles"]["greatest"] == pytest.approx(0.95)
