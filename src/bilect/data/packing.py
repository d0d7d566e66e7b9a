"""Packed files: told by the end of their names in any case, read and written so; what to do where a name is wrong."""

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import zstandard

from bilect.data.files import open_file
from bilect.runtime.files import pointer

__all__ = ["PACKINGS", "blocks", "check_head", "create", "is_damage", "packed", "packing_of", "span"]

PACKINGS = (".gz", ".zst", ".bz2", ".xz")

_FSSPEC = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz"}  # what fsspec calls them; .zst of several frames it cannot read
_BLOCK = 1 << 20
_HEAD = 64
_OTHERS = {  # what a plain file of JSON or text never begins with
    b"\x1f\x8b\x08": "it is packed with gzip; let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "it is packed with zstd; let its name end in .zst",
    b"\xfd7zXZ\0": "it is packed with xz; let its name end in .xz",
    b"PK\x03\x04": "it is a zip archive; unpack it",
    b"PAR1\x15": "it is Parquet; let its name end in .parquet",
    codecs.BOM_UTF16_LE: "it is UTF-16, not UTF-8; iconv -f utf-16 -t utf-8 converts it",
    codecs.BOM_UTF16_BE: "it is UTF-16, not UTF-8; iconv -f utf-16 -t utf-8 converts it",
}


def packing_of(path: str) -> str:
    """The end of a name that says how the file is packed, in lower case; empty for a plain file."""
    name = path.lower()
    return next((packing for packing in PACKINGS if name.endswith(packing)), "")


def blocks(url: str) -> Iterator[bytes]:
    """What a packed or plain file holds, some bytes at a time.

    Raises:
        Exception: whatever the library of the packing raises where the file cannot be read to its end; its first bytes
            are those of something else than its name says.
    """
    packing, begun = packing_of(url), False
    try:
        with open_file(url, _FSSPEC.get(packing)) as file:
            read = iter(lambda: file.read(_BLOCK), b"")
            for block in _unpacked(read) if packing == ".zst" else read:
                if not (begun or packing):
                    check_head(block)
                begun = True
                yield block
    except Exception:
        if packing and not begun:
            with open_file(url) as file:
                check_head(file.read(_HEAD), packed=True)
        raise


def span(url: str, begin: int, end: int) -> Iterator[bytes]:
    """The bytes of a plain file from ``begin`` to before ``end``."""
    with open_file(url) as file:
        file.seek(begin)
        at = begin
        while at < end and (block := file.read(min(_BLOCK, end - at))):
            if not at:
                check_head(block)
            at += len(block)
            yield block


def create(path: Path, packing: str) -> Any:
    """A new file, packed so; the same bytes whenever it is written."""
    opened: dict[str, Any] = {"": open, ".zst": zstandard.open, ".bz2": bz2.open, ".xz": lzma.open}
    opened[".gz"] = partial(gzip.GzipFile, mtime=0)
    return opened[packing](path, "wb")


def packed(content: bytes, packing: str) -> bytes:
    """What a file with this content holds."""
    ways: dict[str, Any] = {"": bytes, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    ways[".gz"] = partial(gzip.compress, compresslevel=6)
    return bytes(ways[packing](content))


def check_head(head: bytes, packed: bool = False) -> None:
    """Look at the first bytes of a file.

    Raises:
        ValueError: they are those of something else; what it is, and what to do.
    """
    if told := pointer(head):
        raise ValueError(f"it is {told}")
    other = next((told for start, told in _OTHERS.items() if head.startswith(start)), None)
    if other and not packed:
        raise ValueError(other)


def is_damage(error: Exception) -> bool:
    """Whether the bytes of a file are at fault, not the way to it, nor this machine."""
    kinds = (EOFError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
    return isinstance(error, kinds) or (type(error) in (OSError, gzip.BadGzipFile) and error.errno is None)  # type: ignore[attr-defined]


def _unpacked(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """What a .zst file of any number of frames holds; a file that was cut off is an error, not a short file."""
    decoder = None
    for block in blocks:
        while block:
            if decoder is None or decoder.eof:
                decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            yield decoder.decompress(block)
            block = decoder.unused_data if decoder.eof else b""
    if decoder is not None and not decoder.eof:
        raise EOFError("the archive is cut off")
