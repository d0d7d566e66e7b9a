"""Plain text: one doc_id per line, best first (``doc_ids.txt``).

An id with a line break in it would become two, so such a list is refused.
"""

from pathlib import Path

from bilect.errors import BilectError
from bilect.integrations.exporters._kept import Kept


def write(kept: Kept, folder: Path) -> None:
    """One file."""
    with (folder / "doc_ids.txt").open("w", encoding="utf-8", newline="\n") as file:
        for batch in kept.batches(text=False):
            for doc_id in batch["doc_id"].to_pylist():
                if len(doc_id.splitlines()) > 1 or doc_id.endswith(("\n", "\r")):
                    raise BilectError(f"export: doc_id {doc_id!r} holds a line break; export to parquet instead")
                file.write(f"{doc_id}\n")
