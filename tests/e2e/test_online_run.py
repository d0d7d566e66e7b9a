"""Runs whose training chooses tokens: ``bilect train --method``, and BLISS rounds that train with BLADE."""

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from bilect.bilevel.cost import selecting_flops
from bilect.cli.commands import main
from bilect.config import TrainConfig, parse_config
from bilect.config.online import BladeConfig
from bilect.data.loading import PackedWindows, SetStream, UpperBatches
from bilect.data.tokens import TokenStore
from bilect.models.flops import forward_flops
from bilect.models.loading import load_causal_lm
from bilect.pipeline.context import open_pool
from bilect.pipeline.stages import run
from bilect.runtime.progress import SilentProgress
from bilect.training.train import Online, train
from tests.corpus import tiny_settings
from tests.helpers import tiny_lm

STEPS, DECAY, BATCH, CONTEXT = 12, 3, 4, 48


def settings(corpus, **changes):
    values = tiny_settings(corpus, **changes)
    values["training"] |= {"steps": STEPS, "decay_steps": DECAY}
    for part in values["warmup"].values():
        part |= {"steps": 4, "decay_steps": 0}
    values["fit"] |= {"steps": 3}
    values["online"] = {"sync_every": 5, "reference_steps": 3, "upper_batch_size": 2, "diagnose_every": 4,
                        **values.get("online", {})}  # fmt: skip
    return values


@pytest.fixture(scope="module")
def compared(corpus, tmp_path_factory):
    """``bilect train --method``, four times over; rank 0's figures and folder."""
    folder = tmp_path_factory.mktemp("online")
    values = settings(corpus, controls=[])
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    arms = ["full", "random-token", "rho1", "blade"]
    return folder / "run", run(parse_config(values), folder / "run", command="train", arms=arms)


def test_methods_train_on_equal_tokens_of_the_same_order(compared):
    out, records = compared
    assert [n for n in records if "train" in n] == [
        f"round 1: train {a}" for a in ("full", "random-token", "rho1", "blade")
    ]
    assert {r["tokens"] for n, r in records.items() if "train" in n} == {(STEPS + DECAY) * BATCH * CONTEXT}
    assert not [n for n in records if "fit" in n or "bliss" in n or "proxy" in n]  # no documents are chosen
    for arm in ("full", "random-token", "rho1", "blade"):
        folder = out / "controls" / arm / "round-1"
        loss = json.loads((folder / "eval.json").read_text())["heldout"]["loss"]
        assert records[f"round 1: evaluate {arm}"]["heldout_loss"] == loss
        logged = [json.loads(line) for line in (folder / "target" / "training.jsonl").read_text().splitlines()]
        assert logged[0]["step"] == 1 and len(logged) == STEPS


def test_cost_of_choosing_is_counted(compared):
    _, records = compared
    flops = {n.split()[-1]: r["flops"] for n, r in records.items() if "train" in n}
    assert flops["full"] == flops["random-token"]
    tokens, batch = (STEPS + DECAY) * BATCH * CONTEXT, BATCH * CONTEXT
    store = TokenStore(compared[0] / "tokens" / "upper" / "upper.arrow")
    upper = 2 * float(store.length_R.mean())
    passes = (flops["blade"] - flops["full"]) / (flops["full"] / (3 * tokens))
    syncs = 3  # after three batches, then every five of the fifteen steps
    assert passes == pytest.approx(tokens + 3 * syncs * 3 * (upper + batch), rel=1e-9)
    passes = (flops["rho1"] - flops["full"]) / (flops["full"] / (3 * tokens))
    assert passes == pytest.approx(tokens + 3 * 1 * 3 * upper, rel=1e-9)


