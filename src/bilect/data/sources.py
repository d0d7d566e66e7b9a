"""Where documents lie: the inputs behind a source of the config, what each is called, and what identifies its content.

One input becomes one token file: a file of records, the plain-text files of a folder, or a dataset. Below a folder or a
glob, what begins with a dot or an underscore is hidden or half-written (``.ipynb_checkpoints``, ``._x.jsonl``,
``_temporary``, ``_SUCCESS``) and is no data; a file that is named is read whatever its name begins with.
"""

import glob
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from bilect.config import SourceConfig
from bilect.data.cache import file_hash
from bilect.data.files import filesystem
from bilect.data.formats import READ, format_of
from bilect.errors import BilectError, reason
from bilect.runtime.files import content_hash

__all__ = ["Found", "Input", "find", "identity", "inputs", "open_dataset", "places", "set_name"]

_GLOB = re.compile(r"(?:^|/)[^/]*[*?\[]")  # the first part of a path that is no plain name
_SUFFIXES = re.compile(r"\.(?:jsonl|ndjson|json|parquet|txt)(?:\.(?:gz|zst|bz2|xz))?$", re.IGNORECASE)
_TEXT_FILES = 10_000  # of one token file
_VERSION_KEYS = ("etag", "mtime", "last_modified", "lastmodified", "modified", "md5", "sha256", "blob_id", "created")


