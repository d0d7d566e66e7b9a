"""Documents from records: JSON in its usual forms, Parquet, plain text, datasets.

A document without an id gets the hash of its text. A record that cannot be used is a ``Problem``, and so is what cannot
be read at all, a row group or the rest of a file whose bytes are damaged; a file that cannot be opened is an error.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bilect.config import SourceConfig
from bilect.data import formats
from bilect.data.document import DAMAGED, Document, Problem, hash64
from bilect.data.fields import Fields
from bilect.data.formats.contract import ALL, Gap, Slice
from bilect.data.input import Input
from bilect.data.packing import is_damage
from bilect.data.sources import inputs
from bilect.errors import BilectError, reason

__all__ = [
    "Document",
    "Problem",
    "bad_record",
    "check_fields",
    "first_record",
    "hash64",
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


def _records(
    source: Input, fields: Fields, part: Slice = ALL, every: bool = False
) -> Iterator[tuple[int, Mapping[str, Any] | Problem]]:
    """Records with their places; ``every``: all of their fields."""
    number = part.first
    columns = (lambda names: None) if every else fields.columns
    try:
        for record in formats.get(source.format).records(source, columns, part):
            if isinstance(record, Gap):
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
        if not (source.files and is_damage(error)):
            raise BilectError(f"data: cannot read {source.where}: {reason(error)}") from error
        yield number, Problem(number, DAMAGED, f"cannot read on: {reason(error)}")
