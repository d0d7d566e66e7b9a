"""LitData: chunks with ``doc_id, source, score, text``, best first, for ``StreamingDataset(FOLDER)``.

By LitData's own writer.
"""

from pathlib import Path

from bilect.integrations.exporters import extra
from bilect.integrations.exporters._kept import Kept

CHUNK_BYTES = 1 << 26
COLUMNS = ("doc_id", "source", "score", "text")


def write(kept: Kept, folder: Path) -> None:
    """Chunks of 64 MiB, or one document, and their ``index.json``."""
    writer = extra("litdata.streaming.writer", "bilect[litdata]").BinaryWriter(str(folder), chunk_bytes=CHUNK_BYTES)
    number = 0
    for batch in kept.batches():
        for row in batch.select(COLUMNS).to_pylist():
            writer[number] = row
            number += 1
    writer.done()
    writer.merge()
