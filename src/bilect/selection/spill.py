"""Rows and hashes on the disk, for what is sorted a part at a time. No file stays open: there may be thousands."""

from pathlib import Path

import numpy as np
import pyarrow as pa

__all__ = ["Hashes", "Rows", "split"]

HASH_ROWS = 1 << 22  # that are sorted at a time


def split(at_D: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Order that brings rows of the same part together, and where each part ends in it."""
    kind = np.uint16 if parts <= 1 << 16 else np.int64  # 16-bit integers are sorted by their digits, in linear time
    return np.argsort(at_D.astype(kind), kind="stable"), np.cumsum(np.bincount(at_D, minlength=parts))


class Rows:
    """Record batches, one after the other, in a file.

    Attributes:
        count: of the rows.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.count = path, 0

    def append(self, batch: pa.RecordBatch) -> None:
        if not len(batch):
            return
        with self._path.open("ab") as file:
            if not self.count:
                file.write(batch.schema.serialize())
            file.write(batch.serialize())
        self.count += len(batch)

    def read(self) -> pa.Table:
        """All of them, each column in one piece; at least one."""
        with pa.ipc.open_stream(pa.memory_map(str(self._path))) as reader:
            return reader.read_all().combine_chunks()


class Hashes:
    """64-bit hashes, in files by their highest bits.

    Args:
        folder: to write.
        count: hashes to come, about.
    """

    def __init__(self, folder: Path, count: int) -> None:
        folder.mkdir()
        self._paths = [folder / str(i) for i in range(max(1, -(-count // HASH_ROWS)))]

    def append(self, hash_D: np.ndarray) -> None:
        parts = len(self._paths)
        at_D = ((hash_D >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)).astype(np.int64)
        order_D, ends = split(at_D, parts)
        hash_D = hash_D[order_D]
        for path, begin, end in zip(self._paths, [0, *ends], ends, strict=False):
            if begin < end:
                with path.open("ab") as file:
                    file.write(hash_D[begin:end].data)

    def repeated(self) -> np.ndarray:
        """Those that occur more than once; the files are removed."""
        found = [np.empty(0, np.uint64)]
        for path in self._paths:
            if path.exists():
                hashes = np.fromfile(path, np.uint64)
                hashes.sort()
                found.append(np.unique(hashes[1:][hashes[1:] == hashes[:-1]]))
                path.unlink()
        return np.concatenate(found)
