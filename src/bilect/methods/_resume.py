"""What a long fit goes on from after a kill."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from bilect.errors import BilectError, reason
from bilect.runtime import distributed
from bilect.runtime.checkpoints import load_state, save_state

__all__ = ["Stateful", "resume", "save"]


class Stateful(Protocol):
    """Anything with a state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def save(path: Path, parts: Mapping[str, Stateful]) -> None:
    """Write the states of all parts, on the main rank; the others are in the same state."""
    if distributed.is_main():
        save_state(path, {name: part.state_dict() for name, part in parts.items()})


def resume(path: Path, parts: Mapping[str, Stateful], device: torch.device) -> None:
    """Read them back, where there is anything.

    Raises:
        BilectError: the file is broken, or of another fit.
    """
    if not path.is_file():
        return
    remedy = f"delete {path} to fit anew"
    state = load_state(path, remedy, device)
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise BilectError(f"checkpoint: {path} does not fit ({reason(error)}); {remedy}") from error
