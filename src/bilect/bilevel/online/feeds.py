"""Where the reference's batches come from: loaders that never end, and never touch the caller's random state."""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from bilect.errors import BilectError

__all__ = ["Feed"]


class Feed:
    """Batch after batch of a loader; when it ends it starts again, reshuffled.

    A ``DataLoader`` that shuffles does so anew in every pass; a sequence of batches comes in its own order first and in
    a random order in later passes. All of the loader's draws, from torch, numpy and ``random``, come from a state of
    its own, so the order is a function of the seed and the caller's random state stays as it is.

    Args:
        loader: an iterable of batches, of this rank's part where there are several.
        seed: of the order.
        name: for errors.
    """

    def __init__(self, loader: Iterable[Any], seed: int, name: str) -> None:
        self.loader, self.seed, self.name = loader, seed, name
        self.passes, self.drawn = 0, 0
        self._iterator: Iterator[Any] | None = None
        self._random: Any = None

    def __call__(self) -> Any:
        """The next batch.

        Raises:
            BilectError: the loader is empty, or can be read only once and ended.
        """
        with self._own_random():
            if self._iterator is None:
                self._iterator = self._begin()
            try:
                batch = next(self._iterator)
            except StopIteration:
                if self.drawn == 0:
                    raise BilectError(f"{self.name} gives no batches; if it is a generator, pass a list or a DataLoader"
                                      ) from None  # fmt: skip
                self.passes, self.drawn = self.passes + 1, 0
                self._iterator = self._begin()
                batch = next(self._iterator, None)
                if batch is None:
                    raise BilectError(f"{self.name} ended and cannot be read again; pass a list or a DataLoader"
                                      ) from None  # fmt: skip
            self.drawn += 1
            return batch

    def _begin(self) -> Iterator[Any]:
        _seed_all(self.seed + 1_000_003 * self.passes)
        sampler: Any = getattr(self.loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.passes)
        if isinstance(self.loader, Sequence) and self.passes:
            return iter([self.loader[i] for i in torch.randperm(len(self.loader))])
        return iter(self.loader)

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        before = _states()
        if self._random is not None:
            _restore(self._random)
        try:
            yield
        finally:
            self._random = _states()
            _restore(before)

    def state_dict(self) -> dict[str, int]:
        """Passes made, and batches drawn in this one."""
        return {"passes": self.passes, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the state was taken: the pass begins again and what was drawn is skipped."""
        self.passes, self.drawn, self._iterator, self._random = state["passes"], 0, None, None
        for _ in range(state["drawn"]):
            self()


def _states() -> tuple[Any, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _restore(states: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def _seed_all(seed: int) -> None:
    torch.random.default_generator.manual_seed(seed)  # the CPU's only: loaders draw nothing from a GPU
    np.random.seed(seed % 2**32)
    random.seed(seed)
