"""Results of a module's script (``SCRIPT``, within ``LIMIT`` seconds) on two and on three ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_script


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks left their results."""
    out = tmp_path_factory.mktemp("ranks") / "out"
    run_script(request.module.SCRIPT.__file__, out, request.module.LIMIT)
    return out


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, results: Path) -> list[dict[str, Any]]:
    return [torch.load(f"{results}.{request.param}.{rank}") for rank in range(request.param)]
