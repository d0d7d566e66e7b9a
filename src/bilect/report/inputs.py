"""Read a run directory, forgivingly: every file is optional, and every problem becomes a sentence for the reader."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bilect.report.scores import ScoreSummary, summarise_scores

Json = dict[str, Any]


@dataclass(frozen=True)
class RoundFiles:
    """What one `round-R/` folder holds."""

    number: int
    metrics: list[Json]
    scores: ScoreSummary | None
    best: list[Json]
    worst: list[Json]


@dataclass(frozen=True)
class OnlineFile:
    """What online token selection recorded while an arm trained: its last round that has an `online.json`."""

    round: int
    content: Json


@dataclass(frozen=True)
class RunFiles:
    """A whole run directory. `missing` maps a file's path inside it to what is wrong with it."""

    name: str
    config: str | None
    run: Json
    summary: Json
    rounds: list[RoundFiles]
    online: dict[str, OnlineFile]
    missing: dict[str, str] = field(default_factory=dict)


def number(value: object) -> float | None:
    """A finite number, or None for anything else (null, text, booleans, NaN, infinities)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def mapping(value: object) -> Json:
    """The value where it is a JSON object, else an empty one."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def objects(value: object) -> list[Json]:
    """The JSON objects in a list; anything else is left out."""
    return [mapping(item) for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def numbers(value: object) -> dict[str, float]:
    """The finite numbers of a JSON object, in its order."""
    pairs = ((key, number(item)) for key, item in mapping(value).items())
    return {key: item for key, item in pairs if item is not None}


def flat_numbers(value: object, prefix: str = "") -> dict[str, float]:
    """The finite numbers of a nested JSON object; keys joined by ' / '."""
    found: dict[str, float] = {}
    for key, item in mapping(value).items():
        if isinstance(item, dict):
            found.update(flat_numbers(item, f"{prefix}{key} / "))
        elif (plain := number(item)) is not None:
            found[prefix + key] = plain
    return found


def read_run(run_dir: Path) -> RunFiles:
    """Read everything the report shows."""
    missing: dict[str, str] = {}
    run = mapping(_json(run_dir, "run.json", missing))
    summary = mapping(_json(run_dir, "summary.json", missing))
    config = _text(run_dir, "config.yaml", missing)
    folders = sorted(_round_folders(run_dir))
    if not folders:
        missing["round-1/"] = "not found"
    rounds = [_round(run_dir, n, folder.name, missing) for n, folder in folders]
    online = {
        arm: file
        for arm, folder in {"bliss": run_dir, **_control_folders(run_dir)}.items()
        if (file := _online(run_dir, folder, missing)) is not None
    }
    return RunFiles(str(run.get("name") or run_dir.resolve().name), config, run, summary, rounds, online, missing)


def _round_folders(run_dir: Path) -> Iterable[tuple[int, Path]]:
    for folder in run_dir.glob("round-*"):
        suffix = folder.name.removeprefix("round-")
        if folder.is_dir() and suffix.isascii() and suffix.isdigit():
            yield int(suffix), folder


def _control_folders(run_dir: Path) -> dict[str, Path]:
    return {folder.name: folder for folder in sorted((run_dir / "controls").glob("*")) if folder.is_dir()}


def _online(run_dir: Path, arm_folder: Path, missing: dict[str, str]) -> OnlineFile | None:
    """The newest readable `online.json` of an arm. Only some arms have one: its absence is no gap."""
    for n, folder in sorted(_round_folders(arm_folder), reverse=True):
        path = folder / "target" / "online.json"
        if not path.is_file():
            continue
        name = path.relative_to(run_dir).as_posix()
        content = mapping(_json(run_dir, name, missing))
        if content:
            return OnlineFile(n, content)
        missing.setdefault(name, "holds nothing")
    return None


def _round(run_dir: Path, n: int, folder: str, missing: dict[str, str]) -> RoundFiles:
    extremes = mapping(_json(run_dir, f"{folder}/extremes.json", missing))
    scores = None
    try:
        scores = summarise_scores(run_dir / folder / "scores")
        if scores is None:
            missing[f"{folder}/scores/"] = "not found, or holds no scored documents"
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors derive from these
        missing[f"{folder}/scores/"] = f"could not be read ({type(error).__name__})"
    metrics = _json_lines(run_dir, f"{folder}/metrics.jsonl", missing)
    return RoundFiles(n, metrics, scores, objects(extremes.get("best")), objects(extremes.get("worst")))


def _text(run_dir: Path, path: str, missing: dict[str, str]) -> str | None:
    try:
        return (run_dir / path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        missing[path] = "not found"
    except OSError as error:
        missing[path] = f"could not be read ({type(error).__name__})"
    return None


def _json(run_dir: Path, path: str, missing: dict[str, str]) -> object:
    text = _text(run_dir, path, missing)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        missing[path] = "is not valid JSON"
        return None


def _json_lines(run_dir: Path, path: str, missing: dict[str, str]) -> list[Json]:
    text = _text(run_dir, path, missing)
    if text is None:
        return []
    rows: list[Json] = []
    bad = 0
    for line in filter(str.strip, text.splitlines()):
        try:
            rows.append(mapping(json.loads(line)))
        except (ValueError, RecursionError):  # a line cut short by an interrupted run
            bad += 1
    if bad:
        missing[path] = f"has {bad} unreadable line{'s' if bad > 1 else ''}, left out"
    elif not rows:
        missing[path] = "is empty"
    return rows
