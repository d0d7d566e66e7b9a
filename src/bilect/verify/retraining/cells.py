"""Results of single computations, one file each: made in parallel, written whole, and kept while what they depend on
is unchanged."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bilect.errors import BilectError
from bilect.runtime.files import write_json
from bilect.runtime.progress import Task
from bilect.runtime.workers import end_with_parent

__all__ = ["Cell", "fill"]


@dataclass(frozen=True)
class Cell:
    """One result.

    Attributes:
        path: its file.
        key: hash of everything it depends on.
        make: computes it; can be sent to another process.
    """

    path: Path
    key: str
    make: Callable[[], Mapping[str, Any]]

    def read(self) -> dict[str, Any] | None:
        """The result; None where there is none, or one that depended on something else."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return dict(found["result"]) if found["key"] == self.key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def fill(self) -> None:
        """Compute and write it."""
        write_json(self.path, {"key": self.key, "result": dict(self.make())})


def fill(cells: Sequence[Cell], workers: int, task: Task) -> None:
    """Compute the cells that are missing; after a kill the same call goes on.

    Args:
        cells: all of them.
        workers: processes of one torch thread each; 1: this process.
        task: moves by one for every cell that is there.

    Raises:
        BilectError: a cell's, or a process was killed.
    """
    missing = [cell for cell in cells if cell.read() is None]
    task.advance(len(cells) - len(missing))
    if workers == 1 or len(missing) < 2:
        for cell in missing:
            cell.fill()
            task.advance(1)
        return
    with ProcessPoolExecutor(min(workers, len(missing)), get_context("spawn"), initializer=_start) as pool:
        try:
            for done in as_completed([pool.submit(cell.fill) for cell in missing]):
                done.result()
                task.advance(1)
        except BrokenProcessPool as error:
            raise BilectError("retrain: a worker process was killed, perhaps for want of memory; the same command goes "
                              "on, with fewer --workers") from error  # fmt: skip
        finally:
            pool.shutdown(cancel_futures=True)


def _start() -> None:
    end_with_parent()
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
