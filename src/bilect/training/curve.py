"""Held-out losses while a model trains: the points of its learning curve."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bilect.data.tokens import TokenStore
from bilect.runtime import distributed
from bilect.training.evaluation import evaluate

__all__ = ["CurveCallback", "HeldoutCurve", "points"]

PREFIX, SECONDS = "heldout/", "heldout_seconds"


@dataclass(frozen=True)
class HeldoutCurve:
    """What is measured, and how often.

    Attributes:
        stores: held-out sets by name.
        every: steps between two points; the last step has one too.
        documents: of each set, the same ones for every model.
        pad_id: padding token.
        batch_tokens: padded tokens per batch.
        bf16: matrix products in bfloat16.
    """

    stores: Mapping[str, TokenStore]
    every: int
    documents: int
    pad_id: int
    batch_tokens: int
    bf16: bool = False

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Mean loss per predicted token of each set; draws no random number, and leaves the model as it was."""
        training, losses = model.training, {}
        model.eval()
        for name, store in self.stores.items():
            rows = np.sort(np.random.default_rng(0).permutation(len(store))[: self.documents])
            losses[name] = evaluate(model, store, self.pad_id, self.batch_tokens, rows, bf16=self.bf16).loss
        model.train(training)
        return losses


class CurveCallback(TrainerCallback):
    """Puts the points among the logs of a Trainer: into its checkpoints, and to its trackers.

    Attributes:
        seconds: spent on measuring, by this process.
    """

    def __init__(self, curve: HeldoutCurve, model: PreTrainedModel, trainer: Trainer) -> None:
        self.curve, self.model, self.trainer = curve, model, trainer
        self.seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._measure(control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.curve.every == 0 or state.global_step == state.max_steps:
            self._measure(control)

    def _measure(self, control: TrainerControl) -> None:
        start, due = time.perf_counter(), control.should_log
        losses = {PREFIX + name: loss for name, loss in self.curve.measure(self.model).items()}
        seconds = time.perf_counter() - start
        self.seconds += seconds
        if distributed.is_main():
            self.trainer.log({**losses, SECONDS: seconds})
            control.should_log = due  # logging unsets it, and this step's training loss would go missing on this rank


def points(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``step``, ``seconds`` of measuring, and ``loss`` by set, of each point in a Trainer's log."""
    return [
        {
            "step": entry["step"],
            "loss": {k.removeprefix(PREFIX): v for k, v in entry.items() if k.startswith(PREFIX)},
            "seconds": round(entry[SECONDS], 3),
        }
        for entry in log_history
        if SECONDS in entry
    ]
