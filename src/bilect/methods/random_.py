"""Uniform documents: the control that no comparison may lack."""

import numpy as np

from bilect.data.tokens import TokenStore
from bilect.methods._noise import uniform
from bilect.methods.contract import DocumentMethod, MethodConfig

__all__ = ["Random"]


class Random(DocumentMethod[MethodConfig]):
    """``score_i`` is uniform in (0, 1), drawn from the seed and the document's id."""

    name = "random"
    summary = "uniform documents, the control"
    uses_upper = uses_proxy = False

    def score(self, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        """See the class."""
        return uniform(self.inputs.seed, store.doc_ids(rows))
