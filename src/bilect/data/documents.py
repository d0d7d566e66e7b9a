"""Documents from records: JSON in its usual forms, Parquet, plain text, datasets.

A document without an id gets the hash of its text. A record that cannot be used is a ``Problem``, and so is what cannot
be read at all, a row group or the rest of a file whose bytes are damaged; a file that cannot be opened is an error.
"""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import zstandard

from bilect.config import SourceConfig
from bilect.data.document import Document, Problem, hash64
from bilect.data.fields import Fields
from bilect.data.formats import format_of, parquet_batches, parquet_columns, parquet_groups, raw_records, whole
from bilect.data.slices import ALL, Slice
from bilect.data.sources import Input, inputs, open_dataset
from bilect.errors import BilectError, reason

__all__ = [
    "Document",
    "Problem",
    "bad_record",
    "check_fields",
    "first_record",
    "hash64",
    "parsed",
    "read_documents",
    "read_input",
]

DAMAGED = "cannot be read"  # reason of a problem


def bad_record(source: Input, problem: Problem) -> BilectError:
    """The error that a problem is under ``on_bad_record: fail``."""
    return BilectError(
        f"data: {source.at(problem.record)}: {problem.detail} (data.on_bad_record=skip leaves such records out)"
    )


def read_documents(sources: Sequence[SourceConfig], *, skip: bool = False) -> Iterator[Document]:
    """All documents of some sources, in the order of sources, files and records.

    Args:
        sources: of the config.
        skip: leave out records that cannot be used.

    Raises:
        BilectError: names the file and the record that cannot be read.
    """
    for part in sources:
        for source in inputs(part):
            for item in read_input(source):
                if isinstance(item, Document):
                    yield item
                elif not skip:
                    raise bad_record(source, item)


def read_input(source: Input, part: Slice = ALL) -> Iterator[Document | Problem]:
    """Documents of one input, and a problem in the place of each record, or damaged part, that cannot be used.

    Args:
        source: the input.
        part: of it.

    Raises:
        BilectError: the input cannot be opened.
    """
    fields = Fields(source.source.fields)
    if source.names:  # files of plain text have no fields
        fields = Fields({})
    for number, record in _records(source, fields, part):
        yield record if isinstance(record, Problem) else fields.document(record, number, source.label)


def first_record(source: Input) -> tuple[Mapping[str, Any], Document | Problem]:
    """The first record of an input, with all of its fields, and the document that it is; none where it is no record.

    Raises:
        BilectError: the input cannot be read, or is empty.
    """
    fields = Fields({} if source.names else source.source.fields)
    for number, record in _records(source, fields, every=True):
        if isinstance(record, Problem):
            return {}, record
        return record, fields.document(record, number, source.label)
    raise BilectError(f"data: {source.where} holds no record")


def check_fields(source: Input) -> None:
    """Look for the fields that the config names, and no further than each is found once.

    Raises:
        BilectError: no record has one of them, or one that should hold a name holds an object.
    """
    named = source.source.fields
    if source.names or not named:
        return
    fields, wrong, damaged = Fields(named), list[str](), list[bool]()

    def records() -> Iterator[Mapping[str, Any]]:
        for number, record in _records(source, fields, every=True):
            if isinstance(record, Problem):
                damaged.append(record.reason == DAMAGED)
            else:
                if misfit := fields.misfit(record):
                    wrong.append(f"{source.at(number)}: {misfit}")
                    return
                there.update(dict.fromkeys(record))
                yield record

    there: dict[str, None] = {}
    absent = fields.absent(records())
    if wrong:
        raise BilectError(f"data: {wrong[0]}")
    if absent and not any(damaged):
        raise BilectError(f"data: {source.where}: no record has the field {absent[0]!r} that data.fields names; there "
                          f"are {', '.join(map(repr, list(there)[:10]))}")  # fmt: skip


def parsed(line: bytes, number: int) -> dict[str, Any] | Problem | None:
    """The record in some bytes of JSON; None where they hold nothing."""
    line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
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


@dataclass(frozen=True)
class _Gap:
    """So many records in a row that are damaged, and how."""

    records: int
    why: str


_Records = Iterator[Mapping[str, Any] | Problem | _Gap | None]  # None: a line that holds nothing


