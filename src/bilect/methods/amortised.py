"""A small model that learns the scores of another method from a sample, and scores the pool in one cheap pass (ours).

    theta_s = argmin mean_i huber( s_i - y_i )       y = labels with median 0 and a robust deviation of 1

The labels are the other method's scores of some candidates, brought to one scale (``functional.weights``). A tenth of
them is held out: training goes over the rest again and again until these are predicted no better, keeps the best
weights, and reports their rank correlation with the held-out labels, which says how far the small model is to be
trusted. It is MATES' second half (arXiv 2406.06046, section 3) for any label. The scores are in the labels' unit.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator
from scipy.stats import spearmanr
from torch import Tensor

from bilect import methods
from bilect.data.batch import make_batch
from bilect.data.tokens import TokenStore
from bilect.errors import BilectError
from bilect.functional.weights import robust_standardise
from bilect.methods._resume import resume
from bilect.methods._score_model import ScoreModelMethod
from bilect.methods.contract import DocumentMethod, Figures, Foresight, MethodConfig, Sizes
from bilect.models.flops import forward_flops
from bilect.models.score_model import ScoreModel
from bilect.runtime import distributed
from bilect.runtime.checkpoints import Stateful, save_parts
from bilect.runtime.device import autocast
from bilect.runtime.progress import Task
from bilect.runtime.seeds import derive_seed
from bilect.selection.scoring import score_rows

__all__ = ["Amortised", "AmortisedConfig", "Regression"]

LEAST_LABELS, LABELS_AT_ONCE, HELD_OUT = 20, 256, 0.1
SHARES = 8  # that ranks take of those at once
PATIENCE = 2  # passes without a better prediction of the held-out labels, then it ends


class AmortisedConfig(MethodConfig):
    """Whose scores are learned, and by what."""

    of: str = Field("excess", description="the method whose scores are labels")
    settings: dict[str, Any] = Field({}, description="of that method")
    labels: int = Field(4096, ge=LEAST_LABELS, description="candidates that are scored by it")
    layers: PositiveInt | None = Field(None, description="first blocks of the proxy that it has; None: all")
    epochs: PositiveInt = Field(20, description="greatest number of passes over the labels")
    batch_size: PositiveInt = Field(16, description="documents of a step")
    learning_rate: PositiveFloat = Field(1e-3, description="of AdamW")

    @field_validator("of")
    @classmethod
    def _scores(cls, name: str) -> str:
        with _as_value_error():
            if name == "amortised" or not issubclass(methods.get(name), DocumentMethod):
                raise ValueError("it gives documents no scores of its own")
        return name

    @field_validator("settings")
    @classmethod
    def _settings(cls, settings: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        with _as_value_error():
            if "of" in info.data:
                methods.make(info.data["of"], settings)
        return settings


@contextmanager
def _as_value_error() -> Iterator[None]:
    try:
        yield
    except BilectError as error:
        raise ValueError(str(error)) from error


class Amortised(ScoreModelMethod[AmortisedConfig]):
    """See the module."""

    name = "amortised"
    summary = "a small model learns another method's scores from a sample (ours, after arXiv 2406.06046)"
    Config = AmortisedConfig

    def foresee(self, sizes: Sizes) -> Foresight:
        """The other method's fit, its scores of the labelled documents, and all passes of the regression."""
        config, labels = self.config, min(self.config.labels, sizes.documents)
        taught = methods.make(config.of, config.settings).foresee(sizes)
        score_model, tokens = sizes.score_model(config.layers), labels * sizes.length
        of_pass = (3 * (1 - HELD_OUT) + HELD_OUT) * forward_flops(score_model, tokens, sizes.length)
        flops = taught.fit_flops + taught.score_flops * labels / sizes.documents + config.epochs * of_pass
        fit_tokens = taught.fit_tokens + (1 + config.epochs) * tokens
        return Foresight(fit_tokens, flops, self._foreseen_scoring(sizes, config.layers))

    def _fit(self, task: Task) -> Figures:
        inputs, config = self.inputs, self.config
        order = np.random.default_rng(inputs.derive("labels")).permutation(inputs.rows)
        rows = order[: config.labels]
        if len(rows) < LEAST_LABELS:
            raise BilectError(f"amortised: {len(rows)} candidates are too few to learn from; it takes {LEAST_LABELS}")
        teacher, given = self._teacher(task)
        head = torch.Generator().manual_seed(inputs.derive("score head"))
        self.score_model = ScoreModel.from_causal_lm(inputs.warm_proxy, head, "linear", config.layers)
        labels = _Labels()
        regression = Regression(
            self.score_model, inputs.pool, rows, config, inputs.pad_id, inputs.derive("regression"), inputs.bf16
        )
        parts: dict[str, Stateful] = {"labels": labels, "regression": regression}
        path = inputs.scratch / "amortised.pt"
        resume(path, parts, inputs.device)
        task.advance(len(labels.values) + regression.done)
        while len(labels.values) < len(rows):
            some = rows[len(labels.values) :][:LABELS_AT_ONCE]
            shares = np.array_split(some, min(SHARES, len(some)))
            found = distributed.spread(lambda own: teacher.score(inputs.pool, own), shares)
            labels.values += np.concatenate(found).tolist()
            save_parts(path, parts)
            task.advance(len(some))
        label_R = torch.tensor(labels.values, dtype=torch.float64)
        while not regression.finished:
            regression.step(label_R)
            if regression.done % inputs.checkpoint_every == 0:
                save_parts(path, parts)
            task.advance(1)
        regression.keep_best()
        tokens, length = float(inputs.pool.length_R[rows].sum()), float(inputs.pool.length_R[rows].mean())
        learned = regression.done * config.batch_size * length
        flops = given["flops"] + teacher.score_flops(inputs.pool, rows)
        flops += 3 * forward_flops(self.score_model, learned, length)
        flops += forward_flops(self.score_model, HELD_OUT * tokens * regression.epoch, length)
        return {"flops": flops, "labels": len(rows), "label_correlation": regression.correlation}

    def _teacher(self, task: Task) -> tuple[DocumentMethod[Any], Figures]:
        """The other method, fitted; an interrupted fit of it goes on, in a folder of its own."""
        inputs, teacher = self.inputs, methods.make(self.config.of, self.config.settings)
        return teacher, teacher.fit(replace(inputs, scratch=inputs.scratch / "teacher", previous=None, log=None), task)


