"""Blocks: the tokens of one slice of an input, made by whichever process takes it.

A block is an Arrow file and, written last, a note with its size and the records that were left out. It is there when
the note is, and is of the same slice.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from bilect.data.documents import Document, Problem, bad_record, read_input
from bilect.data.formats.contract import Slice
from bilect.data.input import Input
from bilect.data.tokens import TokenStore, write_tokens
from bilect.runtime.files import draft_of, write_json

__all__ = ["Block", "Tokenise"]


@dataclass(frozen=True)
class Block:
    """What is to be made.

    Attributes:
        source: the input.
        part: the slice of it.
        entry: the token file that it becomes part of.
        file: the block's own.
        last: whether it is the last of the input.
    """

    source: Input
    part: Slice
    entry: Path
    file: Path
    last: bool


@dataclass
class Tokenise:
    """Makes a block, unless it is there; gives it back with its note.

    The note has ``rows``, ``tokens``, ``skipped`` (the problems as plain data), and ``unreported``, the documents that
    ``on_rows`` was not told of: all, where it stayed with the parent.

    Attributes:
        tokenizer: of the run.
        context: greatest number of tokens of a row.
        chunk: cut long documents.
        skip: leave out records that cannot be used.
        on_rows: called with the number of documents just done; None in a worker.
    """

    tokenizer: PreTrainedTokenizerBase
    context: int
    chunk: bool
    skip: bool
    on_rows: Callable[[int], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "on_rows": None}

    def __call__(self, block: Block) -> tuple[Block, dict[str, Any]]:
        """See the class.

        Raises:
            BilectError: the input cannot be read, or a record cannot be used and is not to be left out.
        """
        file = block.file.with_suffix(".json")
        note = _note(file)
        if note is None or note["part"] != asdict(block.part):
            note = {**self._make(block), "part": asdict(block.part)}
            write_json(file, note)
            if self.on_rows is not None:
                return block, {**note, "unreported": 0}
        return block, {**note, "unreported": note["rows"]}

    def _make(self, block: Block) -> dict[str, Any]:
        skipped: list[Problem] = []

        def on_problem(problem: Problem) -> None:
            if not self.skip:
                raise bad_record(block.source, problem)
            skipped.append(problem)

        def documents() -> Iterator[Document]:
            for item in read_input(block.source, block.part):
                if isinstance(item, Document):
                    yield item
                else:
                    on_problem(item)

        with draft_of(block.file) as draft:
            write_tokens(documents(), self.tokenizer, draft, context=self.context, chunk=self.chunk,
                         on_rows=self.on_rows or (lambda n: None), on_problem=on_problem)  # fmt: skip
        store = TokenStore(block.file)
        return {"rows": len(store), "tokens": int(store.length_R.sum()), "skipped": [asdict(p) for p in skipped]}


def _note(file: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
