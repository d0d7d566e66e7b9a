"""The cache shared between runs: token files, and the hashes of large local files. Deleting it is always safe."""

import json
import os
import time
from pathlib import Path

from bilect.errors import BilectError
from bilect.runtime.files import content_hash, write_json

__all__ = ["cache_folder", "file_hash"]

_REMEMBERED = 1 << 20  # bytes; hashing a smaller file is as quick as looking its hash up
_SETTLED = 2.0  # seconds; a file may change again within one tick of a coarse clock


def cache_folder(name: str) -> Path:
    """A folder of the cache, made if missing: below $BILECT_CACHE, $XDG_CACHE_HOME/bilect or ~/.cache/bilect.

    Raises:
        BilectError: it cannot be made.
    """
    home = os.environ.get("BILECT_CACHE")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "bilect")
    folder = Path(home).expanduser() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BilectError(
            f"data: cannot make the cache folder {folder}: {error.strerror}; set BILECT_CACHE to a folder that can "
            "be written"
        ) from error
    return folder


def file_hash(path: Path) -> str:
    """Hash of a local file's content.

    That of a large file is remembered by its path, size, time of change and inode, so that a run that starts again
    does not read its whole corpus. A file that changed within the last two seconds is not remembered.
    """
    path = path.resolve()
    stat = path.stat()
    if stat.st_size < _REMEMBERED:
        return content_hash(path)
    state = [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    note = cache_folder("hashes") / f"{content_hash(str(path))}.json"  # one file each: nothing to lock
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        if found["state"] == state:
            return str(found["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or damaged: hashed anew
    value = content_hash(path)
    if time.time() - stat.st_mtime > _SETTLED:
        write_json(note, {"state": state, "hash": value})
    return value
