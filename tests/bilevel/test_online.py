"""What is selected, its loss and gradient, what the reference learns: against plain loops with full logits."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import bilect.bilevel.online.token_loss
from bilect.bilevel.online.selector import OnlineTokenSelector
from bilect.errors import BilectError
from tests.bilevel.online_helpers import (
    best,
    largest_difference,
    learned,
    make_batch,
    masked_mean,
    plain_losses,
    plain_reference,
    small,
    train,
)
from tests.helpers import KINDS

UPPER = [make_batch(100 + i, (9, 12), given=5) for i in range(3)]
LR = 0.02


def selector_for(model: nn.Module, **more: Any) -> OnlineTokenSelector:
    options: dict[str, Any] = {
        "sync_every": 3, "reference_steps": 2, "reference_learning_rate": LR, "lower_loader": [make_batch(200)],
    }  # fmt: skip
    return OnlineTokenSelector(model, more.pop("upper", UPPER), **{**options, **more})


# ---------------------------------------------------------------------------------------------------- keep everything


def test_keeping_everything_is_the_unmodified_loop_bit_for_bit() -> None:
    """Dropout on: a single number drawn by the selector would show in everything after it."""
    ours, plain = (small("gpt2", dtype=torch.float32, resid_pdrop=0.2).train() for _ in range(2))
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-2)
    torch.manual_seed(5)
    expected = []
    for i in range(4):
        loss = plain(**make_batch(i)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    state = torch.get_rng_state()
    torch.manual_seed(5)
    selector = selector_for(ours, keep_ratio=1.0)
    assert train(ours, selector, [{**make_batch(i), "source": ["a"] * 3} for i in range(4)]) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), plain.parameters(), strict=True))
    assert selector.reference is None and selector.state_dict() == {"steps": 4}


def test_selecting_leaves_the_random_state_alone() -> None:
    """Apart from the model's own dropout: the reference, upper data that shuffle and diagnostics draw nothing of it."""
    model = small("gpt2", dtype=torch.float32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    upper = torch.utils.data.DataLoader(UPPER, batch_size=None, shuffle=True)
    selector = selector_for(model, upper=upper, diagnose_every=1)
    state = torch.get_rng_state()
    train(model, selector, [make_batch(i) for i in range(5)])
    assert selector.synchronisations == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())


# ------------------------------------------------------------------------------------------- selection, loss, gradient


@pytest.mark.parametrize("kind", KINDS)
def test_selection_loss_and_gradient(kind: str) -> None:
    """RHO-1, a given reference: the largest excess losses, their mean, and its gradient, in float64."""
    model, reference = small(kind), small(kind, seed=3)
    selector = OnlineTokenSelector(model, sync_every=None, reference=reference, keep_ratio=0.6)
    untouched = copy.deepcopy(reference)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for i in range(3):
        batch = make_batch(i)
        u_BT = plain_losses(model, batch)
        with torch.no_grad():
            delta_BT = u_BT - plain_losses(reference, batch)
        n = int(learned(batch).sum())
        assert n == 7 + 11 + 11
        mask_BT = best(delta_BT, 18)  # ceil(0.6 * 29)
        plain = masked_mean(u_BT, mask_BT)
        expected = torch.autograd.grad(plain, list(model.parameters()))
        loss = selector.loss(model, batch)
        loss.backward()
        assert selector.last_mask_BT is not None and selector.last_delta_BT is not None
        assert torch.equal(selector.last_mask_BT, mask_BT)
        torch.testing.assert_close(selector.last_delta_BT, delta_BT.detach(), rtol=0, atol=1e-9, equal_nan=True)
        assert loss.item() == pytest.approx(plain.item(), abs=1e-12)
        for p, g in zip(model.parameters(), expected, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-9)
        optimizer.step()
        optimizer.zero_grad()
        selector.step()
    assert largest_difference(reference, untouched) == 0 and selector.synchronisations == 0


def test_a_reference_on_disk(tmp_path: Any) -> None:
    model, reference = small(dtype=torch.float32), small(dtype=torch.float32, seed=3)
    reference.save_pretrained(tmp_path)
    batch = make_batch(0)
    losses = [
        OnlineTokenSelector(model, sync_every=None, reference=r).loss(model, batch) for r in (reference, tmp_path)
    ]
    assert losses[0].item() == losses[1].item()


def test_head_sees_no_gradient_for_tokens_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = small(), []
    fused = bilect.bilevel.online.token_loss.weighted_token_loss
    monkeypatch.setattr(
        bilect.bilevel.online.token_loss, "weighted_token_loss", lambda h, *a: (rows.append(len(h)), fused(h, *a))[1]
    )
    OnlineTokenSelector(model, sync_every=None, reference=small(seed=3), keep_ratio=0.3).loss(model, make_batch(0))
    assert rows == [9]  # ceil(0.3 * 29)


