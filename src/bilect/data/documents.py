"""Documents from records: JSONL (plain, .gz, .zst), Parquet, plain text, datasets.

A record has ``text``, or ``prompt`` and ``response`` (only the response is learned); ``id`` or ``doc_id`` and
``source`` are kept where given; ``fields`` of the config renames them. A document without an id gets the hash of its
text. A record that cannot be used is a ``Problem``; a file that cannot be read to its end is an error.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import zstandard

from bilect.config import SourceConfig
from bilect.data.sources import Input, inputs, open_dataset
from bilect.errors import BilectError, reason

__all__ = ["Document", "Problem", "bad_record", "hash64", "read_documents", "read_input"]


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        doc_id: stable name.
        source: label.
        text: the whole text; prompt and response together where there are both.
        prompt: its given part, empty for plain text.
        record: its place within the input, from 1.
    """

    doc_id: str
    source: str
    text: str
    prompt: str = ""
    record: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Problem:
    """A record that cannot be used.

    Attributes:
        record: its place within the input, from 1.
        reason: the kind, for counting.
        detail: what exactly.
    """

    record: int
    reason: str
    detail: str


def bad_record(source: Input, problem: Problem) -> BilectError:
    """The error that a problem is under ``on_bad_record: fail``."""
    return BilectError(
        f"data: {source.at(problem.record)}: {problem.detail} (data.on_bad_record=skip leaves such records out)"
    )


