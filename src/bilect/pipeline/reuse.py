"""What a finished run is good for afterwards: another selection from its scores, scores of other files."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bilect.config import Config, SelectionConfig, parse_config, parse_selection, parse_source
from bilect.data.input import Input
from bilect.engines import open_engine
from bilect.errors import BilectError
from bilect.methods import load
from bilect.methods.contract import DocumentMethod, Inputs
from bilect.models.loading import load_tokenizer
from bilect.pipeline import texts
from bilect.pipeline.changes import check_repeats
from bilect.pipeline.choosing import SAVED, score_rows
from bilect.pipeline.context import Figures, RunContext, arm_folder, find_clusters, open_pool
from bilect.pipeline.directory import RunDir, plain
from bilect.runtime.files import content_hash, write_json
from bilect.runtime.locks import locked
from bilect.runtime.progress import Progress, SilentProgress
from bilect.selection.originals import write_records
from bilect.selection.records import attach_text
from bilect.selection.select import Selected, select

__all__ = ["fitted_in", "fitted_method", "score_files", "select_again", "selection_settings"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


def selection_settings(**given: Any) -> dict[str, Any]:
    """Settings of a selection from what stands on a command line; None is left out.

    ``budget_tokens`` may be ``25M``; ``min_share`` and ``max_share`` are lists of ``SOURCE=SHARE``.

    Raises:
        BilectError: something that is no number, or no pair.
    """
    settings = {k: v for k, v in given.items() if v not in (None, [], ())}
    if "budget_tokens" in settings:
        settings["budget_tokens"] = _count(str(settings["budget_tokens"]))
    for name in ("min_share", "max_share"):
        if name in settings:
            settings[name] = dict(_pair(name, text) for text in settings[name])
    return settings


def select_again(
    source: Path,
    out: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    *,
    number: int | None = None,
    seed: int = 0,
    repeat: bool = False,
    workers: int | None = None,
    engine: str = "local",
) -> tuple[Selected, Path]:
    """Another selection from scores that are there; no model is needed.

    Args:
        source: a run directory, what ``score_files`` wrote, or a folder of score files.
        out: folder to write; default: ``source/selections/NAME``, named after the settings.
        settings: of ``SelectionConfig``; the rest as in the run.
        progress: what the reader sees; nothing by default.
        number: the round whose scores are used; default: the last that has any.
        seed: of Gumbel noise.
        repeat: replace another selection that lies in ``out``.
        workers: processes that hash near-duplicates and write records.
        engine: where they run, see ``Config.engine``.

    Returns:
        What was kept, and the folder: ``kept.parquet`` or ``kept.jsonl.zst`` (with text, where the token files are
        there), ``dropped.parquet``, ``selection.json`` (what it was made of) and, where the pool is still there, the
        kept ``records/``.

    Raises:
        BilectError: no scores there, wrong settings, or another selection in ``out``.
    """
    settings = dict(settings or {})
    scores, tokens = _scores_of(source, number)
    base = _run_config(source)
    before = {} if base is None else base.selection.model_dump(exclude_defaults=True)
    if any(settings.get(k) is not None for k in ("keep_ratio", "budget_tokens", "top_k")):
        before = {k: v for k, v in before.items() if k not in ("keep_ratio", "budget_tokens", "top_k")}
    config = parse_selection({**before, **settings})
    folder = out if out is not None else source / "selections" / _name(config, seed)
    made_of = {"scores": str(scores.resolve()), "seed": seed, "selection": plain(config.model_dump())}
    if not repeat:
        _check_selection(folder, made_of)
    with open_engine(engine, workers, folder) as opened:
        clusters = None
        if config.max_per_cluster is not None and tokens is not None:
            clusters = find_clusters(tokens, config.cluster_similarity, progress or SilentProgress(), opened)
        records = None if tokens is None or config.output == "text" else _records(tokens, settings, progress)
        chosen = select(scores, folder, config, seed=seed, clusters=clusters)
        write_json(folder / "selection.json", made_of)  # at once: interrupted from here on, it goes on unasked
        if tokens is not None:
            pool = open_pool(tokens)
            attach_text(folder, pool, config.format)
            if records is not None:
                write_records(folder, pool, records, engine=opened)
    return chosen, folder


def score_files(
    source: Path,
    data: Sequence[str],
    out: Path,
    progress: Progress | None = None,
    *,
    fields: Mapping[str, str] | None = None,
    repeat: bool = False,
    workers: int | None = None,
    engine: str | None = None,
) -> dict[str, Any]:
    """Score other files by what a run has fitted; started again, it goes on at the first missing block.

    Args:
        source: the run directory.
        data: files, folders, globs or URLs, as ``data.lower_data``.
        out: folder to write: ``tokens/pool/``, ``scores/`` and ``run.json``; ``select_again`` takes it.
        progress: what the reader sees; nothing by default.
        fields: names of the fields where they differ, as ``fields`` of a source; by default those of the run's pool.
        repeat: replace scores of other files, or by another run, that lie in ``out``.
        workers: processes; by default as in the run.
        engine: where they run; by default as in the run.

    Returns:
        ``documents``, ``tokens`` and, by reason, the number of records left out (``skipped``).

    Raises:
        BilectError: nothing fitted there, something wrong with the files, or other scores in ``out``.
    """
    base, fitted = fitted_in(source)
    names = dict(base.data.lower_data[0].fields if fields is None else fields)
    pool = tuple(parse_source({"path": path, "fields": names}) for path in data)
    changes = {"lower_data": pool, "upper_data": (), "heldout_data": ()}  # the run's own need not be there any more
    config = base.model_copy(update={"data": base.data.model_copy(update=changes)})
    with open_engine(engine or base.engine, workers or base.workers, out) as opened, locked(out):
        context = RunContext(out.resolve(), config, progress or SilentProgress(), opened)
        directory = RunDir(context.root, config.seed)
        inputs = {"lower_data": texts.pool_hashes(context)}
        tokenizer = load_tokenizer(str(source / "tokenizer"))
        settings = [config.data.model_dump(), inputs, content_hash(tokenizer.get_vocab())]
        content = [content_hash(path) for path in sorted(fitted.rglob("*")) if path.is_file()]
        tokenise, score = _Part("tokenise", settings), _Part("score", content, ("tokenise",))
        check_repeats(context.root, directory.manifest, (tokenise, score), inputs, repeat=repeat)
        directory.manifest["inputs"] = inputs
        figures = directory.stage(
            "tokenise", lambda scratch: texts.tokenise_files(context, scratch, tokenizer), settings=tokenise.settings
        )
        action = partial(_score, context, RunContext(source.resolve(), base, SilentProgress()), fitted)
        directory.stage("score", action, settings=score.settings, after=score.reads)
        directory.finish()
    return {key: figures[key] for key in ("documents", "tokens", "skipped")}


def fitted_in(source: Path) -> tuple[Config, Path]:
    """The config of a run, and the folder of its method as the last round has fitted it.

    Raises:
        BilectError: it has not.
    """
    base = _run_config(source)
    fitted = None if base is None else source / arm_folder(base, base.method, base.rounds) / SAVED
    if base is None or fitted is None or not fitted.is_dir():
        raise BilectError(f"score: {source} has fitted nothing to score by yet; finish the run first")
    return base, fitted


@dataclass(frozen=True)
class _Part:
    """Of ``score_files``, as ``check_repeats`` wants it."""

    name: str
    settings: Any
    reads: tuple[str, ...] = ()


def _check_selection(folder: Path, made_of: Mapping[str, Any]) -> None:
    """Stop before what lies there is replaced by something else, unasked."""
    if not any((folder / name).exists() for name in ("kept.parquet", "kept.jsonl.zst", "run.json")):
        return
    try:
        if json.loads((folder / "selection.json").read_text(encoding="utf-8")) == made_of:
            return
    except (OSError, ValueError):
        pass  # not finished, or not one of these
    raise BilectError(f"select: {folder} holds another selection, or a run: say --yes to replace it, or choose another "
                      "--out")  # fmt: skip


def _records(tokens: Path, settings: Mapping[str, Any], progress: Progress | None) -> list[Input] | None:
    """Where the pool's records are from; None, with a word on it, where that is gone and records were not asked for."""
    try:
        return texts.pool_inputs(tokens)
    except BilectError as error:
        if settings.get("output") == "records":
            raise
        (progress or SilentProgress()).note(f"no records, but the text that the run holds: {error}")
        return None


