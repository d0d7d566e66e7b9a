"""Where documents lie: the inputs behind a source of the config, what each is called, and what identifies its content.

One input becomes one token file: a file of records, the plain-text files of a folder, or a dataset.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import fsspec

from bilect.config import SourceConfig
from bilect.data.cache import file_hash
from bilect.errors import BilectError, reason
from bilect.runtime.files import content_hash

__all__ = ["Input", "identity", "inputs", "open_dataset", "set_name"]

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
_GLOB = re.compile(r"(?:^|/)[^/]*[*?\[]")  # the first part of a path that is no plain name
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

    def place(self, record: int) -> tuple[str, str]:
        """File and place of a record, counted from 1: lines of JSONL, rows of Parquet, whole files of plain text."""
        if self.names:
            return _shown(self.files[record - 1]), "whole file"
        unit = "record" if not self.files else "row" if self.files[0].endswith(".parquet") else "line"
        return self.where, f"{unit} {record}"

    def at(self, record: int) -> str:
        """``place`` in one piece."""
        file, place = self.place(record)
        return file if place == "whole file" else f"{file}, {place}"


def inputs(source: SourceConfig) -> list[Input]:
    """The inputs behind a source, in the order of their paths.

    A file's documents are labelled with the file's stem, plain text that a folder or glob leads to with the folder's
    name, a dataset's with its name without the owner; ``source`` of the config goes before all of them.

    Raises:
        BilectError: nothing there, or nothing of a known kind.
    """
    if source.dataset is not None:
        name = source.dataset.rstrip("/").rsplit("/", 1)[-1]
        return [Input(source, _safe(name), source.source or name, f"dataset {source.dataset}")]
    assert source.path is not None
    fs, path = _filesystem(source.path)
    try:
        base, found = _find(fs, path, source.path)
        urls = [str(fs.unstrip_protocol(p)) for p in found]
    except BilectError:
        raise
    except Exception as error:  # every file system has its own kinds
        raise BilectError(f"data: cannot look into {source.path}: {reason(error)}") from error
    found_inputs: list[Input] = []
    for text, group in groupby(zip(found, urls, strict=True), lambda pair: pair[0].endswith(".txt")):
        pairs = list(group)
        if text and base is not None:
            for first in range(0, len(pairs), _TEXT_FILES):
                found_inputs.append(_text_folder(source, base, pairs[first : first + _TEXT_FILES]))
            continue
        for path, url in pairs:
            file = path.rsplit("/", 1)[-1]
            stem = file.split(".")[0]
            names = (file,) if text else ()
            found_inputs.append(Input(source, _safe(stem), source.source or stem, _shown(url), (url,), names))
    return found_inputs


def set_name(source: SourceConfig) -> str:
    """Name of a target set: its label, or the stem of its file or folder; signs that suit no file name become ``_``."""
    if source.source:
        return _safe(source.source)
    plain = _GLOB.split(source.dataset or source.path or "")[0]  # of a glob: the folder it starts in
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
    try:
        import datasets
    except ImportError as error:
        raise BilectError(
            f"data: dataset {source.dataset} needs the datasets library: pip install 'bilect[hub]'"
        ) from error
    assert source.dataset is not None
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
        fs, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError, OSError) as error:  # a protocol that is unknown, or whose package is missing
        raise BilectError(f"data: cannot open {path}: {reason(error)}") from error
    return fs, str(inner)


def _find(fs: Any, path: str, given: str) -> tuple[str | None, list[str]]:
    """The folder that was searched, if any, and the files found."""
    if any(c in path for c in "*?["):
        base, found = _GLOB.split(path)[0], fs.glob(path)
    elif fs.isdir(path):
        base, found = path.rstrip("/"), fs.find(path)
    elif not fs.exists(path):
        raise BilectError(f"data: no file or directory {given}")
    elif not path.endswith(SUFFIXES):
        raise BilectError(f"data: {given} is none of {', '.join(SUFFIXES)}")
    else:
        return None, [path]
    found = sorted(p for p in found if p.endswith(SUFFIXES))
    if not found:
        raise BilectError(f"data: no {', '.join(SUFFIXES)} files in {given}")
    return base, found


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


def _dataset_identity(name: str) -> str:
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


def _is_local(url: str) -> bool:
    return url.startswith("file://")


def _shown(url: str) -> str:
    return url.removeprefix("file://")


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name) or "_"
