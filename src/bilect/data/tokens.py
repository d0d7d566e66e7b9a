"""Tokenised documents on disk: one Arrow file, memory-mapped, one row per document or piece of one.

Columns ``doc_id, source, text, n_given, input_ids``. Every document starts with the tokenizer's start (or end-of-text)
token, so each of its own tokens is predicted from something. ``n_given`` leading tokens are not learned.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bilect.data.documents import Document
from bilect.errors import BilectError

__all__ = ["TokenStore", "write_tokens"]

_SCHEMA = pa.schema(
    [
        ("doc_id", pa.string()),
        ("source", pa.string()),
        ("text", pa.string()),
        ("n_given", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
    ]
)
_ROWS = 1000


def write_tokens(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    context: int,
    chunk: bool = False,
    on_rows: Callable[[int], None] = lambda n: None,
) -> int:
    """Tokenise documents into one Arrow file; returns the number of rows.

    Longer documents than the context keep their first tokens, or become several rows (``chunk``) named ``doc_id#k``.
    Where a prompt and its response are too long, the start of the prompt goes: the response is what is learned.

    Args:
        documents: to tokenise.
        tokenizer: a fast tokenizer.
        path: of the Arrow file.
        context: greatest number of tokens of a row.
        chunk: cut instead of truncating.
        on_rows: called with the number of documents just done.

    Raises:
        BilectError: a doc_id occurs twice.
    """
    start_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    seen: set[str] = set()
    rows = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for group in _groups(documents, _ROWS):
            for document in group:
                if document.doc_id in seen:
                    raise BilectError(f"data: doc_id {document.doc_id!r} occurs twice")
                seen.add(document.doc_id)
            table: list[dict[str, object]] = []
            encoded = tokenizer([d.text for d in group], add_special_tokens=False, return_offsets_mapping=True)
            for document, ids, offsets in zip(group, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                table += _rows(document, ids, offsets, start_id, context, chunk)
            writer.write_table(pa.Table.from_pylist(table, schema=_SCHEMA))
            rows += len(table)
            on_rows(len(group))
    return rows


def _rows(
    document: Document, ids: list[int], offsets: list[tuple[int, int]], start_id: int, context: int, chunk: bool
) -> Iterator[dict[str, object]]:
    room = context - 1
    base = {"doc_id": document.doc_id, "source": document.source}
    if document.prompt:
        n_prompt = sum(1 for _, end in offsets if end <= len(document.prompt))
        drop = max(len(ids) - room, 0)
        if drop > n_prompt:  # a response longer than the context keeps its start
            drop, ids = n_prompt, ids[: n_prompt + room]
        yield {**base, "text": document.text, "n_given": 1 + n_prompt - drop, "input_ids": [start_id, *ids[drop:]]}
        return
    pieces = range(0, len(ids), room) if chunk else range(1)
    for k, first in enumerate(pieces):
        part = ids[first : first + room]
        if k and len(part) < min(32, room // 4):
            continue  # too short a rest to score or to learn from
        text = document.text[offsets[first][0] : offsets[first + len(part) - 1][1]] if part else document.text
        name = document.doc_id if len(ids) <= room or not chunk else f"{document.doc_id}#{k}"
        yield {**base, "doc_id": name, "text": text, "n_given": 1, "input_ids": [start_id, *part]}


def _groups(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    group: list[Document] = []
    for document in documents:
        group.append(document)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


class TokenStore:
    """A memory-mapped token file.

    Attributes:
        length_R: tokens of each row.
        doc_ids: name of each row.
        sources: label of each row.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise BilectError(f"tokens: no file {path}")
        self.path = path
        self._table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        self._ids = self._table.column("input_ids")
        self.length_R = np.asarray(pc.list_value_length(self._ids)).astype(np.int64)
        self._given_R = np.asarray(self._table.column("n_given"))
        self.doc_ids: list[str] = self._table.column("doc_id").to_pylist()
        self.sources: list[str] = self._table.column("source").to_pylist()

    def __len__(self) -> int:
        return len(self.length_R)

    def row(self, index: int) -> tuple[Tensor, int]:
        """Token ids of a row and the number of its given tokens."""
        ids = np.asarray(self._ids[int(index)].values)
        return torch.from_numpy(ids.astype(np.int64)), int(self._given_R[index])

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[tuple[Tensor, int]]:
        """``row`` of several."""
        return [self.row(int(i)) for i in indices]

    def texts(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Text of some rows."""
        return self._table.column("text").take(pa.array(np.asarray(indices))).to_pylist()

    @property
    def has_prompts(self) -> bool:
        """Whether any row has given tokens beyond its start."""
        return bool((self._given_R > 1).any())
