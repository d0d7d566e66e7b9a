"""Documents from files: JSONL (plain, .gz, .zst), Parquet, plain text; any fsspec URL, directories and globs.

A record has ``text``, or ``prompt`` and ``response`` (only the response is learned); ``id`` or ``doc_id`` and
``source`` are kept where given. A document without an id gets the hash of its content.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import zstandard

from bilect.config import SourceConfig
from bilect.errors import BilectError
from bilect.run_dir import content_hash

__all__ = ["Document", "file_identity", "input_files", "read_documents"]

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        doc_id: stable name.
        source: label.
        text: the whole text; prompt and response together where there are both.
        prompt: its given part, empty for plain text.
    """

    doc_id: str
    source: str
    text: str
    prompt: str = ""


def input_files(source: SourceConfig) -> list[str]:
    """The files behind a path, directory or glob, sorted.

    Raises:
        BilectError: nothing there, or nothing of a known kind.
    """
    fs, path = fsspec.core.url_to_fs(source.path)
    if any(c in path for c in "*?["):
        found = [p for p in fs.glob(path) if p.endswith(SUFFIXES)]
    elif fs.isdir(path):
        found = [p for p in fs.find(path) if p.endswith(SUFFIXES)]
    elif fs.exists(path):
        if not path.endswith(SUFFIXES):
            raise BilectError(f"data: {source.path} is none of {', '.join(SUFFIXES)}")
        found = [path]
    else:
        raise BilectError(f"data: no file or directory {source.path}")
    if not found:
        raise BilectError(f"data: no {', '.join(SUFFIXES)} files in {source.path}")
    return [str(fs.unstrip_protocol(p)) for p in sorted(found)]


def file_identity(url: str) -> str:
    """Hash of a local file's content; size and name of a remote one, which is not worth reading twice."""
    fs, path = fsspec.core.url_to_fs(url)
    return content_hash(Path(path)) if fs.protocol in ("file", ("file", "local")) else f"{fs.size(path)} bytes"


def read_documents(sources: Sequence[SourceConfig]) -> Iterator[Document]:
    """All documents of some sources, in the order of sources, files and records.

    Raises:
        BilectError: names the file and the record that cannot be read.
    """
    for source in sources:
        for url in input_files(source):
            name = url.rsplit("/", 1)[-1]
            label = source.source or name.split(".")[0]
            for place, record in _records(url):
                yield _document(record, label, f"{name}, {place}")


def _records(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        if url.endswith(".parquet"):
            import pyarrow.parquet as pq

            with fsspec.open(url, "rb") as file:
                row = 0
                for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
                    for record in batch.to_pylist():
                        row += 1
                        yield f"row {row}", record
            return
        if url.endswith(".txt"):
            with fsspec.open(url, "rb") as file:
                yield "whole file", {"text": file.read().decode("utf-8"), "id": url.rsplit("/", 1)[-1]}
            return
        with fsspec.open(url, "rb", compression="gzip" if url.endswith(".gz") else None) as file:
            yield from _json_lines(_zst_lines(file) if url.endswith(".zst") else file, url)
    except UnicodeDecodeError as error:
        raise BilectError(f"data: {url} is not UTF-8 (byte {error.start})") from error
    except BilectError:
        raise
    except Exception as error:  # a broken archive raises its library's own kind of error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BilectError(f"data: cannot read {url}: {reason}") from error


def _zst_lines(file: Any) -> Iterator[bytes]:
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


def _json_lines(lines: Iterable[bytes], url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise BilectError(f"data: {url}, line {number}: not valid JSON ({error.msg})") from error
        except UnicodeDecodeError as error:
            raise BilectError(f"data: {url}, line {number}: not UTF-8") from error
        if not isinstance(record, dict):
            raise BilectError(f"data: {url}, line {number}: expected an object with a text field")
        yield f"line {number}", record


def _document(record: dict[str, Any], label: str, place: str) -> Document:
    prompt, response, text = record.get("prompt"), record.get("response"), record.get("text")
    if isinstance(prompt, str) and isinstance(response, str):
        learned, text = response, prompt + response
    elif isinstance(text, str):
        learned, prompt = text, ""
    else:
        raise BilectError(f"data: {place}: no text field (and no prompt with response)")
    if not learned.strip():
        raise BilectError(f"data: {place}: empty document")
    given = record.get("doc_id", record.get("id"))
    doc_id = str(given) if given is not None else hashlib.sha256(text.encode()).hexdigest()[:16]
    return Document(doc_id, str(record.get("source") or label), text, prompt)
