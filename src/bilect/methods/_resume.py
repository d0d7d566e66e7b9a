"""What a long fit goes on from after a kill."""

from collections.abc import Mapping
from pathlib import Path

import torch

from bilect.runtime.checkpoints import Stateful, load_parts

__all__ = ["resume"]


def resume(path: Path, parts: Mapping[str, Stateful], device: torch.device) -> None:
    """Go on from a checkpoint, where there is one; see ``load_parts``."""
    if path.is_file():
        load_parts(path, parts, f"delete {path} to fit anew", device)
