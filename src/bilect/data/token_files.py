"""Every input is tokenised once: its token file is kept in the cache, and runs hold hard links to it.

An entry is an Arrow file and, written last, a note with its size, its hash and the records that were left out. Its key
is everything that its content depends on. An entry that is not whole is made again.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from bilect.data.cache import cache_folder, file_hash
from bilect.data.documents import Document, Problem, bad_record, read_input
from bilect.data.formats import format_of
from bilect.data.sources import Input, identity
from bilect.data.tokens import TokenStore, start_token, write_tokens
from bilect.errors import BilectError, reason
from bilect.runtime.files import content_hash, write_json

__all__ = ["TokenFile", "TokenFiles", "link"]

_FORMAT = 3  # of the entries; another one makes all of them anew


@dataclass(frozen=True)
class TokenFile:
    """A token file of the cache.

    Attributes:
        path: of the Arrow file.
        rows: their number.
        tokens: of all rows.
        skipped: records that have no row.
    """

    path: Path
    rows: int
    tokens: int
    skipped: list[Problem]


class TokenFiles:
    """The token files of inputs, from the cache or made now.

    Args:
        tokenizer: of the run.
        context: greatest number of tokens of a row.
        chunk: cut long documents instead of truncating them.
        skip: leave out records that cannot be used; otherwise the first of them is an error.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, context: int, chunk: bool, skip: bool) -> None:
        self._tokenizer, self._context, self._chunk, self._skip = tokenizer, context, chunk, skip
        backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""
        self._settings = [
            _FORMAT,
            content_hash(backend),
            start_token(tokenizer),
            context,
            chunk,
            tokenizer.chat_template,
        ]

    def get(self, source: Input, on_rows: Callable[[int], None] = lambda n: None) -> TokenFile:
        """The token file of an input.

        Args:
            source: the input.
            on_rows: called with the number of documents just done.

        Raises:
            BilectError: the input cannot be read, holds a record that cannot be used, or the cache cannot be written.
        """
        # Not in the key: whether bad records are left out. A file without any is the same either way.
        form = str(format_of(source.files[0])) if source.files else ""  # of two names for the same bytes
        chosen = [identity(source), form, source.label, source.source.fields, *_split(source)]
        key = content_hash([*self._settings, *chosen])
        path = cache_folder("tokens") / f"{key}.arrow"
        entry = _read(path)
        if entry is None:
            entry = self._make(source, path, on_rows)
        else:
            on_rows(entry.rows)
        if entry.skipped and not self._skip:
            raise bad_record(source, entry.skipped[0])
        return entry

    def _make(self, source: Input, path: Path, on_rows: Callable[[int], None]) -> TokenFile:
        skipped: list[Problem] = []

        def on_problem(problem: Problem) -> None:
            if not self._skip:
                raise bad_record(source, problem)
            skipped.append(problem)

        def documents():
            for item in read_input(source):
                if isinstance(item, Document):
                    yield item
                else:
                    on_problem(item)

        try:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.")
            os.close(handle)
            try:
                write_tokens(documents(), self._tokenizer, Path(name), context=self._context, chunk=self._chunk,
                             on_rows=on_rows, on_problem=on_problem)  # fmt: skip
                os.chmod(name, 0o644)
                os.replace(name, path)
            finally:
                Path(name).unlink(missing_ok=True)
            store = TokenStore(path)
            entry = TokenFile(path, len(store), int(store.length_R.sum()), skipped)
            note = {"rows": entry.rows, "tokens": entry.tokens, "skipped": [asdict(p) for p in skipped]}
            write_json(_note(path), {**note, "hash": file_hash(path)})
        except (OSError, pa.ArrowException) as error:
            raise BilectError(f"data: cannot write the cache in {path.parent}: {reason(error)}") from error
        return entry


def link(source: Path, destination: Path) -> None:
    """A hard link, or a copy where there can be none: what a run holds stays when the cache goes."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    destination.unlink(missing_ok=True)
    try:
        os.link(source, destination)
    except OSError:  # another file system
        shutil.copyfile(source, destination)


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def _read(path: Path) -> TokenFile | None:
    """An entry, if it is whole."""
    try:
        note = json.loads(_note(path).read_text(encoding="utf-8"))
        if note["hash"] != file_hash(path):
            return None
        return TokenFile(path, note["rows"], note["tokens"], [Problem(**p) for p in note["skipped"]])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _split(source: Input) -> list[str]:
    """What chooses among the records of a dataset; the content of a file is all of it."""
    return [str(source.source.subset), source.source.split] if source.source.dataset is not None else []
