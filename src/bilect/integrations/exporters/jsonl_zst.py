"""JSON lines, compressed by Zstandard: one object per document, best first (``kept.jsonl.zst``)."""

import json
from pathlib import Path

import zstandard

from bilect.integrations.exporters._kept import Kept


def write(kept: Kept, folder: Path) -> None:
    """One file."""
    with zstandard.open(folder / "kept.jsonl.zst", "wt", encoding="utf-8", newline="\n") as file:
        for batch in kept.batches():
            for row in batch.to_pylist():
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
