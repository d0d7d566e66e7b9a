"""No selection: every document, every token; the other control."""

from typing import Any

import numpy as np

from bilect.data.tokens import TokenStore
from bilect.methods.contract import DocumentMethod, MethodConfig, TokenMethod

__all__ = ["Full"]


class Full(DocumentMethod[MethodConfig], TokenMethod[MethodConfig]):
    """``score_i = 0``: keep the whole pool (``keep_ratio`` 1); a smaller budget takes from it without a preference."""

    name = "full"
    summary = "no selection, the other control; of documents and of tokens"
    uses_upper = uses_proxy = scores_documents = False  # an arm of a run trains on the whole shard

    def score(self, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        """Zeros."""
        return np.zeros(len(rows))

    def options(self, learning_rate: float) -> dict[str, Any]:
        """The unmodified loop."""
        return {"keep_ratio": 1.0}
