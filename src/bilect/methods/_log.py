"""The figures of every step of a fit, as JSON lines that go on where a checkpoint was taken."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilect.runtime import distributed

__all__ = ["StepLog"]


class StepLog:
    """An open log; a part of a checkpoint, since a fit that goes on must not write its steps twice.

    Args:
        path: of the file; None, or on other ranks than the first: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._kept = path is not None and distributed.is_main()
        target = path if path is not None and self._kept else Path(os.devnull)
        if self._kept:
            target.parent.mkdir(parents=True, exist_ok=True)
        self._file = target.open("ab")

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, figures: Mapping[str, Any]) -> None:
        """One line; what is not a finite number is null."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
        self._file.write((json.dumps(plain) + "\n").encode())

    def start_again(self) -> None:
        """Forget what an attempt without a checkpoint has left."""
        self.load_state_dict({"bytes": 0})

    def state_dict(self) -> dict[str, int]:
        """How long the log is, all of it on the disk."""
        self._file.flush()
        if self._kept:
            os.fsync(self._file.fileno())
        return {"bytes": self._file.tell() if self._kept else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Cut the log back to that."""
        if self._kept:
            if self._file.tell() < state["bytes"]:
                raise ValueError(f"{Path(self._file.name).name} is shorter than it was")
            self._file.truncate(state["bytes"])