def test_padding_is_never_counted_even_where_its_labels_are_set() -> None:
    model, batch = small(), make_batch(0)
    careless = {**batch, "labels": batch["input_ids"].clone()}
    selector = OnlineTokenSelector(model, sync_every=None, reference=small(seed=3))
    loss, other = selector.loss(model, batch), selector.loss(model, careless)
    assert loss.item() == other.item() and not bool((selector.last_mask_BT & ~learned(batch)).any())


def test_sequences_are_kept_whole() -> None:
    model, reference = small(), small(seed=3)
    batch = make_batch(1, (5, 12, 9, 7), width=12)
    batch["labels"][2] = -100  # a sequence without anything to learn is not counted
    selector = OnlineTokenSelector(model, sync_every=None, reference=reference, keep_ratio=0.5, granularity="sequence")
    loss = selector.loss(model, batch)
    with torch.no_grad():
        u_BT = plain_losses(model, batch)
        mean_B = (u_BT - plain_losses(reference, batch)).nanmean(dim=1)
    kept = mean_B.nan_to_num(nan=-torch.inf).topk(2).indices  # ceil(0.5 * 3)
    mask_BT = learned(batch) & torch.isin(torch.arange(4), kept)[:, None]
    assert torch.equal(selector.last_mask_BT, mask_BT)
    assert loss.item() == pytest.approx(masked_mean(u_BT, mask_BT).item(), abs=1e-12)


def test_random_tokens_have_the_same_number_and_need_no_reference() -> None:
    model = small()
    first, again = (OnlineTokenSelector(model, selection="random", keep_ratio=0.4, seed=s) for s in (1, 1))
    for i in range(3):
        batch = make_batch(i)
        loss = first.loss(model, batch)
        again.loss(model, batch)
        mask_BT = first.last_mask_BT
        assert int(mask_BT.sum()) == 12 and torch.equal(mask_BT, again.last_mask_BT)
        assert loss.item() == pytest.approx(masked_mean(plain_losses(model, batch), mask_BT).item(), abs=1e-12)
    assert first.reference is None


# ------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("baseline", ["model", "matched"])
def test_reference_learns_from_the_outgoing_selection(baseline: Any) -> None:
    """First synchronisation: all ones on lower data; second: the recent batches with the masks of their training."""
    model = small()
    lower = [make_batch(200), make_batch(201)]
    selector = selector_for(model, lower_loader=lower, baseline=baseline, penalty=0.7)
    start = copy.deepcopy(model)
    all_ones = [(b, learned(b)) for b in lower]
    w = plain_reference(start, UPPER[:2], all_ones, lr=LR, penalty=0.7)
    m = plain_reference(start, [], all_ones, lr=LR, penalty=0.7) if baseline == "matched" else None
    recent: list[Any] = []
    for i in range(3):
        batch = make_batch(i)
        with torch.no_grad():
            delta_BT = plain_losses(m or model, batch) - plain_losses(w, batch)
        recent.append((batch, best(delta_BT, 18)))
        train(model, selector, [batch])
        assert torch.equal(selector.last_mask_BT, recent[-1][1])
        assert largest_difference(selector.reference.model, w) < 1e-9
    after = copy.deepcopy(model)
    selector.loss(model, make_batch(9))
    assert selector.synchronisations == 2
    order = selector_order(UPPER, seed=0, n=4)
    w2 = plain_reference(after, order[2:], recent[-2:], lr=LR, penalty=0.7)
    assert largest_difference(selector.reference.model, w2) < 1e-9
    wrong = plain_reference(after, order[2:], [(b, learned(b)) for b, _ in recent[-2:]], lr=LR, penalty=0.7)
    assert largest_difference(selector.reference.model, wrong) > 1e-3  # the mask matters


def selector_order(upper: list[Any], seed: int, n: int) -> list[Any]:
    from bilect.bilevel.online.feeds import Feed

    feed = Feed(upper, seed, "upper")
    return [feed() for _ in range(n)]


def test_without_lower_data_the_first_synchronisation_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    selector = selector_for(model, lower_loader=None, reference_steps=3)
    batches = [make_batch(i) for i in range(3)]
    losses = train(model, selector, batches[:1])
    assert losses[0] == pytest.approx(small()(**batches[0]).loss.item(), abs=1e-6)  # the full loss
    train(model, selector, batches[1:])
    assert selector.synchronisations == 0 and bool(torch.equal(selector.last_mask_BT, learned(batches[2])))
    expected = plain_reference(model, UPPER, [(b, learned(b)) for b in batches], lr=LR)
    selector.loss(model, make_batch(3))
    assert selector.synchronisations == 1
    assert largest_difference(selector.reference.model, expected) < 1e-9