def test_what_was_selected_is_told(compared):
    out, _ = compared
    told = {a: json.loads((out / "controls" / a / "round-1" / "target" / "online.json").read_text())
            for a in ("random-token", "rho1", "blade")}  # fmt: skip
    assert (
        told["blade"]["synchronisations"] == 2 and told["rho1"]["synchronisations"] == 1
    )  # the decayed copy had another
    assert [e["step"] for e in told["blade"]["entries"]] == [4, 8]
    for entry in told["blade"]["entries"]:
        assert set(entry["sources"]) <= {"maths", "weather"}
        assert sum(s["tokens"] for s in entry["sources"].values()) == BATCH * (CONTEXT - 1)
        kept = sum(s["tokens"] * s["kept"] for s in entry["sources"].values())
        assert kept == pytest.approx(entry["kept"] * BATCH * (CONTEXT - 1)) and entry["kept"] == pytest.approx(
            0.6, abs=0.01
        )
        words = "".join(entry["documents"][0]["text"]).replace("<|endoftext|>", " ").split()
        assert {"sum", "root", "rain", "wind", "lemma"} & set(words)


def test_a_method_that_knows_no_target_needs_no_upper_data(corpus, tmp_path):
    records = run(parse_config(settings(corpus, controls=[])), tmp_path, command="train", arms=["perplexity"])
    assert "tokenise upper" not in records and not (tmp_path / "tokens" / "upper").exists()
    assert 0 < records["round 1: select perplexity"]["documents"] < 90
    assert records["round 1: evaluate perplexity"]["heldout_loss"] > 0


def test_blade_that_keeps_everything_ends_where_full_ends(compared, corpus, tmp_path):
    out, _ = compared
    values = settings(corpus, controls=[], online={"keep_ratio": {0: 1.0}, "diagnose_every": None})
    run(parse_config(values), tmp_path, command="train", arms=["blade"])
    weights = [load_file(p / "model.safetensors") for p in
               (tmp_path / "controls/blade/round-1/target", out / "controls/full/round-1/target")]  # fmt: skip
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-5)


def test_rounds_train_with_blade_and_the_reference_goes_on(corpus, tmp_path):
    values = settings(corpus, rounds=2, controls=["random"])
    summary = run(parse_config(values), tmp_path)
    one, two = (json.loads((tmp_path / f"round-{n}" / "target" / "online.json").read_text()) for n in (1, 2))
    assert [e["step"] for e in two["entries"]] == [4, 8, 12, 16, 20] and two["entries"][:2] == one["entries"]
    assert two["synchronisations"] == 5 and not (tmp_path / "controls/random/round-1/target/online.json").exists()
    assert summary["flops"]["round 1: train bliss"] > 1.3 * summary["flops"]["round 1: train random"]
    assert summary["tokens"]["bliss"] == summary["tokens"]["random"]
    again = settings(corpus, rounds=2, controls=["random"], online={"keep_ratio": 0.5})
    before = (tmp_path / "round-1/target/model.safetensors").read_bytes()
    run(parse_config(again), tmp_path, command="train", number=1, repeat=True)
    assert (tmp_path / "round-1/target/model.safetensors").read_bytes() != before  # its settings are in the stage's key


def test_command_line(corpus, tmp_path, capsys, monkeypatch, compared):
    out, _ = compared
    monkeypatch.setattr(sys, "argv", ["bilect", "train", str(out.parent / "config.yaml"), "--out", str(out),
                                      "--method", "blade", "--method", "full"])  # fmt: skip
    main()  # returns: exit code 0
    printed = capsys.readouterr().out
    assert "Held-out loss at equal training tokens" in printed
    loss = json.loads((out / "controls" / "blade" / "round-1" / "eval.json").read_text())["heldout"]["loss"]
    assert f"{loss:.4f}" in printed


def test_plan_counts_the_choice_of_tokens(compared, corpus):
    from bilect.pipeline.plan import plan_run

    out, records = compared
    lines = {p.name: p for p in plan_run(parse_config(settings(corpus, controls=[])), out, ["blade", "full"])}
    assert all(p.done for p in lines.values()) and "round 1: fit bliss" not in lines
    assert lines["round 1: train blade"].flops == pytest.approx(records["round 1: train blade"]["flops"], rel=0.02)


