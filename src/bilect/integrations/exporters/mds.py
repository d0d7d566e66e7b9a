"""MosaicML Streaming: MDS shards with ``doc_id, source, score, text``, for ``StreamingDataset(local=...)``.

Written here, as its documentation gives the format, since the library asks for older versions of numpy and transformers
than bilect does. A shard is ``n`` (the number of samples), ``n + 1`` offsets from the start of the file (all unsigned,
32 bits), the description of the columns as JSON, and the samples: the lengths of the columns that vary in length, then
the columns, in alphabetical order. ``index.json`` describes all shards.
"""

import json
from pathlib import Path

import numpy as np

from bilect.integrations.exporters._kept import Kept
from bilect.runtime.files import write_json

SHARD_BYTES = 1 << 26
COLUMNS = {"doc_id": ("str", None), "score": ("float32", 4), "source": ("str", None), "text": ("str", None)}
_CONFIG = {
    "column_encodings": [encoding for encoding, _ in COLUMNS.values()],
    "column_names": list(COLUMNS),
    "column_sizes": [size for _, size in COLUMNS.values()],
    "compression": None,
    "format": "mds",
    "hashes": [],
    "size_limit": SHARD_BYTES,
}


def write(kept: Kept, folder: Path) -> None:
    """``shard.00000.mds`` and so on, of 64 MiB or one document at most."""
    samples: list[bytes] = []
    shards: list[dict[str, object]] = []
    head = json.dumps(_CONFIG, sort_keys=True).encode()
    size = fixed = 8 + len(head)

    def close() -> None:
        name = f"shard.{len(shards):05d}.mds"
        offset = np.cumsum([fixed + 4 * len(samples), *map(len, samples)]).astype(np.uint32)
        with (folder / name).open("wb") as file:
            file.write(np.uint32(len(samples)).tobytes() + offset.tobytes() + head)
            file.writelines(samples)
        raw = {"basename": name, "bytes": (folder / name).stat().st_size, "hashes": {}}
        shards.append({**_CONFIG, "raw_data": raw, "samples": len(samples), "version": 2, "zip_data": None})
        samples.clear()

    for batch in kept.batches():
        for row in batch.to_pylist():
            sample = _encoded(row)
            if samples and size + len(sample) + 4 > SHARD_BYTES:
                close()
                size = fixed
            samples.append(sample)
            size += len(sample) + 4
    if samples:
        close()
    write_json(folder / "index.json", {"shards": shards, "version": 2})


def _encoded(row: dict[str, object]) -> bytes:
    parts = [
        np.float32(row[name]).tobytes() if size else str(row[name]).encode()  # type: ignore[arg-type]
        for name, (_, size) in COLUMNS.items()
    ]
    varying = [len(part) for part, (_, size) in zip(parts, COLUMNS.values(), strict=True) if size is None]
    return np.array(varying, np.uint32).tobytes() + b"".join(parts)
