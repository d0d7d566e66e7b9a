"""Hugging Face datasets: what ``datasets.load_from_disk`` reads.

``save_to_disk`` of the library, on its own Arrow files, which are read through the memory map.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bilect.integrations.exporters import extra
from bilect.integrations.exporters._kept import Kept


def write(kept: Kept, folder: Path) -> None:
    """One split, without a name."""
    datasets = extra("datasets", "bilect[hub]")
    types = {"doc_id": "string", "source": "string", "n_tokens": "int32", "score": "float32", "rank": "int64"}
    features = datasets.Features({name: datasets.Value(kind) for name, kind in {**types, "text": "string"}.items()})
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".datasets-") as cache:
        dataset = datasets.Dataset.from_generator(
            partial(_rows, kept), features=features, cache_dir=cache, fingerprint="kept", keep_in_memory=False
        )
        dataset.save_to_disk(folder)


def _rows(kept: Kept) -> Iterator[dict[str, Any]]:
    for batch in kept.batches():
        yield from batch.to_pylist()
