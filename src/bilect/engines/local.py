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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice
from queue import LifoQueue
from threading import Lock
from typing import Any
from uuid import uuid4

from bilect.engines._calls import environment
from bilect.engines.contract import ATTEMPTS, Engine, Here, Item, Result
from bilect.errors import BilectError
from bilect.runtime.workers import cores, gpu_names

__all__ = ["Local", "start"]

_CODE = "import sys; sys.path[:] = {path!r}; from bilect.engines._calls import serve; serve()"


def start(workers: int | None) -> Engine:
    """``workers`` processes; 1 by default."""
    return Here() if workers in (None, 1) else Local(workers)


class Local(Engine):
    """Worker processes, each with its share of the cores, and a GPU where there are several.

    A thread for each worker sends it an item and waits for the answer. A worker that dies loses its item alone, which a
    fresh one takes over.

    Args:
        workers: their number.
    """

    def __init__(self, workers: int) -> None:
        self._workers = [_Worker(number, max(cores() // workers, 1)) for number in range(workers)]
        self._idle: LifoQueue[_Worker] = LifoQueue()  # last in, first out: the fewest are started
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers)
        self._closed = False

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See ``Engine``; a single item is done in this process."""
        items = iter(items)
        first = list(islice(items, 2))
        if len(first) < 2:
            yield from map(function, first)
            return
        key, pickled, running = uuid4().hex, pickle.dumps(function), deque[Future[Any]]()
        try:
            for item in chain(first, items):
                running.append(self._threads.submit(self._call, key, pickled, item))
                if len(running) >= 2 * len(self._workers):
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()

    def close(self) -> None:
        """See ``Engine``."""
        self._closed = True
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(cancel_futures=True)

    def _call(self, key: str, function: bytes, item: Any) -> Any:
        worker = self._idle.get()
        try:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    done, value = worker.call(key, function, item)
                    break
                except (EOFError, OSError, pickle.UnpicklingError) as error:
                    code = worker.kill()
                    if self._closed or attempt == ATTEMPTS:
                        raise BilectError(f"engine: a worker process died ({_how(code)}) at each of {attempt} attempts "
                                          "at the same work, perhaps for want of memory; the same command goes on, "
                                          "with fewer --workers") from error  # fmt: skip
        finally:
            self._idle.put(worker)
        if not done:
            raise value
        return value


class _Worker:
    """A process, started when it is first needed and again after its death."""

    def __init__(self, number: int, threads: int) -> None:
        self._number, self._threads = number, threads
        self._process: subprocess.Popen[bytes] | None = None
        self._knows = ""  # key of the function that it was sent last
        self._lock, self._closed = Lock(), False

    def call(self, key: str, function: bytes, item: Any) -> tuple[bool, Any]:
        """See ``Calls``.

        Raises:
            EOFError: it has died, and so do other errors of reading and writing say.
        """
        call = pickle.dumps((key, None if key == self._knows else function, item), pickle.HIGHEST_PROTOCOL)
        with self._lock:
            if self._closed:
                raise EOFError
            process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(call)
        process.stdin.flush()
        self._knows = key
        answer: tuple[bool, Any] = pickle.load(process.stdout)
        return answer

    def close(self) -> None:
        """End it for good."""
        with self._lock:
            self._closed = True
        self.kill()

    def kill(self) -> int | None:
        """End it; returns how it ended, which may have been before."""
        process, self._process, self._knows = self._process, None, ""
        if process is None:
            return None
        try:
            code = process.wait(0.1)  # where it has died, its own code
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what was not yet sent
                pipe.close()  # type: ignore[union-attr]
        return code

    def _start(self) -> "subprocess.Popen[bytes]":
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
