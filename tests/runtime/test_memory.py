"""Peak memory of a part of a process."""

import sys

import pytest
import torch

from bilect.runtime.memory import peak_gb, reset_peak


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is set back on Linux alone")
def test_the_peak_is_that_since_it_was_set_back():
    before = peak_gb()
    block = torch.ones(40_000_000)  # 0.16 GB, all of it touched
    high = peak_gb()
    assert high > before - 1e-3
    del block
    reset_peak()
    low = peak_gb()
    assert low < high - 0.1
    block = torch.ones(20_000_000)
    assert peak_gb() - low == pytest.approx(0.08, abs=0.02)
    assert len(block) == 20_000_000
