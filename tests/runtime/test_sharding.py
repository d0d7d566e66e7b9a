"""What sharding needs; what it does is tested on ranks, in tests/distributed."""

import pytest
import torch

from bilect.errors import BilectError
from bilect.runtime.sharding import shard


def test_a_pytorch_that_shards_on_gpus_only_is_named(monkeypatch):
    monkeypatch.setattr(torch.cpu, "Stream", object)  # as in 2.6
    with pytest.raises(BilectError, match=f"PyTorch {torch.__version__.split('+')[0]}.* on GPUs only"):
        shard(torch.nn.Linear(2, 2), torch.device("cpu"))
