"""``.jsonl`` and ``.ndjson``: one JSON object a line."""

from collections.abc import Iterable
from pathlib import Path

from bilect.data.formats._json import copy_records, cut_lines, lines, parsed
from bilect.data.formats.contract import ALL, Columns, Format, Records, Slice, Wanted
from bilect.data.input import Input
from bilect.data.packing import blocks, span

__all__ = ["FORMAT"]


class _Jsonl(Format):
    suffixes = (".jsonl", ".ndjson")
    unit = "line"
    packable = True

    def records(self, source: Input, columns: Columns, part: Slice = ALL) -> Records:
        (url,) = source.files
        read = blocks(url) if part.end is None else span(url, part.begin, part.end)
        return (parsed(line, number) for number, line in enumerate(lines(read), start=part.first))

    def slices(self, source: Input) -> Iterable[Slice]:
        """By bytes; packed lines can only be read from their start, and distant ones would be read twice."""
        return [ALL] if source.packing or not source.is_local else cut_lines(source.files[0])

    def copy(self, source: Input, wanted: Wanted, out: Path) -> int:
        return copy_records(lines(blocks(source.files[0])), source, wanted, out, around=(b"", b"\n", b"\n"))


FORMAT = _Jsonl()
