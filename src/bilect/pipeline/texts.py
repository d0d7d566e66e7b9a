"""Text to tokens: the pool, and the target sets: upper data and held-out data.

``tokens/pool/``, ``tokens/upper/`` and ``tokens/heldout/`` hold token files; ``tokens/pool.json`` lists those of the
pool, and its rows that repeat others, ``tokens/held-out.json`` its rows with a held-out text, and
``tokens/skipped-*.jsonl`` every record that was left out, and why.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from bilect.config import Config, SourceConfig
from bilect.data.checks import DocumentIndex
from bilect.data.documents import Problem, bad_record, read_documents
from bilect.data.sources import Input, identity, inputs, set_name
from bilect.data.task_files import task_inputs
from bilect.data.token_files import TokenFiles, link
from bilect.data.tokens import TokenStore, write_rows
from bilect.errors import BilectError
from bilect.models.loading import load_tokenizer, train_tokenizer
from bilect.models.presets import PRESETS
from bilect.pipeline.context import Figures, RunContext
from bilect.runtime import distributed
from bilect.runtime.files import write_json, write_text
from bilect.runtime.progress import Task

__all__ = ["given_tokenizer", "input_hashes", "tokenise_files", "tokenise_heldout", "tokenise_pool", "tokenise_upper"]

TWICE, HELD_OUT = "duplicate doc_id", "in heldout_data"


def input_hashes(run: RunContext) -> dict[str, dict[str, str]]:
    """Identity of every input, by role: its content's hash where it is local, its version elsewhere.

    Raises:
        BilectError: an input is missing or cannot be read, or two target sets of a role have the same name.
    """
    data = run.config.data
    found: dict[str, dict[str, str]] = {"lower_data": {}, "upper_data": {}, "heldout_data": {}}
    target_sets = (("upper_data", data.upper_data), ("heldout_data", data.heldout_data))
    for role, sources in target_sets:
        for name, count in Counter(map(set_name, sources)).items():
            if count > 1:
                raise BilectError(f"data.{role}: {count} sets are called {name!r}; give each its own source")
    for role, sources in (("lower_data", data.lower_data), *target_sets):
        for source in sources:
            for part in inputs(source):
                known = found[role].get(part.where, "")
                found[role][part.where] = f"{known} {identity(part)}".strip()  # several, of a large folder of text
    if run.config.tasks.names:
        found["tasks"] = {"lm-eval": _version("lm-eval"), **task_inputs(run.config.tasks.names)}
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def tokenise_pool(run: RunContext, scratch: Path) -> Figures:
    """Tokenizer and token files of the pool, one per input."""
    if not distributed.is_main():
        return {}
    data = run.config.data
    if data.long_documents == "truncate":  # a row per document: too few are known before anything is tokenised
        skip = data.on_bad_record == "skip"
        _check_size(run, sum(1 for _ in islice(read_documents(data.lower_data, skip=skip), _needed(run))))
    figures = tokenise_files(run, scratch, _make_tokenizer(run))
    _check_size(run, figures["documents"])
    return figures


def tokenise_files(run: RunContext, scratch: Path, tokenizer: PreTrainedTokenizerBase) -> Figures:
    """Token files of the pool under a given tokenizer, which is saved beside them."""
    data, folder = run.config.data, scratch / "tokens"
    skip = data.on_bad_record == "skip"
    with run.progress.task("tokenise the pool", unit="documents") as task:
        tokenizer.save_pretrained(scratch / "tokenizer")
        pool = _Set("pool", data.lower_data)
        pool.tokenise(_token_files(run, tokenizer, chunk=data.long_documents == "chunk"), task)
        files = [folder / "pool" / f"{n:05d}-{part.name}.arrow" for n, part in enumerate(pool.inputs)]
        for made, file in zip(pool.paths, files, strict=True):
            link(made, file)
    pool.leave_out_repeated(skip)
    rows = [
        {"file": file.name, "input": part.where, "weight": part.source.weight, "rows": len(store_part.rows)}
        for file, part, store_part in zip(files, pool.inputs, pool.store.parts, strict=True)
    ]
    write_json(folder / "pool.json", {"files": rows, "excluded": {TWICE: pool.twice.tolist()}})
    _write_skipped(folder / "skipped-pool.jsonl", pool.skipped)
    tokens = int(pool.store.length_R.sum()) - int(pool.store.length_R[pool.twice].sum())
    return {
        "tokens": tokens,
        "documents": len(pool.store) - len(pool.twice),
        "skipped": _counts(pool.skipped),
        "flops": 0.0,
    }


def tokenise_heldout(run: RunContext, scratch: Path) -> Figures:
    """Token file of each held-out set; documents of the pool with their texts are left out, a bad record or not."""
    if not distributed.is_main():
        return {}
    data = run.config.data
    sets = _tokenise_sets(run, "heldout", data.heldout_data)
    pool = _Set("pool", data.lower_data)
    pool.use(run.pool())
    pool.twice = np.array(run.pool_note()["excluded"][TWICE], dtype=np.int64)
    pool.index.leave_out(pool.twice)
    none = np.zeros(0, np.int64)  # where nothing is held out
    held_out = np.unique(np.concatenate([none, *(pool.index.with_texts_of(s.index) for s in sets)]))
    for document in held_out.tolist():
        pool.skip(document, HELD_OUT, "its text is that of a held-out document")
    rows = pool.index.rows(held_out)
    _check_size(run, len(pool.store) - len(pool.twice) - len(rows))
    write_json(scratch / "tokens" / "held-out.json", {"excluded": {HELD_OUT: rows.tolist()}})
    return _saved(scratch, sets, "held-out", pool.skipped)


def tokenise_upper(run: RunContext, scratch: Path) -> Figures:
    """Token file of each upper set; none may share a text with a held-out set."""
    if not distributed.is_main():
        return {}
    sets = _tokenise_sets(run, "upper", run.config.data.upper_data)
    for heldout in _tokenise_sets(run, "heldout", run.config.data.heldout_data):  # again, since it knows its files
        for upper in sets:
            shared = heldout.index.with_texts_of(upper.index)
            if len(shared):
                raise BilectError(f"data: held-out document {heldout.at(shared[0])} is in upper_data too "
                                  f"({len(shared)} in all); remove it from one of the two")  # fmt: skip
    return _saved(scratch, sets, "upper")


def _tokenise_sets(run: RunContext, role: str, sources: Sequence[SourceConfig]) -> "list[_Set]":
    files, sets = _token_files(run, run.tokenizer, chunk=False), [_Set(role, (source,)) for source in sources]
    with run.progress.task(f"tokenise the {'held-out' if role == 'heldout' else role} sets") as task:
        for part in sets:
            part.tokenise(files, task)
            part.leave_out_repeated(run.config.data.on_bad_record == "skip")
    return sets


def _saved(scratch: Path, sets: "Sequence[_Set]", name: str, skipped: Sequence[dict[str, Any]] = ()) -> Figures:
    """A token file per set, and a list of what was left out."""
    for part in sets:
        part.save(scratch / "tokens" / part.role / f"{set_name(part.sources[0])}.arrow")
    skipped = [*skipped, *(s for part in sets for s in part.skipped)]
    _write_skipped(scratch / "tokens" / f"skipped-{name}.jsonl", skipped)
    tokens = sum(int(part.store.length_R.sum()) for part in sets)
    return {"tokens": tokens, "skipped": _counts(skipped), "flops": 0.0}


@dataclass
class _Set:
    """The inputs of a role or of one target set, and what became of them."""

    role: str
    sources: Sequence[SourceConfig]
    paths: list[Path] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    twice: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # rows that are left out

    def __post_init__(self) -> None:
        self.inputs = [part for source in self.sources for part in inputs(source)]

    def tokenise(self, files: TokenFiles, task: Task) -> None:
        for part in self.inputs:
            made = files.get(part, task.advance)
            self.paths.append(made.path)
            self.skipped += [_skipped(self.role, part, p) for p in made.skipped]
        self.use(TokenStore(self.paths))
        if not len(self.store):
            where = ", ".join(s.path or str(s.dataset) for s in self.sources)
            left_out = f": all {len(self.skipped)} records were left out" if self.skipped else ""
            raise BilectError(f"data: no documents for {self.role} in {where}{left_out}")

    def use(self, store: TokenStore) -> None:
        self.store, self.index = store, DocumentIndex(store)

    def leave_out_repeated(self, skip: bool) -> None:
        """Leave out the documents that repeat an id; unless they are to be skipped, the first of them is an error."""
        pairs = self.index.repeated()
        for document, first in pairs:
            same_text = self.index.has_hash_for_id(document)
            what = "the same text" if same_text else f"doc_id {self.index.id(document)!r}"
            detail = f"{what} occurs twice, first in {self.at(first)}"
            if not skip:
                part, record = self._locate(document)
                raise bad_record(part, Problem(record, TWICE, detail))
            self.skip(document, TWICE, detail)
        self.twice = self.index.rows(np.array([d for d, _ in pairs], dtype=np.int64))
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


def _token_files(run: RunContext, tokenizer: PreTrainedTokenizerBase, *, chunk: bool) -> TokenFiles:
    data = run.config.data
    return TokenFiles(tokenizer, context=data.context, chunk=chunk, skip=data.on_bad_record == "skip")


def _needed(run: RunContext) -> int:
    return (run.config.rounds + 1) * run.config.fit.lower_batch_size


def _check_size(run: RunContext, rows: int) -> None:
    if rows < _needed(run):
        raise BilectError(f"data: the pool has {rows} documents, fewer than {run.config.rounds + 1} batches of "
                          f"{run.config.fit.lower_batch_size}; add documents or lower "
                          "fit.lower_batch_size")  # fmt: skip


def _skipped(role: str, part: Input, problem: Problem) -> dict[str, Any]:
    file, place = part.place(problem.record)
    return {"role": role, "file": file, "place": place, "reason": problem.reason, "detail": problem.detail}


def _write_skipped(file: Path, skipped: Iterable[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in skipped))


def _counts(skipped: Iterable[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(s["reason"] for s in skipped))


def given_tokenizer(config: Config) -> str | None:
    """The tokenizer that the settings name, or that a pretrained model brings; None: one is trained on the pool."""
    models = config.models
    brought = (m for m in (models.target, models.proxy) if isinstance(m, str) and m not in PRESETS)
    return config.data.tokenizer if config.data.tokenizer is not None else next(brought, None)


def _make_tokenizer(run: RunContext) -> PreTrainedTokenizerBase:
    data, spec = run.config.data, given_tokenizer(run.config)
    if spec is not None:
        return load_tokenizer(spec)
    texts = islice(read_documents(data.lower_data, skip=data.on_bad_record == "skip"), 100_000)
    return train_tokenizer((d.text for d in texts), data.vocab_size)
