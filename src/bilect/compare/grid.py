"""The cells of a comparison carried out: several at a time, each in a process of its own, each from where it was."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import Queue, get_context
from queue import Empty
from typing import Any

from bilect.compare.cells import Cell, share
from bilect.errors import BilectError
from bilect.runtime.progress import SilentProgress, Task
from bilect.runtime.workers import cores, end_with_parent, gpu_names

__all__ = ["carry_out"]

_messages: Any = None  # of a worker: where its notes go


def _default_workers(cells: Sequence[Cell]) -> int:
    """One per GPU, or per core where none is used; no more than there are cells."""
    import torch

    gpus = 0 if cells[0].config.device == "cpu" else torch.cuda.device_count()
    return min(gpus or cores(), len(cells))


def carry_out(cells: Sequence[Cell], workers: int | None, say: Callable[[str], None], *, repeat: bool = False) -> None:
    """Run all cells, or what is left of them; those of a variant once the base of their seed is done.

    Args:
        cells: see there.
        workers: processes, each with its share of the cores, and a GPU where there are any; None: ``_default_workers``.
        say: takes a line for the reader whenever a stage has finished.

    Raises:
        BilectError: the first of a cell, with its name; the others are finished first, and kept. Or: a process was
            killed.
    """
    context, workers = get_context("spawn"), workers or _default_workers(cells)
    messages, numbers = context.Queue(), context.Queue()
    for n in range(workers):
        numbers.put(n)
    failed = list[Exception]()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start,
                             initargs=(messages, numbers, workers, gpu_names())) as pool:  # fmt: skip
        running: dict[Future[None], Cell] = {pool.submit(_run, c, repeat): c for c in cells if c.base is None}
        try:
            while running:
                done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                _pass_on(messages, say)
                for future in done:
                    cell = running.pop(future)
                    try:
                        future.result()
                    except BrokenProcessPool:
                        raise
                    except BilectError as error:
                        failed.append(BilectError(f"compare: {cell.name}: {error}"))
                        say(str(failed[-1]))
                    except Exception as error:  # of one cell: the others go on
                        error.add_note(f"in the run {cell.folder}")
                        failed.append(error)
                        say(f"compare: {cell.name}: {type(error).__name__}: {error}")
                    else:
                        running |= {pool.submit(_run, c, repeat): c for c in cells if c.base == cell.folder}
        except BrokenProcessPool as error:
            raise BilectError("compare: a worker process was killed, perhaps for want of memory; the same command goes "
                              "on, with fewer compare.workers") from error  # fmt: skip
        finally:
            pool.shutdown(cancel_futures=True)
    _pass_on(messages, say)
    if failed:
        raise failed[0]


def _start(messages: "Queue[str]", numbers: "Queue[int]", workers: int, gpus: list[str]) -> None:
    global _messages
    end_with_parent()
    _messages, number = messages, numbers.get()
    import torch  # asks for no device before one is used

    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    torch.set_num_threads(min(torch.get_num_threads(), max(cores() // workers, 1)))  # OMP_NUM_THREADS may say fewer
    from transformers.utils import logging

    logging.disable_progress_bar()


def _run(cell: Cell, repeat: bool) -> None:
    from bilect.pipeline.stages import run

    share(cell)
    run(cell.config, cell.folder, _Notes(cell.name), repeat=repeat)


class _Notes(SilentProgress):
    """Tells the parent of every finished task."""

    def __init__(self, name: str) -> None:
        self.name = name

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str | None = None) -> Iterator[Task]:
        with super().task(name, total, unit) as task:
            yield task
        _messages.put(f"{self.name}: {name}")

    def note(self, text: str) -> None:
        _messages.put(f"{self.name}: {text}")


def _pass_on(messages: Any, say: Callable[[str], None]) -> None:
    while True:
        try:
            say(messages.get_nowait())
        except Empty:
            return
