"""Planted pools with warm models, made once."""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from bilect.methods.contract import Inputs
from tests.methods.planted import planted


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Inputs]:
    """Inputs by seed."""

    @cache
    def make(seed: int) -> Inputs:
        torch.set_num_threads(1)
        return planted(tmp_path_factory.mktemp(f"pool{seed}"), seed)

    return make
