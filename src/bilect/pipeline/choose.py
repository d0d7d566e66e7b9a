"""One way to choose: a pool, and a target that says what good means, give the records to train on.

It is a run without its trainings: the same stages, up to the selection, on the whole pool.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bilect.config import Config, parse_config
from bilect.config.base import put
from bilect.config.template import TRAINED_RATE
from bilect.data.token_files import link
from bilect.errors import BilectError
from bilect.pipeline.directory import RunDir
from bilect.pipeline.stages import run
from bilect.report import write_report
from bilect.runtime import distributed
from bilect.runtime.device import pick_device
from bilect.runtime.files import write_json
from bilect.runtime.locks import locked
from bilect.runtime.progress import Progress, SilentProgress

__all__ = ["METHOD", "Chosen", "choose", "choosing_config"]

METHOD: str = Config.model_fields["method"].default
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_CPU: dict[str, Any] = {
    "data": {"context": 256, "vocab_size": 4096},
    "models": {"proxy": "tiny-300k", "target": "tiny-300k"},
    "warmup": {"proxy": {"steps": 300, "batch_size": 8, "learning_rate": 2e-3, "warmup_ratio": 0.1}},
    "fit": {"steps": 120, "proxy_learning_rate": 5e-4, "score_learning_rate": 1e-3},
}
_GPU: dict[str, Any] = {
    "data": {"context": 1024, "vocab_size": 32_768},
    "models": {"proxy": "pythia-31m", "target": "pythia-31m"},
    "warmup": {"proxy": {"steps": 3000, "batch_size": 64, "learning_rate": 1e-3, "bf16": True}},
    "fit": {"steps": 3000, "bf16": True},
    "score_batch_tokens": 65_536,
}


@dataclass(frozen=True)
class Chosen:
    """What was chosen, and where it lies.

    Attributes:
        out: the folder: a run directory.
        records: folder of the kept records, as they came; None with ``selection.output: text``, where ``kept`` has it.
        kept: table of the kept documents: doc_id, source, n_tokens, score, rank.
        dropped: table of the others, with the reason.
        scores: folder of the scores of all documents.
        report: page to look at.
        documents: kept.
        tokens: kept.
        pool_documents: candidates.
        pool_tokens: of the candidates.
        threshold: lowest score kept.
        sources: per source ``pool_share`` and ``kept_share`` of the tokens, ``kept_fraction`` of its documents.
    """

    out: Path
    records: Path | None
    kept: Path
    dropped: Path
    scores: Path
    report: Path
    documents: int
    tokens: int
    pool_documents: int
    pool_tokens: int
    threshold: float
    sources: dict[str, dict[str, float]]


def choose(
    pool: Paths,
    target: Paths,
    out: str | os.PathLike[str],
    *,
    keep: float | None = None,
    tokens: int | None = None,
    top_k: int | None = None,
    method: str = METHOD,
    model: str | os.PathLike[str] | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    repeat: bool = False,
) -> Chosen:
    """Choose the part of a pool to train on. The same call goes on where an interrupted one stopped.

        kept = bilect.choose("pool/", target="target.jsonl", keep=0.2, out="kept/")
        print(kept.documents, kept.records, kept.sources)

    Args:
        pool: files, folders, globs or URLs of the candidates.
        target: of the examples that say what good means.
        out: folder for the records, scores, audit, manifest and report.
        keep: share of the tokens to keep; 0.2 where neither this nor ``tokens`` nor ``top_k`` is given.
        tokens: number of tokens to keep.
        top_k: number of documents to keep.
        method: what is chosen by, see docs/methods.md.
        model: directory or Hub name of a causal LM that stands in for yours, taken as it is; None: a small proxy is
            trained on a sample of the pool, of a size that suits the machine.
        seed: of every random draw.
        settings: further settings of a run, as ``{"data.context": 512}``.
        progress: what the reader sees; nothing by default.
        repeat: choose again in a folder that holds a finished choice of other settings or files, and replace it.

    Returns:
        Paths and figures.

    Raises:
        BilectError: one line on what is wrong with the input.
    """
    config = choosing_config(
        pool, target, keep=keep, tokens=tokens, top_k=top_k, method=method, model=model, seed=seed, settings=settings
    )
    folder, progress = Path(out).resolve(), progress or SilentProgress()
    records = run(config, folder, progress, command="select", number=1, repeat=repeat)
    selected = records[f"round 1: select {method}"]
    result = folder / "round-1"
    sources = {name: {"pool_share": share, "kept_share": selected["kept_share_by_source"][name],
                      "kept_fraction": selected["kept_fraction_by_source"][name]}
               for name, share in selected["pool_share_by_source"].items()}  # fmt: skip
    chosen = Chosen(
        out=folder,
        records=folder / "records" if config.selection.output == "records" else None,
        kept=result / "selected" / f"kept.{config.selection.format}",
        dropped=result / "selected" / "dropped.parquet",
        scores=result / "scores",
        report=folder / "report.html",
        sources=sources,
        **{name: selected[name] for name in ("documents", "tokens", "pool_documents", "pool_tokens", "threshold")},
    )
    if distributed.is_main():
        with locked(folder):
            _publish(result / "selected" / "records", folder / "records", wanted=chosen.records is not None)
            plain = {k: v for k, v in asdict(chosen).items() if k == "sources" or isinstance(v, int | float)}
            costs = {key: {name: record.get(key, 0.0) for name, record in records.items()}
                     for key in ("seconds", "flops")}  # fmt: skip
            write_json(folder / "summary.json", {"method": method, **plain, **costs})
            write_report(folder)
            RunDir(folder, seed).finish()
    distributed.barrier()
    return chosen


def choosing_config(
    pool: Paths,
    target: Paths,
    *,
    keep: float | None = None,
    tokens: int | None = None,
    top_k: int | None = None,
    method: str = METHOD,
    model: str | os.PathLike[str] | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> Config:
    """The settings of the run behind ``choose``; see there.

    Raises:
        BilectError: as ``parse_config``.
    """
    amount = {"keep_ratio": keep, "budget_tokens": tokens, "top_k": top_k}
    given = {name: value for name, value in amount.items() if value is not None} or {"keep_ratio": 0.2}
    size = _GPU if pick_device("auto").type == "cuda" else _CPU
    values: dict[str, Any] = {
        **size,
        "seed": seed,
        "method": method,
        "controls": [],
        "data": {**size["data"], "lower_data": _sources(pool), "upper_data": _sources(target)},
        "warmup": {"candidates": True, "proxy": {**size["warmup"]["proxy"], "decay_steps": 0}},
        "fit": {**size["fit"], "kl_coef": 0.0},  # no target is trained that the proxy could stray from
        "selection": given,
    }
    if model is not None:
        values["models"] = {"proxy": os.fspath(model), "target": os.fspath(model)}
        values["warmup"]["proxy"]["steps"] = 0
        del values["data"]["vocab_size"]
        if method == "excess":
            values["methods"] = {"excess": {"learning_rate": TRAINED_RATE}}
    for key, value in (settings or {}).items():
        put(values, key, value, f"settings: {key}")
    return parse_config(values)


def _sources(paths: Paths) -> list[dict[str, str]]:
    found = [os.fspath(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    if not found:
        raise BilectError("choose: no files of a pool or of a target were given")
    return [{"path": path} for path in found]


def _publish(source: Path, target: Path, *, wanted: bool) -> None:
    """The kept records where users look for them: hard links, or copies where there can be none."""
    draft = target.with_name(f".{target.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    if wanted:
        shutil.copytree(source, draft, copy_function=lambda file, copy: link(Path(file), Path(copy)))
    shutil.rmtree(target, ignore_errors=True)  # those of another selection, too
    if wanted:
        os.replace(draft, target)
