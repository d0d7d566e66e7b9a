"""``.parquet``: tables, a row a record."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bilect.data.files import open_file
from bilect.data.formats._tables import copy_rows, numbered, rows_of
from bilect.data.formats.contract import ALL, SLICE_BYTES, Columns, Format, Gap, Records, Slice, Wanted
from bilect.data.input import Input
from bilect.data.packing import check_head, is_damage
from bilect.errors import reason

__all__ = ["FORMAT"]

_BATCH = 1000
_HEAD = 64


class _Parquet(Format):
    suffixes = (".parquet",)
    unit = "row"

    def records(self, source: Input, columns: Columns, part: Slice = ALL) -> Records:
        (url,) = source.files
        with _opened(url) as file:
            wanted = columns(list(file.schema_arrow.names))
        number = part.first
        for group, (rows, _) in enumerate(_groups(url)[part.begin : part.end], start=part.begin):
            end = number + rows
            try:
                for batch in _batches(url, group, wanted):
                    yield from rows_of(batch, number)
                    number += len(batch)
            except (ValueError, OSError) as error:
                if not is_damage(error):
                    raise
                yield Gap(end - number, reason(error))
                number = end

    def slices(self, source: Input) -> Iterable[Slice]:
        """Row groups, as many as hold ``SLICE_BYTES`` or so when they are unpacked."""
        groups = _groups(source.files[0])
        found, first, begin, rows, size = list[Slice](), 1, 0, 0, 0
        for number, (more_rows, more_bytes) in enumerate(groups, start=1):
            rows, size = rows + more_rows, size + more_bytes
            if size >= SLICE_BYTES or number == len(groups):
                found.append(Slice(first, begin, number))
                first, begin, rows, size = first + rows, number, 0, 0
        return found or [ALL]

    def count(self, source: Input) -> int | None:
        return sum(rows for rows, _ in _groups(source.files[0]))

    def copy(self, source: Input, wanted: Wanted, out: Path) -> int:
        (url,) = source.files
        return copy_rows(_holding(url, wanted), source, wanted, out, _codec(url))


FORMAT = _Parquet()


@contextmanager
def _opened(url: str) -> Iterator[pq.ParquetFile]:
    with open_file(url) as file:
        try:
            opened = pq.ParquetFile(file)
        except ValueError:
            file.seek(0)
            check_head(file.read(_HEAD), packed=True)
            raise
        yield opened


def _groups(url: str) -> list[tuple[int, int]]:
    """Rows, and bytes when unpacked, of each row group."""
    with _opened(url) as file:
        metadata = file.metadata
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    return [(group.num_rows, group.total_byte_size) for group in groups]


def _batches(url: str, group: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    with _opened(url) as file:
        yield from file.iter_batches(batch_size=_BATCH, row_groups=[group], columns=columns)


def _holding(url: str, wanted: Wanted) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of the row groups that hold something wanted, with the places of their first rows."""
    first = 1
    for group, (rows, _) in enumerate(_groups(url)):
        if wanted.place is not None and wanted.place < first + rows:
            yield from numbered(_batches(url, group), first)
        first += rows


def _codec(url: str) -> str:
    with _opened(url) as file:
        metadata = file.metadata
        if not metadata.num_row_groups or not metadata.num_columns:
            return "zstd"
        return {"UNCOMPRESSED": "none"}.get(name := metadata.row_group(0).column(0).compression, name.lower())
