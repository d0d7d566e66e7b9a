"""The same answers through torch.compile, gradient checkpointing, PEFT, mixed precision; and the diagnostics."""

import copy
import json
from typing import Any

import peft
import pytest
import torch

from bilect.bilevel.online.reference import distance
from bilect.bilevel.online.selector import OnlineTokenSelector
from tests.bilevel.online_helpers import largest_difference, learned, make_batch, plain_losses, small, train

UPPER = [make_batch(100 + i, (9, 12), given=5) for i in range(3)]
BATCHES = [make_batch(i) for i in range(5)]


def selector_for(model: Any, **more: Any) -> OnlineTokenSelector:
    options: dict[str, Any] = {
        "sync_every": 3, "reference_steps": 2, "reference_learning_rate": 1e-2, "lower_loader": [make_batch(200)],
    }  # fmt: skip
    return OnlineTokenSelector(model, UPPER, **{**options, **more})


def test_compiled() -> None:
    """Compiled once: nothing the selector does forces another compilation."""
    shape = (12, 12)
    upper, batches = [make_batch(100, shape)], [make_batch(i, shape) for i in range(4)]
    options: dict[str, Any] = {"sync_every": 2, "reference_steps": 2, "penalty": 0.0}
    plain, model = small(dtype=torch.float32), small(dtype=torch.float32)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    expected = train(plain, OnlineTokenSelector(plain, upper, **options), batches)
    torch._dynamo.utils.counters.clear()
    selector = OnlineTokenSelector(compiled, upper, **options)
    seen = train(compiled, selector, batches[:1])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    seen += train(compiled, selector, batches[1:])
    assert seen == pytest.approx(expected, abs=1e-4) and selector.synchronisations == 2
    assert selector.reference is not None and hasattr(selector.reference.model, "_orig_mod")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0


def test_gradient_checkpointing() -> None:
    plain, model = small(), small()
    model.gradient_checkpointing_enable()
    model.train()
    expected = train(plain, selector_for(plain), BATCHES)
    assert train(model, selector_for(model), BATCHES) == pytest.approx(expected, abs=1e-9)
    assert largest_difference(plain, model) < 1e-9


def test_lora_reference_is_a_second_adapter_on_the_same_base() -> None:
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(small(dtype=torch.float32), settings)
    before = copy.deepcopy(model.state_dict())
    selector = selector_for(model, diagnose_every=1)
    train(model, selector, BATCHES)
    assert selector.reference is not None and selector.synchronisations == 2
    theirs = dict(model.get_base_model().named_parameters())
    adapters = 0
    for name, p in selector.reference.forward.base.named_parameters():
        if "lora" in name:
            adapters += 1
            assert name in selector.reference.own and p.data_ptr() != theirs[name].data_ptr()
            assert not torch.equal(p, theirs[name])
        else:
            assert p is theirs[name]
    assert adapters == len(selector.reference.own) == 4
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == ("lora" not in name)
    loss_BT, w_BT = plain_losses(model, BATCHES[0]), plain_losses(selector.reference.model, BATCHES[0])
    selector.loss(model, BATCHES[0])
    torch.testing.assert_close(selector.last_delta_BT, loss_BT - w_BT, rtol=0, atol=1e-5, equal_nan=True)
    assert 0 < selector.diagnostics[-1]["distance_reference"] < 1


def test_autocast() -> None:
    """Synchronisation, selection and training within one region: no weight is read from autocast's cache too late."""
    plain, model = small(dtype=torch.float32), small(dtype=torch.float32)
    expected_selector, selector = selector_for(plain, diagnose_every=1), selector_for(model, diagnose_every=1)
    expected = train(plain, expected_selector, BATCHES[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = selector.loss(model, BATCHES[0])
    loss.backward()
    assert loss.item() == pytest.approx(expected[0], rel=0.03)
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    a, b = expected_selector.reference, selector.reference
    assert a is not None and b is not None
    start = dict(small(dtype=torch.float32).named_parameters())
    assert distance(a.own, b.own) < 0.3 * distance(a.own, start)


def test_lora_on_the_head_learns_under_autocast() -> None:
    """The pass without gradient that chooses the tokens leaves no weight behind for the pass that learns them."""
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(small(dtype=torch.float32), settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = selector_for(model).loss(model, BATCHES[0])
    loss.backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in learning)
    assert all(gradient is not None and bool(gradient.any()) for gradient in learning.values())


def test_reference_in_bfloat16_is_trained_in_full_precision() -> None:
    plain, model = small(dtype=torch.float32), small(dtype=torch.float32)
    full, half = selector_for(plain), selector_for(model, reference_dtype=torch.bfloat16)
    train(plain, full, BATCHES[:1])
    train(model, half, BATCHES[:1])
    assert full.reference is not None and half.reference is not None
    for name, p in full.reference.own.items():
        assert torch.equal(p.bfloat16(), half.reference.own[name])
    torch.testing.assert_close(half.last_delta_BT, full.last_delta_BT, rtol=0.1, atol=0.2, equal_nan=True)
    train(model, half, BATCHES[1:4])  # a second synchronisation
    assert half.synchronisations == 2 and {p.dtype for p in half.reference.own.values()} == {torch.bfloat16}


def test_diagnostics() -> None:
    model = small(dtype=torch.float32)
    oracle = small(seed=9, dtype=torch.float32)
    selector = selector_for(model, diagnose_every=2, oracle=oracle, keep_ratio=0.5)
    at_sync: dict[str, torch.Tensor] = {}
    for i in range(5):
        if i == 3:
            at_sync = {k: p.detach().clone() for k, p in model.named_parameters()}
        before = {k: p.detach().clone() for k, p in model.named_parameters()}
        train(model, selector, [{**BATCHES[i], "source": ["books", "web", "books"]}])
    seen = selector.diagnostics
    assert [e["step"] for e in seen] == [0, 2, 4] and json.loads(json.dumps(seen)) == seen
    entry, delta_BT, mask_BT = seen[-1], selector.last_delta_BT, selector.last_mask_BT
    assert delta_BT is not None and mask_BT is not None
    delta_N = delta_BT[learned(BATCHES[4])]
    assert entry["kept"] == pytest.approx(15 / 29)
    assert entry["delta"]["0.5"] == pytest.approx(float(delta_N.median()), abs=1e-6)
    assert entry["share_positive"] == pytest.approx(float((delta_N > 0).float().mean()))
    assert selector.reference is not None
    for name, other in (("distance_reference", selector.reference.own), ("distance_last_sync", at_sync)):
        expected = sum(float((before[k] - other[k].detach()).square().sum()) for k in before) ** 0.5
        assert entry[name] == pytest.approx(expected, rel=1e-4)
    kept = int(mask_BT[0].sum() + mask_BT[2].sum())
    assert entry["sources"]["books"] == {"tokens": 18, "kept": pytest.approx(kept / 18)}
    with torch.no_grad():
        oracle_BT = plain_losses(oracle, BATCHES[4])
    assert entry["oracle_loss"]["selected"] == pytest.approx(float(oracle_BT[mask_BT].mean()), abs=1e-5)
    assert entry["oracle_loss"]["all"] == pytest.approx(float(oracle_BT.nanmean()), abs=1e-5)
    assert seen[0]["agreement"] is None and all(0 < e["agreement"] <= 1 for e in seen[1:])
    assert entry["documents"][1]["tokens"] == BATCHES[4]["input_ids"][1].tolist()
    assert entry["documents"][1]["mask"] == mask_BT[1].tolist() and entry["documents"][1]["delta"][0] is None
