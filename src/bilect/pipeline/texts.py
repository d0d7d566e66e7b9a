"""Text to tokens: the pool, and the target sets: upper data and held-out data.

``tokens/pool/``, ``tokens/upper/`` and ``tokens/heldout/`` hold token files; ``tokens/pool.json`` lists those of the
pool, where their records are from, what makes their ids unique, and the rows that repeat others;
``tokens/held-out.json`` its rows with a held-out text, and ``tokens/skipped-*.jsonl`` every record that was left out,
and why.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import PreTrainedTokenizerBase

from bilect.config import Config, SourceConfig
from bilect.data.documents import check_fields, read_documents
from bilect.data.input import Input
from bilect.data.sources import identity, inputs, places, set_name
from bilect.data.task_files import task_inputs
from bilect.data.token_files import TokenFiles, link
from bilect.errors import BilectError
from bilect.methods import methods_of
from bilect.models.loading import load_tokenizer, train_tokenizer
from bilect.models.presets import PRESETS
from bilect.pipeline.context import Figures, RunContext, on_main
from bilect.pipeline.directory import read_manifest
from bilect.pipeline.document_set import TWICE, DocumentSet
from bilect.runtime.files import write_json, write_text

__all__ = [
    "given_tokenizer",
    "input_hashes",
    "pool_hashes",
    "pool_inputs",
    "tokenise_files",
    "tokenise_heldout",
    "tokenise_pool",
    "tokenise_upper",
]

HELD_OUT = "in heldout_data"
_SUFFIX = re.compile(r"\.(jsonl|ndjson|json|parquet|txt)(\.\w+)?$", re.IGNORECASE)


def input_hashes(run: RunContext) -> dict[str, dict[str, str]]:
    """Identity of every input, by role: its content's hash where it is local, its version elsewhere.

    Of a role whose inputs cannot be found any more, it is what the run directory says of them, if that is of the same
    sources: stages that are done need them no longer, others say so themselves.

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
        try:
            found[role] = _hashes(sources)
        except BilectError as error:
            found[role] = _recorded(run, role, sources, error)
    if run.config.tasks.names:
        found["tasks"] = {"lm-eval": _version("lm-eval"), **task_inputs(run.config.tasks.names)}
    return found


def pool_hashes(run: RunContext) -> dict[str, str]:
    """``input_hashes`` of the pool alone: where nothing else is read."""
    return _hashes(run.config.data.lower_data)


def _hashes(sources: Sequence[SourceConfig]) -> dict[str, str]:
    found = dict[str, str]()
    for source in sources:
        for part in inputs(source):  # several of one name, of a large folder of text
            found[part.where] = f"{found.get(part.where, '')} {identity(part)}".strip()
    return found


def _recorded(run: RunContext, role: str, sources: Sequence[SourceConfig], error: BilectError) -> dict[str, str]:
    file = run.root / "config.yaml"
    recorded = read_manifest(run.root).get("inputs", {}).get(role)
    before = yaml.safe_load(file.read_text(encoding="utf-8"))["data"].get(role) if file.is_file() else None
    if not recorded or before != [source.model_dump(mode="json") for source in sources]:
        raise error
    run.progress.note(f"data.{role}: {error}; going on with what {run.root} holds of it")
    return dict(recorded)


def pool_inputs(tokens: Path) -> list[Input]:
    """Where the records of a pool are from: an input for each of its token files, in order.

    Args:
        tokens: folder with ``pool.json``.

    Raises:
        BilectError: one of them is not there any more, or not as it was.
    """
    files = json.loads((tokens / "pool.json").read_text(encoding="utf-8"))["files"]
    if any("format" not in f.get("from", {}) for f in files):
        raise BilectError(f"selection.output: {tokens} was written by an earlier version, which did not note where its "
                          "records are from (selection.output=text needs it not)")  # fmt: skip
    notes = [f["from"] for f in files]
    found = [Input.of_note(note) for note in notes]
    for part, note in zip(found, notes, strict=True):
        try:
            same = identity(part) == note["identity"]
        except BilectError as error:
            raise BilectError(f"selection.output: the kept records are copied from the pool, but {error} "
                              "(selection.output=text needs it no more)") from error  # fmt: skip
        if not same:
            raise BilectError(f"selection.output: the kept records are copied from the pool, but {part.where} has "
                              "changed since it was tokenised (selection.output=text needs it no more)")  # fmt: skip
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@on_main
def tokenise_pool(run: RunContext, scratch: Path) -> Figures:
    """Tokenizer and token files of the pool, one per input."""
    data = run.config.data
    for source in (*data.lower_data, *data.upper_data, *data.heldout_data):
        for part in inputs(source):
            check_fields(part)
    if data.long_documents == "truncate":  # a row per document: too few are known before anything is tokenised
        skip = data.on_bad_record == "skip"
        _check_size(run, sum(1 for _ in islice(read_documents(data.lower_data, skip=skip), _needed(run))))
    figures = tokenise_files(run, scratch, _make_tokenizer(run))
    _check_size(run, figures["documents"])
    return figures


