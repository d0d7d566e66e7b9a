"""Uniform documents: the control that no comparison may lack."""

from functools import cached_property

import numpy as np

from bilect.data.tokens import TokenStore
from bilect.methods.contract import DocumentMethod, MethodConfig

__all__ = ["Random"]


class Random(DocumentMethod[MethodConfig]):
    """A random order of the candidates; ``score_i`` is minus the place of document i in it.

    Documents with a weight come first with probability proportional to it: a weighted draw without replacement
    (Efraimidis and Spirakis 2006). Scores are written in single precision, which tells 2^24 places apart; beyond, equal
    ones are ordered by id.
    """

    name = "random"
    summary = "uniform documents, the control"
    uses_upper = uses_proxy = bound_by_shares = False
    trains_in_order = True

    def score(self, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        """See the class; ``rows`` are candidates of the fit."""
        return -self._place_of[np.searchsorted(self.inputs.rows, rows)]

    @cached_property
    def _place_of(self) -> np.ndarray:
        """Place of each candidate, in the order of ``inputs.rows``."""
        inputs = self.inputs
        generator = np.random.default_rng(inputs.derive("random"))
        order = generator.permutation(inputs.rows)
        if inputs.pool.weight_R is not None:
            order = order[np.argsort(generator.exponential(size=len(order)) / inputs.pool.weight_R[order])]
        place_R = np.empty(len(order))
        place_R[np.searchsorted(inputs.rows, order)] = np.arange(len(order))
        return place_R
