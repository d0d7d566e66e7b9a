"""Several upper sets: the weighted sum of their mean losses, each reported by itself."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilect.bilevel.objective import upper_objective
from bilect.bilevel.offline.fit import BilevelFit
from bilect.config import FitConfig
from bilect.data.batch import join_batches, make_batch
from bilect.data.documents import Document
from bilect.data.loading import BatchStream, SetStream, _parts
from bilect.data.tokens import TokenStore, write_tokens
from bilect.errors import BilectError
from bilect.functional.losses import token_losses
from bilect.models.causal_lm import CausalLM
from bilect.models.loading import train_tokenizer
from bilect.models.score_model import ScoreModel
from tests.helpers import tiny_lm

SETS = [
    [(torch.tensor([1, 5, 9, 3]), 1), (torch.tensor([1, 8, 2, 7, 7, 4, 6]), 3)],
    [(torch.arange(1, 22), 20)],  # a single answer token, like LAMBADA
]


@pytest.fixture(scope="module")
def lm():
    return CausalLM(tiny_lm())


def mean_loss(lm, documents):
    batch = make_batch(documents, 0)
    return token_losses(batch.predicting(lm.hidden(batch.input_ids_BT)), lm.head(), batch.labels_N).ce_N.mean()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.2, 0.6)])
def test_weighted_sum_of_the_sets_means_and_its_gradient(lm, weights):
    batch = join_batches([make_batch(d, 0) for d in SETS], pad_id=0)
    actual = upper_objective(lm, batch, weights).gradient(lm.params())
    means = [mean_loss(lm, d) for d in SETS]
    share = [w / sum(weights) for w in weights]
    expected = sum(s * m for s, m in zip(share, means, strict=True))
    assert actual.ce == pytest.approx(expected.item(), rel=1e-12)
    assert actual.ce_S == pytest.approx([s * m.item() for s, m in zip(share, means, strict=True)], rel=1e-12)
    gradients = torch.autograd.grad(expected, list(lm.params().values()))
    for got, wanted in zip(actual.tree.values(), gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_joined_batches_keep_every_document_and_its_set():
    batch = join_batches([make_batch(d, 0) for d in SETS], pad_id=0)
    assert batch.set_B is not None and batch.set_B.tolist() == [0, 0, 1]
    assert batch.length_B.tolist() == [4, 7, 21]
    assert batch.predicted_B.tolist() == [3, 4, 1]
    part = batch.rows(slice(1, 3))
    assert part.set_B is not None and part.set_B.tolist() == [0, 1]


def test_one_set_is_the_plain_mean(lm):
    batch = make_batch(SETS[0], 0)
    actual = upper_objective(lm, batch).gradient(lm.params())
    assert actual.ce == pytest.approx(mean_loss(lm, SETS[0]).item(), rel=1e-12) and len(actual.ce_S) == 0


@given(st.integers(1, 40), st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 3))
def test_parts_of_a_batch(spare, weights, least):
    total = spare + least * len(weights)
    parts = _parts(total, weights, least)
    assert sum(parts) == total and min(parts) >= least
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - least - weight / sum(weights) * spare) < 1 + 1e-9


@pytest.fixture
def stores(tmp_path):
    tokenizer = train_tokenizer(["one two three four"], 300)
    made = []
    for name, count in (("many", 20), ("few", 2)):
        write_tokens([Document(f"{name}{i}", name, "one two " * (i + 1)) for i in range(count)], tokenizer,
                     tmp_path / f"{name}.arrow", context=64)  # fmt: skip
        made.append(TokenStore(tmp_path / f"{name}.arrow"))
    return made


def test_every_batch_holds_the_same_part_of_each_set(stores):
    stream = SetStream(stores, [3.0, 1.0], 8, 0, seed=0, device=torch.device("cpu"))
    first = [next(stream) for _ in range(3)]
    assert all(b.set_B is not None and b.set_B.tolist() == [0] * 6 + [1] * 2 for b in first)
    few = set(stores[1].length_R.tolist())
    assert all({int(n) for n in b.length_B[6:]} == few for b in first)  # both documents of the small set, every time
    state, ahead = stream.state_dict(), next(stream)
    again = SetStream(stores, [3.0, 1.0], 8, 0, seed=5, device=torch.device("cpu"))
    again.load_state_dict(state)
    assert torch.equal(next(again).input_ids_BT, ahead.input_ids_BT)
    with pytest.raises(BilectError, match="1 documents are too few for 2 upper sets"):
        SetStream(stores, [1.0, 1.0], 1, 0, seed=0, device=torch.device("cpu"))


def test_a_single_set_draws_as_it_always_did(stores):
    alone = SetStream(stores[:1], [7.0], 8, 0, seed=3, device=torch.device("cpu"))
    plain = BatchStream(stores[0], np.arange(20), 8, 0, 3, torch.device("cpu"))
    for _ in range(4):
        a, b = next(alone), next(plain)
        assert a.set_B is None and torch.equal(a.input_ids_BT, b.input_ids_BT)


def test_no_more_batches_than_it_takes_to_draw_everything(stores):
    one, both = (SetStream(stores[:n], [3.0, 1.0][:n], 8, 0, seed=0, device=torch.device("cpu")) for n in (1, 2))
    assert [one.batches_of(n) for n in (1, 8, 9, 512)] == [1, 1, 2, 3]  # 20 documents, 8 a batch
    assert [both.batches_of(n) for n in (16, 512)] == [2, 4]  # 20 and 2 documents, 6 and 2 a batch


@pytest.mark.parametrize("more", [{}, {"hypergradient": "penalty", "sync_every": 2, "reference_steps": 2}])
def test_the_fit_reports_each_set(stores, more):
    model = tiny_lm(vocab=320, context=64, dtype=torch.float32)
    settings = FitConfig(steps=2, lower_batch_size=4, upper_batch_size=4, kl_coef=0, **more)
    lower = BatchStream(stores[0], np.arange(20), 4, 0, 1, torch.device("cpu"))
    upper = SetStream(stores, [3.0, 1.0], 4, 0, seed=2, device=torch.device("cpu"))
    score_model = ScoreModel.from_causal_lm(model, torch.Generator().manual_seed(0))
    fit = BilevelFit(model, score_model, None, lower, upper, settings, upper_sets={"many": 3.0, "few": 1.0})
    figures = fit.step()
    parts = figures["upper_loss_by_set"]
    assert set(parts) == {"many", "few"} and parts["many"] != parts["few"]
    assert figures["upper_loss"] == pytest.approx(0.75 * parts["many"] + 0.25 * parts["few"], rel=1e-9)
