"""``.txt``: a file is a document."""

import shutil
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from bilect.data.document import DAMAGED, Problem
from bilect.data.files import open_file
from bilect.data.formats.contract import ALL, Columns, Format, Records, Slice, Wanted
from bilect.data.input import Input
from bilect.data.packing import blocks, create, is_damage, packing_of
from bilect.errors import reason

__all__ = ["FORMAT"]

_FILES = 1000  # of a slice


class _Text(Format):
    suffixes = (".txt",)
    packable = True
    whole = True

    def records(self, source: Input, columns: Columns, part: Slice = ALL) -> Records:
        files = list(zip(source.files, source.names, strict=True))[part.begin : part.end]
        for number, (url, name) in enumerate(files, start=part.first):
            try:
                yield {"text": b"".join(blocks(url)).decode("utf-8-sig"), "id": name}
            except UnicodeDecodeError as error:
                yield Problem(number, "not UTF-8", f"not UTF-8 (byte {error.start})")
            except Exception as error:
                if not is_damage(error):
                    raise
                yield Problem(number, DAMAGED, f"cannot read it: {reason(error)}")

    def slices(self, source: Input) -> Iterable[Slice]:
        """By files."""
        bounds = [*range(0, len(source.names), _FILES), len(source.names)]
        return [Slice(1 + begin, begin, end) for begin, end in pairwise(bounds)]

    def copy(self, source: Input, wanted: Wanted, out: Path) -> int:
        """See the contract; pieces of a file are files ``NAME#2.txt``."""
        count = 0
        for number, (url, name) in enumerate(zip(source.files, source.names, strict=True), start=1):
            for piece in wanted.at(number):
                target = out / name if source.is_folder else out
                target.parent.mkdir(parents=True, exist_ok=True)
                if piece is None:
                    with open_file(url) as old, target.open("wb") as new:
                        shutil.copyfileobj(old, new)
                else:
                    stem, dot, end = target.name.partition(".")
                    with create(target.with_name(f"{stem}#{piece[0]}{dot}{end}"), packing_of(url)) as file:
                        file.write(piece[1].encode())
                count += 1
        return count


FORMAT = _Text()
