"""One set of documents on its way to tokens: the inputs it is from, and what is left out of it, with the reason."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bilect.config import SourceConfig
from bilect.data.checks import DocumentIndex
from bilect.data.documents import Document, Problem, check_fields, hash64, read_input
from bilect.data.input import Input
from bilect.data.sources import find
from bilect.data.token_files import TokenFiles, link
from bilect.data.tokens import TokenStore, write_rows
from bilect.errors import BilectError
from bilect.pipeline.context import RunContext
from bilect.runtime.progress import Task

__all__ = ["TWICE", "DocumentSet"]

TWICE = "duplicate text"
_SIGNS = " (data.duplicates=drop leaves such documents out, keep keeps them)"


@dataclass
class DocumentSet:
    """The inputs of a role or of one target set, and what became of them.

    Attributes:
        role: pool, upper or heldout.
        sources: of the config.
        duplicates: what becomes of documents with the text of an earlier one.
        inputs: of the sources.
        not_read: number of files there that are no data.
        paths: of the token files, one per input.
        skipped: what is said of each record that was left out.
        twice: rows of documents that repeat a text.
        store: all rows.
        index: the documents that they are of.
    """

    role: str
    sources: Sequence[SourceConfig]
    duplicates: Literal["drop", "keep", "fail"]
    paths: list[Path] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    twice: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        found = [find(source) for source in self.sources]
        self.inputs = [part for there in found for part in there.inputs]
        self._others = [other for there in found for other in there.not_read]
        self.not_read = len(self._others)

    def look(self, run: RunContext) -> None:
        """Before anything is tokenised: say what is not read, and find missing fields and, if need be, repeated texts.

        Raises:
            BilectError: no record has a field that is named, or a text is there twice under ``duplicates: fail``.
        """
        for why, files in _by_reason(self._others).items():
            names = ", ".join(files[:3]) + (" ..." if len(files) > 3 else "")
            run.progress.note(f"{self.role}: not read, {why}: {len(files)} file{'s' * (len(files) > 1)} ({names})")
        for part in self.inputs:
            check_fields(part)
        if self.duplicates == "fail":
            self._refuse_repeated()

    def _refuse_repeated(self) -> None:
        hashes, where = array("Q"), list[tuple[int, int]]()  # and for each input its first hash
        records = array("q")
        for number, part in enumerate(self.inputs):
            where.append((len(hashes), number))
            for item in read_input(part):
                if isinstance(item, Document):
                    hashes.append(hash64(item.text))
                    records.append(item.record)
        hash_D = np.frombuffer(hashes, dtype=np.uint64)
        order = np.argsort(hash_D, kind="stable")
        later = order[1:][hash_D[order[1:]] == hash_D[order[:-1]]]
        if len(later):
            second = int(later.min())
            first = int(np.flatnonzero(hash_D == hash_D[second])[0])

            def at(document: int) -> str:
                number = next(n for start, n in reversed(where) if start <= document)
                return self.inputs[number].at(records[document])

            raise BilectError(f"data: {at(second)}: the same text occurs twice, first in {at(first)}{_SIGNS}")

    def tokenise(self, files: TokenFiles, task: Task) -> None:
        for part, made in zip(self.inputs, files.all(self.inputs, task.advance), strict=True):
            self.paths.append(made.path)
            self.skipped += [_skipped(self.role, part, p) for p in made.skipped]
        self.use(TokenStore(self.paths))
        if not len(self.store):
            where = ", ".join(s.path or str(s.dataset) for s in self.sources)
            left_out = f": all {len(self.skipped)} records were left out" if self.skipped else ""
            raise BilectError(f"data: no documents for {self.role} in {where}{left_out}")

    def use(self, store: TokenStore) -> None:
        self.store, self.index = store, DocumentIndex(store)

    def leave_out_repeated(self) -> None:
        """Leave out the documents that repeat a text, unless they are to be kept."""
        if self.duplicates == "keep":
            return
        pairs = self.index.repeated()
        for document, first in pairs.tolist():
            detail = f"the same text occurs twice, first in {self.at(first)}"
            if self.duplicates == "fail":
                raise BilectError(f"data: {self.at(document)}: {detail}{_SIGNS}")
            self.skip(document, TWICE, detail)
        self.twice = self.index.rows(pairs[:, 0])
        self.index.leave_out(self.twice)

    def save(self, file: Path) -> None:
        """One token file of a set."""
        if len(self.paths) == 1 and not len(self.twice):
            link(self.paths[0], file)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
            write_rows(self.store, np.setdiff1d(np.arange(len(self.store)), self.twice), file)

    def at(self, document: int) -> str:
        part, record = self._locate(document)
        return part.at(record)

    def skip(self, document: int, reason: str, detail: str) -> None:
        part, record = self._locate(document)
        self.skipped.append(_skipped(self.role, part, Problem(record, reason, detail)))

    def _locate(self, document: int) -> tuple[Input, int]:
        row = int(self.index.first_D[document])
        number = next(n for n, part in enumerate(self.store.parts) if row in part.rows)
        return self.inputs[number], int(self.store.take("record", [row])[0].as_py())


def _skipped(role: str, part: Input, problem: Problem) -> dict[str, Any]:
    file, place = part.place(problem.record)
    return {"role": role, "file": file, "place": place, "reason": problem.reason, "detail": problem.detail}


def _by_reason(others: Iterable[tuple[str, str]]) -> Mapping[str, list[str]]:
    found = dict[str, list[str]]()
    for path, why in others:
        found.setdefault(why, []).append(path)
    return found
