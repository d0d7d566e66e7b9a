"""``dataset:`` of the config: what the datasets library reads, from the Hub or a folder."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from bilect.config import SourceConfig
from bilect.data.cache import file_hash
from bilect.data.formats._tables import copy_rows, numbered
from bilect.data.formats.contract import ALL, Columns, Format, Records, Slice, Wanted
from bilect.data.input import Input
from bilect.errors import BilectError, reason
from bilect.runtime.files import content_hash

__all__ = ["FORMAT", "identity"]


class _Dataset(Format):
    def records(self, source: Input, columns: Columns, part: Slice = ALL) -> Records:
        dataset = _opened(source.source)
        read = columns(dataset.column_names or [])
        yield from dataset.select_columns(read) if read else dataset  # other columns may be images to decode

    def copy(self, source: Input, wanted: Wanted, out: Path) -> int:
        """See the contract; a Parquet file."""
        return copy_rows(numbered(_batches(source)), source, wanted, out.with_name(f"{out.name}.parquet"))


FORMAT = _Dataset()


def identity(name: str) -> str:
    """What changes when a dataset does: hash of the content of a folder, commit of one on the Hub.

    Raises:
        BilectError: the datasets library is missing, or there is no such folder.
    """
    _check_library(name)  # before the Hub is asked
    folder = _local_folder(name)
    if folder:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return content_hash([[str(p.relative_to(folder)), file_hash(p)] for p in files])
    import huggingface_hub

    return str(huggingface_hub.HfApi().dataset_info(name).sha)


def _batches(source: Input) -> Iterator[pa.RecordBatch]:
    """All columns; the first rows tell the schema."""
    schema = None
    for table in _opened(source.source).with_format("arrow").iter(batch_size=1000):
        schema = schema or table.schema
        yield from table.cast(schema).combine_chunks().to_batches()


def _opened(source: SourceConfig) -> Any:
    """The records; streamed, unless ``save_to_disk`` wrote the folder.

    Raises:
        BilectError: the datasets library is missing, or there is no such dataset, subset or split.
    """
    assert source.dataset is not None
    _check_library(source.dataset)
    import datasets

    folder = _local_folder(source.dataset)
    try:
        if folder and ((folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()):
            saved = datasets.load_from_disk(str(folder))
            if not isinstance(saved, datasets.DatasetDict):
                return saved
            if source.split not in saved:
                raise BilectError(f"data: dataset {source.dataset} has no split {source.split!r}; it has "
                                  + ", ".join(map(repr, saved)))  # fmt: skip
            return saved[source.split]
        return datasets.load_dataset(str(folder or source.dataset), source.subset, split=source.split, streaming=True)
    except BilectError:
        raise
    except Exception as error:
        raise BilectError(f"data: cannot load dataset {source.dataset}: {reason(error)}") from error


def _check_library(name: str) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise BilectError(f"data: dataset {name} needs the datasets library: pip install 'bilect[hub]'")


def _local_folder(name: str) -> Path | None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")):  # must not be taken for a Hub name
        raise BilectError(f"data: no directory {name}")
    return None