def tokenise_files(run: RunContext, scratch: Path, tokenizer: PreTrainedTokenizerBase) -> Figures:
    """Token files of the pool under a given tokenizer, which is saved beside them."""
    data, folder = run.config.data, scratch / "tokens"
    pool = DocumentSet("pool", data.lower_data, data.duplicates)
    pool.look(run)
    with run.progress.task("tokenise the pool", unit="documents") as task:
        tokenizer.save_pretrained(scratch / "tokenizer")
        pool.tokenise(_token_files(run, scratch, tokenizer, chunk=data.long_documents == "chunk"), task)
        files = [folder / "pool" / f"{n:05d}-{part.name}.arrow" for n, part in enumerate(pool.inputs)]
        for made, file in zip(pool.paths, files, strict=True):
            link(made, file)
    pool.leave_out_repeated()
    naming = pool.index.naming(_names(pool.inputs))
    renamed = [part.where for part, name in zip(pool.inputs, naming, strict=True) if name.prefix]
    if renamed:
        others = f" and of {len(renamed) - 1} more" if len(renamed) > 1 else ""
        example = next(name for name in naming if name.prefix)
        run.progress.note(f"ids of {renamed[0]}{others} occur more than once: they are called "
                          f"{example.prefix}{'RECORD/' * example.numbered}ID")  # fmt: skip
    rows = [
        {
            "file": file.name,
            "input": part.where,
            "weight": part.source.weight,
            "rows": len(store_part.rows),
            "naming": asdict(name),
            "from": {**part.note(), "identity": identity(part)},
        }
        for file, part, store_part, name in zip(files, pool.inputs, pool.store.parts, naming, strict=True)
    ]
    write_json(folder / "pool.json", {"files": rows, "excluded": {TWICE: pool.twice.tolist()}})
    _write_skipped(folder / "skipped-pool.jsonl", pool.skipped)
    tokens = int(pool.store.length_R.sum()) - int(pool.store.length_R[pool.twice].sum())
    return {
        "tokens": tokens,
        "documents": len(pool.store) - len(pool.twice),
        "skipped": _counts(pool.skipped),
        "not_read": pool.not_read,
        "inputs_with_renamed_ids": len(renamed),
        "flops": 0.0,
    }


@on_main
def tokenise_heldout(run: RunContext, scratch: Path) -> Figures:
    """Token file of each held-out set; documents of the pool with their texts are left out, a bad record or not."""
    data = run.config.data
    sets = _tokenise_sets(run, scratch, "heldout", data.heldout_data)
    pool = DocumentSet("pool", data.lower_data, data.duplicates)
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


@on_main
def tokenise_upper(run: RunContext, scratch: Path) -> Figures:
    """Token file of each upper set; none may share a text with a held-out set."""
    sets = _tokenise_sets(run, scratch, "upper", run.config.data.upper_data)
    for heldout in _tokenise_sets(
        run, scratch, "heldout", run.config.data.heldout_data
    ):  # again, since it knows its files
        for upper in sets:
            shared = heldout.index.with_texts_of(upper.index)
            if len(shared):
                raise BilectError(f"data: held-out document {heldout.at(shared[0])} is in upper_data too "
                                  f"({len(shared)} in all); remove it from one of the two")  # fmt: skip
    return _saved(scratch, sets, "upper")


def _tokenise_sets(run: RunContext, scratch: Path, role: str, sources: Sequence[SourceConfig]) -> list[DocumentSet]:
    files = _token_files(run, scratch, run.tokenizer, chunk=False)
    sets = [DocumentSet(role, (source,), run.config.data.duplicates) for source in sources]
    for part in sets:
        part.look(run)
    with run.progress.task(f"tokenise the {'held-out' if role == 'heldout' else role} sets", unit="documents") as task:
        for part in sets:
            part.tokenise(files, task)
            part.leave_out_repeated()
    return sets


def _saved(scratch: Path, sets: Sequence[DocumentSet], name: str, skipped: Sequence[dict[str, Any]] = ()) -> Figures:
    """A token file per set, and a list of what was left out."""
    for part in sets:
        part.save(scratch / "tokens" / part.role / f"{set_name(part.sources[0])}.arrow")
    skipped = [*skipped, *(s for part in sets for s in part.skipped)]
    _write_skipped(scratch / "tokens" / f"skipped-{name}.jsonl", skipped)
    tokens = sum(int(part.store.length_R.sum()) for part in sets)
    not_read = sum(part.not_read for part in sets)
    return {"tokens": tokens, "skipped": _counts(skipped), "not_read": not_read, "flops": 0.0}


def _names(parts: Sequence[Input]) -> list[str]:
    """What is put before ids that are not unique: the path of the input without its suffix."""
    found = [_SUFFIX.sub("", place) for place in places(parts)]
    return [part.name if name == "." else name for name, part in zip(found, parts, strict=True)]


def _token_files(run: RunContext, scratch: Path, tokenizer: PreTrainedTokenizerBase, *, chunk: bool) -> TokenFiles:
    data, skip = run.config.data, run.config.data.on_bad_record == "skip"
    blocks = scratch / ".blocks"
    return TokenFiles(tokenizer, context=data.context, chunk=chunk, skip=skip, engine=run.engine, scratch=blocks)


def _batch(run: RunContext) -> int:
    """The greatest batch of documents that a method of the run learns from at a time."""
    return max(getattr(method.config, "lower_batch_size", 1) for method in methods_of(run.config).values())


def _needed(run: RunContext) -> int:
    return (run.config.rounds + 1) * _batch(run)


def _check_size(run: RunContext, rows: int) -> None:
    if rows < _needed(run):
        raise BilectError(f"data: the pool has {rows} documents, fewer than {run.config.rounds + 1} batches of "
                          f"{_batch(run)}; add documents or lower fit.lower_batch_size")  # fmt: skip


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
