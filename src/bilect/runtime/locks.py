"""One process at a time in a folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bilect.errors import BilectError

__all__ = ["locked"]


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a run directory, made if missing, for this process alone; the system lets go of it when the process dies.

    Args:
        path: the directory.
        wait: until another process lets go of it.

    Raises:
        BilectError: another process holds it.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            raise BilectError(f"run: {path} is in use by process {file.read().strip() or '(unknown)'}; wait until it "
                              "has ended, or choose another directory") from error  # fmt: skip
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
