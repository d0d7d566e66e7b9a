"""What formats of tables share: batches of rows as records, and kept rows written again under their schema."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bilect.data.document import DAMAGED, Problem
from bilect.data.formats.contract import Wanted, with_text
from bilect.data.input import Input
from bilect.errors import reason

__all__ = ["copy_rows", "numbered", "rows_of"]


def rows_of(batch: pa.RecordBatch, number: int) -> list[dict[str, Any] | Problem]:
    """The rows of a batch as Python's values; where Python has none for some, those of the other rows.

    Dates may lie outside of Python's calendar, or in a time zone that this machine does not know: no text, no error.

    Args:
        batch: of a table.
        number: place of its first row.
    """
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


def numbered(batches: Iterable[pa.RecordBatch], first: int = 1) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches with the places of their first rows."""
    for batch in batches:
        yield first, batch
        first += len(batch)


def copy_rows(
    batches: Iterable[tuple[int, pa.RecordBatch]], source: Input, wanted: Wanted, out: Path, codec: str = "zstd"
) -> int:
    """Write the rows that are wanted to a Parquet file; returns their number.

    Args:
        batches: with the places of their first rows.
        source: the input they are from.
        wanted: of it.
        out: the file.
        codec: of its columns, as pyarrow calls it.
    """
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
                    records[at] = with_text(records[at], source, text)
                part = pa.RecordBatch.from_pylist(records, schema=batch.schema)
            if len(part):
                writer.write_batch(part)
            written += len(part)
            if wanted.place is None:
                break
    return written
