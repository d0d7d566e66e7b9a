"""Where documents lie: the inputs behind a source of the config, what each is called, and what identifies its content.

One input becomes one token file: a file of records, the plain-text files of a folder, or a dataset. Below a folder or a
glob, what begins with a dot or an underscore is hidden or half-written (``.ipynb_checkpoints``, ``._x.jsonl``,
``_temporary``, ``_SUCCESS``) and is no data; a file that is named is read whatever its name begins with.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from bilect.config import SourceConfig
from bilect.data import formats
from bilect.data.cache import file_hash
from bilect.data.files import filesystem
from bilect.data.formats import dataset
from bilect.data.input import Input, is_local, shown
from bilect.errors import BilectError, reason
from bilect.runtime.files import content_hash

__all__ = ["Found", "find", "identity", "inputs", "places", "set_name"]

_GLOB = re.compile(r"(?:^|/)[^/]*[*?\[]")  # the first part of a path that is no plain name
_WHOLE_FILES = 10_000  # of one token file
_VERSION_KEYS = ("etag", "mtime", "last_modified", "lastmodified", "modified", "md5", "sha256", "blob_id", "created")


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
        return Found([Input(source, _safe(name), source.source or name, f"dataset {source.dataset}", "dataset")])
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
    for form, group in groupby(zip(found, urls, strict=True), lambda pair: formats.name_of(pair[0])):
        assert form is not None
        pairs, whole, unit = list(group), formats.get(form).whole, formats.get(form).unit
        if whole and base is not None:
            for first in range(0, len(pairs), _WHOLE_FILES):
                found_inputs.append(_folder(source, base, form, pairs[first : first + _WHOLE_FILES]))
            continue
        for path, url in pairs:
            file = path.rsplit("/", 1)[-1]
            stem = file.split(".")[0]
            names = (file,) if whole else ()
            label = source.source or _folder_stem(path) or stem
            found_inputs.append(Input(source, _safe(stem), label, shown(url), form, unit, (url,), names))
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
            return dataset.identity(source.source.dataset)
        hashes = [_file_identity(url) for url in source.files]
    except BilectError:
        raise
    except Exception as error:
        raise BilectError(f"data: cannot read {source.where}: {reason(error)}") from error
    return content_hash([source.names, hashes]) if source.names else hashes[0]


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
        if formats.name_of(path) is None:
            config = path.endswith((".yaml", ".yml"))
            hint = "; a config is what `bilect run` takes" if config else "; convert it to one of them"
            raise BilectError(f"data: {given} is none of {formats.readable()}{hint}")
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
        if hidden or formats.name_of(file) is None:
            not_read.append((file, "hidden or temporary" if hidden else "of another kind"))
        elif _is_pipe(fs, file):
            not_read.append((file, _PIPE))
        else:
            read.append(file)
    if not read:
        others = f"; not read: {', '.join(f.rsplit('/', 1)[-1] for f, _ in not_read[:3])}" if not_read else ""
        raise BilectError(f"data: no {formats.readable()} files in {given}{others}")
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


def _folder_stem(path: str) -> str | None:
    """Of a part of a folder that is called like a file, as Spark writes them: the folder's stem."""
    return (
        next((stem for name in reversed(path.split("/")[:-1]) if (stem := formats.stem(name)) is not None), None)
        or None
    )


def _folder(source: SourceConfig, base: str, form: str, pairs: Sequence[tuple[str, str]]) -> Input:
    """Files of a folder that are a document each."""
    name, files = base.rsplit("/", 1)[-1], tuple(url for _, url in pairs)
    names = tuple(path.removeprefix(f"{base}/") for path, _ in pairs)
    where = shown(files[0]).removesuffix(f"/{names[0]}")
    unit = formats.get(form).unit
    return Input(source, _safe(name), source.source or name, where, form, unit, files, names)


def _file_identity(url: str) -> str:
    fs, path = _filesystem(url)
    if is_local(url):
        return file_hash(Path(path))
    info = {k.lower().replace("-", "_"): str(v) for k, v in fs.info(path).items()}
    return content_hash([url, info.get("size"), {k: info[k] for k in _VERSION_KEYS if k in info}])


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name) or "_"
