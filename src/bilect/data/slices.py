"""Inputs in slices: parts that are read, and tokenised, each by itself, on any process that can reach the file.

How an input is cut depends on its content alone: plain JSON lines on this machine's disks by their bytes, Parquet by
its row groups, folders of plain text by their files. Packed files, arrays and datasets can only be read from their
start, and lines that lie elsewhere would have to be read twice: these are one slice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bilect.data.files import open_file
from bilect.data.formats import format_of, layout, parquet_groups
from bilect.data.sources import Input

__all__ = ["ALL", "Slice", "slices"]

BYTES = 4 << 20  # of text in a slice, about: seconds of work
FILES = 1000
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Slice:
    """A part of an input.

    Attributes:
        first: place of its first record within the input, from 1.
        begin: first byte of lines, row group, or file.
        end: what comes after the last; None for the end of the input.
    """

    first: int = 1
    begin: int = 0
    end: int | None = None


ALL = Slice()


def slices(source: Input) -> Iterator[Slice]:
    """The slices of an input in order: one or more, together all of it. What cannot be read, its reader finds."""
    if source.names:
        bounds = [*range(0, len(source.names), FILES), len(source.names)]
        return (Slice(1 + begin, begin, end) for begin, end in pairwise(bounds))
    form = format_of(source.files[0]) if source.files else None
    try:
        if form is not None and form.kind == "parquet":
            return iter(_row_groups(parquet_groups(source.files[0])))
        if form is not None and not form.packing and source.is_local and layout(source.files[0], form) == "lines":
            return _lines(source.files[0])
    except Exception:  # every format has its own kinds
        pass
    return iter([ALL])


def _row_groups(groups: Sequence[tuple[int, int]]) -> list[Slice]:
    found, first, begin, rows, size = list[Slice](), 1, 0, 0, 0
    for number, (more_rows, more_bytes) in enumerate(groups, start=1):
        rows, size = rows + more_rows, size + more_bytes
        if size >= BYTES or number == len(groups):
            found.append(Slice(first, begin, number))
            first, begin, rows, size = first + rows, number, 0, 0
    return found or [ALL]


def _lines(url: str) -> Iterator[Slice]:
    """Cut at an end of a line after each ``BYTES`` or so."""
    first, begin, at, lines, cut, before = 1, 0, 0, 0, 0, 0  # lines seen; the newest end of a line, and lines before it
    with open_file(url) as file:
        while block := file.read(_BLOCK):
            newest = block.rfind(b"\n") + 1
            if newest:
                lines += block.count(b"\n")
                cut, before = at + newest, lines
            at += len(block)
            if cut - begin >= BYTES:
                yield Slice(first, begin, cut)
                first, begin = 1 + before, cut
    if at > begin or not at:
        yield Slice(first, begin, at)
