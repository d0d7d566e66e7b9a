"""Files written whole or not at all, and hashes of what they hold."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bilect.errors import BilectError, reason

__all__ = ["content_hash", "draft_of", "flush", "make_folder", "pointer", "write_json", "write_text"]


def pointer(head: bytes) -> str | None:
    """What to say of a file with these first bytes if Git LFS has not fetched it; None if it is a file of its own."""
    if not head.startswith(b"version https://git-lfs.github.com/"):
        return None
    return "a Git LFS pointer that stands for the file; `git lfs pull` fetches the file itself"


def make_folder(path: Path) -> None:
    """Make a folder for results, with those above it, and see that it can be written: before hours of work.

    Raises:
        BilectError: a file is in the way, the disk is read-only, the name is too long, there is no permission ...
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        in_the_way = next((p for p in (path, *path.parents) if os.path.lexists(p) and not p.is_dir()), None)
        problem = f"{in_the_way} is no folder" if in_the_way else reason(error)
        raise BilectError(f"cannot write in {_short(path)}: {problem}; choose another folder (--out)") from error


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 300 else f"{text[:200]}... ({len(text)} characters)"


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """An empty file beside ``path`` that takes its place if the block ends well, and else goes."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(path) as draft, draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """``write_text`` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def flush(folder: Path) -> None:
    """Wait until every file below ``folder`` is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def content_hash(value: Any) -> str:
    """Hash of plain data, or of the content of a file where ``value`` is a Path."""
    digest = hashlib.sha256()
    if isinstance(value, Path):
        with value.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    else:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
