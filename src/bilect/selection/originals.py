"""The kept records as they came: whole, with all their fields, in the format of their files, found by file and place.

Lines of JSON, elements of an array and files of text are copied byte for byte, rows of Parquet under their schema. Of a
document that was cut into pieces (``data.long_documents: chunk``), each kept piece is a record of its own: the fields
are the record's, the text is the piece's.
"""

import bz2
import gzip
import json
import lzma
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from bilect.data.documents import parsed
from bilect.data.fields import Fields, with_value_at
from bilect.data.files import open_file
from bilect.data.formats import Format, format_of, layout, parquet_batches, parquet_groups, raw_records
from bilect.data.sources import Input, open_dataset, places
from bilect.data.store import Part
from bilect.data.tokens import TokenStore, hash64
from bilect.engines import Engine, Here
from bilect.errors import BilectError, explain, reason
from bilect.selection.records import kept_rows

__all__ = ["write_records"]

_AT_ONCE = 4096  # kept rows that are looked up at a time


def write_records(
    selected: Path,
    store: TokenStore,
    inputs: Sequence[Input],
    on_records: Callable[[int], None] = lambda n: None,
    engine: Engine | None = None,
) -> int:
    """Write ``selected/records/``, the kept records in files called like those they are from; returns their number.

    Files are laid out as the inputs are below the folder that all of them share, records are in the order of the input.
    ``records/`` appears when it is complete and can be read as a pool. Memory: 8 bytes for each kept record.

    Args:
        selected: folder of a selection.
        store: the pool's token files.
        inputs: of each token file, in order, see ``pipeline.texts.pool_inputs``.
        on_records: called with the number of records just written.
        engine: where files are written, each by one process.

    Raises:
        BilectError: an input cannot be read, or is not what was tokenised.
    """
    rows, out, draft = kept_rows(selected, store), selected / "records", selected / ".records.partial"
    shutil.rmtree(draft, ignore_errors=True)
    written = 0
    try:
        files = zip(store.parts, inputs, places(inputs), strict=True)
        parts = ((source, draft / place, _within(rows, part)) for part, source, place in files)
        for count in (engine or Here()).map(_Copy(store), (part for part in parts if len(part[2]))):
            on_records(count)
            written += count
        shutil.rmtree(out, ignore_errors=True)
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return written


def _within(rows: np.ndarray, part: Part) -> np.ndarray:
    return rows[np.searchsorted(rows, part.rows.start) : np.searchsorted(rows, part.rows.stop)]


@dataclass
class _Copy:
    """Writes the kept records of one input to a file; returns their number."""

    store: TokenStore

    def __call__(self, part: tuple[Input, Path, np.ndarray]) -> int:
        source, out, rows = part
        try:
            count = _write(source, _Wanted(self.store, rows), out)
        except BilectError:
            raise
        except Exception as error:
            if explain(error):  # a full disk, for one
                raise
            raise BilectError(f"select: cannot copy records of {source.where}: {reason(error)}") from error
        if count != len(rows):
            raise BilectError(f"select: {count:,} of {len(rows):,} kept records are found in {source.where}: it is "
                              "not what was tokenised")  # fmt: skip
        return count


class _Wanted:
    """Places of the kept records of one input, and the texts of pieces; asked for in order."""

    def __init__(self, store: TokenStore, rows: np.ndarray) -> None:
        self._store, self._rows = store, rows
        self._coming = self._all()
        self._next = next(self._coming, None)

    def at(self, place: int) -> list[tuple[str, str] | None]:
        """What is wanted of the record at a place: None for all of it, or number and text of a piece."""
        found = []
        while self._next is not None and self._next[0] <= place:
            if self._next[0] == place:
                found.append(self._next[1])
            self._next = next(self._coming, None)
        return found

    @property
    def place(self) -> int | None:
        """Of the next record; None where nothing more is wanted."""
        return None if self._next is None else self._next[0]

    def _all(self) -> Iterator[tuple[int, tuple[str, str] | None]]:
        for first in range(0, len(self._rows), _AT_ONCE):
            rows = self._rows[first : first + _AT_ONCE]
            records, hashes = (
                self._store.take("record", rows).to_pylist(),
                self._store.take("id_hash", rows).to_pylist(),
            )
            for row, record, id_hash, name in zip(rows, records, hashes, self._store.given_ids(rows), strict=True):
                piece = hash64(name) != id_hash  # `id#2`, of the document `id`
                yield record, (name.rpartition("#")[2], self._store.texts([row])[0]) if piece else None


