"""Seeds: one for every purpose of a run."""

import hashlib

__all__ = ["derive_seed"]


def derive_seed(seed: int, *labels: str | int) -> int:
    """An independent seed for one purpose of a run, in [0, 2^31)."""
    text = "/".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
