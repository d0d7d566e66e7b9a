"""What the tests give workers to do."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from bilect.errors import BilectError


@dataclass
class Square:
    """Leaves the process that did each item in a folder."""

    folder: Path

    def __call__(self, n: int) -> int:
        with (self.folder / f"{n}-{os.getpid()}").open("a") as file:
            file.write("done\n")
        time.sleep(0.02)
        return n * n


@dataclass
class DiesOnce:
    """Kills its process at some items: the first time, or always."""

    folder: Path
    at: tuple[int, ...]
    always: bool = False

    def __call__(self, n: int) -> int:
        mark = self.folder / str(n)
        if n in self.at and (self.always or not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return n * n


class Strange(Exception):
    """Does not survive pickling."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def faulty(n: int) -> int:
    print("a library speaks")  # on standard output, where answers go
    if n == 3:
        raise BilectError("item 3 is wrong")
    if n == 5:
        raise Strange(1, 2)
    return n // n * n


def meeting(folder: Path) -> int:
    """Ends when two processes are at it."""
    (folder / str(os.getpid())).touch()
    limit = time.monotonic() + 100
    while len(list(folder.iterdir())) < 2 and time.monotonic() < limit:
        time.sleep(0.01)
    return os.getpid()


def sleeping(n: int) -> int:
    time.sleep(60 * (n > 0))
    return os.getpid()


def threads(n: int) -> list[str | None]:
    return [os.environ.get(name) for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM")]
