"""Two and three gloo processes, DDP and FSDP2, against one process: the same selections, model and reference.

Five documents a batch, so the ranks hold unequal parts with unequal numbers of learned tokens.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import online_on_ranks
from tests.distributed.online_on_ranks import LENGTHS, SCENARIOS, STEPS, handed_on, run

SCRIPT = online_on_ranks
LIMIT = 300  # seconds, for a machine that does much else; it takes about 20


@cache
def one_rank(scenario: str) -> dict[str, Any]:
    return online_on_ranks.run(scenario)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_ranks_equal_one_rank(ranks: list[dict[str, Any]], scenario: str) -> None:
    one = one_rank(scenario)
    tolerance = 1e-9
    for many in (r[scenario] for r in ranks):
        assert many["sharded"] == (SCENARIOS[scenario][0] == "fsdp")
        assert len(many["losses"]) == STEPS and many["losses"] == pytest.approx(one["losses"], abs=tolerance)
        for a, b in zip(one["masks"], many["masks"], strict=True):
            assert torch.equal(a, b)
        assert not one["masks"][0].all()  # something is left out, and not the same ever
        for which in ("model", "reference"):
            for k, p in one[which].items():
                torch.testing.assert_close(many[which][k], p, rtol=0, atol=tolerance, msg=lambda m, k=k: f"{k}: {m}")
        assert len(many["diagnostics"]) == len(one["diagnostics"]) == 3
        for a, b in zip(one["diagnostics"], many["diagnostics"], strict=True):
            assert a["agreement"] == b["agreement"] and a["step"] == b["step"]
            for k in ("kept", "delta", "share_positive", "distance_reference", "distance_last_sync"):
                assert b[k] == pytest.approx(a[k], rel=1e-5), k


@pytest.mark.parametrize("world", [2, 3])
def test_one_process_goes_on_from_what_ranks_have_left(results: Path, world: int) -> None:
    alone, one = run("fsdp, handed on", read=handed_on(str(results), world)), one_rank("fsdp, handed on")
    assert alone["losses"] == pytest.approx(one["losses"], abs=1e-9)
    for k, p in one["reference"].items():
        torch.testing.assert_close(alone["reference"][k], p, rtol=0, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(alone["masks"], one["masks"], strict=True))
    assert [e["agreement"] for e in alone["diagnostics"]] == [e["agreement"] for e in one["diagnostics"]]
    last = [e["distance_last_sync"] for e in alone["diagnostics"]]
    assert last == pytest.approx([e["distance_last_sync"] for e in one["diagnostics"]], rel=1e-5)


def test_local_scope_chooses_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    expected = online_on_ranks.local(len(ranks))
    for result in ranks:
        for a, b in zip(expected, result["local"], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_ties_go_to_the_lower_rank_and_empty_ranks_take_part(ranks: list[dict[str, Any]]) -> None:
    for result in (r["ties"] for r in ranks):
        n = len(result["mask"])
        assert n < sum(LENGTHS) - len(LENGTHS)
        assert result["mask"].tolist() == [True] * -(-n // 2) + [False] * (n // 2)
        assert result["gradient"] > 0
    assert ranks[-1]["ties"]["loss"] == 0