class _Labels:
    """Those that are there."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = list(state["values"])


class Regression:
    """AdamW on the Huber loss, pass after pass, until held-out labels are predicted no better.

    Args:
        score_model: with a linear head; trained in place.
        store: of the documents.
        rows: documents with labels, in random order; the first tenth is held out.
        config: sizes and rates.
        pad_id: padding token.
        seed: of the order of each pass.
        bf16: matrix products in bfloat16.

    Attributes:
        done: steps so far.
        epoch: passes that are complete.
        correlation: Spearman's, of the best weights' scores with the held-out labels; None where one is constant.
        finished: whether there is nothing left to do.
    """

    def __init__(
        self,
        score_model: ScoreModel,
        store: TokenStore,
        rows: np.ndarray,
        config: AmortisedConfig,
        pad_id: int,
        seed: int,
        bf16: bool = False,
    ) -> None:
        self.score_model, self.store, self.rows, self.config = score_model.eval(), store, rows, config
        self.pad_id, self.seed, self.bf16 = pad_id, seed, bf16
        self.held_out = max(int(HELD_OUT * len(rows)), 2)
        self.optimizer = torch.optim.AdamW(score_model.parameters(), lr=config.learning_rate)
        self.best = copy.deepcopy(score_model.state_dict())
        self.correlation: float | None = None
        self.done, self.epoch, self.best_epoch = 0, 0, 0

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass."""
        return -(-(len(self.rows) - self.held_out) // self.config.batch_size)

    @property
    def finished(self) -> bool:
        """Whether the last pass is done, or the one after which nothing got better for a while."""
        return self.epoch >= self.config.epochs or self.epoch - self.best_epoch >= PATIENCE

    def step(self, label_R: Tensor) -> None:
        """One step; at the end of a pass the held-out labels are looked at.

        Args:
            label_R: labels of ``rows``.
        """
        size = self.config.batch_size
        learned = np.arange(self.held_out, len(self.rows))
        order = np.random.default_rng(derive_seed(self.seed, "pass", self.epoch)).permutation(learned)
        first = self.done % self.steps_per_epoch * size
        some = order[first : first + size]
        batch = make_batch(self.store.rows(self.rows[some]), self.pad_id).to(self.score_model.device)
        target_R = robust_standardise(label_R)
        with autocast(batch.input_ids_BT.device, self.bf16):
            score_B = self.score_model(batch.input_ids_BT, batch.mask_BT).scores
        label_B = target_R[some].to(score_B.device, torch.float32)
        torch.nn.functional.huber_loss(score_B.float(), label_B).backward()
        torch.nn.utils.clip_grad_norm_(self.score_model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        if self.done % self.steps_per_epoch == 0:
            self.epoch += 1
            self._look(label_R)

    def keep_best(self) -> None:
        """Go back to the best weights."""
        self.score_model.load_state_dict(self.best)

    def _look(self, label_R: Tensor) -> None:
        scores = score_rows(self.score_model, self.store, self.rows[: self.held_out], self.pad_id, bf16=self.bf16)
        labels = label_R[: self.held_out].numpy()
        found = float(spearmanr(scores, labels).statistic) if np.ptp(scores) and np.ptp(labels) else None
        if self.correlation is None or (found is not None and found > self.correlation):
            self.correlation, self.best_epoch = found, self.epoch
            self.best = copy.deepcopy(self.score_model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step changes."""
        keys = ("correlation", "done", "epoch", "best_epoch")
        return {
            "model": self.score_model.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            **{key: getattr(self, key) for key in keys},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.score_model.load_state_dict(state["model"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        for key in ("correlation", "done", "epoch", "best_epoch"):
            setattr(self, key, state[key])
