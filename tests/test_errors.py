"""A full disk is one clear line, whichever library meets it."""

import errno
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from bilect.errors import BilectError, explain, reason


def plainly(path: Path) -> None:
    path.write_text("x" * 10_000)


def parquet(path: Path) -> None:
    pq.write_table(pa.table({"a": list(range(10_000))}), path)


def arrow(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.schema([("a", pa.int64())])) as writer:
        writer.write_table(pa.table({"a": list(range(10_000))}))


def safe(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(10_000)}, path)


def torches(path: Path) -> None:
    torch.save({"a": torch.zeros(10_000)}, path)


def duck(path: Path) -> None:
    with duckdb.connect() as db:
        db.execute(f"COPY (SELECT range AS a FROM range(10000)) TO '{path}' (FORMAT csv)")


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """As on a full disk, writing fails half-way; a device that is always full would not survive a careless library."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("write", [plainly, parquet, arrow, safe, torches, duck])
def test_a_full_disk_is_named(write, tmp_path):
    with pytest.raises(Exception) as caught, no_file_longer_than(4096):  # noqa: PT011 - every library has its own
        write(tmp_path / "x")
    message = explain(caught.value)
    assert message is not None and message.startswith("no space left on the device"), repr(caught.value)
    assert "\n" not in message and "the same command goes on" in message


def test_it_is_found_behind_other_errors():
    error = RuntimeError("cannot save")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/data/x")
    assert "(/data/x)" in (explain(error) or "")


def test_other_errors():
    assert explain(BilectError("data: wrong")) == "data: wrong"
    assert explain(PermissionError(errno.EACCES, "Permission denied", "/root/x")) == "no permission to use /root/x"
    assert "lower the batch sizes" in (explain(torch.OutOfMemoryError("CUDA out of memory. Tried")) or "")
    assert explain(KeyError("a fault of the program")) is None
    assert reason(FileNotFoundError(errno.ENOENT, "No such file", "x")) == "No such file"
    assert reason(ValueError("two\n  lines")) == "two lines" and reason(ValueError()) == "ValueError"
