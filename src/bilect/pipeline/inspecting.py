"""What lies at a path: a run, scores, a selection, a model or a checkpoint, told from the files alone."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from torch import Tensor

from bilect.config import parse_config
from bilect.data.tables import kept_file, kept_table, parquet_table
from bilect.errors import BilectError, reason
from bilect.pipeline import texts
from bilect.pipeline.context import RunContext, arm_folder
from bilect.pipeline.directory import read_manifest, scratch_name
from bilect.pipeline.stages import Stage, stages, states, wanted
from bilect.report.choice import opened
from bilect.runtime.checkpoints import check_readable, load_state
from bilect.runtime.progress import SilentProgress

__all__ = ["EXPECTED", "inspect"]

EXPECTED = (
    "a run directory (config.yaml), a selection (kept.parquet), a folder of scores (doc_id, source, n_tokens, score in "
    "Parquet), a model (config.json) or a checkpoint (.pt)"
)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
STEPS = ("steps_done", "global_step", "steps", "step")  # what checkpoints call them
_SCORES = {"doc_id", "source", "n_tokens", "score"}


def inspect(path: Path) -> dict[str, Any]:
    """What lies at a path: ``path``, ``kind``, what its kind has, and ``next``, the commands that take it further.

    ``kind`` is "run", "choice" (a run that trains nothing), "scores", "selection", "score model", "model" or
    "checkpoint".

    Raises:
        BilectError: nothing is there, it is none of these, or it is broken.
    """
    if not path.exists():
        raise BilectError(f"inspect: nothing is at {path}; give {EXPECTED}")
    if path.is_file():
        found = _checkpoint(path) if path.suffix in (".pt", ".pth") else None
    elif (path / "config.yaml").is_file():
        found = _run(path)
    elif (path / "kept.parquet").is_file() or (path / "kept.jsonl.zst").is_file():
        found = _selection(path)
    elif (path / "config.json").is_file():
        found = _model(path)
    else:
        found = _scores(path, path / "scores" if (path / "scores").is_dir() else path)
    if found is None:
        what = "a file" if path.is_file() else "a folder"
        raise BilectError(f"inspect: {path} is {what}{_holding(path)}, and none of what is expected: {EXPECTED}")
    return {"path": path, **found}


# ---------------------------------------------------------------------------------------------------------------- runs


def _run(path: Path) -> dict[str, Any]:
    """Stages by what they are made of now, or by name alone where inputs cannot be found any more."""
    config = parse_config(yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")))
    manifest, summary = read_manifest(path), _json(path / "summary.json")
    context, note = RunContext(path.resolve(), config, SilentProgress()), ""
    try:
        inputs: Mapping[str, Any] = texts.input_hashes(context)
        plan = stages(context, inputs)
        done = states(plan, manifest)
    except BilectError as error:
        note = f"told by the names of stages alone: {error}"
        plan = stages(context, {"lower_data": {}, "upper_data": {}, "heldout_data": {}, "tasks": {}})
        done = {stage.name: stage.name in manifest["stages"] for stage in plan}
    only_chosen = not config.data.heldout_data
    if only_chosen:
        plan = wanted(plan, done, "select", 1, ())
    left = [stage.name for stage in plan if not done[stage.name]]
    changed = [name for name in left if name in manifest["stages"]]
    kept = [_kept(manifest["stages"][stage.name], stage, path / arm_folder(config, stage.arm, stage.round) / "selected")
            for stage in plan if stage.kind == "select" and stage.name in manifest["stages"]]  # fmt: skip
    figures = ("seconds", "tokens", "flops", "peak_gb")
    return {
        "kind": "choice" if only_chosen else "run",
        "method": config.method,
        "controls": list(config.controls),
        "seed": config.seed,
        "done": {s.name: {k: v for k, v in manifest["stages"][s.name].items() if k in figures}
                 for s in plan if done[s.name]},
        "left": left,
        "changed": changed,
        "begun": [name for name in left if (path / ".partial" / scratch_name(name)).is_dir()],
        "kept": kept,
        "heldout_loss": summary.get("heldout_loss", {}) if not left else {},
        "verdict": summary.get("verdict", "") if not left else "",
        "note": note,
        "next": _next(path, left, only_chosen, "finished" in manifest and bool(changed),
                      [k["folder"] for k in kept if k["arm"] == config.method]),
    }  # fmt: skip


def _kept(record: Mapping[str, Any], stage: Stage, folder: Path) -> dict[str, Any]:
    names = ("documents", "pool_documents", "tokens", "pool_tokens", "threshold", "pool_share_by_source",
             "kept_share_by_source", "kept_fraction_by_source")  # fmt: skip
    return {"round": stage.round, "arm": stage.arm, "folder": folder, **{k: record[k] for k in names if k in record}}


def _next(path: Path, left: list[str], only_chosen: bool, asks: bool, selections: list[Path]) -> list[str]:
    if left:
        yes = " --yes" if asks else ""
        return [
            f"the same `bilect choose`{yes and ' with --yes'} goes on" if only_chosen else f"bilect run {path}{yes}"
        ]
    export = [f"bilect export {selections[-1]} --to parquet --out NEW_FOLDER"] if selections else []
    return [f"bilect report {path}", f"bilect select {path} --keep 0.1", *export]


# ----------------------------------------------------------------------------------------------- scores and selections


def _scores(path: Path, folder: Path) -> dict[str, Any] | None:
    files = sorted(folder.glob("*.parquet"))
    if not files or not _columns(files[0]) >= _SCORES:
        return None
    for file in files:
        if lacking := _SCORES - _columns(file):
            raise BilectError(f"inspect: {file} has no column {sorted(lacking)[0]!r}, unlike the other score files")
    figures = f"""count(*) AS documents, sum(n_tokens)::BIGINT AS tokens,
                  count(*) FILTER (NOT coalesce(isfinite(score), false)) AS without_score,
                  quantile_cont(score, {[0.0, *QUANTILES, 1.0]}) FILTER (isfinite(score)) AS quantiles"""
    table = parquet_table(*files)
    with opened() as db:
        (total,) = _rows(db, f"SELECT {figures} FROM {table}")
        query = f"SELECT coalesce(source, '(no source)') AS name, {figures} FROM {table} GROUP BY name"
        sources = _rows(db, f"{query} ORDER BY documents DESC, name")
    names = ["least", *(f"{100 * q:g}%" for q in QUANTILES), "greatest"]
    for row in (total, *sources):
        row["quantiles"] = dict(zip(names, row["quantiles"] or [None] * len(names), strict=True))
    return {"kind": "scores", "files": len(files), **total, "sources": {row.pop("name"): row for row in sources},
            "next": [f"bilect select {path} --keep 0.2"]}  # fmt: skip


def _selection(path: Path) -> dict[str, Any]:
    """Counts of both tables; ``dropped`` is null where only the kept documents were brought along."""
    kept, dropped = kept_file(path), path / "dropped.parquet"
    assert kept is not None  # by which it was told for a selection
    tables = {"kept": kept_table(kept)}
    if dropped.is_file():
        tables["dropped"] = parquet_table(dropped)
    reasons, counts = list[dict[str, Any]](), dict[str, dict[str, Any]]()
    figures = "count(*) AS documents, coalesce(sum(n_tokens), 0)::BIGINT AS tokens"
    with opened() as db:
        totals = {name: _rows(db, f"SELECT {figures}, min(score) AS least FROM {t}")[0] for name, t in tables.items()}
        for name, table in tables.items():
            query = f"SELECT coalesce(source, '(no source)') AS name, {figures} FROM {table} GROUP BY name"
            for row in _rows(db, query):
                counts.setdefault(row["name"], {})[name] = {k: row[k] for k in ("documents", "tokens")}
        if dropped.is_file():
            why = "CASE WHEN reason::VARCHAR LIKE 'near-duplicate of %' THEN 'near-duplicate' ELSE reason::VARCHAR END"
            query = f"SELECT {why} AS reason, count(*) AS documents FROM {tables['dropped']} GROUP BY 1"
            reasons = _rows(db, f"{query} ORDER BY 2 DESC, 1")
    none = {"documents": 0, "tokens": 0}
    sources = {name: {table: found.get(table, none) for table in tables} for name, found in counts.items()}
    in_order = sorted(sources, key=lambda name: (-sources[name]["kept"]["tokens"], name))
    threshold = totals["kept"].pop("least")
    totals.get("dropped", {}).pop("least", None)
    return {
        "kind": "selection",
        "kept": totals["kept"],
        "dropped": totals.get("dropped"),
        "threshold": threshold,
        "reasons": {row["reason"]: row["documents"] for row in reasons},
        "sources": {name: sources[name] for name in in_order},
        "records": (path / "records").is_dir(),
        "next": [f"bilect export {path} --to parquet --out NEW_FOLDER"],
    }


def _columns(file: Path) -> set[str]:
    try:
        return {*pq.read_schema(file).names}
    except (pa.ArrowException, OSError) as error:
        raise BilectError(f"inspect: {file} is not a readable Parquet file: {reason(error)}") from error


def _rows(db: Any, query: str) -> list[dict[str, Any]]:
    import duckdb

    try:
        found = db.execute(query)
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    except duckdb.Error as error:
        raise BilectError(f"inspect: a file is damaged, or is not of bilect: {reason(error)}") from error


# ---------------------------------------------------------------------------------------------- models and checkpoints


def _model(path: Path) -> dict[str, Any] | None:
    """By its config and the headers of its weights, which stay on the disk."""
    from safetensors import safe_open

    check_readable(path, "copy it anew, or delete it")
    config = _json(path / "config.json")
    if "model_type" not in config:
        return None
    sizes, kinds = list[int](), set[str]()
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no mapping
                part = weights.get_slice(name)
                sizes.append(math.prod(part.get_shape()))
                kinds.add(str(part.get_dtype()))
    inner = config.get("trunk") or config.get("text_config") or config
    scores = config["model_type"] == "bilect_score"
    state = _json(path / "trainer_state.json")
    return {
        "kind": "score model" if scores else "model",
        "architecture": inner.get("model_type"),
        **({"head": config.get("head")} if scores else {}),
        "tensors": len(sizes),
        "parameters": sum(sizes),
        "stored_as": sorted(kinds),
        "vocabulary": inner.get("vocab_size"),
        "positions": inner.get("max_position_embeddings") or inner.get("n_positions"),
        "tokenizer": (path / "tokenizer.json").is_file(),
        "step": state.get("global_step"),
        "note": "" if sizes else "no weights in safetensors, which is all that bilect reads",
        "next": [f"bilect choose POOL --target FILE --out NEW_FOLDER --model {path}"] if sizes and not scores else [],
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    state = load_state(path, f"expected is {EXPECTED}")
    parts = {}
    for name, part in state.items() if isinstance(state, Mapping) else [("", state)]:
        sizes = [tensor.numel() for tensor in _tensors(part)]
        parts[str(name)] = {"tensors": len(sizes), "numbers": sum(sizes)}
    return {"kind": "checkpoint", "step": _step(state), "parts": parts,
            "next": ["the command that wrote it goes on from it, in the same run directory"]}  # fmt: skip


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(inner)


def _step(state: Any) -> int | None:
    """Steps behind it: of the outermost part that counts them."""
    level = [state]
    while level := [part for part in level if isinstance(part, Mapping)]:
        for part in level:
            for name in STEPS:
                if isinstance(count := part.get(name), int | float) or (
                    isinstance(count, Tensor) and count.numel() == 1
                ):
                    return int(count)
        level = [inner for part in level for inner in part.values()]
    return None


def _json(file: Path) -> dict[str, Any]:
    """A file's content; empty where there is none that can be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _holding(path: Path) -> str:
    if path.is_file():
        return ""
    names = sorted(entry.name for entry in path.iterdir())
    return f" of {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if names else " of nothing"
