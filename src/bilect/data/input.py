"""One input: what becomes one token file, and what its records are called."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bilect.config import SourceConfig
from bilect.data.packing import packing_of

__all__ = ["Input"]


@dataclass(frozen=True)
class Input:
    """A file of records, files that are a document each, or a dataset.

    Attributes:
        source: of the config.
        name: for file names.
        label: ``source`` of the documents that carry none.
        where: file, folder, or dataset, as users see it.
        format: name of its format (``bilect.data.formats``).
        unit: what a record is called.
        files: URLs; none for a dataset.
        names: of files that are a document each, relative to the folder: their documents' ids.
    """

    source: SourceConfig
    name: str
    label: str
    where: str
    format: str
    unit: str = "record"
    files: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def packing(self) -> str:
        """See ``packing_of``; of the first file."""
        return packing_of(self.files[0]) if self.files else ""

    def place(self, record: int) -> tuple[str, str]:
        """File and place of a record, counted from 1: lines of JSONL, rows of Parquet, whole files of plain text."""
        if self.names:
            return shown(self.files[record - 1]), "whole file"
        return self.where, f"{self.unit} {record}"

    def at(self, record: int) -> str:
        """``place`` in one piece."""
        file, place = self.place(record)
        return file if place == "whole file" else f"{file}, {place}"

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of files that are a document each."""
        return bool(self.names) and shown(self.files[0]) != self.where

    @property
    def is_local(self) -> bool:
        """Whether its files lie on disks of this machine."""
        return bool(self.files) and all(map(is_local, self.files))

    def note(self) -> dict[str, Any]:
        """All of it as plain data, for a file."""
        return {**asdict(self), "source": self.source.model_dump(mode="json")}

    @classmethod
    def of_note(cls, note: Mapping[str, Any]) -> "Input":
        """What ``note`` has written."""
        texts = {key: str(note[key]) for key in ("name", "label", "where", "format", "unit")}
        files, names = tuple(note["files"]), tuple(note["names"])
        return cls(SourceConfig.model_validate(note["source"]), **texts, files=files, names=names)


def is_local(url: str) -> bool:
    """Whether a URL leads to a disk of this machine."""
    return url.startswith("file://")


def shown(url: str) -> str:
    """A URL as users write it."""
    return url.removeprefix("file://")
