"""What a section is made of: text, tables, plots, folds. The page renders them, the export writes them as files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bilect.report.svg import Svg
from bilect.report.wording import DASH

__all__ = ["Block", "Column", "Fold", "Html", "Plot", "Section", "Table", "Text", "gaps", "walk"]

MAX_ROWS = 40  # of a table on the page; the export has all


@dataclass(frozen=True)
class Text:
    """A paragraph, or with `style` a note, a heading within the section, or a gap: what is missing and why."""

    text: str
    style: Literal["", "note", "h3", "gap"] = ""
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class Column:
    """A column: its title, and how a value is written. `arm` names an arm, with its colour."""

    title: str
    show: Callable[[Any], str] | None = None
    arm: bool = False

    def written(self, value: object) -> str:
        if self.show is not None:
            return self.show(value)
        return DASH if value is None else str(value)


@dataclass(frozen=True)
class Table:
    """Rows of plain values; the first column names the row. A column with `show` holds numbers."""

    name: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    strong: Callable[[Sequence[Any]], bool] = lambda row: False
    limit: int = MAX_ROWS
    kind: Literal["table"] = "table"


@dataclass(frozen=True)
class Plot:
    """A figure, what it shows, and its numbers as a table: header and rows."""

    svg: Svg
    caption: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    kind: Literal["plot"] = "plot"

    @property
    def name(self) -> str:
        return self.svg.name


@dataclass(frozen=True)
class Fold:
    """Blocks under a summary that opens them."""

    title: str
    blocks: Sequence[Block]
    open: bool = False
    kind: Literal["fold"] = "fold"


@dataclass(frozen=True)
class Html:
    """What no other block can say: a template of the package, with its values. All values are escaped."""

    template: str
    values: dict[str, Any] = field(default_factory=dict)
    kind: Literal["html"] = "html"


Block = Text | Table | Plot | Fold | Html


@dataclass(frozen=True)
class Section:
    """A section of the page: its anchor, its heading, and what it shows."""

    id: str
    title: str
    blocks: Sequence[Block]


def gaps(found: Sequence[str]) -> list[Block]:
    """A sentence for each thing that is missing."""
    return [Text(f"Missing: {gap}.", "gap") for gap in found]


def walk(blocks: Sequence[Block]) -> Iterator[Block]:
    """The blocks, those under folds among them."""
    for block in blocks:
        if isinstance(block, Fold):
            yield from walk(block.blocks)
        else:
            yield block
