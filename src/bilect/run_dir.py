"""The run directory: which stages are done, atomic results, and the manifest ``run.json``.

A stage writes into a scratch folder; only when it has finished are its results moved into place and the stage is
recorded as done, together with a key over everything it depends on. Started again, a run skips the stages whose keys
are unchanged and repeats the rest; a killed process leaves nothing half-written.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["RunDir", "StageResult", "content_hash", "derive_seed", "write_json", "write_text"]

StageResult = dict[str, Any]


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """``write_text`` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def content_hash(value: Any) -> str:
    """Hash of plain data, or of the content of a file where ``value`` is a Path."""
    digest = hashlib.sha256()
    if isinstance(value, Path):
        with value.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    else:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def derive_seed(seed: int, *labels: str | int) -> int:
    """An independent seed for one purpose of a run, in [0, 2^31)."""
    text = "/".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


class RunDir:
    """A run directory and its manifest.

    Args:
        path: the directory; made if missing.
        seed: recorded.
        main: whether this process writes (of several ranks, one does).
        barrier: waits for the other ranks.
    """

    def __init__(
        self, path: Path, seed: int = 0, *, main: bool = True, barrier: Callable[[], None] = lambda: None
    ) -> None:
        self.path, self._main, self._barrier = path, main, barrier
        path.mkdir(parents=True, exist_ok=True)
        self._file = path / "run.json"
        self.manifest: dict[str, Any] = {"stages": {}}
        if self._file.is_file():
            self.manifest = json.loads(self._file.read_text(encoding="utf-8"))
        self.manifest.update(name=path.name, seed=seed, **_environment())
        self.manifest.setdefault("started", _now())

    def __truediv__(self, part: str) -> Path:
        return self.path / part

    def save(self) -> None:
        """Write the manifest."""
        if self._main:
            write_json(self._file, self.manifest)

    def finish(self) -> None:
        """Record the end of the run."""
        self.manifest["finished"] = _now()
        self.save()

    def is_done(self, name: str, key: str) -> bool:
        """Whether a stage has finished with exactly these inputs."""
        return self.manifest["stages"].get(name, {}).get("key") == key

    def key(self, name: str, settings: Any, after: Iterable[str] = ()) -> str:
        """Key of a stage: its name, its settings, and the keys of the stages it builds on."""
        stages = self.manifest["stages"]
        return content_hash([name, settings, [stages.get(s, {}).get("key") for s in after]])

    def stage(
        self, name: str, action: Callable[[Path], Mapping[str, Any]], *, settings: Any, after: Iterable[str] = ()
    ) -> StageResult:
        """Run a stage unless it is done, and return its record.

        Args:
            name: of the stage.
            action: writes results below the folder it is given, as they shall lie in the run directory, and returns
                figures for the record (``tokens``, ``flops`` ...).
            settings: everything the result depends on that is no earlier stage.
            after: names of the stages whose results it reads.

        Returns:
            The record: the figures, ``seconds`` and ``key``.
        """
        key = self.key(name, settings, after)
        if self.is_done(name, key):
            return dict(self.manifest["stages"][name])
        scratch = self.path / ".partial" / name
        if self._main:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        self._barrier()
        start = time.perf_counter()
        figures = dict(action(scratch))
        self._barrier()
        if self._main:
            for entry in sorted(p for p in scratch.rglob("*") if self._is_result(p, scratch)):
                self._move(entry, self.path / entry.relative_to(scratch))
            shutil.rmtree(self.path / ".partial", ignore_errors=True)
            record = {**figures, "seconds": round(time.perf_counter() - start, 3), "key": key}
            self.manifest["stages"][name] = record
            self.manifest.pop("finished", None)
            self.save()
        self._barrier()
        if not self._main:
            self.manifest["stages"] = json.loads(self._file.read_text(encoding="utf-8"))["stages"]
        return dict(self.manifest["stages"][name])

    @staticmethod
    def _is_result(path: Path, scratch: Path) -> bool:
        """Whole folders are moved where they hold a stage's result; ``round-N`` and ``controls`` folders are shared."""
        parts = path.relative_to(scratch).parts
        depth = next((i for i, p in enumerate(parts) if not _shared(p)), len(parts))
        return len(parts) == depth + 1

    @staticmethod
    def _move(source: Path, destination: Path) -> None:
        destination.parent.mkdir(parents=True, exist_ok=True)
        if destination.is_dir() and not destination.is_symlink():
            shutil.rmtree(destination)
        os.replace(source, destination)


def _shared(part: str) -> bool:
    return part in ("controls", "random", "full", "warmup", "tokens") or part.startswith("round-")


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
    return {"bilect_version": versions.get("bilect", ""), "git_revision": _git_revision(), "versions": versions,
            "host": host}  # fmt: skip


def _git_revision() -> str | None:
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