def _write(source: Input, wanted: _Wanted, out: Path) -> int:
    if source.names:
        return _copy_files(source, wanted, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if not source.files:
        return _write_table(_numbered(_tables(source)), wanted, source, out.with_name(f"{out.name}.parquet"))
    (url,) = source.files
    form = format_of(url)
    assert form is not None
    if form.kind == "parquet":
        return _write_table(_row_groups(url, wanted), wanted, source, out, _codec(url))
    return _write_json(url, form, wanted, source, out)


def _write_json(url: str, form: Format, wanted: _Wanted, source: Input, out: Path) -> int:
    shape, count = layout(url, form), 0
    begin, between, end = (b"[\n", b",\n", b"\n]\n") if shape == "array" else (b"", b"\n" * (shape == "values"), b"")
    with ExitStack() as stack:
        file = stack.enter_context(_packed(out, form.packing))
        file.write(begin)
        for number, line in enumerate(raw_records(url, form), start=1):
            for piece in wanted.at(number):
                whole = line if piece is None else _with_text(line, number, source, piece[1])
                if shape == "lines" and not whole.endswith(b"\n"):
                    whole += b"\n"
                file.write((between if count else b"") + whole)
                count += 1
            if wanted.place is None:
                break
        file.write(end)
    return count


def _with_text(line: bytes, number: int, source: Input, text: str) -> bytes:
    record = parsed(line, number)
    if not isinstance(record, dict):
        raise BilectError(f"select: {source.at(number)} is no record any more")
    return json.dumps(_cut(record, source, text), ensure_ascii=False).encode()


def _cut(record: dict[str, Any], source: Input, text: str) -> dict[str, Any]:
    """The record with the text of a piece; where several fields were the text, the first of them holds it."""
    first, *others = Fields(source.source.fields).text or ("text",)
    for name in others:
        record = with_value_at(record, name, "")
    return with_value_at(record, first, text)


def _write_table(
    batches: Iterator[tuple[int, pa.RecordBatch]], wanted: _Wanted, source: Input, out: Path, codec: str = "zstd"
) -> int:
    written, writer = 0, None
    with ExitStack() as stack:
        for first, batch in batches:
            whole, pieces = list[int](), list[tuple[int, str]]()
            for place in range(len(batch)):
                for piece in wanted.at(first + place):
                    whole.append(place)
                    if piece is not None:
                        pieces.append((len(whole) - 1, piece[1]))
            writer = writer or stack.enter_context(pq.ParquetWriter(out, batch.schema, compression=codec))
            part = batch.take(pa.array(whole, pa.int64()))
            if pieces:
                records = part.to_pylist()
                for at, text in pieces:
                    records[at] = _cut(records[at], source, text)
                part = pa.RecordBatch.from_pylist(records, schema=batch.schema)
            if len(part):
                writer.write_batch(part)
            written += len(part)
            if wanted.place is None:
                break
    return written


def _row_groups(url: str, wanted: _Wanted) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of the row groups that hold something wanted, with the places of their first rows."""
    first = 1
    for group, (rows, _) in enumerate(parquet_groups(url)):
        if wanted.place is not None and wanted.place < first + rows:
            yield from _numbered(parquet_batches(url, group), first)
        first += rows


def _numbered(batches: Iterable[pa.RecordBatch], first: int = 1) -> Iterator[tuple[int, pa.RecordBatch]]:
    for batch in batches:
        yield first, batch
        first += len(batch)


def _tables(source: Input) -> Iterator[pa.RecordBatch]:
    """All columns of a dataset; the first rows tell the schema."""
    schema = None
    for table in open_dataset(source.source).with_format("arrow").iter(batch_size=1000):
        schema = schema or table.schema
        yield from table.cast(schema).combine_chunks().to_batches()


def _codec(url: str) -> str:
    with open_file(url) as file:
        metadata = pq.ParquetFile(file).metadata
        if not metadata.num_row_groups or not metadata.num_columns:
            return "zstd"
        return {"UNCOMPRESSED": "none"}.get(name := metadata.row_group(0).column(0).compression, name.lower())


def _copy_files(source: Input, wanted: _Wanted, out: Path) -> int:
    """Files of plain text; pieces of one are files ``NAME#2.txt``."""
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
                target = target.with_name(f"{stem}#{piece[0]}{dot}{end}")
                form = format_of(url)
                with _packed(target, form.packing if form else "") as file:
                    file.write(piece[1].encode())
            count += 1
    return count


def _packed(path: Path, packing: str) -> Any:
    """A new file, packed as the input is."""
    opened: dict[str, Any] = {"": open, ".zst": zstandard.open, ".bz2": bz2.open, ".xz": lzma.open}
    opened[".gz"] = partial(gzip.GzipFile, mtime=0)  # the same bytes whenever it is written
    return opened[packing](path, "wb")
