"""Every input is tokenised once: its token file is kept in the cache, and runs hold hard links to it.

An entry is an Arrow file and, written last, a note with its size, its hash and the records that were left out. Its key
is everything that its content depends on. An entry that is not whole is made again. It is made of blocks, one for each
slice of the input: workers write them, and started again it goes on at the first that is missing.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from bilect.data.blocks import Block, Tokenise
from bilect.data.cache import cache_folder, file_hash
from bilect.data.documents import Problem, bad_record
from bilect.data.formats import slices
from bilect.data.formats.contract import Slice
from bilect.data.input import Input
from bilect.data.sources import identity
from bilect.data.tokens import join_tokens, start_token
from bilect.engines import Engine, Here
from bilect.errors import BilectError, reason
from bilect.runtime.files import content_hash, draft_of, write_json

__all__ = ["TokenFile", "TokenFiles", "link"]

_FORMAT = 5  # of the entries; another one makes all of them anew


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
        engine: where slices of inputs are tokenised.
        scratch: folder for blocks, all of whose processes can reach it; a temporary one by default.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: int,
        chunk: bool,
        skip: bool,
        engine: Engine | None = None,
        scratch: Path | None = None,
    ) -> None:
        self._tokenizer, self._context, self._chunk, self._skip = tokenizer, context, chunk, skip
        self._engine, self._scratch = engine or Here(), scratch
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
        """``all`` of one input."""
        (entry,) = self.all([source], on_rows)
        return entry

    def all(self, sources: Sequence[Input], on_rows: Callable[[int], None] = lambda n: None) -> Iterator[TokenFile]:
        """The token file of each input, in order.

        Args:
            sources: the inputs.
            on_rows: called with the number of documents just done.

        Raises:
            BilectError: an input cannot be read, holds a record that cannot be used, or the cache cannot be written.
        """
        paths = [self._path(source) for source in sources]
        found = {path: _read(path) for path in paths}
        missing = {path: source for source, path in zip(sources, paths, strict=True) if found[path] is None}
        with ExitStack() as stack:
            scratch = self._scratch
            if scratch is None:
                temporary = tempfile.TemporaryDirectory(prefix="bilect-", ignore_cleanup_errors=True)
                scratch = Path(stack.enter_context(temporary))
            made = self._make(missing, scratch, on_rows)
            for source, path in zip(sources, paths, strict=True):
                entry = found[path]
                if entry is None:
                    entry = found[path] = next(made)
                else:
                    on_rows(entry.rows)
                if entry.skipped and not self._skip:
                    raise bad_record(source, entry.skipped[0])
                yield entry

    def _path(self, source: Input) -> Path:
        # Not in the key: whether bad records are left out. A file without any is the same either way.
        form = [source.format, source.packing]  # of two names for the same bytes
        chosen = [identity(source), *form, source.label, source.source.fields, *_split(source)]
        return cache_folder("tokens") / f"{content_hash([*self._settings, *chosen])}.arrow"

    def _make(
        self, missing: Mapping[Path, Input], scratch: Path, on_rows: Callable[[int], None]
    ) -> Iterator[TokenFile]:
        """Entries that are not there, in order."""
        work = Tokenise(self._tokenizer, self._context, self._chunk, self._skip, on_rows)
        blocks = list[tuple[Path, Mapping[str, Any]]]()  # of the entry that is being made
        for block, note in self._engine.map(work, _blocks(missing, scratch)):
            on_rows(note["unreported"])
            blocks.append((block.file, note))
            if block.last:
                yield _join(blocks, block.entry)
                blocks = []


def _blocks(missing: Mapping[Path, Input], scratch: Path) -> Iterator[Block]:
    for path, source in missing.items():
        folder = scratch / path.stem
        folder.mkdir(parents=True, exist_ok=True)
        parts = slices(source)
        part: Slice | None = next(parts)
        for number in count():
            if part is None:
                break
            following = next(parts, None)
            yield Block(source, part, path, folder / f"{number:06d}.arrow", following is None)
            part = following


def _join(blocks: Sequence[tuple[Path, Mapping[str, Any]]], path: Path) -> TokenFile:
    """An entry of its blocks, which go."""
    try:
        with draft_of(path) as draft:
            join_tokens([file for file, _ in blocks], draft)
        skipped = [problem for _, note in blocks for problem in note["skipped"]]
        rows, tokens = (sum(note[key] for _, note in blocks) for key in ("rows", "tokens"))
        write_json(_note(path), {"rows": rows, "tokens": tokens, "skipped": skipped, "hash": file_hash(path)})
    except (OSError, pa.ArrowException) as error:
        raise BilectError(f"data: cannot write the cache in {path.parent}: {reason(error)}") from error
    shutil.rmtree(blocks[0][0].parent)
    return TokenFile(path, rows, tokens, [Problem(**p) for p in skipped])


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
