"""Formats of files, told by the end of their names in any case, and the records in them as they stand there.

``.jsonl`` and ``.ndjson`` hold one JSON object a line. ``.json`` holds the same, or one array of objects, or objects
one after another over several lines: its start tells. ``.txt`` is one document. All of these may be packed.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import zstandard

from bilect.data.files import open_file
from bilect.runtime.files import pointer

__all__ = [
    "READ",
    "Format",
    "Layout",
    "format_of",
    "layout",
    "parquet_batches",
    "parquet_columns",
    "parquet_groups",
    "raw_records",
    "whole",
]

READ = ".jsonl, .ndjson, .json, .txt (each also .gz, .zst, .bz2, .xz), .parquet"
Kind = Literal["lines", "json", "parquet", "text"]
Layout = Literal["lines", "array", "values"]  # of JSON: an object a line, one array, or objects one after another

_KINDS: dict[str, Kind] = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".txt": "text"}
_PACKINGS = {"": None, ".gz": "gzip", ".zst": None, ".bz2": "bz2", ".xz": "xz"}  # what fsspec calls them
_BLOCK = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")
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


@dataclass(frozen=True)
class Format:
    """What a file is.

    Attributes:
        kind: how records lie in it.
        packing: suffix of its compression, in lower case; empty for none.
    """

    kind: Kind
    packing: str = ""


def format_of(path: str) -> Format | None:
    """The format of a file; None for one that is not read."""
    name = path.lower()
    if name.endswith(".parquet"):
        return Format("parquet")
    packing = next((p for p in _PACKINGS if p and name.endswith(p)), "")
    kind = next((k for suffix, k in _KINDS.items() if name.removesuffix(packing).endswith(suffix)), None)
    return None if kind is None else Format(kind, packing)


def raw_records(url: str, form: Format, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The records of a file of JSON in order: lines with their ends, blank ones too, or the text of each value.

    Args:
        url: of the file.
        form: of the file.
        begin: byte that a line of a plain file begins at.
        end: byte after the end of a line of it; None is the end of any file.

    Raises:
        Exception: whatever the library of the format raises where the file cannot be read to its end; its first bytes
            are those of something else.
    """
    if end is not None:
        return _lines(_range(url, begin, end))
    blocks = _blocks(url, form)
    if form.kind == "json":
        found, blocks = _layout(blocks)
        if found != "lines":
            return _values(blocks)
    return _lines(blocks)


def layout(url: str, form: Format) -> Layout:
    """How records lie in a file of JSON."""
    return "lines" if form.kind == "lines" else _layout(_blocks(url, form))[0]


def whole(url: str, form: Format) -> bytes:
    """All that a packed or plain file holds."""
    return b"".join(_blocks(url, form))


def parquet_batches(url: str, group: int, columns: Sequence[str] | None = None, size: int = 1000) -> Iterator[Any]:
    """Record batches of a row group of a Parquet file."""
    with _parquet(url) as file:
        yield from file.iter_batches(batch_size=size, row_groups=[group], columns=columns)


def parquet_columns(url: str) -> list[str]:
    """Names of the columns of a Parquet file."""
    with _parquet(url) as file:
        return list(file.schema_arrow.names)


def parquet_groups(url: str) -> list[tuple[int, int]]:
    """Rows, and bytes when unpacked, of each row group of a Parquet file."""
    with _parquet(url) as file:
        metadata = file.metadata
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    return [(group.num_rows, group.total_byte_size) for group in groups]


@contextmanager
def _parquet(url: str) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with open_file(url) as file:
        try:
            opened = pq.ParquetFile(file)
        except ValueError:
            file.seek(0)
            _check_head(file.read(_HEAD), packed=True)
            raise
        yield opened


def _blocks(url: str, form: Format) -> Iterator[bytes]:
    begun = False
    try:
        with open_file(url, _PACKINGS[form.packing]) as file:
            blocks = iter(lambda: file.read(_BLOCK), b"")
            for block in _unpacked(blocks) if form.packing == ".zst" else blocks:
                if not (begun or form.packing):
                    _check_head(block)
                begun = True
                yield block
    except Exception:
        if form.packing and not begun:
            with open_file(url) as file:
                _check_head(file.read(_HEAD), packed=True)
        raise


def _range(url: str, begin: int, end: int) -> Iterator[bytes]:
    with open_file(url) as file:
        file.seek(begin)
        at = begin
        while at < end and (block := file.read(min(_BLOCK, end - at))):
            if not at:
                _check_head(block)
            at += len(block)
            yield block


def _check_head(head: bytes, packed: bool = False) -> None:
    """What to do about a file whose first bytes are those of something else than its name says."""
    if told := pointer(head):
        raise ValueError(f"it is {told}")
    other = next((told for start, told in _OTHERS.items() if head.startswith(start)), None)
    if other and not packed:
        raise ValueError(other)


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


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    tail = b""
    for block in blocks:
        lines = (tail + block).split(b"\n")
        tail = lines.pop()
        for line in lines:
            yield line + b"\n"
    if tail:
        yield tail


def _layout(blocks: Iterator[bytes]) -> tuple[Layout, Iterator[bytes]]:
    """The layout, and the blocks from the first one on again."""
    head = b""
    for block in blocks:
        head += block
        start = head.removeprefix(codecs.BOM_UTF8).lstrip()
        if start.startswith(b"[") or b"\n" in start:
            break
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    found: Layout = "lines"
    if start.startswith(b"["):
        found = "array"
    elif start.startswith(b"{"):
        try:
            json.loads(start.split(b"\n", 1)[0])
        except (ValueError, RecursionError):
            found = "values"
    return found, chain([head], blocks)


def _values(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The text of each element of an array, or of each of several values; a few blocks are in memory at a time."""
    decode, scan = codecs.getincrementaldecoder("utf-8-sig")().decode, json.JSONDecoder().raw_decode
    text, at, array, ended = "", 0, False, False

    def more(least: int) -> None:
        nonlocal text, at, ended
        text, at = text[at:], 0
        while not ended and len(text) < least:
            block = next(blocks, b"")
            text, ended = text + decode(block, not block), not block

    more(1)
    at = len(text) - len(text.lstrip())
    if text.startswith("[", at):
        array, at = True, at + 1
    while True:
        match = _BETWEEN.match(text, at)
        at = match.end() if match else at
        if array and text.startswith("]", at):
            if text[at + 1 :].strip():
                raise ValueError("not valid JSON: something follows the array")
            return
        try:
            _, end = scan(text, at)
        except (ValueError, RecursionError) as error:
            if ended and (array or at < len(text)):
                raise ValueError(f"not valid JSON ({getattr(error, 'msg', type(error).__name__)})") from error
            end = len(text)
        else:
            if end < len(text) or ended:
                yield text[at:end].encode()
                at = end
                continue
        if ended:
            return
        more(2 * (len(text) - at) + 1)
