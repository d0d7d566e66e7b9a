"""What a format is: how the records of an input are read, how it is cut, and how kept records are written as they came.

A record that cannot be used is a ``Problem`` in its place, a line that holds nothing is None, and a part of the input
whose bytes are damaged is a ``Gap``, so that places count on. Formats raise whatever their libraries raise; what to
make of it, their callers know.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from bilect.data.document import Problem
from bilect.data.fields import Fields, with_value_at
from bilect.data.input import Input

__all__ = ["ALL", "SLICE_BYTES", "Columns", "Format", "Gap", "Records", "Slice", "Wanted", "with_text"]

SLICE_BYTES = 4 << 20  # of text in a slice, about: seconds of work


@dataclass(frozen=True)
class Slice:
    """A part of an input.

    Attributes:
        first: place of its first record within the input, from 1.
        begin: where it begins, in the format's own unit: bytes, row groups, files.
        end: what comes after the last; None for the end of the input.
    """

    first: int = 1
    begin: int = 0
    end: int | None = None


ALL = Slice()


@dataclass(frozen=True)
class Gap:
    """So many records in a row that are damaged, and how."""

    records: int
    why: str


Records = Iterator[Mapping[str, Any] | Problem | Gap | None]
Columns = Callable[[Sequence[str]], list[str] | None]  # of the names of columns, those to read; None for all


class Wanted(Protocol):
    """Kept records of one input, asked for in the order of their places."""

    @property
    def place(self) -> int | None:
        """Of the next one; None where nothing more is wanted."""

    def at(self, place: int) -> list[tuple[str, str] | None]:
        """What is wanted of the record at a place: None for all of it, or number and text of a piece."""


class Format(ABC):
    """A format of inputs.

    Attributes:
        suffixes: what the names of its files end in, in lower case; none for what is no file.
        unit: what a record is called.
        packable: whether its files may be packed.
        whole: whether a file is one document; those of a folder are one input then.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "record"
    packable: ClassVar[bool] = False
    whole: ClassVar[bool] = False

    @abstractmethod
    def records(self, source: Input, columns: Columns, part: Slice = ALL) -> Records:
        """The records of a part, in order.

        Args:
            source: the input.
            columns: which fields are needed, where some can be read alone.
            part: of it.
        """

    def slices(self, source: Input) -> Iterable[Slice]:
        """The parts that can be read each by itself, in order, together all of it; by its content alone."""
        return [ALL]

    def count(self, source: Input) -> int | None:
        """Number of records, where it is told without reading them."""
        return None

    @abstractmethod
    def copy(self, source: Input, wanted: Wanted, out: Path) -> int:
        """Write what is wanted as it came, in order; returns the number of records.

        Args:
            source: the input.
            wanted: of it.
            out: path for it, which may get another ending; the folder is there.
        """


def with_text(record: Mapping[str, Any], source: Input, text: str) -> dict[str, Any]:
    """The record with the text of a piece; where several fields were the text, the first of them holds it."""
    first, *others = Fields(source.source.fields).text or ("text",)
    for name in others:
        record = with_value_at(record, name, "")
    return with_value_at(record, first, text)
