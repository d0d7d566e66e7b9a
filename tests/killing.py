"""Kill a run for real, at a chosen point: a forked child carries it out and sends itself SIGKILL.

Forking saves the seconds that a fresh process spends on imports. It is sound as long as torch has one thread and no
process group has been started here.
"""

import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bilect.config import Config
from bilect.pipeline.directory import RunDir
from bilect.pipeline.stages import run

START, END = 0, 1 << 30  # of a stage's action; any number between: at that call of ``advance`` that moves the bar


class KillingProgress:
    """Kills its process at the ``at``-th advance of a stage; writes every advance of every stage to ``log``."""

    def __init__(self, log: Path, stage: str | None = None, at: int = END) -> None:
        self.log, self.stage, self.at = log, stage, at
        self.now, self.count = "", 0

    def advance(self, amount: float = 1, **figures: float | None) -> None:
        if amount == 0:
            return
        self.count += 1
        with self.log.open("a") as file:
            file.write(f"{self.now}={amount:g}\n")
        self.die_at(self.count)

    def die_at(self, moment: int) -> None:
        if self.now == self.stage and moment == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str | None = None) -> Iterator["KillingProgress"]:
        yield self

    def note(self, text: str) -> None:
        pass

    def watched(self, name: str, action: Any, scratch: Path) -> Any:
        self.now, self.count = name, 0
        self.die_at(START)
        figures = action(scratch)
        self.die_at(END)
        return figures


def run_watched(config: Config, out: Path, progress: KillingProgress) -> dict[str, Any]:
    """``run`` with a progress display that knows which stage it is in."""
    plain = RunDir.stage

    def stage(self: RunDir, name: str, action: Any, **more: Any) -> Any:
        return plain(self, name, partial(progress.watched, name, action), **more)

    RunDir.stage = stage  # type: ignore[assignment, method-assign]
    try:
        return run(config, out, progress)
    finally:
        RunDir.stage = plain  # type: ignore[method-assign]


def in_fork(action: Any, limit: float = 120) -> int:
    """Call ``action`` in a forked child; its exit code, or minus the signal that ended it.

    Skips where there are several threads: a child has none of OpenMP's, and would hang or crash where it needs them.
    """
    if torch.get_num_threads() > 1:
        pytest.skip("a forked child has none of OpenMP's threads; OMP_NUM_THREADS=1 runs this")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the child did not end within {limit} s")