def test_schedules_and_warmup() -> None:
    model = small()
    ratios = {2: 0.5, 3: 0.25, 4: 1.0}
    asked: list[int] = []

    def every(step: int) -> int:
        asked.append(step)
        return 2 if step < 4 else 100

    selector = selector_for(model, warmup_steps=2, keep_ratio=lambda step: ratios.get(step, 0.5), sync_every=every)
    kept, counts = [], []
    for i in range(7):
        train(model, selector, [make_batch(i)])
        kept.append(int(selector.last_mask_BT.sum()))
        counts.append(selector.synchronisations)
    assert kept == [29, 29, 15, 8, 29, 15, 15]
    assert counts == [0, 0, 1, 1, 2, 2, 2] and asked == [2, 4]
    with pytest.raises(ValueError, match="keep_ratio"):
        selector_for(model, keep_ratio=lambda step: 0.0).loss(model, make_batch(0))


def test_upper_data_alone_is_rho1_with_a_home_made_reference() -> None:
    model = small()
    expected = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=LR, weight_decay=0.0)
    for batch in selector_order(UPPER, 0, 5):  # more steps than upper batches
        masked_mean(plain_losses(expected, batch), learned(batch)).backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    selector = selector_for(model, sync_every=None, penalty=0.0, lower_loader=None, reference_steps=5)
    train(model, selector, [make_batch(i) for i in range(8)])
    assert selector.synchronisations == 1 and largest_difference(selector.reference.model, expected) < 1e-9


# ------------------------------------------------------------------------------------------------------ edges, errors


def test_gradient_accumulation_adds_up_to_the_mean_over_tokens() -> None:
    """With num_items, micro-batches of unequal size count by their tokens; keeping nearly all, nothing else differs."""
    model = small()
    parts = [make_batch(0, (12, 12)), make_batch(1, (5,), width=12)]
    whole = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    selector = selector_for(model, keep_ratio=lambda step: 1.0)
    total = sum(selector.loss(model, p, num_items=26).item() for p in parts)
    assert total == pytest.approx(model(**whole).loss.item(), abs=1e-6)
    assert selector.synchronisations == 1  # at the first micro-batch of a step only
    ratio = OnlineTokenSelector(model, sync_every=None, reference=small(seed=3), keep_ratio=0.5)
    assert ratio.loss(model, parts[0], num_items=44).item() == pytest.approx(ratio.loss(model, parts[0]).item() / 2)


def test_batches_with_next_to_nothing() -> None:
    model = small()
    selector = OnlineTokenSelector(model, sync_every=None, reference=small(seed=3), keep_ratio=0.1)
    empty = make_batch(0)
    empty["labels"] = torch.full_like(empty["labels"], -100)
    loss = selector.loss(model, empty)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())
    one = {**empty, "labels": empty["labels"].clone()}
    one["labels"][1, 4] = one["input_ids"][1, 4]
    loss = selector.loss(model, one)
    assert int(selector.last_mask_BT.sum()) == 1 and bool(selector.last_mask_BT[1, 4])
    assert loss.item() == pytest.approx(plain_losses(model, one)[1, 4].item(), abs=1e-9)


class _NoLogits(nn.Module):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio must lie"),
        ({"keep_ratio": 1.2}, "keep_ratio must lie"),
        ({"reference_steps": 0}, "reference_steps must be at least 1"),
        ({"sync_every": 0}, "sync_every must be at least 1"),
        ({"scope": "world"}, "scope must be one of global, local"),
        ({"granularity": "document"}, "granularity must be one of"),
        ({"upper": None}, "upper_loader"),
        ({"sync_every": None, "reference": small(vocab=60)}, "its vocabulary has 60 entries, the model's 64"),
        ({"sync_every": None, "reference": small(), "baseline": "matched"}, "needs synchronisations"),
        ({"sync_every": None, "reference": _NoLogits()}, "not a causal LM"),
    ],
)  # fmt: skip
def test_clear_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises((BilectError, ValueError), match=message):
        selector_for(small(), **options)


def test_more_errors() -> None:
    model = small()
    with pytest.raises(BilectError, match="not a causal LM"):
        selector_for(_NoLogits())
    odd = small()
    odd.lm_head.register_forward_hook(lambda module, args, output: output.clamp(-3, 3))
    with pytest.raises(BilectError, match="transforms its logits"):
        selector_for(odd)
    odd = small()
    forward = odd.forward
    odd.forward = lambda **inputs: {"loss": forward(**inputs).logits.sum()}
    with pytest.raises(BilectError, match="gives no logits"):
        selector_for(odd)
    selector = selector_for(model)
    with pytest.raises(BilectError, match="made for another model"):
        selector.loss(small(), make_batch(0))
    with pytest.raises(BilectError, match="needs input_ids and labels"):
        selector.loss(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})
    with pytest.raises(BilectError, match="differ"):
        selector.loss(model, {"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": torch.ones(1, 4)})
    with pytest.raises(BilectError, match="upper_loader gives no batches"):
        selector_for(model, upper=[]).loss(model, make_batch(0))
    with pytest.raises(BilectError, match="other settings"):
        selector.load_state_dict({"steps": 1})
