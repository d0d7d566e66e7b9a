"""Task files: YAML in lm-eval's format, over local JSON lines.

``dataset_kwargs.data_files`` is relative to the YAML. These files are read here: ``datasets.load_dataset`` would look
for them in the current directory, call on the Hub, and fill a cache.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import yaml

from bilect.data.cache import file_hash
from bilect.errors import BilectError, reason

__all__ = ["is_task_file", "read_dataset", "read_task_file", "task_inputs"]


def is_task_file(name: str) -> bool:
    """Whether a task is given by a file, and not by a name that lm-eval knows."""
    return name.endswith((".yaml", ".yml"))


def task_inputs(names: Sequence[str]) -> dict[str, str]:
    """Content hashes of task files and of their local data, by path; lm-eval's own tasks have none.

    Raises:
        BilectError: a file is missing, or a task file is wrong.
    """
    hashes = {}
    for name in names:
        if is_task_file(name):
            _, splits = read_task_file(name)
            for path in [Path(name).expanduser(), *(file for files in splits.values() for file in files)]:
                hashes[str(path)] = file_hash(path)
    return hashes


def read_task_file(name: str) -> tuple[dict[str, Any], dict[str, list[Path]]]:
    """The task's settings, and its local data files by split.

    Raises:
        BilectError: a file is missing, or this is no task file.
    """
    path = Path(name).expanduser()
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BilectError(f"tasks.names: cannot read {name}: {reason(error)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BilectError(
            f"tasks.names: {name} is not plain YAML (!function is not allowed): {reason(error)}"
        ) from error
    if not isinstance(task, dict) or not isinstance(task.get("task"), str):
        raise BilectError(f"tasks.names: {name} is no task file of lm-eval: it needs a `task:` name")
    if task.get("dataset_path") != "json":
        return task, {}
    given = (task.get("dataset_kwargs") or {}).get("data_files")
    splits = given if isinstance(given, dict) else {"train": given}
    files = {
        split: [path.parent / Path(file).expanduser() for file in ([found] if isinstance(found, str) else found or [])]
        for split, found in splits.items()
    }
    if not all(files.values()):
        raise BilectError(f"tasks.names: {name} names no data: give dataset_kwargs.data_files, for instance "
                          "{test: data/NAME.jsonl}")  # fmt: skip
    for file in (f for found in files.values() for f in found):
        if not file.is_file():
            raise BilectError(f"tasks.names: {name}: no data file {file}")
    return task, files


def read_dataset(splits: Mapping[str, Sequence[Path]], /, **_: Any) -> dict[str, Any]:
    """Data files as datasets by split; lm-eval hands over further settings, which are of no use here.

    Raises:
        BilectError: a line is no JSON object, or has other fields than the first.
    """
    import datasets

    return {split: datasets.Dataset.from_list(list(_records(files))) for split, files in splits.items()}


def _records(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    fields: list[str] | None = None
    for file in files:
        with fsspec.open(str(file), "rt", encoding="utf-8", compression="infer") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise BilectError(f"tasks: {file}, line {number} is not valid JSON") from error
                if not isinstance(record, dict) or sorted(record) != (fields := fields or sorted(record)):
                    raise BilectError(f"tasks: {file}, line {number}: expected an object with the fields of the first "
                                      f"line: {', '.join(fields or ())}")  # fmt: skip
                yield record
