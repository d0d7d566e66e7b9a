"""Work shared out between ranks: every item once, by all of them, in order, on each that asks."""

from collections import Counter
from typing import Any

import pytest

from bilect.engines import Led, Together
from tests.distributed import work_on_ranks

SCRIPT, LIMIT = work_on_ranks, 120


def test_all_ranks_get_what_each_did_a_part_of(ranks: list[dict[str, Any]]) -> None:
    world = len(ranks)
    for result in (r["together"] for r in ranks):
        assert result["values"] == [n * n for n in range(100)] and result["none"] == []
        assert result["pids"] == ranks[0]["together"]["pids"]
        assert result["drawn"] == 4 * world  # items are taken as they are needed
        shares = Counter(result["pids"])
        assert set(shares) == {r["pid"] for r in ranks} and max(shares.values()) - min(shares.values()) <= 4


def test_the_main_rank_hands_out_and_gets_the_results(ranks: list[dict[str, Any]]) -> None:
    found = ranks[0]["led"]
    assert found["values"] == [n * n for n in range(2, 12)] and found["again"] == 25
    assert set(found["pids"]) == {r["pid"] for r in ranks}
    assert [r["led"] for r in ranks[1:]] == [{}] * (len(ranks) - 1)
    assert found["sent"] == 3  # once a call, not once an item


def test_the_error_is_that_of_the_first_item_in_order(ranks: list[dict[str, Any]]) -> None:
    found = ranks[0]["led"]
    assert (found["error"], found["before"]) == ("13 is no good", [121, 144])


def test_what_the_main_rank_says_all_know(ranks: list[dict[str, Any]]) -> None:
    assert [r["told"] for r in ranks] == [[0, 1, 2]] * len(ranks)


@pytest.mark.parametrize("engine", [Led(), Together()])
def test_one_rank_alone_does_it_all(engine: Any) -> None:
    assert list(engine.map(abs, iter([-2, 3, -5]))) == [2, 3, 5]
    with pytest.raises(ValueError, match="no"):
        list(engine.map(_refuse, [1]))


def _refuse(item: int) -> None:
    raise ValueError("no")
