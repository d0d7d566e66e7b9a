"""A training on two and on three ranks, its model sharded or not, interrupted or not, is that of one process."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from tests.distributed import training_on_ranks
from tests.distributed.training_on_ranks import STORIES, story, tokens

SCRIPT, LIMIT = training_on_ranks, 300


@cache
def alone() -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        return story(tokens(Path(folder)), Path(folder) / "run", False)


@pytest.mark.parametrize("name", STORIES)
def test_equals_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    one = alone()
    interrupted = len(STORIES[name]) > 1
    for found in (r[name] for r in ranks):
        assert found["amounts"] == ([3, 1, 1, 1, 1, 1] if interrupted else [1] * 8)
        for part in ("trained", "decayed"):
            assert found[part].keys() == one[part].keys()
            for k, value in one[part].items():
                torch.testing.assert_close(found[part][k], value, rtol=0, atol=2e-5, msg=lambda m, k=k: f"{k}: {m}")
        assert found["optimizer"]["param_groups"] == one["optimizer"]["param_groups"]
        for i, slots in one["optimizer"]["state"].items():
            for k, value in slots.items():
                torch.testing.assert_close(found["optimizer"]["state"][i][k], value, rtol=1e-3, atol=1e-6)
        assert found["evaluated"]["loss"] == pytest.approx(one["evaluated"]["loss"], abs=1e-4)
        for k in ("tokens", "accuracy"):
            assert found["evaluated"][k] == one["evaluated"][k] is not None
        torch.testing.assert_close(found["losses"], one["losses"], rtol=0, atol=1e-3)
    assert one["evaluated"]["loss"] < 5.5  # of log 320 = 5.77: it has learned something
