"""What a selection method is: fit on the inputs, score documents, save, load; or options of the online selector.

A module of this package holds one method: its settings and its class. Higher score means keep, everywhere.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from bilect.data.tokens import TokenStore
from bilect.engines import Engine, Here
from bilect.errors import BilectError, reason
from bilect.methods._sizes import Foresight, Sizes
from bilect.models.loading import load_causal_lm
from bilect.runtime import distributed
from bilect.runtime.files import write_json
from bilect.runtime.progress import Task
from bilect.runtime.seeds import derive_seed
from bilect.runtime.sharding import shard

__all__ = [
    "DocumentMethod",
    "Figures",
    "Foresight",
    "Inputs",
    "Method",
    "MethodConfig",
    "Sizes",
    "TokenMethod",
    "UpperSet",
    "saved_name",
]

Figures = dict[str, Any]
UpperSet = tuple[str, float, TokenStore]  # name, weight, tokens
C = TypeVar("C", bound=BaseModel)

METHOD_FILE = "method.json"


class MethodConfig(BaseModel):
    """Settings of a method; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


@dataclass(frozen=True)
class Inputs:
    """What every method is given in a round; each takes what it needs.

    Attributes:
        pool: tokens of the pool.
        rows: its candidate documents.
        upper: the target sets.
        proxy: folder of the warmed-up proxy, with ``optimizer.pt`` where its training has left one.
        scratch: a folder of this fit alone, for what an interrupted fit goes on from.
        pad_id: padding token.
        seed: of the run; every random draw has its own from ``derive``.
        device: where to compute.
        target: folder of the target as it is now, or None.
        number: of the round, from 1.
        previous: folder where this method was saved in the round before; None in the first.
        log: file for the figures of every step, JSON lines; None for none.
        bf16: matrix products in bfloat16 where the method allows it.
        batch_tokens: padded tokens per scoring batch.
        checkpoint_every: steps of a fit between two checkpoints.
        engine: where work on blocks of documents is done that many processes can share.
        shard: whether the target is spread over the ranks (FSDP2).
    """

    pool: TokenStore
    rows: np.ndarray
    upper: Sequence[UpperSet]
    proxy: Path
    scratch: Path
    pad_id: int
    seed: int
    device: torch.device
    target: Path | None = None
    number: int = 1
    previous: Path | None = None
    log: Path | None = None
    bf16: bool = False
    batch_tokens: int = 8192
    checkpoint_every: int = 500
    engine: Engine = field(default_factory=Here)
    shard: bool = False

    def derive(self, label: str) -> int:
        """The seed of one purpose in this round."""
        return derive_seed(self.seed, label, self.number)

    def load(self, folder: Path) -> PreTrainedModel:
        """A saved model, on the device."""
        return load_causal_lm(str(folder.resolve())).to(self.device)

    def load_frozen(self, folder: Path) -> PreTrainedModel:
        """A saved model that all ranks ask together and nobody trains, in half precision if the method computes so."""
        model = load_causal_lm(str(folder.resolve())).to(torch.bfloat16 if self.bf16 else torch.float32)
        if not self.shard:
            return model.to(self.device)
        shard(model, self.device)
        return model

    @cached_property
    def warm_proxy(self) -> PreTrainedModel:
        """The warm proxy, read once, for methods that do not change it."""
        return self.load(self.proxy)


