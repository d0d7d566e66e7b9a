"""Tokenised documents on disk: Arrow files, memory-mapped, one row per document or piece of one.

Columns ``doc_id, source, text, n_given, input_ids``, and of the document that the row is (a piece of) ``record``, its
place within its input, and the hashes ``id_hash`` and ``text_hash``. Every document starts with the tokenizer's start
(or end-of-text) token, so each of its own tokens is predicted from something; it is no content. ``n_given`` leading
tokens are not learned.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from bilect.data.documents import Document, Problem, hash64
from bilect.data.store import TokenStore
from bilect.errors import BilectError

__all__ = ["TokenStore", "start_token", "write_rows", "write_tokens"]

_SCHEMA = pa.schema(
    [
        ("doc_id", pa.string()),
        ("source", pa.string()),
        ("text", pa.string()),
        ("n_given", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
        ("record", pa.int64()),
        ("id_hash", pa.uint64()),
        ("text_hash", pa.uint64()),
    ]
)
_DOCUMENTS, _CHARACTERS = 1000, 4_000_000  # of a group, whichever is reached first: memory does not grow


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that every document starts with."""
    return int(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)


def write_tokens(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    context: int,
    chunk: bool = False,
    on_rows: Callable[[int], None] = lambda n: None,
    on_problem: Callable[[Problem], None] = lambda problem: None,
) -> int:
    """Tokenise documents into one Arrow file; returns the number of rows.

    Longer documents than the context keep their first tokens, or become several rows (``chunk``) named ``doc_id#k``.
    Where a prompt and its response are too long, the start of the prompt goes: the response is what is learned.

    Args:
        documents: to tokenise.
        tokenizer: a fast tokenizer.
        path: of the Arrow file.
        context: greatest number of tokens of a row.
        chunk: cut instead of truncating; a last piece shorter than 32 tokens, or a quarter of the context if that is
            less, is dropped.
        on_rows: called with the number of documents just done.
        on_problem: called with each document that has no tokens; it gets no row.

    Raises:
        BilectError: the context has no room, or the tokenizer is a slow one.
    """
    if context < 2:
        raise BilectError(f"data.context: {context} leaves no room beside the start token; it must be 2 or more")
    if not tokenizer.is_fast:
        raise BilectError("tokenizer: only fast tokenizers (with a tokenizer.json) can be used")
    start_id, rows = start_token(tokenizer), 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for group in _groups(documents):
            table: list[tuple[Any, ...]] = []
            for document, encoding in zip(group, _encode(tokenizer, [d.text for d in group]), strict=True):
                ids = encoding.ids
                if ids.count(start_id) == len(ids):
                    on_problem(Problem(document.record, "no tokens", "the document has no tokens"))
                    continue
                table += _rows(document, ids, encoding, start_id, context, chunk)
            if table:
                writer.write_batch(_batch(table))
            rows += len(table)
            on_rows(len(group))
    return rows


def write_rows(store: TokenStore, rows: np.ndarray, path: Path) -> None:
    """Copy some rows of a store into one file."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for first in range(0, len(rows), _DOCUMENTS):
            part = rows[first : first + _DOCUMENTS]
            writer.write_batch(pa.RecordBatch.from_arrays([store.take(n, part) for n in _SCHEMA.names], schema=_SCHEMA))


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Any]:
    """Encodings by the tokenizer's backend, whose offsets become Python objects only where they are asked for."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend.encode_batch(texts, add_special_tokens=False)


def _rows(
    document: Document, ids: list[int], encoding: Any, start_id: int, context: int, chunk: bool
) -> Iterator[tuple[Any, ...]]:
    room = context - 1
    name, source, text = document.doc_id, document.source, document.text
    place = (document.record, hash64(name), hash64(text))
    if document.prompt:
        n_prompt = sum(1 for _, end in encoding.offsets if end <= len(document.prompt))
        drop = max(len(ids) - room, 0)
        if drop > n_prompt:  # a response longer than the context keeps its start
            drop, ids = n_prompt, ids[: n_prompt + room]
        yield name, source, text, 1 + n_prompt - drop, [start_id, *ids[drop:]], *place
        return
    chunks = chunk and len(ids) > room
    end = encoding.token_to_chars(0)[0]
    for k, first in enumerate(range(0, len(ids), room) if chunks else range(1)):
        part = ids[first : first + room]
        if k and len(part) < min(32, room // 4):
            continue  # too short a rest to score or to learn from
        # pieces join to the document: a character whose bytes fall on both sides of a cut goes to the earlier one
        begin, end = end, encoding.token_to_chars(first + len(part) - 1)[1]
        yield f"{name}#{k}" if chunks else name, source, text[begin:end], 1, [start_id, *part], *place


def _batch(table: list[tuple[Any, ...]]) -> pa.RecordBatch:
    doc_id, source, text, n_given, ids, record, id_hash, text_hash = zip(*table, strict=True)
    ends = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    values = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(ends[-1]))
    lists = pa.ListArray.from_arrays(pa.array(ends), pa.array(values))
    columns = [doc_id, source, text, n_given, lists, record, id_hash, text_hash]
    return pa.RecordBatch.from_arrays(
        [c if c is lists else pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA
    )


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if len(group) == _DOCUMENTS or characters > _CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group
