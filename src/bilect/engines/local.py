"""Processes of this machine. One worker is this process itself: nothing is started.

A worker is a fresh interpreter that knows the parent's paths and nothing of its main module, so that this works in a
notebook and in a script without a guard, where ``multiprocessing`` would run the script again. (Its executor also loses
every worker when one dies, and stops for good.)
"""

import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from bilect.engines._calls import environment
from bilect.engines._pool import Died, Pool, Worker
from bilect.engines.contract import Engine, Here
from bilect.runtime.workers import cores, gpu_names

__all__ = ["Local", "start"]

_CODE = "import sys; sys.path[:] = {path!r}; from bilect.engines._calls import serve; serve()"


def start(workers: int | None, folder: Path | None) -> Engine:
    """``workers`` processes; 1 by default."""
    return Here() if workers in (None, 1) else Local(workers)


class Local(Pool):
    """Worker processes, each with its share of the cores, and a GPU where there are several.

    Args:
        workers: their number.
    """

    def __init__(self, workers: int) -> None:
        super().__init__()
        self._count = workers

    def _limit(self) -> int:
        return self._count

    def _worker(self, number: int) -> Worker:
        return _Process(number, max(cores() // self._count, 1))


class _Process(Worker):
    """An interpreter that answers through its standard output."""

    def __init__(self, number: int, threads: int) -> None:
        self._number, self._threads = number, threads
        self._process: subprocess.Popen[bytes] | None = None
        self._knows = ""  # key of the function that it was sent last
        self._lock, self._closed = Lock(), False

    def start(self) -> None:
        """See ``Worker``."""
        with self._lock:
            if self._closed:
                raise Died("closed")
            self._process = self._process or self._begin()

    def call(self, key: str, function: bytes, item: Any) -> tuple[bool, Any]:
        """See ``Worker``."""
        call = pickle.dumps((key, None if key == self._knows else function, item), pickle.HIGHEST_PROTOCOL)
        process = self._process
        try:
            if process is None:
                raise EOFError
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(call)
            process.stdin.flush()
            self._knows = key
            answer: tuple[bool, Any] = pickle.load(process.stdout)
            return answer
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise Died(_how(self._kill(0.1))) from error  # it has died, or is about to: its own code

    def close(self) -> None:
        """See ``Worker``."""
        with self._lock:
            self._closed = True
        self._kill(0)

    def _kill(self, patience: float) -> int | None:
        """End it, after some seconds; returns how it ended, which may have been before."""
        process, self._process, self._knows = self._process, None, ""
        if process is None:
            return None
        try:
            code = process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what was not yet sent
                pipe.close()  # type: ignore[union-attr]
        return code

    def _begin(self) -> "subprocess.Popen[bytes]":
        settings = {**os.environ, **environment(self._threads)}
        if len(gpus := gpu_names()) > 1:
            settings["CUDA_VISIBLE_DEVICES"] = gpus[self._number % len(gpus)]
        code = _CODE.format(path=sys.path)
        return subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=settings
        )


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