def _score(context: RunContext, source: RunContext, fitted: Path, scratch: Path) -> Figures:
    rows = np.setdiff1d(np.arange(len(context.pool())), context.excluded())
    method = partial(fitted_method, context.for_workers(), source.for_workers(), fitted, rows, scratch / ".fit")
    return score_rows(context, method, rows, scratch / "scores", "score")


def fitted_method(
    context: RunContext, source: RunContext, fitted: Path, rows: np.ndarray, scratch: Path
) -> DocumentMethod[Any]:
    """A method as a run has fitted it, for another pool.

    Args:
        context: whose pool is scored.
        source: the run.
        fitted: folder of the method.
        rows: candidates of the pool.
        scratch: folder of its own.
    """
    config = source.config
    inputs = Inputs(
        context.pool(), rows, source.upper_sets(), proxy=source.root / "warmup" / "proxy", scratch=scratch,
        pad_id=source.pad_id, seed=config.seed, device=source.device, number=config.rounds, bf16=config.fit.bf16,
        batch_tokens=config.score_batch_tokens,
    )  # fmt: skip
    return load(fitted, inputs)


def _scores_of(source: Path, number: int | None) -> tuple[Path, Path | None]:
    """Folder of the score files, and of the tokens where there are any."""
    tokens = source / "tokens"
    rounds = sorted((int(p.parent.name.removeprefix("round-")), p) for p in source.glob("round-*/scores"))
    if rounds:
        found = dict(rounds)
        if number is not None and number not in found:
            raise BilectError(f"select: {source} has scores of round {', '.join(map(str, found))}, not of {number}")
        return found[number if number is not None else max(found)], tokens
    if (source / "scores").is_dir():
        return source / "scores", tokens if tokens.is_dir() else None
    if (source / "run.json").is_file():
        raise BilectError(f"select: {source} has no scores yet; `bilect score {source}` makes them")
    return source, None


