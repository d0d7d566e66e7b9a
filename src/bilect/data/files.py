"""Files under any name and anywhere, as fsspec has them."""

import os
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

__all__ = ["filesystem", "open_file"]


def filesystem(path: str) -> tuple[Any, str]:
    """The file system that a path or URL leads to, and the path within it.

    Of a local file the whole path is a name: fsspec alone would take ``std::sort.txt`` for two linked URLs.

    Raises:
        Exception: a protocol that is unknown, or whose package is missing.
    """
    if path.startswith(("file://", "/")) or os.path.exists(path):
        return LocalFileSystem(), str(LocalFileSystem._strip_protocol(path))
    fs, inner = fsspec.core.url_to_fs(path)
    return fs, str(inner)


def open_file(url: str, packing: str | None = None) -> Any:
    """A file to be read: a context manager of its bytes.

    Args:
        url: of the file.
        packing: what fsspec calls its compression; None for none.
    """
    fs, path = filesystem(url)
    return fsspec.core.OpenFile(fs, path, "rb", packing)