@dataclass(frozen=True)
class Input:
    """What becomes one token file.

    Attributes:
        source: of the config.
        name: for file names.
        label: ``source`` of the documents that carry none.
        where: file, folder of plain text, or dataset, as users see it.
        files: URLs; none for a dataset.
        names: of plain-text files, relative to the folder: their documents' ids.
    """

    source: SourceConfig
    name: str
    label: str
    where: str
    files: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """What a record is called."""
        form = format_of(self.files[0]) if self.files else None
        return _UNITS.get(form.kind if form else "", "record")

    def place(self, record: int) -> tuple[str, str]:
        """File and place of a record, counted from 1: lines of JSONL, rows of Parquet, whole files of plain text."""
        if self.names:
            return _shown(self.files[record - 1]), "whole file"
        return self.where, f"{self.unit} {record}"

    def at(self, record: int) -> str:
        """``place`` in one piece."""
        file, place = self.place(record)
        return file if place == "whole file" else f"{file}, {place}"

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of plain text."""
        return bool(self.names) and _shown(self.files[0]) != self.where

    @property
    def is_local(self) -> bool:
        """Whether its files lie on disks of this machine."""
        return bool(self.files) and all(map(_is_local, self.files))

    def note(self) -> dict[str, Any]:
        """All of it as plain data, for a file."""
        return {**asdict(self), "source": self.source.model_dump(mode="json")}

    @classmethod
    def of_note(cls, note: Mapping[str, Any]) -> "Input":
        """What ``note`` has written."""
        more = {key: tuple(note[key]) for key in ("files", "names")}
        return cls(SourceConfig.model_validate(note["source"]), note["name"], note["label"], note["where"], **more)


@dataclass(frozen=True)
class Found:
    """What lies behind a source.

    Attributes:
        inputs: in the order of their paths.
        not_read: files below the folder or glob that are no data: path, and why.
    """

    inputs: list[Input]
    not_read: list[tuple[str, str]] = field(default_factory=list)


def inputs(source: SourceConfig) -> list[Input]:
    """The inputs behind a source; as ``find``."""
    return find(source).inputs


def find(source: SourceConfig) -> Found:
    """The inputs behind a source, and the files there that are not read.

    A file's documents are labelled with the file's stem, plain text that a folder or glob leads to with the folder's
    name, the parts of a folder that is called like a file (``x.parquet/``) with that folder's stem, a dataset's with
    its name without the owner; ``source`` of the config goes before all of them.

    Raises:
        BilectError: nothing there, or nothing of a known kind.
    """
    if source.dataset is not None:
        name = source.dataset.rstrip("/").rsplit("/", 1)[-1]
        return Found([Input(source, _safe(name), source.source or name, f"dataset {source.dataset}")])
    assert source.path is not None
    fs, path = _filesystem(source.path)
    try:
        base, found, not_read = _find(fs, path, source.path)
        urls = [str(fs.unstrip_protocol(p)) for p in found]
    except BilectError:
        raise
    except Exception as error:  # every file system has its own kinds
        raise BilectError(f"data: cannot look into {source.path}: {reason(error)}") from error
    found_inputs: list[Input] = []
    for text, group in groupby(zip(found, urls, strict=True), lambda pair: _is_text(pair[0])):
        pairs = list(group)
        if text and base is not None:
            for first in range(0, len(pairs), _TEXT_FILES):
                found_inputs.append(_text_folder(source, base, pairs[first : first + _TEXT_FILES]))
            continue
        for path, url in pairs:
            file = path.rsplit("/", 1)[-1]
            stem = file.split(".")[0]
            names = (file,) if text else ()
            label = source.source or _folder_stem(path) or stem
            found_inputs.append(Input(source, _safe(stem), label, _shown(url), (url,), names))
    return Found(found_inputs, not_read)


def places(parts: Sequence[Input]) -> list[str]:
    """A relative path for each input that no other has: its path below the folder that all of them share.

    That of a folder of plain text may be ``.``, the shared folder itself.
    """
    paths = [(part.where if part.files else part.name).split("://")[-1].lstrip("/") for part in parts]
    folders = [p if part.is_folder else os.path.dirname(p) for p, part in zip(paths, parts, strict=True)]
    shared = os.path.commonpath(folders) if paths else ""
    found = [os.path.relpath(p, shared) if shared else p for p in paths]
    keys = [(place, part.names[:1]) for place, part in zip(found, parts, strict=True)]  # one folder, other files of it
    count = Counter(keys)
    return [
        f"{n:05d}/{place}" if count[key] > 1 else place for n, (place, key) in enumerate(zip(found, keys, strict=True))
    ]


def set_name(source: SourceConfig) -> str:
    """Name of a target set: its label, or the stem of its file or folder; signs that suit no file name become ``_``."""
    if source.source:
        return _safe(source.source)
    plain = source.dataset or source.path or ""
    if not os.path.exists(plain):
        plain = _GLOB.split(plain)[0]  # of a glob: the folder it starts in
    return _safe(plain.rstrip("/").rsplit("/", 1)[-1].split(".")[0])


def identity(source: Input) -> str:
    """What changes when an input's content does.

    Local: hash of the content. Remote: hash of URL, size and what the file system tells of its version (ETag, time of
    change). A dataset on the Hub: its commit.

    Raises:
        BilectError: it cannot be read.
    """
    try:
        if source.source.dataset is not None:
            return _dataset_identity(source.source.dataset)
        hashes = [_file_identity(url) for url in source.files]
    except BilectError:
        raise
    except Exception as error:
        raise BilectError(f"data: cannot read {source.where}: {reason(error)}") from error
    return content_hash([source.names, hashes]) if source.names else hashes[0]


def open_dataset(source: SourceConfig) -> Any:
    """The records of ``dataset:``; streamed, unless ``save_to_disk`` wrote the folder.

    Raises:
        BilectError: the datasets library is missing, or there is no such dataset, subset or split.
    """
    assert source.dataset is not None
    _check_library(source.dataset)
    import datasets

    folder = _local_folder(source.dataset)
    try:
        if folder and ((folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()):
            saved = datasets.load_from_disk(str(folder))
            if not isinstance(saved, datasets.DatasetDict):
                return saved
            if source.split not in saved:
                raise BilectError(f"data: dataset {source.dataset} has no split {source.split!r}; it has "
                                  + ", ".join(map(repr, saved)))  # fmt: skip
            return saved[source.split]
        return datasets.load_dataset(str(folder or source.dataset), source.subset, split=source.split, streaming=True)
    except BilectError:
        raise
    except Exception as error:
        raise BilectError(f"data: cannot load dataset {source.dataset}: {reason(error)}") from error


def _filesystem(path: str) -> tuple[Any, str]:
    try:
        return filesystem(path)
    except (ImportError, ValueError, OSError) as error:  # a protocol that is unknown, or whose package is missing
        raise BilectError(f"data: cannot open {path}: {reason(error)}") from error


def _find(fs: Any, path: str, given: str) -> tuple[str | None, list[str], list[tuple[str, str]]]:
    """The folder that was searched, if any, the files found in it, and those that are not read."""
    if fs.isdir(path):
        base, pattern, found = path.rstrip("/"), "", fs.find(path)
    elif fs.exists(path):
        if format_of(path) is None:
            config = path.endswith((".yaml", ".yml"))
            hint = "; a config is what `bilect run` takes" if config else "; convert it to one of them"
            raise BilectError(f"data: {given} is none of {READ}{hint}")
        if _is_pipe(fs, path):
            raise BilectError(f"data: {given} is {_PIPE}; inputs are read more than once: write it to a file first")
        return None, [path], []
    elif any(c in path for c in "*?["):
        base, pattern = _plain_start(fs, path)
        if not pattern:
            raise BilectError(f"data: no file or directory {given}")
        found = _matches(fs, f"{glob.escape(base)}/{pattern}" if base else pattern)
    else:
        raise BilectError(f"data: no file or directory {given}")
    read, not_read = list[str](), list[tuple[str, str]]()
    for file in sorted(set(found)):
        hidden = _hidden(file.removeprefix(base).lstrip("/"), pattern)
        if hidden or format_of(file) is None:
            not_read.append((file, "hidden or temporary" if hidden else "of another kind"))
        elif _is_pipe(fs, file):
            not_read.append((file, _PIPE))
        else:
            read.append(file)
    if not read:
        others = f"; not read: {', '.join(f.rsplit('/', 1)[-1] for f, _ in not_read[:3])}" if not_read else ""
        raise BilectError(f"data: no {READ} files in {given}{others}")
    return base, read, not_read


_PIPE = "a pipe or a device, no file"


def _is_pipe(fs: Any, path: str) -> bool:
    """Whether reading would wait for somebody to write.

    Raises:
        BilectError: the name cannot be written down, or is that of a link that leads nowhere.
    """
    if not isinstance(fs, LocalFileSystem):
        return False
    try:
        path.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise BilectError(f"data: the name of {shown} is not UTF-8; rename the file or folder") from error
    if os.path.islink(path) and not os.path.exists(path):
        raise BilectError(f"data: {path} is a link to {os.readlink(path)}, which is not there; remove it or mend it")
    return not os.path.isfile(path)


def _plain_start(fs: Any, path: str) -> tuple[str, str]:
    """The folder that a glob starts in, whatever signs its name has, and the pattern below it."""
    parts = path.split("/")
    count = next(n for n, part in enumerate(parts) if any(c in part for c in "*?["))
    while count < len(parts) and fs.isdir("/".join(parts[: count + 1])):
        count += 1
        while count < len(parts) and not any(c in parts[count] for c in "*?["):
            count += 1
    return "/".join(parts[:count]), "/".join(parts[count:])


def _matches(fs: Any, pattern: str) -> list[str]:
    """Files that a pattern matches, and all that lie in the folders it matches."""
    found = list[str]()
    for path, info in fs.glob(pattern, detail=True).items():
        found += fs.find(path) if info["type"] == "directory" else [path]
    return found


def _hidden(below: str, pattern: str) -> bool:
    """Whether a path is hidden: not where the pattern itself spells the dot or the underscore."""
    return any(part[:1] in (".", "_") and f"/{part[0]}" not in f"/{pattern}" for part in below.split("/"))


def _is_text(path: str) -> bool:
    form = format_of(path)
    return form is not None and form.kind == "text"


def _folder_stem(path: str) -> str | None:
    """Of a part of a folder that is called like a file, as Spark writes them: the folder's stem."""
    folders = path.split("/")[:-1]
    named = next((f for f in reversed(folders) if _SUFFIXES.search(f)), None)
    return None if named is None else _SUFFIXES.sub("", named) or None


