"""What engines of several workers share: a thread for each worker takes an item, sends it, and waits for the answer.

A worker that dies loses its item alone, which the next that is free takes over.
"""

import pickle
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain, count, islice
from queue import PriorityQueue
from threading import Thread
from typing import Any
from uuid import uuid4

from bilect.engines.contract import ATTEMPTS, Engine, Item, Result
from bilect.errors import BilectError

__all__ = ["Died", "Pool", "Worker"]


class Died(Exception):
    """A worker is no more; the message says how it ended."""


class Worker(ABC):
    """One of those that work, as its thread sees it."""

    @abstractmethod
    def start(self) -> None:
        """Return when it can be called: at once, where it has not died since. It is given no item before.

        Raises:
            Died: it ended before that, or ``close`` was called.
            BilectError: it can do nothing here.
        """

    @abstractmethod
    def call(self, key: str, function: Any, item: Any) -> tuple[bool, Any]:
        """See ``Calls``; ``function`` is what ``Pool._shared`` made of it.

        Raises:
            Died: before it has answered.
        """

    @abstractmethod
    def close(self) -> None:
        """End it for good, whatever it is at; called from another thread."""


@dataclass(order=True)
class _Task:
    number: int  # in the order of the items
    call: tuple[str, Any, Any] = field(compare=False)
    answer: "Future[Any]" = field(compare=False, default_factory=Future)
    attempts: int = field(compare=False, default=0)


class Pool(Engine):
    """Workers, started where an item waits and none of them is free."""

    def __init__(self) -> None:
        self._waiting: PriorityQueue[_Task] = PriorityQueue()
        self._workers, self._threads = list[Worker](), list[Thread]()
        self._numbers = count()
        self._closed = False

    @abstractmethod
    def _limit(self) -> int:
        """Greatest number of workers, now."""

    @abstractmethod
    def _worker(self, number: int) -> Worker:
        """Another one, not yet started."""

    def _shared(self, function: bytes) -> Any:
        """What calls carry of a function: itself, or where it is to be had."""
        return function

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """See ``Engine``; a single item is done in this process."""
        items = iter(items)
        first = list(islice(items, 2))
        if len(first) < 2:
            yield from map(function, first)
            return
        pickled, key, running = pickle.dumps(function), uuid4().hex, deque[Future[Any]]()
        limit, sent = self._limit(), self._shared(pickled)
        try:
            for item in chain(first, items):
                running.append(self._submit(key, sent, item))
                if sum(not future.done() for future in running) > len(self._workers) < limit:
                    self._hire()
                if len(running) >= 2 * limit:
                    yield running.popleft().result()
                    limit = self._limit()
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
            self._waiting.put(_Task(-1, ("", None, None)))  # before all others, for its thread to look up
        for thread in self._threads:
            thread.join(1)

    def _submit(self, key: str, function: Any, item: Any) -> "Future[Any]":
        task = _Task(next(self._numbers), (key, function, item))
        self._waiting.put(task)
        return task.answer

    def _hire(self) -> None:
        worker = self._worker(len(self._workers))
        self._workers.append(worker)
        self._threads.append(Thread(target=self._feed, args=(worker,), daemon=True))
        self._threads[-1].start()

    def _feed(self, worker: Worker) -> None:
        while not self._closed:
            problem = self._started(worker)
            task = self._waiting.get()
            if self._closed or (task.attempts == 0 and not task.answer.set_running_or_notify_cancel()):
                continue  # nobody waits for it
            if problem is not None:
                task.answer.set_exception(problem)
            else:
                self._do(worker, task)

    def _started(self, worker: Worker) -> Exception | None:
        problem: Exception | None = None
        for _ in range(ATTEMPTS):
            try:
                worker.start()
                return None
            except Died as error:
                problem = BilectError(f"engine: a worker process cannot start ({error})")
            except Exception as error:
                return error
        return problem

    def _do(self, worker: Worker, task: _Task) -> None:
        task.attempts += 1
        try:
            done, value = worker.call(*task.call)
        except Died as error:
            if task.attempts < ATTEMPTS and not self._closed:
                self._waiting.put(task)
                return
            done, value = False, BilectError(f"engine: a worker process died ({error}) at each of {task.attempts} "
                                             "attempts at the same work, perhaps for want of memory; the same command "
                                             "goes on, with fewer --workers")  # fmt: skip
        except Exception as error:
            done, value = False, error  # the item or its result cannot be sent
        if done:
            task.answer.set_result(value)
        else:
            task.answer.set_exception(value)
