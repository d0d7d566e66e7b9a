"""The run directory: which stages are done, atomic results, and the manifest ``run.json``.

A stage writes into a scratch folder, ``.partial/<stage>``; only when it has finished are its results moved into place
and the stage is recorded as done, together with a key over everything it depends on. Started again, a run skips the
stages whose keys are unchanged and repeats the rest; a killed process leaves nothing half-written:

    .stage.json      the key, written first: with the same key the scratch is kept, so that the stage can go on from its
                     own checkpoints; with another one it is wiped
    .finished.json   the record, written when all results are; from here on a restart only moves what is not moved yet
    run.json         loses the stage's old record before the first move, gets the new one after the last

Names in the scratch that begin with a dot are never moved; they are gone when the stage is done.
"""

import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bilect.errors import BilectError
from bilect.runtime.files import content_hash, flush, write_json
from bilect.runtime.revision import git_revision

__all__ = ["RunDir", "StageResult", "plain", "read_manifest", "scratch_name", "stage_key"]

StageResult = dict[str, Any]


def stage_key(name: str, settings: Any, after: Sequence[str | None]) -> str:
    """Key of a stage from its name, its settings, and the keys of the stages it builds on."""
    return content_hash([name, settings, list(after)])


def plain(settings: Any) -> Any:
    """Settings as they are when read back from JSON; what has no form there as its text, as in the key."""
    return json.loads(json.dumps(settings, default=str))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run directory; one without stages where there is none yet.

    Raises:
        BilectError: ``run.json`` is there but is no manifest.
    """
    file = path / "run.json"
    if not file.is_file():
        return {"stages": {}}
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(manifest["stages"], dict):
            raise TypeError("stages is no mapping")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BilectError(f"run: {file} is not a manifest of bilect ({type(error).__name__}: {error}); "
                          "restore it, or delete it to do every stage again") from error  # fmt: skip
    return manifest


class RunDir:
    """A run directory and its manifest.

    Args:
        path: the directory; made if missing.
        seed: recorded.
        main: whether this process writes (of several ranks, one does).
        barrier: waits for the other ranks.

    Raises:
        BilectError: ``run.json`` is there but is no manifest.
    """

    def __init__(
        self,
        path: Path,
        seed: int = 0,
        *,
        main: bool = True,
        barrier: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self._main, self._barrier = path, main, barrier
        path.mkdir(parents=True, exist_ok=True)
        self._file = path / "run.json"
        self.manifest = read_manifest(path)
        self.manifest.update(name=path.name, seed=seed, **_environment())
        self.manifest.setdefault("started", _now())

    def __truediv__(self, part: str) -> Path:
        return self.path / part

    def save(self) -> None:
        """Write the manifest."""
        if self._main:
            write_json(self._file, self.manifest)

    def finish(self) -> None:
        """Record the end of the run; what is left of stages that it no longer has goes."""
        self.manifest["finished"] = _now()
        self.save()
        for scratch in (self.path / ".partial").glob("*") if self._main else ():
            _clear(scratch)

    def is_done(self, name: str, key: str) -> bool:
        """Whether a stage has finished with exactly these inputs."""
        return self.manifest["stages"].get(name, {}).get("key") == key

    def key(self, name: str, settings: Any, after: Iterable[str] = ()) -> str:
        """Key of a stage: its name, its settings, and the keys of the stages it builds on."""
        stages = self.manifest["stages"]
        return stage_key(name, settings, [stages.get(s, {}).get("key") for s in after])

    def stage(
        self, name: str, action: Callable[[Path], Mapping[str, Any]], *, settings: Any, after: Iterable[str] = ()
    ) -> StageResult:
        """Run a stage unless it is done, and return its record.

        Args:
            name: of the stage.
            action: writes results below the folder it is given, as they shall lie in the run directory, and returns
                figures for the record (``tokens``, ``flops`` ...). After a kill it finds there what it had written.
            settings: everything the result depends on that is no earlier stage.
            after: names of the stages whose results it reads.

        Returns:
            The record: the figures, ``seconds`` (of the attempt that finished), ``key``, and the settings of the key
            (``made_of``).
        """
        key = self.key(name, settings, after)
        scratch = self.path / ".partial" / scratch_name(name)
        if self.is_done(name, key):
            if self._main:
                _clear(scratch)
            return dict(self.manifest["stages"][name])
        if self._main:
            self._prepare(scratch, key)
        self._barrier()
        finished = scratch / ".finished.json"
        if not finished.is_file():
            start = time.perf_counter()
            figures = dict(action(scratch))
            self._barrier()
            if self._main:
                flush(scratch)
                seconds = round(time.perf_counter() - start, 3)
                write_json(finished, {**figures, "seconds": seconds, "key": key, "made_of": plain(settings)})
        self._barrier()  # nobody still looks for the file
        if self._main:
            self._put_in_place(name, scratch, finished)
        self._barrier()
        if not self._main:
            self.manifest["stages"] = read_manifest(self.path)["stages"]
        return dict(self.manifest["stages"][name])

    @staticmethod
    def _prepare(scratch: Path, key: str) -> None:
        """Keep the scratch of an interrupted attempt of this kind; else start an empty one."""
        mark = scratch / ".stage.json"
        try:
            if json.loads(mark.read_text(encoding="utf-8")) == {"key": key}:
                return
        except (OSError, ValueError):
            pass  # none, or none that can be trusted
        _clear(scratch)
        scratch.mkdir(parents=True)
        write_json(mark, {"key": key})

    def _put_in_place(self, name: str, scratch: Path, finished: Path) -> None:
        """Move the results and record them. Killed anywhere in here, the next start does the rest."""
        stages = self.manifest["stages"]
        if stages.pop(name, None) is not None:  # from the first move on, the old record is no longer true
            self.save()
        for entry in sorted(p for p in scratch.rglob("*") if self._is_result(p, scratch)):
            self._move(entry, self.path / entry.relative_to(scratch))
        stages[name] = json.loads(finished.read_text(encoding="utf-8"))
        self.manifest.pop("finished", None)
        self.save()
        _clear(scratch)

    @staticmethod
    def _is_result(path: Path, scratch: Path) -> bool:
        """Whole folders are moved where they hold a stage's result; ``round-N`` and ``controls/ARM`` are shared."""
        parts = path.relative_to(scratch).parts
        depth = next((i for i, p in enumerate(parts) if not _shared(p) and parts[:i] != ("controls",)), len(parts))
        return len(parts) == depth + 1 and not parts[0].startswith(".")

    @staticmethod
    def _move(source: Path, destination: Path) -> None:
        destination.parent.mkdir(parents=True, exist_ok=True)
        if destination.is_dir() and not destination.is_symlink():
            shutil.rmtree(destination)
        os.replace(source, destination)


def _clear(scratch: Path) -> None:
    """Remove a scratch folder; the key first, so that nobody goes on from what a kill in here leaves."""
    (scratch / ".stage.json").unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)
    if scratch.parent.is_dir() and not any(scratch.parent.iterdir()):
        scratch.parent.rmdir()


def scratch_name(stage: str) -> str:
    """Of a stage: letters, digits and dashes; two stages that fall together would only wipe each other's scratch."""
    return re.sub(r"[^A-Za-z0-9]+", "-", stage).strip("-")


def _shared(part: str) -> bool:
    return part in ("controls", "warmup", "tokens") or part.startswith("round-")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _environment() -> dict[str, Any]:
    versions = {}
    for package in ("bilect", "torch", "transformers", "tokenizers", "datasets", "duckdb", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    host = {"system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count(),
            "python": platform.python_version()}  # fmt: skip
    return {"bilect_version": versions.get("bilect", ""), "git_revision": git_revision(), "versions": versions,
            "host": host}  # fmt: skip