def _records(
    source: Input, fields: Fields, part: Slice = ALL, every: bool = False
) -> Iterator[tuple[int, Mapping[str, Any] | Problem]]:
    """Records with their places; ``every``: all of their fields."""
    number = part.first
    try:
        records = _files(source, fields, part, every) if source.files else _dataset(source, fields, every)
        for record in records:
            if isinstance(record, _Gap):
                yield number, Problem(number, DAMAGED, f"cannot read {source.unit}s {number} to "
                                      f"{number + record.records - 1}: {record.why}")  # fmt: skip
                number += record.records
                continue
            if record is not None:
                yield number, record
            number += 1
    except BilectError:
        raise
    except Exception as error:  # a broken archive raises its library's own kind of error
        if not (source.files and _is_damage(error)):
            raise BilectError(f"data: cannot read {source.where}: {reason(error)}") from error
        yield number, Problem(number, DAMAGED, f"cannot read on: {reason(error)}")


def _files(source: Input, fields: Fields, part: Slice, every: bool) -> _Records:
    if source.names:
        return _texts(source, part)
    (url,) = source.files
    form = format_of(url)
    assert form is not None
    if form.kind == "parquet":
        return _parquet(url, None if every else fields.columns(parquet_columns(url)), part)
    lines = raw_records(url, form, part.begin, part.end)
    return (parsed(line, number) for number, line in enumerate(lines, start=part.first))


def _texts(source: Input, part: Slice) -> _Records:
    files = list(zip(source.files, source.names, strict=True))[part.begin : part.end]
    for number, (url, name) in enumerate(files, start=part.first):
        form = format_of(url)
        assert form is not None
        try:
            yield {"text": whole(url, form).decode("utf-8-sig"), "id": name}
        except UnicodeDecodeError as error:
            yield Problem(number, "not UTF-8", f"not UTF-8 (byte {error.start})")
        except Exception as error:
            if not _is_damage(error):
                raise
            yield Problem(number, DAMAGED, f"cannot read it: {reason(error)}")


def _parquet(url: str, columns: Sequence[str] | None, part: Slice) -> _Records:
    number = part.first
    for group, (rows, _) in enumerate(parquet_groups(url)[part.begin : part.end], start=part.begin):
        end = number + rows
        try:
            for batch in parquet_batches(url, group, columns):
                yield from _rows(batch, number)
                number += len(batch)
        except (ValueError, OSError) as error:
            if not _is_damage(error):
                raise
            yield _Gap(end - number, reason(error))
            number = end


def _rows(batch: Any, number: int) -> list[dict[str, Any] | Problem]:
    """The rows of a batch as Python's values; where Python has none for some, those of the other rows.

    Dates may lie outside of Python's calendar, or in a time zone that this machine does not know: no text, no error.
    """
    import pyarrow as pa

    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError, KeyError):
        pass
    columns = [c.cast(pa.int64()) if pa.types.is_timestamp(c.type) else c.cast(pa.int32()) if pa.types.is_date32(c.type)
               else c for c in batch.columns]  # fmt: skip
    found: list[dict[str, Any] | Problem] = []
    for row in range(len(batch)):
        try:
            values = [column[row].as_py() for column in columns]
            found.append(dict(zip(batch.schema.names, values, strict=True)))
        except UnicodeDecodeError:
            found.append(Problem(number + row, "not UTF-8", "not UTF-8"))
        except (ValueError, OverflowError, KeyError) as error:  # a date within an object
            found.append(Problem(number + row, DAMAGED, f"cannot read a value: {reason(error)}"))
    return found


def _is_damage(error: Exception) -> bool:
    """Whether the bytes of a file are at fault, not the way to it, nor this machine."""
    kinds = (EOFError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
    return isinstance(error, kinds) or (type(error) in (OSError, gzip.BadGzipFile) and error.errno is None)  # type: ignore[attr-defined]


def _dataset(source: Input, fields: Fields, every: bool) -> _Records:
    dataset = open_dataset(source.source)
    columns = None if every else fields.columns(dataset.column_names or [])
    yield from dataset.select_columns(columns) if columns else dataset  # other columns may be images to decode
