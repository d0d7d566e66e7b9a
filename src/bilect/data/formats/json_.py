"""``.json``: an object a line, one array of objects, or values one after another; its start tells."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

from bilect.data.formats._json import copy_records, cut_lines, lines, parsed
from bilect.data.formats.contract import ALL, Columns, Format, Records, Slice, Wanted
from bilect.data.input import Input
from bilect.data.packing import blocks, span

__all__ = ["FORMAT", "texts"]

Layout = Literal["lines", "array", "values"]

_BETWEEN = re.compile(r"[\s,]*")
_AROUND = {"lines": (b"", b"\n", b"\n"), "array": (b"[\n", b",\n", b"\n]\n"), "values": (b"", b"\n", b"")}


class _Json(Format):
    suffixes = (".json",)
    packable = True

    def records(self, source: Input, columns: Columns, part: Slice = ALL) -> Records:
        (url,) = source.files
        found = texts(blocks(url))[1] if part.end is None else lines(span(url, part.begin, part.end))
        return (parsed(text, number) for number, text in enumerate(found, start=part.first))

    def slices(self, source: Input) -> Iterable[Slice]:
        """Lines by their bytes, as those of ``.jsonl``; an array can only be read from its start."""
        (url,) = source.files
        plain = not source.packing and source.is_local
        return cut_lines(url) if plain and _layout(blocks(url))[0] == "lines" else [ALL]

    def copy(self, source: Input, wanted: Wanted, out: Path) -> int:
        layout, found = texts(blocks(source.files[0]))
        return copy_records(found, source, wanted, out, around=_AROUND[layout])


FORMAT = _Json()


def texts(content: Iterator[bytes]) -> tuple[Layout, Iterator[bytes]]:
    """How records lie in a file, and the text of each.

    Raises:
        ValueError: what holds several of them is not valid JSON.
    """
    layout, content = _layout(content)
    return layout, lines(content) if layout == "lines" else _values(content)


def _layout(content: Iterator[bytes]) -> tuple[Layout, Iterator[bytes]]:
    """The layout, and the content from its start again."""
    head = b""
    for block in content:
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
    return found, chain([head], content)


def _values(content: Iterator[bytes]) -> Iterator[bytes]:
    """The text of each element of an array, or of each of several values; a few blocks are in memory at a time."""
    decode, scan = codecs.getincrementaldecoder("utf-8-sig")().decode, json.JSONDecoder().raw_decode
    text, at, array, ended = "", 0, False, False

    def more(least: int) -> None:
        nonlocal text, at, ended
        text, at = text[at:], 0
        while not ended and len(text) < least:
            block = next(content, b"")
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