def _text_folder(source: SourceConfig, base: str, pairs: Sequence[tuple[str, str]]) -> Input:
    name = base.rsplit("/", 1)[-1]
    names = tuple(path.removeprefix(f"{base}/") for path, _ in pairs)
    where = _shown(pairs[0][1]).removesuffix(f"/{names[0]}")
    return Input(source, _safe(name), source.source or name, where, tuple(url for _, url in pairs), names)


def _file_identity(url: str) -> str:
    fs, path = _filesystem(url)
    if _is_local(url):
        return file_hash(Path(path))
    info = {k.lower().replace("-", "_"): str(v) for k, v in fs.info(path).items()}
    return content_hash([url, info.get("size"), {k: info[k] for k in _VERSION_KEYS if k in info}])


def _check_library(name: str) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise BilectError(f"data: dataset {name} needs the datasets library: pip install 'bilect[hub]'")


def _dataset_identity(name: str) -> str:
    _check_library(name)  # before the Hub is asked
    folder = _local_folder(name)
    if folder:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return content_hash([[str(p.relative_to(folder)), file_hash(p)] for p in files])
    import huggingface_hub

    return str(huggingface_hub.HfApi().dataset_info(name).sha)


def _local_folder(name: str) -> Path | None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")):  # must not be taken for a Hub name
        raise BilectError(f"data: no directory {name}")
    return None


_UNITS = {"lines": "line", "parquet": "row"}


def _is_local(url: str) -> bool:
    return url.startswith("file://")


def _shown(url: str) -> str:
    return url.removeprefix("file://")


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name) or "_"
