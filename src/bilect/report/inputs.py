"""Read a run directory, forgivingly: every file is optional, and every problem becomes a sentence for the reader."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from bilect.report.choice import Selection, read_selection
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
    selection: Selection | None = None


@dataclass(frozen=True)
class OnlineFile:
    """What online token selection recorded while an arm trained: its last round that has an `online.json`."""

    round: int
    content: Json


@dataclass(frozen=True)
class RunFiles:
    """A whole run directory: `main` is the arm it is about, `missing` maps a path in it to what is wrong there."""

    root: Path
    name: str
    main: str
    config: str | None
    run: Json
    summary: Json
    rounds: list[RoundFiles]
    online: dict[str, OnlineFile]
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def losses(self) -> dict[str, float]:
        """Held-out loss of each arm."""
        return numbers(self.summary.get("heldout_loss"))

    @cached_property
    def arms(self) -> list[str]:
        """The main arm, then the controls that have a folder or a result."""
        return self.ordered({self.main: None, **dict.fromkeys(_control_folders(self.root)), **self.losses})

    @cached_property
    def only_chose(self) -> bool:
        """Whether the directory holds a choice and no training, done or begun: such a run has no arms to compare."""
        stages = mapping(self.run.get("stages"))
        trained = self.losses or any(re.search(r"\b(train|warm up target)\b", name) for name in stages)
        chosen = any((self.root / f"round-{r.number}" / "selected").is_dir() or r.scores for r in self.rounds)
        trained = trained or self.summary.get("heldout") or any(self.root.glob("round-*/target"))
        return chosen and not trained and not (self.root / "warmup/target").exists()

    def ordered(self, arms: Iterable[str]) -> list[str]:
        """Arms in the order of the page."""
        found = set(arms)
        first = [arm for arm in dict.fromkeys((self.main, *ARM_ORDER)) if arm in found]
        return first + sorted(found - set(first))

    def folder(self, arm: str, number: int) -> str:
        """Where an arm's results of a round lie, within the run directory."""
        return f"round-{number}" if arm == self.main else f"controls/{arm}/round-{number}"

    def find(self, path: str) -> Path | None:
        """A file or folder of the run; while its stage still runs, the one that is being written."""
        there = [self.root / path, *sorted(self.root.glob(f".partial/*/{path}"))]
        return next((found for found in there if found.exists()), None)

    def lines(self, path: str) -> list[Json]:
        """The rows of a JSONL file; none where it is not there."""
        found = self.find(path)
        return _json_lines(found.parent, found.name, {}) if found is not None else []

    def gaps(self, pattern: str) -> list[str]:
        """What is wrong with the files whose path matches."""
        return [f"{path} {problem}" for path, problem in self.missing.items() if re.match(pattern, path)]


ARM_ORDER = ("bliss", "blade", "rho1", "random-token", "random", "full", "warm")


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
    main = _method(summary, config)
    folders = sorted(_round_folders(run_dir))
    if not folders:
        missing["round-1/"] = "not found"
    rounds = [_round(run_dir, n, folder.name, missing) for n, folder in folders]
    online = {
        arm: file
        for arm, folder in {main: run_dir, **_control_folders(run_dir)}.items()
        if (file := _online(run_dir, folder, missing)) is not None
    }
    name = str(run.get("name") or run_dir.resolve().name)
    return RunFiles(run_dir, name, main, config, run, summary, rounds, online, missing)


def _method(summary: Json, config: str | None) -> str:
    """Name of the main arm: the method that chose the documents of the run itself."""
    stated = summary.get("method")
    if not isinstance(stated, str):
        stated = settings_of(config).get("method")
    return stated if isinstance(stated, str) and stated else "bliss"


def settings_of(config: str | None) -> Json:
    """The settings in a config file; none where it cannot be read."""
    try:
        return mapping(yaml.safe_load(config or ""))
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}


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
    selection = _selection(run_dir, f"{folder}/selected", missing)
    metrics = _metrics(run_dir, folder, missing)
    return RoundFiles(n, metrics, scores, objects(extremes.get("best")), objects(extremes.get("worst")), selection)


def _selection(run_dir: Path, folder: str, missing: dict[str, str]) -> Selection | None:
    import duckdb

    try:
        selection = read_selection(run_dir / folder)
    except (duckdb.Error, OSError, ValueError) as error:
        missing[f"{folder}/"] = f"could not be read ({type(error).__name__})"
        return None
    if selection is None:
        missing[f"{folder}/"] = "not found, or holds no documents"
    return selection


def _metrics(run_dir: Path, folder: str, missing: dict[str, str]) -> list[Json]:
    """What the fit logged; of a fit that still runs, what it has logged so far."""
    names = (f"{folder}/metrics.jsonl", f"{folder}/method/metrics.jsonl")
    for name in names:
        if (run_dir / name).is_file():
            return _json_lines(run_dir, name, missing)
    running = [path for name in names for path in sorted(run_dir.glob(f".partial/*/{name}"))]
    return _json_lines(run_dir, (running[0].relative_to(run_dir) if running else Path(names[0])).as_posix(), missing)


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
