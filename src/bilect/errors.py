"""The one exception that users see as a single clear line (exit code 2), and what else deserves such a line."""

import errno
import os
from collections.abc import Mapping
from typing import Any

__all__ = ["BilectError", "DivergedError", "explain", "reason"]


# What the system says of a path, in words that end a line; whatever library met it, it is the user's to put right.
_OF_A_PATH = {
    errno.EACCES: "no permission to use {}",
    errno.EPERM: "no permission to use {}",
    errno.EROFS: "the disk is read-only: {}",
    errno.ENAMETOOLONG: "the name is too long: {}",
    errno.ENOTDIR: "a part of the path is no folder: {}",
    errno.EEXIST: "something else is there already: {}",
    errno.EISDIR: "a folder is where a file is to be written: {}",
    errno.ELOOP: "a link that leads back to itself: {}",
    errno.EMFILE: "too many open files ({}); raise the limit (ulimit -n)",
    errno.EIO: "the disk failed: {}; nothing is half-written, and the same command goes on",
    errno.ESTALE: "the network file system has lost {}; the same command goes on",
    errno.ETIMEDOUT: "the network file system does not answer: {}; the same command goes on",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_SIGNS = (*map(os.strerror, _FULL), *(f"os error {number}" for number in _FULL), "inline_container.cc")

_READ_ONLY_SIGNS = (os.strerror(errno.EROFS), f"os error {errno.EROFS}")


_LOST_RANK_SIGNS = ("Connection closed by peer", "gloo/transport", "ncclRemoteError")


class BilectError(Exception):
    """Something the user can put right: bad input, a bad setting, a missing extra.

    The message is one line that says what is wrong, where, and what to do.
    """


class DivergedError(BilectError):
    """A loss that is not a number. Where estimators are studied this is a finding, unlike a mistake in the input.

    Attributes:
        models: the newest models at which all was well, by name.
        good_step: steps they have behind them; None if no step of this attempt was good.
    """

    def __init__(self, message: str, models: Mapping[str, Any] | None = None, good_step: int | None = None) -> None:
        super().__init__(message)
        self.models, self.good_step = dict(models or {}), good_step


def explain(error: BaseException) -> str | None:
    """What to tell the user of an error that is not a fault of the program; None where it is one.

    A full disk is reported by every library in its own way, often as the cause of something else.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, BilectError):
            return str(link)
    for link in chain:
        text = " ".join(str(link).split())
        if getattr(link, "errno", None) in _FULL or any(sign in text for sign in _FULL_SIGNS):
            where = getattr(link, "filename", None)
            return (f"no space left on the device{f' ({where})' if where else ''}; nothing is half-written: free some, "
                    "then the same command goes on")  # fmt: skip
        if isinstance(link, OSError) and link.errno in _OF_A_PATH and link.filename is not None:
            where = str(link.filename)
            return _OF_A_PATH[link.errno].format(where if len(where) <= 300 else f"{where[:200]}...")
        if isinstance(link, UnicodeEncodeError) and "\udc80" <= link.object[link.start] <= "\udcff":
            # how Python spells a byte of a name that is in another encoding
            shown = link.object.encode(errors="surrogateescape").decode(errors="backslashreplace")
            return f"a name is not UTF-8 ({shown[:300]}); rename the file or folder"
        if any(sign in text for sign in _READ_ONLY_SIGNS):  # safetensors, DuckDB and Arrow have no number
            return f"the disk is read-only ({text})"
        if isinstance(link, FileNotFoundError) and "temporary directory" in text:
            return "no folder for temporary files can be written; set TMPDIR to one that can"
        if type(link).__name__.startswith("Dist") or any(sign in text for sign in _LOST_RANK_SIGNS):
            return "another rank has ended, and says why itself unless it was killed; the same command goes on"
        if type(link).__name__ == "OutOfMemoryError":
            return f"out of memory on the device ({text.split('.')[0]}); lower the batch sizes or use bf16"
    return None


def reason(error: BaseException) -> str:
    """What somebody else's exception says, in one line, for the middle of ours."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
