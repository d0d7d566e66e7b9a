"""What a run has fitted, as an object that scores texts: for pipelines that are not bilect's own."""

import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bilect.data.document import Document
from bilect.data.tokens import TokenStore, write_tokens
from bilect.methods.contract import DocumentMethod
from bilect.pipeline.context import RunContext
from bilect.pipeline.directory import read_manifest
from bilect.pipeline.reuse import fitted_in, fitted_method
from bilect.runtime.progress import SilentProgress

__all__ = ["Chooser"]


class Chooser:
    """Scores texts as a run has scored its pool; higher means keep.

    Loaded with the first text, once per process: it can be sent to other processes while it is nothing but a path.

    Args:
        run: directory of a run, or of ``bilect choose``, that has fitted its method.
        device: where to compute; by default the run's.

    Attributes:
        cut: the least score that the run's last round has kept; None where nothing is selected yet.

    Raises:
        BilectError: nothing fitted there.
    """

    def __init__(self, run: str | Path, device: str | None = None) -> None:
        self.run = Path(run).resolve()
        config, self._fitted = fitted_in(self.run)
        self._config = config if device is None else config.model_copy(update={"device": device})
        stages = read_manifest(self.run)["stages"]
        self.cut: float | None = stages.get(f"round {config.rounds}: select {config.method}", {}).get("threshold")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_method"}

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Scores (len(texts),), float64; -inf for a text without tokens.

        A text beyond the context is cut as the run cuts documents: its score is that of its start, or, with
        ``data.long_documents: chunk``, the mean over its pieces by their tokens.

        Args:
            texts: documents; their number and order change no score.
        """
        data, number = self._config.data, len(texts)
        documents = (Document(str(n), "", text, record=n) for n, text in enumerate(texts))
        with tempfile.TemporaryDirectory(prefix="bilect-") as folder:
            file = Path(folder) / "texts.arrow"
            chunk = data.long_documents == "chunk"
            write_tokens(documents, self._context.tokenizer, file, context=data.context, chunk=chunk)
            store = TokenStore(file)
            rows = np.arange(len(store))
            score_R = self._method.score(store, rows) if len(rows) else np.zeros(0)
            record_R, length_R = store.column_R("record"), store.length_R.astype(np.float64)
        total, weight = (np.bincount(record_R, w, number) for w in (score_R * length_R, length_R))
        return np.divide(total, weight, out=np.full(number, -np.inf), where=weight > 0)

    @cached_property
    def _context(self) -> RunContext:
        return RunContext(self.run, self._config, SilentProgress())

    @cached_property
    def _method(self) -> DocumentMethod[Any]:
        return fitted_method(self._context, self._context, self._fitted, np.zeros(0, np.int64), self.run / ".chooser")