def test_upper_batches_are_those_of_the_stream_in_the_convention_of_transformers(compared):
    store = TokenStore(compared[0] / "tokens" / "upper" / "upper.arrow")
    batches, stream = (
        iter(UpperBatches([store], [1.0], 3, 0, 7)),
        SetStream([store], [1.0], 3, 0, 7, torch.device("cpu")),
    )
    for _ in range(3):
        batch, expected = next(batches), next(stream)
        assert torch.equal(batch["input_ids"], expected.input_ids_BT)
        assert torch.equal(batch["labels"][:, 1:], expected.target_BT[:, :-1]) and (batch["labels"][:, 0] == -100).all()
        assert torch.equal(batch["attention_mask"], expected.mask_BT)


def test_windows_are_labelled_with_the_source_of_most_of_their_text(compared):
    pool = open_pool(compared[0] / "tokens")
    rows = torch.arange(len(pool)).numpy()
    windows = PackedWindows(pool, rows, CONTEXT, 30, 0, label_sources=True)
    assert windows.sources == ["maths", "weather"]
    plain = PackedWindows(pool, rows, CONTEXT, 30, 0)
    sources = pool.sources(rows)
    for i in range(30):
        assert torch.equal(windows[i]["input_ids"], plain[i]["input_ids"]) and "source" not in plain[i]
        starts = windows.ends - pool.length_R[windows.order]
        inside = {k: min(windows.ends[k], (i + 1) * CONTEXT) - max(starts[k], i * CONTEXT) for k in range(len(starts))}
        longest = max(inside, key=lambda k: inside[k])
        assert windows[i]["source"] == sources[windows.order[longest]]


def test_sources_keep_their_names_where_the_training_goes_on_with_other_documents(compared, tmp_path):
    out, _ = compared
    pool, rows = open_pool(out / "tokens"), np.arange(240)
    of = np.array(pool.sources(rows))
    config = TrainConfig(steps=4, batch_size=2, decay_steps=0)
    upper = UpperBatches([TokenStore(out / "tokens" / "upper" / "upper.arrow")], [1.0], 2, 0, 7)
    online = Online(BladeConfig(method="random-token", diagnose_every=2), upper, str)
    told = []
    for source, before in (("weather", None), ("maths", tmp_path / "weather")):
        folder = tmp_path / source
        folder.mkdir()
        with SilentProgress().task("") as task:
            train(load_causal_lm(str(out / "warmup" / "target")), pool, rows[of == source], folder, config,
                  context=CONTEXT, seed=0, task=task, checkpoint_every=99, start_from=before, online=online,
                  device=torch.device("cpu"))  # fmt: skip
        told.append([list(e["sources"]) for e in json.loads((folder / "online.json").read_text())["entries"]])
    assert told == [[["weather"]] * 2, [["weather"]] * 2 + [["maths"]] * 2]


def test_operations_of_a_selection():
    model = tiny_lm()
    per_token = forward_flops(model, 1, 32)
    given = {"tokens": 1000, "context": 32, "batch_tokens": 64, "upper_tokens": 10, "synchronisations": 2}
    steps = 7
    for config, passes in (
        (BladeConfig(reference_steps=steps), 1000 + 3 * 2 * steps * 74),
        (BladeConfig(reference_steps=steps, baseline="matched"), 2000 + 3 * 2 * steps * 138),
        (BladeConfig(reference_steps=steps, penalty=0), 1000 + 3 * 2 * steps * 10),
        (BladeConfig(method="rho1", reference_steps=steps), 1000 + 3 * 2 * steps * 10),
        (BladeConfig(method="random-token"), 0),
        (BladeConfig(keep_ratio=1), 0),
    ):
        assert selecting_flops(config, model, **given) == pytest.approx(passes * per_token)
