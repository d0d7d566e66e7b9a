"""What formats of JSON share: records one after another, what each holds, and how kept ones are written again."""

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bilect.data.document import Problem
from bilect.data.files import open_file
from bilect.data.formats.contract import SLICE_BYTES, Slice, Wanted, with_text
from bilect.data.input import Input
from bilect.data.packing import create
from bilect.errors import BilectError

__all__ = ["copy_records", "cut_lines", "lines", "parsed"]

_BLOCK = 1 << 20


def lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with their ends, blank ones too."""
    tail = b""
    for block in blocks:
        found = (tail + block).split(b"\n")
        tail = found.pop()
        for line in found:
            yield line + b"\n"
    if tail:
        yield tail


def cut_lines(url: str) -> Iterator[Slice]:
    """Slices of a plain file on this machine's disks, cut at an end of a line after each ``SLICE_BYTES`` or so."""
    first, begin, at, count, cut, before = 1, 0, 0, 0, 0, 0  # lines seen; the newest end of a line, and lines before it
    with open_file(url) as file:
        while block := file.read(_BLOCK):
            newest = block.rfind(b"\n") + 1
            if newest:
                count += block.count(b"\n")
                cut, before = at + newest, count
            at += len(block)
            if cut - begin >= SLICE_BYTES:
                yield Slice(first, begin, cut)
                first, begin = 1 + before, cut
    if at > begin or not at:
        yield Slice(first, begin, at)


def parsed(line: bytes, number: int) -> dict[str, Any] | Problem | None:
    """The record in some bytes; None where they hold nothing."""
    line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    if not line.strip():
        return None
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return Problem(number, "not UTF-8", "not UTF-8")
    except (ValueError, RecursionError) as error:
        return Problem(number, "not valid JSON", f"not valid JSON ({getattr(error, 'msg', type(error).__name__)})")
    if not isinstance(record, dict):
        return Problem(number, "not an object", "expected an object with a text field")
    return record


def copy_records(
    texts: Iterable[bytes], source: Input, wanted: Wanted, out: Path, *, around: tuple[bytes, bytes, bytes]
) -> int:
    """Write those of some records, byte for byte, that are wanted.

    Args:
        texts: of all records in order.
        source: the input they are from.
        wanted: of it.
        out: the file.
        around: what stands before the first, between two, and after the last.
    """
    (begin, between, end), count = around, 0
    with create(out, source.packing) as file:
        file.write(begin)
        for number, text in enumerate(texts, start=1):
            for piece in wanted.at(number):
                whole = text if piece is None else _cut(text, number, source, piece[1])
                file.write((between if count else b"") + whole.removesuffix(b"\n"))
                count += 1
            if wanted.place is None:
                break
        file.write(end)
    return count


def _cut(text: bytes, number: int, source: Input, piece: str) -> bytes:
    record = parsed(text, number)
    if not isinstance(record, dict):
        raise BilectError(f"select: {source.at(number)} is no record any more")
    return json.dumps(with_text(record, source, piece), ensure_ascii=False).encode()
