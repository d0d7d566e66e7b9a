"""Interrupted anywhere and resumed: exactly the uninterrupted run. And where the batches come from."""

import copy
import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from bilect.bilevel.online.feeds import Feed
from bilect.bilevel.online.selector import OnlineTokenSelector
from bilect.errors import BilectError
from tests.bilevel.online_helpers import make_batch, small

UPPER = [make_batch(100 + i, (9, 12), given=5) for i in range(3)]
STEPS = 8


class _Killed(Exception):
    pass


def start(**more: Any) -> tuple[Any, OnlineTokenSelector, torch.optim.Optimizer]:
    model = small(dtype=torch.float32)
    upper = DataLoader(UPPER, batch_size=None, shuffle=True)  # type: ignore[arg-type]
    options = {"sync_every": 3, "reference_steps": 4, "reference_learning_rate": 1e-2, "diagnose_every": 2}
    return (
        model,
        OnlineTokenSelector(model, upper, **{**options, **more}),
        torch.optim.AdamW(model.parameters(), lr=1e-2),
    )


def run(
    model: Any, selector: OnlineTokenSelector, optimizer: torch.optim.Optimizer, first: int, last: int
) -> list[tuple[float, list[Any]]]:
    """Loss and selection of every step."""
    seen = []
    for i in range(first, last):
        loss = selector.loss(model, make_batch(i))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        selector.step()
        assert selector.last_mask_BT is not None
        seen.append((loss.item(), selector.last_mask_BT.tolist()))
    return seen


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"baseline": "matched", "lower_loader": [make_batch(200 + i) for i in range(3)]},
        {"selection": "random"},
        {"reference_dtype": torch.bfloat16},
    ],
    ids=["blade", "matched", "random", "bf16"],
)
def test_resumed_equals_uninterrupted_exactly(more: dict[str, Any]) -> None:
    model, selector, optimizer = start(**more)
    expected = run(model, selector, optimizer, 0, STEPS)
    for stop in (1, 4, 5, 6):  # before the first synchronisation, before and after others
        first, one, one_optimizer = start(**more)
        seen = run(first, one, one_optimizer, 0, stop)
        saved = through_a_file([first.state_dict(), one.state_dict(), one_optimizer.state_dict()])
        second, two, two_optimizer = start(**more)
        for part, state in zip((second, two, two_optimizer), saved, strict=True):
            part.load_state_dict(state)
        assert seen + run(second, two, two_optimizer, stop, STEPS) == expected
        assert str(two.diagnostics) == str(selector.diagnostics) and len(two.diagnostics) >= 1
        for p, q in zip(model.parameters(), second.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("kill_at", [1, 3, 4, 6])
def test_killed_within_the_reference_steps(kill_at: int) -> None:
    """A checkpoint taken after a reference step; the loop begins again with the step whose loss was being made."""
    more: dict[str, Any] = {"baseline": "matched"}
    model, selector, optimizer = start(**more)
    expected = run(model, selector, optimizer, 0, STEPS)

    first, one, one_optimizer = start(**more)
    saved: list[Any] = []

    def kill(selector: OnlineTokenSelector) -> None:
        kill.count += 1  # type: ignore[attr-defined]
        if kill.count == kill_at:  # type: ignore[attr-defined]
            saved.append(through_a_file([first.state_dict(), selector.state_dict(), one_optimizer.state_dict()]))
            raise _Killed

    kill.count = 0  # type: ignore[attr-defined]
    one.on_reference_step = kill
    with pytest.raises(_Killed):
        run(first, one, one_optimizer, 0, STEPS)
    second, two, two_optimizer = start(**more)
    for part, state in zip((second, two, two_optimizer), saved[0], strict=True):
        part.load_state_dict(state)
    begin = two.steps
    assert begin == (4 if kill_at < 5 else 7)
    assert run(second, two, two_optimizer, begin, STEPS) == expected[begin:]
    assert str(two.diagnostics) == str(selector.diagnostics)


# -------------------------------------------------------------------------------------------------------------- feeds


def test_short_data_cycle_with_a_reshuffle() -> None:
    feed = Feed(list(range(6)), 0, "upper_loader")
    passes = [[feed() for _ in range(6)] for _ in range(4)]
    assert passes[0] == list(range(6)) and all(sorted(p) == passes[0] for p in passes)
    assert len({tuple(p) for p in passes}) == 4
    loader = Feed(DataLoader(list(range(6)), batch_size=None, shuffle=True), 0, "upper_loader")  # type: ignore[arg-type]
    shuffled = [[int(loader()) for _ in range(6)] for _ in range(4)]
    assert all(sorted(p) == list(range(6)) for p in shuffled) and len({tuple(p) for p in shuffled}) == 4


class _Noisy(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Draws from all three generators."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> tuple[int, float, float, float]:
        return i, float(torch.rand(())), float(np.random.rand()), random.random()


def test_feeds_are_functions_of_their_seed_and_touch_no_other_state() -> None:
    def make(seed: int) -> Feed:
        return Feed(DataLoader(_Noisy(), batch_size=None, shuffle=True), seed, "upper_loader")

    feed, again, other = make(1), make(1), make(2)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    drawn = [feed() for _ in range(12)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    torch.rand(3)
    resumed, result = make(1), []
    for i in range(12):
        torch.rand(1)
        result.append(again())
        if i == 7:
            resumed.load_state_dict(copy.deepcopy(again.state_dict()))
    assert result == drawn and [resumed() for _ in range(4)] == drawn[8:]
    assert [other() for _ in range(12)] != drawn


def test_a_generator_can_be_read_once() -> None:
    feed = Feed((i for i in range(2)), 0, "upper_loader")
    assert [feed(), feed()] == [0, 1]
    with pytest.raises(BilectError, match="cannot be read again"):
        feed()
    with pytest.raises(BilectError, match="gives no batches"):
        Feed([], 0, "upper_loader")()
