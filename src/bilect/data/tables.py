"""The tables of scores and selections, as DuckDB reads them: no type is guessed, no column is read off a folder's name.

(Otherwise ``source=c4/`` in a path would be a column of every row, and an id that looks like a date would be one.)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

__all__ = ["KEPT", "database", "kept_file", "kept_table", "parquet_table", "quoted"]

KEPT = {"doc_id": "VARCHAR", "source": "VARCHAR", "n_tokens": "INTEGER", "score": "FLOAT", "rank": "BIGINT"}
_LONGEST = 1 << 30  # bytes of one record


@contextmanager
def database() -> Iterator[Any]:
    """A DuckDB in memory that spills to a scratch folder of its own, not to the working directory, as it would."""
    import duckdb

    with TemporaryDirectory(prefix="bilect-") as scratch, duckdb.connect() as db:
        db.execute(f"SET temp_directory = {quoted(scratch)}")
        yield db


def quoted(text: object) -> str:
    """A string literal of SQL."""
    return "'" + str(text).replace("'", "''") + "'"


def parquet_table(*files: Path) -> str:
    """Parquet files, for FROM."""
    return f"read_parquet([{', '.join(map(quoted, files))}], hive_partitioning = false)"


def kept_file(selected: Path) -> Path | None:
    """The kept documents of a selection; None where there are none."""
    return next((f for f in (selected / "kept.parquet", selected / "kept.jsonl.zst") if f.is_file()), None)


def kept_table(file: Path, more: Mapping[str, str] | None = None) -> str:
    """Kept documents, for FROM, in the order of the file, which is that of rank.

    Args:
        file: ``kept.parquet`` or ``kept.jsonl.zst``.
        more: further columns of the latter by name, with their types.
    """
    if file.suffix == ".parquet":
        return parquet_table(file)
    columns = ", ".join(f"{name}: '{kind}'" for name, kind in {**KEPT, **(more or {})}.items())
    return (f"read_json({quoted(file)}, columns = {{{columns}}}, format = 'newline_delimited', "
            f"hive_partitioning = false, maximum_object_size = {_LONGEST})")  # fmt: skip
