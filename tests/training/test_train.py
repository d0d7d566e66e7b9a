"""Training through the Trainer, evaluation, scoring and the count of operations, against plain renditions."""

import json
import math

import numpy as np
import pytest
import torch

from bilect.config import TrainConfig
from bilect.data.batch import make_batch
from bilect.data.documents import Document
from bilect.data.tokens import TokenStore, write_tokens
from bilect.errors import BilectError
from bilect.models.causal_lm import CausalLM
from bilect.models.flops import forward_flops
from bilect.models.loading import load_causal_lm, train_tokenizer
from bilect.models.score_model import ScoreModel
from bilect.runtime.progress import SilentProgress
from bilect.selection.scoring import score_rows
from bilect.training.evaluation import document_losses, evaluate
from bilect.training.train import NotANumberError, forget_training, train
from bilect.training.trainer import FusedLoss
from tests.corpus import TINY

WORDS = ["the", "sun", "and", "rain", "over", "a", "blue", "hill", "or", "green", "field", "by", "old", "stone"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(5, 40))) for _ in range(40)]
    documents = [Document(f"d{i}", "s", t, t[: len(t) // 2] if i % 2 else "") for i, t in enumerate(texts)]
    path = tmp_path_factory.mktemp("tokens") / "t.arrow"
    write_tokens(documents, train_tokenizer(texts, 320), path, context=48)
    return TokenStore(path)


def model(seed=0):
    return load_causal_lm(TINY, vocab_size=320, seed=seed)


def run_training(store, folder, network, checkpoint_every=500, curve=None, **settings):
    config = TrainConfig(**{"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "decay_steps": 3, **settings})
    with SilentProgress().task("t") as task:
        more = {"context": 32, "seed": 1, "task": task, "device": torch.device("cpu"), "curve": curve}
        more["checkpoint_every"] = checkpoint_every
        folder.mkdir(exist_ok=True)
        return train(network, store, np.arange(len(store)), folder, config, **more), config, more


def test_equals_a_plain_loop(store, tmp_path):
    from torch.utils.data import DataLoader, RandomSampler

    from bilect.data.loading import PackedWindows

    ours = model()
    figures, config, _ = run_training(store, tmp_path / "a", ours)
    assert figures["tokens"] == 6 * 4 * 32 and figures["steps"] == 6

    plain = model().train()
    decayed = [p for p in plain.parameters() if p.dim() == 2]
    others = [p for p in plain.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    windows = PackedWindows(store, np.arange(len(store)), 32, 24, seed=1)
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(windows, batch_size=4, sampler=RandomSampler(windows, generator=generator))
    seen = {tuple(w["input_ids"].tolist()) for w in windows}
    batches = list(loader)
    assert {tuple(r) for b in batches for r in b["input_ids"].tolist()} == seen
    for batch in batches:
        loss = plain(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    # the Trainer's own order of windows differs from a loop's; what both learn is the same text
    with torch.no_grad():
        whole = [plain(input_ids=w["input_ids"][None], labels=w["labels"][None]).loss.item() for w in windows]
        mine = [ours(input_ids=w["input_ids"][None], labels=w["labels"][None]).loss.item() for w in windows]
    assert np.mean(mine) == pytest.approx(np.mean(whole), rel=0.05)


def test_first_step_equals_the_plain_gradient_step(store, tmp_path):
    from bilect.data.loading import PackedWindows

    ours, plain = model(), model()
    run_training(store, tmp_path / "a", ours, steps=1, warmup_ratio=0.0)
    windows = PackedWindows(store, np.arange(len(store)), 32, 4, seed=1)
    ids, labels = (torch.stack([w[k] for w in windows]) for k in ("input_ids", "labels"))
    plain(input_ids=ids, labels=labels).loss.backward()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        step = (p - q).detach()
        big = q.grad.abs() > 1e-4 * q.grad.abs().max()
        assert torch.allclose(torch.sign(step[big]), -torch.sign(q.grad[big]))  # AdamW's first step: lr * sign
        assert step[big].abs().median() == pytest.approx(1e-2, rel=0.02)


def test_same_seed_same_model_and_accumulation_changes_nothing(store, tmp_path):
    models = [model() for _ in range(3)]
    run_training(store, tmp_path / "a", models[0])
    run_training(store, tmp_path / "b", models[1])
    run_training(store, tmp_path / "c", models[2], gradient_accumulation=2)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    for a, c in zip(models[0].parameters(), models[2].parameters(), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-4)


def test_the_optimiser_goes_on_and_the_decay_branch_ends_at_zero(store, tmp_path):
    import json

    network = model()
    _, config, more = run_training(store, tmp_path / "a", network, warmup_ratio=0.5)
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "a" / "training.jsonl").read_text().splitlines()]
    assert rates[0] < rates[2] and rates[3:] == [pytest.approx(1e-2)] * 3
    (tmp_path / "b").mkdir()
    rows = np.arange(len(store))
    train(network, store, rows, tmp_path / "b", config, start_from=tmp_path / "a", **more)
    going_on = [
        json.loads(line)["learning_rate"] for line in (tmp_path / "b" / "training.jsonl").read_text().splitlines()
    ]
    assert going_on == [pytest.approx(1e-2)] * 6  # no second warm-up
    state = torch.load(tmp_path / "b" / "optimizer.pt", weights_only=True)
    assert {int(s["step"]) for s in state["state"].values()} == {12}  # moments carried over
    train(network, store, rows, tmp_path / "b", config, start_from=tmp_path / "b", decay=True, **more)
    down = [json.loads(line)["learning_rate"] for line in (tmp_path / "b" / "decay.jsonl").read_text().splitlines()]
    assert down == sorted(down, reverse=True) and down[-1] < 1e-2 / 3 + 1e-9


def test_cosine_schedule(store, tmp_path):
    import json

    run_training(store, tmp_path / "a", model(), schedule="cosine", warmup_ratio=0.0)
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "a" / "training.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([1e-2 * 0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)])


# ------------------------------------------------------------------------------------------------------------- resume


class Killed(BaseException):
    """Stands for SIGKILL."""


class KillingTask:
    """Ends the training at its ``at``-th advance, a step or what a resumed training takes over at once."""

    def __init__(self, at=10**9):
        self.at, self.amounts = at, []

    def advance(self, amount=1, **figures):
        if amount:
            self.amounts.append(amount)
            if len(self.amounts) == self.at:
                raise Killed


def interrupted(store, folder, make, kills, *, rows=None, **more):
    """Attempts that each end at one of ``kills``, then one that finishes; its figures, model and advances."""
    folder.mkdir(exist_ok=True)
    for at in [*kills, 10**9]:
        torch.manual_seed(at)  # a new process has another state
        task, network = KillingTask(at), make()
        try:
            common = {"context": 32, "seed": 1, "task": task, "device": torch.device("cpu"), "checkpoint_every": 3}
            figures = train(network, store, np.arange(len(store)), folder, more["config"], **{**common, **more["call"]})
        except Killed:
            continue
    return figures, network, task.amounts


FAMILIES = {
    "neox": TINY,
    "tied": {**TINY, "tie_word_embeddings": True},
    "dropout": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.3},
}


@pytest.mark.parametrize(
    ("phase", "family"), [("main", "neox"), ("main", "dropout"), ("goes on", "tied"), ("decay", "neox")]
)
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(store, tmp_path, family, phase):
    def make():
        return load_causal_lm(FAMILIES[family], vocab_size=320, seed=0)

    accumulation = 2 if phase == "main" else 1
    config = TrainConfig(
        steps=8, batch_size=4, decay_steps=8, learning_rate=1e-2, schedule="cosine", gradient_accumulation=accumulation
    )
    call = {}
    if phase != "main":
        interrupted(store, tmp_path / "before", make, [], config=config, call={"checkpoint_every": 500})
        call = {"start_from": tmp_path / "before", "decay": phase == "decay"}
    whole = interrupted(store, tmp_path / "whole", make, [], config=config, call=call)
    resumed = interrupted(store, tmp_path / "resumed", make, [5, 5], config=config, call=call)
    assert whole[2] == [1] * 8 and resumed[2] == [6, 1, 1]  # stopped at 5, with 3 saved; 3 at once, stopped at 7
    assert resumed[0] == whole[0]
    for (name, a), b in zip(whole[1].named_parameters(), resumed[1].parameters(), strict=True):
        assert torch.equal(a, b), name
    log = "decay.jsonl" if phase == "decay" else "training.jsonl"
    assert (tmp_path / "resumed" / log).read_text() == (tmp_path / "whole" / log).read_text()
    if phase != "decay":
        a, b = (torch.load(tmp_path / name / "optimizer.pt", weights_only=True) for name in ("whole", "resumed"))
        assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
        assert all(torch.equal(v, b["state"][i][k]) for i, s in a["state"].items() for k, v in s.items())
    forget_training(tmp_path / "resumed", decay=phase == "decay")
    assert not (tmp_path / "resumed" / "trainer").exists()


def test_logged_means_do_not_reach_over_a_checkpoint(store, tmp_path):
    """110 steps are logged in pairs: a checkpoint every 31 is then one every 30."""
    config, call = TrainConfig(steps=110, batch_size=1, learning_rate=1e-2), {"checkpoint_every": 31}
    whole = interrupted(store, tmp_path / "whole", model, [], config=config, call=call)
    resumed = interrupted(store, tmp_path / "resumed", model, [65], config=config, call=call)
    assert resumed[2] == [60, *[1] * 50]
    assert (tmp_path / "resumed" / "training.jsonl").read_text() == (tmp_path / "whole" / "training.jsonl").read_text()
    assert resumed[0] == whole[0]


def test_a_half_written_checkpoint_is_passed_over(store, tmp_path):
    config = TrainConfig(steps=8, batch_size=4, learning_rate=1e-2)
    whole = interrupted(store, tmp_path / "whole", model, [], config=config, call={})
    with pytest.raises(Killed):
        interrupted_once(store, tmp_path / "a", config, 5)
    checkpoints = tmp_path / "a" / "trainer" / "main"
    assert [p.name for p in checkpoints.iterdir()] == ["checkpoint-3"]
    half = checkpoints / "checkpoint-6"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    resumed = interrupted(store, tmp_path / "a", model, [], config=config, call={})
    assert resumed[2] == [3, 1, 1, 1, 1, 1] and resumed[0] == whole[0]


def interrupted_once(store, folder, config, at):
    folder.mkdir(exist_ok=True)
    more = {"context": 32, "seed": 1, "device": torch.device("cpu"), "checkpoint_every": 3}
    train(model(), store, np.arange(len(store)), folder, config, task=KillingTask(at), **more)


def test_a_short_training_writes_no_checkpoint(store, tmp_path):
    with pytest.raises(Killed):
        interrupted_once(store, tmp_path / "a", TrainConfig(steps=3, batch_size=4), 3)
    assert not list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_broken_checkpoint_is_one_line(store, tmp_path, name):
    config = TrainConfig(steps=8, batch_size=4, learning_rate=1e-2)
    with pytest.raises(Killed):
        interrupted_once(store, tmp_path / "a", config, 5)
    checkpoint = tmp_path / "a" / "trainer" / "main" / "checkpoint-3"
    file = checkpoint / name
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(BilectError, match=rf"cannot read {file} \(.*\); delete {checkpoint} to train") as caught:
        interrupted_once(store, tmp_path / "a", config, 5)
    assert "\n" not in str(caught.value)


def test_a_broken_optimizer_of_an_earlier_stage_is_one_line(store, tmp_path):
    (tmp_path / "optimizer.pt").write_bytes(b"PK hello")
    config = TrainConfig(steps=2, batch_size=4)
    with pytest.raises(BilectError, match=f"cannot read {tmp_path}/optimizer.pt .*; restore it") as caught:
        interrupted(store, tmp_path / "a", model, [], config=config, call={"start_from": tmp_path})
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- not a number


def test_a_loss_that_is_not_a_number_stops(store, tmp_path):
    network = model()
    with torch.no_grad():
        network.get_input_embeddings().weight[:] = float("nan")
    with pytest.raises(BilectError, match="loss is not a number at step 1") as caught:
        run_training(store, tmp_path / "a", network)
    assert isinstance(caught.value, NotANumberError) and caught.value.good_step is None


class Poison:
    """Makes the loss of one forward pass infinite."""

    def __init__(self, monkeypatch, at):
        self.calls, self.at, plain = 0, at, FusedLoss.forward

        def forward(module, *args, **more):
            self.calls += 1
            out = plain(module, *args, **more)
            return {"loss": out["loss"] * (float("inf") if self.calls == self.at else 1.0)}

        monkeypatch.setattr(FusedLoss, "forward", forward)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_step_is_named_and_the_weights_before_it_are_kept(store, tmp_path, monkeypatch, accumulation):
    """Logged every other step, checkpointed every fourth: noticed at once all the same."""
    good = model()
    settings = {"steps": 100, "gradient_accumulation": accumulation, "schedule": "constant"}
    stopped = {"context": 32, "seed": 1, "task": KillingTask(5), "device": torch.device("cpu"), "checkpoint_every": 500}
    config = TrainConfig(batch_size=4, learning_rate=1e-2, **settings)
    with pytest.raises(Killed):
        train(good, store, np.arange(len(store)), tmp_path, config, **stopped)
    Poison(monkeypatch, 7 * accumulation)  # within step 7; that the gradient of step 6 was good is known of the 5th
    bad = model()
    with pytest.raises(NotANumberError, match="at step 7") as caught:
        run_training(store, tmp_path / "a", bad, checkpoint_every=4, **settings)
    assert (caught.value.step, caught.value.good_step) == (7, 5)
    for p, q in zip(good.parameters(), bad.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [p.name for p in (tmp_path / "a" / "trainer" / "main").iterdir()] == ["checkpoint-4"]


def test_weights_that_overflow_at_the_last_step_are_no_result(store, tmp_path):
    network = model()
    with pytest.raises(NotANumberError) as caught:
        run_training(store, tmp_path / "a", network, steps=1, learning_rate=1e38, warmup_ratio=0.0, weight_decay=10.0)
    assert caught.value.good_step == 0
    for p, q in zip(network.parameters(), model().parameters(), strict=True):
        assert torch.equal(p, q)


def test_evaluation_equals_document_by_document(store):
    network = model(3).eval()
    total, tokens, right, per_document = 0.0, 0, 0, []
    for i in range(len(store)):
        ids, n_given = store.row(i)
        with torch.no_grad():
            logits = network(input_ids=ids[None]).logits[0, :-1].double()
        ce = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[n_given - 1 :]
        total, tokens = total + float(ce.sum()), tokens + len(ce)
        per_document.append(float(ce.mean()))
        right += bool((logits.argmax(-1) == ids[1:])[n_given - 1 :].all())
    result = evaluate(network, store, pad_id=0, batch_tokens=200)
    assert result.tokens == tokens and result.documents == 40
    assert result.loss == pytest.approx(total / tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert result.accuracy == right / 40
    rows = np.array([5, 3, 30])
    assert document_losses(network, store, rows, 0, 100) == pytest.approx([per_document[i] for i in rows], rel=1e-5)


def test_evaluation_in_bfloat16_has_losses_of_float32(store):
    network, per_document = model(3).eval(), []
    lm, rows = CausalLM(network), np.arange(len(store))
    for i in rows:
        batch = make_batch(store.rows(rows[i : i + 1]), 0)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hidden_ND = batch.predicting(lm.hidden(batch.input_ids_BT))
            logits = torch.nn.functional.linear(hidden_ND, network.get_output_embeddings().weight)
        assert logits.dtype == torch.bfloat16
        per_document.append(torch.nn.functional.cross_entropy(logits.float(), batch.labels_N, reduction="none"))
    expected, exact = np.array([float(ce.mean()) for ce in per_document]), document_losses(network, store, rows, 0)
    found = document_losses(network, store, rows, 0, batch_tokens=1, bf16=True)
    assert np.abs(found / expected - 1).max() < 1e-6 < np.abs(exact / expected - 1).max()
    loss = evaluate(network, store, pad_id=0, batch_tokens=1, bf16=True).loss
    assert loss == pytest.approx(float(torch.cat(per_document).double().mean()), rel=1e-6)


def test_scores_do_not_depend_on_batches(store):
    score_model = ScoreModel.from_causal_lm(model(), torch.Generator().manual_seed(0))
    rows = np.array([7, 1, 30, 12, 5])
    alone = score_rows(score_model, store, rows, 0, batch_tokens=1)
    assert np.abs(alone - score_rows(score_model, store, rows, 0, batch_tokens=10_000)).max() <= 1e-5
    assert np.abs(alone[::-1] - score_rows(score_model, store, rows[::-1].copy(), 0, batch_tokens=64)).max() <= 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_flops_agree_with_the_counter(tied):
    from torch.utils.flop_counter import FlopCounterMode

    network = load_causal_lm({**TINY, "tie_word_embeddings": tied, "num_hidden_layers": 3}, vocab_size=320)
    network.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(input_ids=torch.zeros(2, 64, dtype=torch.long))
    attention = 3 * 2 * 2 * 2 * 64 * 64 * 16  # layers, two products, batch, operations: the counter sees no mask
    counted = counter.get_total_flops() - attention / 2
    assert forward_flops(network, 128, 64) == pytest.approx(counted, rel=0.02)
    score_model = ScoreModel.from_causal_lm(network, torch.Generator())
    assert forward_flops(score_model, 128, 64) == pytest.approx(counted - 128 * 2 * 16 * 320, rel=0.02)


def test_a_curve_is_measured_beside_the_training(store, tmp_path):
    from bilect.training.curve import HeldoutCurve

    plain, watched = model(), model()
    run_training(store, tmp_path / "a", plain)
    curve = HeldoutCurve({"h": store}, every=4, documents=10, pad_id=0, batch_tokens=256)
    figures, _, _ = run_training(store, tmp_path / "b", watched, curve=curve)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    logs = [(tmp_path / f / "training.jsonl").read_text() for f in ("a", "b")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 6  # a point at a logged step takes nothing away
    rows = np.sort(np.random.default_rng(0).permutation(len(store))[:10])
    points = [json.loads(line) for line in (tmp_path / "b" / "heldout.jsonl").read_text().splitlines()]
    assert [p["step"] for p in points] == [0, 4, 6]
    for point, network in ((points[0], model()), (points[-1], watched)):
        expected = evaluate(network, store, 0, rows=rows)
        assert expected.documents == 10 and point["loss"]["h"] == pytest.approx(expected.loss, rel=1e-6)
    assert 0 < figures["curve_seconds"] == pytest.approx(sum(p["seconds"] for p in points), abs=0.003)  # both rounded


def test_an_interrupted_curve_goes_on(store, tmp_path):
    from bilect.training.curve import HeldoutCurve

    curve = HeldoutCurve({"h": store}, every=2, documents=10, pad_id=0, batch_tokens=256)
    run_training(store, tmp_path / "whole", model(), curve=curve)

    class Killed(Exception):
        pass

    class Killing:
        count = 0

        def advance(self, amount=1, **figures):
            self.count += amount
            if self.count == 5:
                raise Killed

    config = TrainConfig(steps=6, batch_size=4, learning_rate=1e-2, decay_steps=3)
    more = {"context": 32, "seed": 1, "device": torch.device("cpu"), "checkpoint_every": 2, "curve": curve}
    (tmp_path / "parts").mkdir()
    with pytest.raises(Killed):
        train(model(), store, np.arange(len(store)), tmp_path / "parts", config, task=Killing(), **more)
    with SilentProgress().task("t") as task:
        train(model(), store, np.arange(len(store)), tmp_path / "parts", config, task=task, **more)
    lines = [[json.loads(line) for line in (tmp_path / f / "heldout.jsonl").read_text().splitlines()]
             for f in ("whole", "parts")]  # fmt: skip
    assert [(p["step"], p["loss"]) for p in lines[0]] == [(p["step"], p["loss"]) for p in lines[1]]
    assert [p["step"] for p in lines[0]] == [0, 2, 4, 6]
