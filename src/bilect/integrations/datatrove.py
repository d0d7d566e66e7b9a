"""A filter of datatrove that keeps the documents a fitted method scores highest.

    pipeline = [JsonlReader("crawl/"), ChooserFilter(bilect.Chooser("kept/")), JsonlWriter("out/")]

A document's score goes into its metadata, ``bilect_score``. Every document is judged by itself, by a fixed score, so
tasks need not know of each other; to keep a share of a corpus exactly, score first and select afterwards.
"""

from typing import Any

from bilect.integrations._cut import Chooser, least_score

try:
    from datatrove.data import Document
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from datatrove.pipeline.writers.disk_base import DiskWriter
except ImportError as error:
    raise ImportError(f"ChooserFilter needs datatrove: pip install 'bilect[datatrove]' ({error})") from error

__all__ = ["ChooserFilter"]


class ChooserFilter(BaseFilter):
    """Keeps documents with a score of at least ``cut``.

    Args:
        chooser: ``bilect.Chooser``.
        cut: least score; by default the least that the run kept.
        exclusion_writer: gets what is dropped, with ``filter_reason``.
        batch_size: documents that are scored at once.

    Raises:
        BilectError: neither ``cut`` is given, nor has the run kept anything.
    """

    name = "🎯 bilect"

    def __init__(
        self,
        chooser: Chooser,
        cut: float | None = None,
        exclusion_writer: DiskWriter | None = None,
        batch_size: int = 256,
    ) -> None:
        super().__init__(exclusion_writer, batch_size)
        self.chooser, self.cut = chooser, least_score(chooser, cut)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether a document is kept; otherwise why not."""
        (result,) = self.filter_batch([doc])
        return result

    def filter_batch(self, batch: list[Document]) -> list[bool | tuple[bool, str]]:
        """``filter`` of several."""
        scores = self.chooser.score([doc.text for doc in batch])
        found: list[Any] = []
        for doc, score in zip(batch, scores.tolist(), strict=True):
            doc.metadata["bilect_score"] = score
            found.append(True if score >= self.cut else (False, "low_score"))
        return found
