"""Documents from records: JSON in its usual forms, Parquet, plain text, datasets.

A document without an id gets the hash of its text. A record that cannot be used is a ``Problem``; a file that cannot be
read to its end is an error.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fsspec

from bilect.config import SourceConfig
from bilect.data.document import Document, Problem, hash64
from bilect.data.fields import Fields
from bilect.data.formats import format_of, parquet_batches, raw_records, whole
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


def read_input(source: Input) -> Iterator[Document | Problem]:
    """Documents of one input, and a problem in the place of each record that cannot be used.

    Raises:
        BilectError: the input cannot be read to its end.
    """
    fields = Fields(source.source.fields)
    if source.names:  # files of plain text have no fields
        fields = Fields({})
    for number, record in _records(source, fields):
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
    fields, wrong = Fields(named), list[str]()

    def records() -> Iterator[Mapping[str, Any]]:
        for number, record in _records(source, fields, every=True):
            if not isinstance(record, Problem):
                if misfit := fields.misfit(record):
                    wrong.append(f"{source.at(number)}: {misfit}")
                    return
                there.update(dict.fromkeys(record))
                yield record

    there: dict[str, None] = {}
    absent = fields.absent(records())
    if wrong:
        raise BilectError(f"data: {wrong[0]}")
    if absent:
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


_Records = Iterator[Mapping[str, Any] | Problem | None]  # None: a line that holds nothing


def _records(source: Input, fields: Fields, every: bool = False) -> Iterator[tuple[int, Mapping[str, Any] | Problem]]:
    """Records with their places; ``every``: all of their fields."""
    records = _dataset(source, fields, every) if not source.files else _files(source, fields, every)
    try:
        for number, record in enumerate(records, start=1):
            if record is not None:
                yield number, record
    except BilectError:
        raise
    except Exception as error:  # a broken archive raises its library's own kind of error
        raise BilectError(f"data: cannot read {source.where}: {reason(error)}") from error


def _files(source: Input, fields: Fields, every: bool) -> _Records:
    if source.names:
        return _texts(source)
    (url,) = source.files
    form = format_of(url)
    assert form is not None
    if form.kind == "parquet":
        return _parquet(url, fields, every)
    return (parsed(line, number) for number, line in enumerate(raw_records(url, form), start=1))


def _texts(source: Input) -> _Records:
    for number, (url, name) in enumerate(zip(source.files, source.names, strict=True), start=1):
        form = format_of(url)
        assert form is not None
        try:
            yield {"text": whole(url, form).decode("utf-8-sig"), "id": name}
        except UnicodeDecodeError as error:
            yield Problem(number, "not UTF-8", f"not UTF-8 (byte {error.start})")


def _parquet(url: str, fields: Fields, every: bool) -> _Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with fsspec.open(url, "rb") as file:
        columns = None if every else fields.columns(pq.ParquetFile(file).schema_arrow.names)
    for batch in parquet_batches(url, columns):
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:  # read as bytes, so that only the records that are not UTF-8 are left out
            binary = [c.cast(pa.large_binary()) if pa.types.is_string(c.type) else c for c in batch.columns]
            yield from pa.RecordBatch.from_arrays(binary, names=batch.schema.names).to_pylist()


def _dataset(source: Input, fields: Fields, every: bool) -> _Records:
    dataset = open_dataset(source.source)
    columns = None if every else fields.columns(dataset.column_names or [])
    yield from dataset.select_columns(columns) if columns else dataset  # other columns may be images to decode
