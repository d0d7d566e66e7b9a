"""States on disk: written whole or not at all, read without running code, and one line about a file that is broken."""

import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bilect.errors import BilectError, reason
from bilect.runtime import distributed

__all__ = ["Stateful", "all_finite", "check_readable", "load_parts", "load_state", "save_parts", "save_state"]


class Stateful(Protocol):
    """Anything with a state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no value is infinite or not a number; waits for the device once."""
    fine = [x.detach().isfinite().all() for x in tensors]
    return bool(torch.stack(fine).all()) if fine else True


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values; whenever the process dies, ``path`` holds the old state or the new one."""
    draft = path.with_name(f"{path.name}.draft")
    with draft.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def load_state(path: Path, remedy: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what ``save_state``, or ``torch.save`` of plain values, has written.

    Args:
        path: the file.
        remedy: what to do if it cannot be read, the end of the message.
        device: where the tensors are put.

    Raises:
        BilectError: there is no such file, or it is broken.
    """
    try:
        _check_archive(path)
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a broken pickle raises anything
        raise BilectError(f"checkpoint: cannot read {path} ({reason(error)}); {remedy}") from error


def save_parts(path: Path, parts: Mapping[str, Stateful]) -> None:
    """Write the states of all parts, on the main rank; the others are in the same state."""
    if distributed.is_main():
        save_state(path, {name: part.state_dict() for name, part in parts.items()})


def load_parts(path: Path, parts: Mapping[str, Stateful], remedy: str, device: torch.device) -> None:
    """Read them back.

    Raises:
        BilectError: the file is broken, or of other parts.
    """
    state = load_state(path, remedy, device)
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise BilectError(f"checkpoint: {path} does not fit ({reason(error)}); {remedy}") from error


def check_readable(folder: Path, remedy: str) -> None:
    """Look for a broken file among the JSON, safetensors and torch files of a checkpoint.

    Raises:
        BilectError: names the first one.
    """
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:  # compares the header with the size
                    file.keys()
            elif path.suffix in (".pt", ".pth"):
                _check_archive(path)
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            raise BilectError(f"checkpoint: cannot read {path} ({reason(error)}); {remedy}") from error


def _check_archive(path: Path) -> None:
    """torch.load does not look at the checksums of the archive."""
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise zipfile.BadZipFile(f"wrong checksum of {broken}")
