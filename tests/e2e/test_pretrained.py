"""Runs of models that are trained already: no warm-up of their own, every way of choosing, several rounds."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bilect.config import parse_config
from bilect.errors import BilectError
from bilect.models.loading import load_causal_lm
from bilect.pipeline.context import RunContext
from bilect.pipeline.directory import read_manifest
from bilect.pipeline.plan import plan_run
from bilect.pipeline.stages import run
from bilect.runtime.progress import SilentProgress
from bilect.runtime.seeds import derive_seed
from bilect.selection.records import kept_rows
from bilect.training.evaluation import evaluate
from bilect.training.train import train
from tests.corpus import tiny_settings

ARMS = ["dsir", "less", "mates", "influence", "blade"]
AS_IT_IS = {"steps": 0}


def settings(corpus, model, **changes):
    changes = {"controls": ARMS, "methods": {"mates": {"probes": 16}}, **changes}
    values = tiny_settings(corpus, models={"proxy": str(model), "target": str(model)}, **changes)
    values["data"].pop("vocab_size", None)  # the model brings its tokenizer
    values["warmup"] = {"share": 0.05, "proxy": AS_IT_IS, "target": AS_IT_IS}
    values["fit"] |= {"steps": 2}
    values["training"] |= {"steps": 4, "decay_steps": 0, "warmup_ratio": 0.5}
    values["online"] = {"method": "full", "sync_every": 2, "reference_steps": 1, "upper_batch_size": 2}
    return parse_config(values)


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory):
    """A model with its tokenizer, as it might come from the Hub."""
    folder = tmp_path_factory.mktemp("pretrained")
    values = tiny_settings(corpus, method="random", controls=[])
    for part in values["warmup"].values():
        part |= {"steps": 6, "decay_steps": 0}
    run(parse_config(values), folder / "run", command="warmup")
    context = RunContext(folder / "run", parse_config(values), SilentProgress())
    context.save(context.load("warmup/target"), folder / "model")
    return folder / "model"


def test_every_arm_starts_from_the_model_as_it_is(corpus, model, tmp_path):
    out, config = tmp_path / "run", settings(corpus, model, rounds=2)
    planned = {stage.name: stage for stage in plan_run(config, out)}
    assert planned["warm up target"].tokens == 0
    summary = run(config, out)
    assert set(summary["heldout"]) == {"warm", "bliss", *ARMS}
    weights = [load_file(folder / "model.safetensors") for folder in (model, out / "warmup" / "target")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    context = RunContext(out, config, SilentProgress())
    arm = out / "controls" / "dsir" / "round-1"
    pool, alone = context.pool(), load_causal_lm(str(model))
    rows = kept_rows(arm / "selected", pool, in_order=False)
    with SilentProgress().task("train") as task:
        train(alone, pool, rows, tmp_path, config.training, context=48,
              seed=derive_seed(0, "train", 1), task=task, checkpoint_every=100, device=torch.device("cpu"))  # fmt: skip
    trained = load_file(arm / "target" / "model.safetensors")
    assert all(
        np.array_equal(trained[name], value.detach()) for name, value in alone.named_parameters() if name in trained
    )
    rates = [[json.loads(line)["learning_rate"] for line in (arm.with_name(f"round-{n}") / "target" / "training.jsonl")
              .read_text().splitlines()] for n in (1, 2)]  # fmt: skip
    assert rates == [[0.0, 2.5e-3, 5e-3, 5e-3], [5e-3] * 4]  # a fresh optimiser warms up; the next round has its state


def test_a_training_without_steps_is_refused_before_anything_is_computed(corpus, model, tmp_path):
    config = settings(corpus, model)
    config = config.model_copy(update={"training": config.training.model_copy(update={"steps": 0})})
    with pytest.raises(BilectError, match=r"^training.steps: 0 steps train nothing; to choose only: bilect choose"):
        run(config, tmp_path / "run")
    assert not list((tmp_path / "run").glob("t*"))


def test_held_out_losses_are_in_the_precision_of_the_training(corpus, model, tmp_path):
    out, warm, stages = tmp_path / "run", [], []
    for bf16 in (False, True):
        config = settings(corpus, model, method="random", controls=[], methods={}, curve={"every": 4, "documents": 8})
        config = config.model_copy(update={"training": config.training.model_copy(update={"bf16": bf16})})
        run(config, out, repeat=True)
        context = RunContext(out, config, SilentProgress())
        [(name, store)] = context.heldout_sets().items()

        def loss(folder, bf16=bf16, context=context, store=store, **more):
            return evaluate(context.load(folder), store, context.pad_id, bf16=bf16, **more).loss

        warm.append(json.loads((out / "warmup" / "eval.json").read_text())[name]["loss"])
        trained = json.loads((out / "round-1" / "eval.json").read_text())[name]["loss"]
        assert (warm[-1], trained) == (loss("warmup/target"), loss("round-1/target"))
        sample = np.sort(np.random.default_rng(0).permutation(len(store))[:8])
        point = json.loads((out / "round-1" / "target" / "heldout.jsonl").read_text().splitlines()[-1])
        assert point["loss"][name] == loss("round-1/target", rows=sample)
        stages.append(read_manifest(out)["stages"]["evaluate warm"]["made_of"])
    assert warm[0] != warm[1] == pytest.approx(warm[0], rel=1e-2)  # the model is the same
    assert stages == [{}, {"training.bf16": True}]  # float32 runs of before are not evaluated again
