"""Processes that end with the one that started them, however it ended."""

import os
import threading
from multiprocessing import parent_process
from multiprocessing.connection import wait

__all__ = ["cores", "end_with_parent"]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """Called in a worker: a killed parent must not leave it at work, with its locks and its GPU."""
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
