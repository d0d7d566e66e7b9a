"""Parquet: ``doc_id, source, n_tokens, score, rank, text``, in files of about a million documents."""

from pathlib import Path

import pyarrow.parquet as pq

from bilect.integrations.exporters._kept import Kept

FILE_ROWS = 1 << 20


def write(kept: Kept, folder: Path) -> None:
    """``part-00000.parquet`` and so on."""
    writer, rows, number = None, 0, 0
    for batch in kept.batches():
        if writer is None or rows >= FILE_ROWS:
            if writer is not None:
                writer.close()
            writer = pq.ParquetWriter(folder / f"part-{number:05d}.parquet", batch.schema, compression="zstd")
            rows, number = 0, number + 1
        writer.write_batch(batch)
        rows += len(batch)
    if writer is not None:
        writer.close()
