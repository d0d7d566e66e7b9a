"""Tokenised documents on disk: Arrow files, memory-mapped, one row per document or piece of one.

Columns ``doc_id, source, text, n_given, input_ids``, and of the document that the row is (a piece of) ``record``, its
place within its input, and the hashes ``id_hash`` and ``text_hash``. Every document starts with the tokenizer's start
(or end-of-text) token, so each of its own tokens is predicted from something; it is no content. ``n_given`` leading
tokens are not learned; at the places in ``flips``, if there are any, learning stops, starts again, and so on.
``n_tokens`` counts those beyond the context too, which a row of a document that is not cut into pieces does not hold.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from bilect.data.chat import in_template
from bilect.data.document import Document, Problem, hash64
from bilect.data.store import TokenStore
from bilect.errors import BilectError

__all__ = ["TokenStore", "join_tokens", "start_token", "write_rows", "write_tokens"]

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
        ("flips", pa.list_(pa.int32())),
        ("n_tokens", pa.int32()),
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
    Where a prompt and its response, or a conversation, are too long, the start of what is given goes: the response, or
    the first turn of the assistant, is what is learned.

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
        for found in _groups(documents):
            group, table = list[Document](), list[tuple[Any, ...]]()
            for item in (in_template(d, tokenizer) for d in found):
                if isinstance(item, Document):
                    group.append(item)
                else:
                    on_problem(item)
            for document, encoding in zip(group, _encode(tokenizer, [d.text for d in group]), strict=True):
                ids = encoding.ids
                if ids.count(start_id) == len(ids):
                    on_problem(Problem(document.record, "no tokens", "the document has no tokens"))
                elif document.learned:
                    table.append(_conversation(document, ids, encoding, start_id, context))
                else:
                    table += _rows(document, ids, encoding, start_id, context, chunk)
            if table:
                writer.write_batch(_batch(table))
            rows += len(table)
            on_rows(len(found))
    return rows


def write_rows(store: TokenStore, rows: np.ndarray, path: Path) -> None:
    """Copy some rows of a store into one file."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for first in range(0, len(rows), _DOCUMENTS):
            part = rows[first : first + _DOCUMENTS]
            writer.write_batch(pa.RecordBatch.from_arrays([store.take(n, part) for n in _SCHEMA.names], schema=_SCHEMA))


def join_tokens(parts: Sequence[Path], path: Path) -> None:
    """Several files as one, a batch at a time."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for part in parts:
            with pa.memory_map(str(part)) as file:
                for batch in pa.ipc.open_stream(file):
                    writer.write_batch(batch)


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
    place, whole = (document.record, hash64(name), hash64(text)), len(ids) + 1
    if document.prompt:
        n_prompt = sum(1 for _, end in encoding.offsets if end <= len(document.prompt))
        drop = max(len(ids) - room, 0)
        if drop > n_prompt:  # a response longer than the context keeps its start
            drop, ids = n_prompt, ids[: n_prompt + room]
        yield name, source, text, 1 + n_prompt - drop, [start_id, *ids[drop:]], *place, [], whole
        return
    chunks = chunk and len(ids) > room
    end = encoding.token_to_chars(0)[0]
    for k, first in enumerate(range(0, len(ids), room) if chunks else range(1)):
        part = ids[first : first + room]
        if k and len(part) < min(32, room // 4):
            continue  # too short a rest to score or to learn from
        # pieces join to the document: a character whose bytes fall on both sides of a cut goes to the earlier one
        begin, end = end, encoding.token_to_chars(first + len(part) - 1)[1]
        size = len(part) + 1 if chunks else whole
        yield f"{name}#{k}" if chunks else name, source, text[begin:end], 1, [start_id, *part], *place, [], size


def _conversation(document: Document, ids: list[int], encoding: Any, start_id: int, context: int) -> tuple[Any, ...]:
    """A token is learned if any of its characters is."""
    learned_C = np.zeros(len(document.text) + 1, dtype=np.int64)
    for begin, end in document.learned:
        learned_C[begin + 1 : end + 1] = 1
    before_C = np.cumsum(learned_C)
    offsets = np.array(encoding.offsets)
    learned_T = before_C[offsets[:, 1]] > before_C[offsets[:, 0]]
    if ids[0] == start_id and not learned_T[0]:  # the template starts with it too
        ids, learned_T = ids[1:], learned_T[1:]
    first, room, whole = int(learned_T.argmax()), context - 1, len(ids) + 1
    drop = min(max(len(ids) - room, 0), first)
    ids, learned_T = ids[drop : drop + room], learned_T[drop : drop + room]
    at = (np.flatnonzero(np.diff(learned_T)) + 2).tolist()  # after the start token
    n_given, flips = (at[0], at[1:]) if not learned_T[0] else (1, at)
    place = (document.record, hash64(document.doc_id), hash64(document.text))
    return document.doc_id, document.source, document.text, n_given, [start_id, *ids], *place, flips, whole


def _batch(table: list[tuple[Any, ...]]) -> pa.RecordBatch:
    doc_id, source, text, n_given, ids, record, id_hash, text_hash, flips, n_tokens = zip(*table, strict=True)
    ends = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    values = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(ends[-1]))
    lists = pa.ListArray.from_arrays(pa.array(ends), pa.array(values))
    columns = [doc_id, source, text, n_given, lists, record, id_hash, text_hash, flips, n_tokens]
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
