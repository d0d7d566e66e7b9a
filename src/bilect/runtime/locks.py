"""One process at a time in a folder, on any file system and operating system."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from bilect.errors import BilectError
from bilect.runtime.files import make_folder

__all__ = ["locked"]

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a run directory, made if missing, for this process alone.

    The system's lock where there is one: it goes with the process, however that ends. On a file system without locks
    (Lustre, some NFS) a file ``.lock.soft`` stands for it, which a killed process leaves behind. On the same machine
    the next one sees that its holder is dead and takes over; elsewhere none can tell, and the message says what to
    do.

    Args:
        path: the directory.
        wait: until another process lets go of it.

    Raises:
        BilectError: another process holds it, or the directory cannot be made or written.
    """
    make_folder(path)
    holder = path / ".lock.holder"
    with _acquired(path, holder, -1 if wait else 0):
        holder.write_text(f"{os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield


@contextmanager
def _acquired(path: Path, holder: Path, timeout: float) -> Iterator[None]:
    hint = ""
    lock: BaseFileLock = FileLock(path / ".lock", timeout=timeout, poll_interval=0.2, fallback_to_soft=False)
    try:
        try:
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            if isinstance(error, Timeout) or getattr(error, "errno", errno.ENOSYS) not in _NO_LOCKS:
                raise
            lock = SoftFileLock(path / ".lock.soft", timeout=timeout, poll_interval=0.2)
            hint = f"; if that process is no more, delete {lock.lock_file}"
            lock.acquire()
    except Timeout:
        raise BilectError(
            f"run: {path} is in use by process {_read(holder) or '(unknown)'}; wait until it has ended, or choose "
            f"another directory{hint}"
        ) from None
    except OSError as error:
        raise BilectError(f"run: cannot write in {path}: {error.strerror}; choose another directory") from error
    try:
        yield
    finally:
        lock.release()


def _read(holder: Path) -> str:
    try:
        return holder.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