def _run_config(source: Path) -> Config | None:
    file = source / "config.yaml"
    return parse_config(yaml.safe_load(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _name(config: SelectionConfig, seed: int) -> str:
    """Names a selection after what is not default, such as ``tokens-25000000-max_share-web-0.5``."""
    chosen = config.model_dump(exclude_none=True)
    default = SelectionConfig().model_dump()
    words = []
    for key, value in chosen.items():
        if key in ("keep_ratio", "budget_tokens", "top_k") or value != default[key]:
            shown = "-".join(f"{k}-{v:g}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            words.append(f"{key}-{shown}")
    if config.temperature:
        words.append(f"seed-{seed}")
    return re.sub(r"[^\w.\-]+", "_", "-".join(words))


def _count(text: str) -> int:
    match = re.fullmatch(r"\s*([\d_.]+)\s*([kKmMbBgGtT]?)\s*", text)
    try:
        return round(float(match[1].replace("_", "")) * _UNITS[match[2].lower()])  # type: ignore[index]
    except (TypeError, ValueError):
        raise BilectError(f"--tokens {text}: expected a number of tokens such as 25M, 1.5B, 300k or 1000000") from None


def _pair(name: str, text: str) -> tuple[str, float]:
    source, sign, share = text.rpartition("=")
    try:
        if not sign or not source:
            raise ValueError
        return source, float(share)
    except ValueError:
        raise BilectError(f"--{name.replace('_', '-')} {text}: expected SOURCE=SHARE, for instance web=0.5") from None