def hash64(text: str) -> int:
    """Hash of a text or an id; ``f"{hash64(text):016x}"`` is the id of a document that has none."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def read_documents(sources: Sequence[SourceConfig], *, skip: bool = False) -> Iterator[Document]:
    """All documents of some sources, in the order of sources, files and records.

    Args:
        sources: of the config.
        skip: leave out records that cannot be used.

    Raises:
        BilectError: names the file and the record that cannot be read.
    """
    for part in sources:
        for source in inputs(part):
            for item in read_input(source):
                if isinstance(item, Document):
                    yield item
                elif not skip:
                    raise bad_record(source, item)


def read_input(source: Input) -> Iterator[Document | Problem]:
    """Documents of one input, and a problem in the place of each record that cannot be used.

    Raises:
        BilectError: the input cannot be read to its end.
    """
    names = _Names(source.source.fields)
    records = _dataset(source, names) if not source.files else _files(source, names)
    try:
        for number, record in enumerate(records, start=1):
            if isinstance(record, Problem):
                yield record
            elif record is not None:
                yield _document(record, number, source.label, names)
    except BilectError:
        raise
    except Exception as error:  # a broken archive raises its library's own kind of error
        raise BilectError(f"data: cannot read {source.where}: {reason(error)}") from error


class _Names:
    """What the fields of a document are called in its records."""

    def __init__(self, fields: Mapping[Any, str]) -> None:
        self.text, self.prompt, self.response = (fields.get(k, k) for k in ("text", "prompt", "response"))
        self.source = fields.get("source", "source")
        self.ids = (fields["id"],) if "id" in fields else ("doc_id", "id")
        # a text that is named is meant, even where records happen to have a prompt and a response too
        self.prompted = "text" not in fields or "prompt" in fields or "response" in fields

    def columns(self, present: Sequence[str]) -> list[str] | None:
        """The columns to read; all where there is no text, so that the message can name them."""
        texts = [n for n in (self.text, self.prompt, self.response) if n in present]
        return [*texts, *(n for n in (*self.ids, self.source) if n in present and n not in texts)] if texts else None


def _document(record: Mapping[str, Any], number: int, label: str, names: _Names) -> Document | Problem:
    prompt, response, text = record.get(names.prompt), record.get(names.response), record.get(names.text)
    parts: tuple[Any, ...] = (text,)
    if names.prompted and prompt is not None and response is not None:
        parts = (prompt, response)
    elif names.text in record and text is None:
        return Problem(number, "no text field", f"field {names.text!r} is null")
    elif text is None:
        there = ", ".join(map(repr, list(record)[:10])) or "no fields"
        wanted = f"no field {names.text!r}, nor {names.prompt!r} with {names.response!r}"
        return Problem(number, "no text field", f"{wanted}, but {there}; rename with fields: {{text: NAME}}")
    try:
        parts = tuple(p.decode() if isinstance(p, bytes) else p for p in parts)
        for name, part in zip((names.prompt, names.response) if len(parts) == 2 else (names.text,), parts, strict=True):
            if not isinstance(part, str):
                kind = {dict: "an object", list: "a list", bool: "a truth value"}.get(type(part), "a number")
                return Problem(number, "text is not a string", f"field {name!r} is {kind}, not a string")
        if not parts[-1].strip():
            return Problem(number, "empty document", f"empty document{' (its response)' if len(parts) == 2 else ''}")
        given = next((record[n] for n in names.ids if record.get(n) not in (None, "")), None)
        doc_id, source, whole = str(given), str(record.get(names.source) or label), "".join(parts)
        if given is None:
            doc_id = f"{hash64(whole):016x}"
        else:
            (doc_id + source + whole).encode()
    except UnicodeError:  # bytes of another encoding, or half of a surrogate pair
        return Problem(number, "not UTF-8", "not UTF-8")
    return Document(doc_id, source, whole, parts[0] if len(parts) == 2 else "", number)


_Records = Iterator[Mapping[str, Any] | Problem | None]  # None: a line that holds nothing


def _files(source: Input, names: _Names) -> _Records:
    if source.names:
        return _texts(source)
    (url,) = source.files
    return _parquet(url, names) if url.endswith(".parquet") else _json_lines(url)


def _texts(source: Input) -> _Records:
    fields = source.source.fields
    for number, (url, name) in enumerate(zip(source.files, source.names, strict=True), start=1):
        with fsspec.open(url, "rb") as file:
            content = file.read()
        try:
            yield {fields.get("text", "text"): content.decode("utf-8-sig"), fields.get("id", "id"): name}
        except UnicodeDecodeError as error:
            yield Problem(number, "not UTF-8", f"not UTF-8 (byte {error.start})")


def _parquet(url: str, names: _Names) -> _Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with fsspec.open(url, "rb") as file:
        parquet = pq.ParquetFile(file)
        for batch in parquet.iter_batches(batch_size=1000, columns=names.columns(parquet.schema_arrow.names)):
            try:
                yield from batch.to_pylist()
            except UnicodeDecodeError:  # read as bytes, so that only the records that are not UTF-8 are left out
                binary = [c.cast(pa.large_binary()) if pa.types.is_string(c.type) else c for c in batch.columns]
                yield from pa.RecordBatch.from_arrays(binary, names=batch.schema.names).to_pylist()


def _dataset(source: Input, names: _Names) -> _Records:
    dataset = open_dataset(source.source)
    columns = names.columns(dataset.column_names or [])
    yield from dataset.select_columns(columns) if columns else dataset  # other columns may be images to decode


def _json_lines(url: str) -> _Records:
    with fsspec.open(url, "rb", compression="gzip" if url.endswith(".gz") else None) as file:
        for number, line in enumerate(_zst_lines(file) if url.endswith(".zst") else file, start=1):
            yield _json(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, number)


def _json(line: bytes, number: int) -> Mapping[str, Any] | Problem | None:
    if not line.strip():
        return None
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return Problem(number, "not UTF-8", "not UTF-8")
    except (ValueError, RecursionError) as error:
        return Problem(number, "not valid JSON", f"not valid JSON ({getattr(error, 'msg', type(error).__name__)})")
    if not isinstance(record, dict):
        return Problem(number, "not an object", "expected an object with a text field")
    return record


def _zst_lines(file: Any) -> Iterable[bytes]:
    """Lines of a .zst file of any number of frames; a file that was cut off is an error, not a short file."""
    decoder, tail = None, b""
    while block := file.read(1 << 20):
        while block:
            if decoder is None or decoder.eof:
                decoder = zstandard.ZstdDecompressor().decompressobj()
            lines = (tail + decoder.decompress(block)).split(b"\n")
            block = decoder.unused_data if decoder.eof else b""
            tail = lines.pop()
            yield from lines
    if decoder is not None and not decoder.eof:
        raise EOFError("the archive is cut off")
    if tail:
        yield tail
