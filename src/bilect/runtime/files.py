"""Files written whole or not at all, and hashes of what they hold."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["content_hash", "flush", "write_json", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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
