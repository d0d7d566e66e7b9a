"""Noise that belongs to a document: the same in any batch, order and store."""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

__all__ = ["gumbel", "uniform"]


def uniform(seed: int, ids: Iterable[str]) -> np.ndarray:
    """One uniform draw in (0, 1) per document id, from a hash of it and the seed."""
    key = seed.to_bytes(8, "big")
    draws = [int.from_bytes(blake2b(i.encode(), digest_size=8, key=key).digest(), "big") >> 11 for i in ids]
    return (np.array(draws, dtype=np.float64) + 0.5) / 2**53


def gumbel(seed: int, ids: Iterable[str]) -> np.ndarray:
    """One standard Gumbel draw per document id: ``-log(-log(uniform))``."""
    return -np.log(-np.log(uniform(seed, ids)))
