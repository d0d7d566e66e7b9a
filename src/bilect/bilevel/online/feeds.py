"""Where the reference's batches come from: loaders that never end, and never touch the caller's random state."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilect.bilevel.online.token_loss import TokenBatch
from bilect.data.batch import IGNORE
from bilect.errors import BilectError, reason
from bilect.models.checks import positions

__all__ = ["Feed", "check_batch"]


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
        self._ahead: list[Any] = []  # looked at, and not handed out

    def peek(self) -> Any:
        """The next batch, which the next call gives.

        Raises:
            BilectError: as the call does, or the loader cannot make a batch.
        """
        if not self._ahead:
            try:
                self._ahead.append(self._draw())
            except BilectError:
                raise
            except Exception as error:  # anybody's data set and collator
                raise BilectError(f"{self.name}: cannot make a batch of it: {type(error).__name__}: {reason(error)}"
                                  ) from error  # fmt: skip
        return self._ahead[0]

    def __call__(self) -> Any:
        """The next batch.

        Raises:
            BilectError: the loader is empty, or can be read only once and ended.
        """
        batch = self._ahead.pop() if self._ahead else self._draw()
        self.drawn += 1
        return batch

    def _draw(self) -> Any:
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
        if self.passes or self.drawn or state["passes"]:  # else the batch looked at stays the first
            self._iterator, self._random = None, None
            self._ahead.clear()
        self.passes, self.drawn = state["passes"], 0
        for _ in range(state["drawn"]):
            self()


def check_batch(feed: Feed, model: Any) -> None:
    """Look at the next batch of a feed: all that would stop the model at it is told now.

    Raises:
        BilectError: no batch, no labels, nothing learned, ids or positions that the model has not, or columns that it
            does not take.
    """
    batch = feed.peek()
    if not isinstance(batch, Mapping):
        raise BilectError(f"{feed.name}: its batches must be mappings with input_ids and labels, not "
                          f"{type(batch).__name__}")  # fmt: skip
    if odd := [k for k in ("input_ids", "labels") if k in batch and not isinstance(batch[k], Tensor)]:
        raise BilectError(f"{feed.name}: {odd[0]} of a batch must be a tensor, not {type(batch[odd[0]]).__name__}; "
                          "give a data collator that pads")  # fmt: skip
    try:
        tokens = TokenBatch.of(batch)
    except BilectError as error:
        raise BilectError(f"{feed.name}: {error}") from error
    if odd := [k for k, v in tokens.inputs.items() if not isinstance(v, Tensor | int | float | None)]:
        raise BilectError(f"{feed.name}: the model takes no {odd[0]}, of which a batch has "
                          f"{type(tokens.inputs[odd[0]]).__name__}; leave the column out")  # fmt: skip
    if tokens.n == 0:
        raise BilectError(f"{feed.name}: nothing in its first batch is learned: all its labels are {IGNORE}")
    ids_BT, config = tokens.inputs["input_ids"], model.config.get_text_config()
    if not 0 <= int(ids_BT.min()) <= int(ids_BT.max()) < config.vocab_size:
        raise BilectError(f"{feed.name}: a batch has id {int(ids_BT.max())}, the model {config.vocab_size} ids; is it "
                          "the model's tokenizer?")  # fmt: skip
    longest, width = positions(model.config), tokens.shape[1]
    if isinstance(position_BT := tokens.inputs.get("position_ids"), Tensor):  # several examples in one row
        width = int(position_BT.max()) + 1
    if longest is not None and width > longest:
        raise BilectError(f"{feed.name}: a batch has {width} tokens in a row, the model {longest} positions; "
                          "shorten its examples")  # fmt: skip


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