class Method(ABC, Generic[C]):
    """What document and token methods have in common.

    Args:
        config: settings; the defaults of ``Config`` where None.

    Attributes:
        name: by which it is known, as its module's with ``-`` for ``_``.
        summary: one line, with the paper.
        Config: class of the settings, a frozen pydantic model that forbids extra keys.
        uses_upper: whether upper data say what is kept.
        uses_proxy: whether it needs the warm proxy, whose training then is part of its cost.
        scores_documents: whether an arm of a run trains on the documents with the best scores; else on all of them.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[BaseModel]] = MethodConfig
    uses_upper: ClassVar[bool] = True
    uses_proxy: ClassVar[bool] = True
    scores_documents: ClassVar[bool] = False

    def __init__(self, config: C | None = None) -> None:
        self.config: C = self.Config() if config is None else config  # type: ignore[assignment]


class DocumentMethod(Method[C]):
    """Scores documents. ``fit`` or ``load`` comes first; a score depends on the document alone, not on its batch.

    In every round of a run a method is made anew, fitted on the round's shard, saved, loaded and asked for scores. What
    it carries from round to round it reads from ``Inputs.previous``.

    Attributes:
        moves_proxy: whether the fit leaves a proxy of its own, saved as ``proxy/``, which diagnostics then look at.
        bound_by_shares: whether shares of sources and temperature of the selection apply; to a control they do not.
        trains_in_order: whether the kept documents are trained on in the order of their ranks.
    """

    scores_documents = True
    moves_proxy: ClassVar[bool] = False
    bound_by_shares: ClassVar[bool] = True
    trains_in_order: ClassVar[bool] = False
    inputs: Inputs

    @property
    def uses_target(self) -> bool:
        """Whether the fit needs the target model."""
        return False

    @property
    def steps(self) -> int | None:
        """Of the fit, for the progress display; None where they are not known."""
        return None

    def settings(self, number: int) -> dict[str, Any]:
        """What the fit of a round depends on; a changed value repeats it."""
        return self.config.model_dump(mode="json")

    def fit(self, inputs: Inputs, task: Task) -> Figures:
        """Learn what to keep. Goes on from what an interrupted fit has left in ``inputs.scratch``, to the same result.

        Args:
            inputs: see there.
            task: progress.

        Returns:
            Figures for the record, ``flops`` among them.

        Raises:
            BilectError: there is nothing to choose from, or nothing that says what good means.
        """
        if not len(inputs.rows):
            raise BilectError(f"{self.name}: there are no candidate documents to choose from; check the pool")
        if self.uses_upper and not inputs.upper:
            raise BilectError(f"{self.name}: no upper data says what good means; give at least one set")
        for name, _, store in inputs.upper if self.uses_upper else ():
            if not len(store):
                raise BilectError(f"{self.name}: the upper set {name!r} is empty; give it documents, or leave it out")
        self.inputs = inputs
        inputs.scratch.mkdir(parents=True, exist_ok=True)
        return self._fit(task)

    @abstractmethod
    def score(self, store: TokenStore, rows: np.ndarray) -> np.ndarray:
        """Scores (float64) in the order of ``rows``; higher means keep."""

    def score_flops(self, store: TokenStore, rows: np.ndarray) -> float:
        """FLOPs of scoring ``rows``, counted as ``bilect.models.flops`` does."""
        return 0.0

    def foresee(self, sizes: Sizes) -> Foresight:
        """FLOPs as ``fit`` and ``score_flops`` will count them, before either; of a method without models none."""
        return Foresight()

    def save(self, folder: Path) -> None:
        """Keep what was fitted in a folder."""
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            self._write(folder)
            write_json(folder / METHOD_FILE, {"name": self.name, "config": self.config.model_dump(mode="json")})
        distributed.barrier()

    @classmethod
    def load(cls, folder: Path, inputs: Inputs) -> Self:
        """A saved method.

        Args:
            folder: see ``save``.
            inputs: those of the fit: models are read from where they lie.

        Raises:
            BilectError: the folder holds none, or another one.
        """
        name, settings = _read_note(folder)
        if name != cls.name:
            raise BilectError(f"methods: {folder} holds the method {name!r}, not {cls.name!r}")
        method = cls(cls.Config.model_validate(settings))  # type: ignore[arg-type]
        method.inputs = inputs
        method._read(folder)
        return method

    def _fit(self, task: Task) -> Figures:
        """The fit itself, on ``self.inputs``; nothing to learn by default."""
        return {"flops": 0.0}

    def _write(self, folder: Path) -> None:
        """Save what was learned, beside the settings; called on the main rank."""

    def _read(self, folder: Path) -> None:
        """The inverse of ``_write``."""


class TokenMethod(Method[C]):
    """Chooses tokens while a model trains."""

    @abstractmethod
    def options(self, learning_rate: float) -> dict[str, Any]:
        """Keyword arguments of ``bilect.OnlineTokenSelector``, less the data loaders.

        Args:
            learning_rate: of the training.
        """


def saved_name(folder: Path) -> str:
    """Name of the method that a folder holds.

    Raises:
        BilectError: it holds none.
    """
    return _read_note(folder)[0]


def _read_note(folder: Path) -> tuple[str, dict[str, Any]]:
    try:
        note = json.loads((folder / METHOD_FILE).read_text(encoding="utf-8"))
        return str(note["name"]), dict(note["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BilectError(f"methods: {folder} holds no saved method ({reason(error)}); fit it first") from error
