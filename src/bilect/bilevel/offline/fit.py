"""BLISS: fit a score model so that training on what it weighs up lowers the upper loss. One call is one bilevel step.

    lower:  theta_p <- AdamW on g = sum_i P_i l_i + kl_coef KL + l2_coef ||theta_p||^2,   P = softmax of the scores
    upper:  theta_s <- AdamW on dPhi/dtheta_s = - sum_i P_i (d_i - dbar) ds_i/dtheta_s                (learn: policy)
            theta_s <- AdamW on the mean Huber loss of s_i - y_i, here and on earlier batches     (learn: regression)

The policy gradient is the paper's. Regression (ours) has the scores predict the labels y, which are d brought to median
0 and a robust deviation of 1 within their batch, without far tails; batches are kept, and seen many times.

d comes from the implicit or the penalty hypergradient, see ``bilect.functional.hypergradient``. BLISS, arXiv
2510.06048, algorithm 1. Across ranks only the scores and the d's are gathered, next to the usual gradient sums.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from bilect.bilevel.objective import (
    Objective,
    TargetOnBatch,
    directional,
    document_losses,
    lower_objective,
    target_on_batch,
    upper_objective,
)
from bilect.bilevel.offline import solvers
from bilect.bilevel.offline.solvers import System
from bilect.bilevel.offline.twins import Twins
from bilect.config import FitConfig
from bilect.data.batch import Batch
from bilect.data.loading import BatchStream
from bilect.errors import BilectError
from bilect.functional import linear_solve
from bilect.functional.hypergradient import penalty_values, score_gradient
from bilect.functional.linear_solve import relative_residual
from bilect.functional.trees import Tree
from bilect.functional.weights import document_weights, effective_sample_size, robust_standardise, weight_entropy
from bilect.models.causal_lm import CausalLM, share_vocabulary
from bilect.models.score_model import ScoreModel
from bilect.runtime import distributed
from bilect.runtime.device import autocast
from bilect.runtime.sharding import has_shards

__all__ = ["BilevelFit"]

KEPT_BATCHES = 512  # whose labels regression sees again


class BilevelFit:
    """The state of one fit: proxy, score model, their optimisers and schedules, and the twins.

    Args:
        proxy: lower variable; trained in place.
        score_model: upper variable; trained in place.
        target: the frozen target model, or None without divergence; with ``config.bf16`` it is cast in place.
        lower: endless lower batches (this rank's part of each); regression draws some again, from a ``BatchStream``.
        upper: endless upper batches (this rank's part of each).
        config: every choice.
        upper_sets: name and weight of each upper set, where the upper batches hold several (``Batch.set_B``).

    Raises:
        BilectError: a regression of scores that are bounded.
    """

    def __init__(
        self,
        proxy: PreTrainedModel,
        score_model: ScoreModel,
        target: PreTrainedModel | None,
        lower: Iterator[Batch],
        upper: Iterator[Batch],
        config: FitConfig,
        upper_sets: Mapping[str, float] | None = None,
    ) -> None:
        if config.learn == "regression" and score_model.config.head != "linear":
            raise BilectError("fit.learn: the labels of a regression are not bounded; set models.score_head=linear")
        self.config, self.solver = config, solvers.get(config.solver)
        self.proxy = CausalLM(proxy)
        self.score_model = score_model.eval()  # no dropout: a score is a function of the document
        self.target = None
        if target is not None and config.kl_coef > 0:
            # frozen, so cast once instead of at every pass; a sharded one comes in its dtype
            cast = config.bf16 and not has_shards(target)
            self.target = CausalLM(target.to(torch.bfloat16) if cast else target)
            share_vocabulary(self.proxy, self.target)
        self.lower, self.upper = lower, upper
        self.upper_sets = dict(upper_sets or {"": 1.0})
        self.params = self.proxy.params()
        decay = config.weight_decay
        self.proxy_optimizer = torch.optim.AdamW(
            list(self.params.values()), lr=config.proxy_learning_rate, weight_decay=decay
        )
        self.score_optimizer = torch.optim.AdamW(
            score_model.parameters(), lr=config.score_learning_rate, weight_decay=decay
        )
        self.schedules = [
            get_cosine_schedule_with_warmup(optimizer, int(config.warmup_ratio * config.steps), config.steps)
            for optimizer in (self.proxy_optimizer, self.score_optimizer)
        ]
        self.kept: list[tuple[list[int], Tensor]] = []  # rows and labels of global batches, for regression
        self.twins: Twins | None = None
        self.hessian_norm: float | None = None  # where the solver's settings follow from it
        self.steps_done = 0

    def step(self) -> dict[str, Any]:
        """One bilevel step; returns its figures (the same on every rank), which are fetched together at its end."""
        config = self.config
        batch = next(self.lower)
        score_B = self._scores(batch)
        score_M, own = distributed.gather_rows(score_B)
        weight_M = document_weights(score_M, config.weighting)
        lower = self._lower(batch, weight_M[own])

        for _ in range(config.inner_steps):
            lower_loss, kl = self._inner_step(lower)
        figures: dict[str, Any] = {"lower_loss": lower_loss, "kl": kl if lower.target is not None else None}

        if config.hypergradient == "implicit":
            d_B, more = self._implicit(lower, batch)
        else:
            d_B, more = self._penalty(batch)
        d_M, _ = distributed.gather_rows(d_B.to(score_M.dtype))
        if config.learn == "policy":
            gradient_M, _ = score_gradient(score_M, d_M, config.weighting, config.standardise)
            score_B.backward(gradient_M[own])
        else:
            self._regress(score_B, robust_standardise(d_M), own)
        self._score_step()

        self.steps_done += 1
        figures |= {
            "step": self.steps_done,
            **more,
            "weight_entropy": weight_entropy(weight_M),
            "effective_sample_size": effective_sample_size(weight_M),
            "score_mean": score_M.mean(),
            "score_std": score_M.std(correction=0),
            "score_min": score_M.min(),
            "score_max": score_M.max(),
            "d_std": d_M.std(correction=0),
            "learning_rate": self.schedules[1].get_last_lr()[0],
        }
        fetched, (score, d) = _fetched(figures, torch.stack([score_M, d_M]))
        # of labels that the scores have not learned from yet
        return {"step": self.steps_done, **fetched, "label_correlation": _rank_correlation(score, d)}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step changes, but for the positions of the batch streams; the same on every rank."""
        return {
            "proxy": self.proxy.model.state_dict(),
            "score_model": self.score_model.state_dict(),
            "optimizers": [x.state_dict() for x in (self.proxy_optimizer, self.score_optimizer)],
            "schedules": [x.state_dict() for x in self.schedules],
            "twins": None if self.twins is None else vars(self.twins),
            "hessian_norm": self.hessian_norm,
            "kept": self.kept,
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state: the next step is exactly what it would have been."""
        self.proxy.model.load_state_dict(state["proxy"])
        self.score_model.load_state_dict(state["score_model"])
        for optimizer, own in zip((self.proxy_optimizer, self.score_optimizer), state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        for schedule, own in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(own)
        self.twins = None if state["twins"] is None else Twins(**state["twins"])
        self.hessian_norm = state["hessian_norm"]
        self.kept = list(state["kept"])
        self.steps_done = state["steps_done"]

    def _scores(self, batch: Batch) -> Tensor:
        with autocast(batch.input_ids_BT.device, self.config.bf16):
            return self.score_model(batch.input_ids_BT, batch.mask_BT, right_padded=True).scores

    def _lower(self, batch: Batch, weight_B: Tensor) -> Objective:
        config = self.config
        return lower_objective(
            self.proxy,
            batch,
            weight_B,
            target=self._target_on(batch),
            kl_coef=config.kl_coef,
            l2_coef=config.l2_coef,
            direction=config.kl_direction,
        )

    def _target_on(self, batch: Batch) -> TargetOnBatch | None:
        """The target's single pass over a batch, in micro-batches: it is the largest model here."""
        if self.target is None:
            return None
        target = target_on_batch(self.target, batch, self.config.bf16, self.config.target_micro_batch)
        if not self._many_gradients:
            return target
        return target.hold(torch.promote_types(self.proxy.model.dtype, torch.float32))

    @property
    def _many_gradients(self) -> bool:
        """Whether a lower batch sees more gradients than the inner step's: Hessian products by differences."""
        config = self.config
        solves = config.hypergradient == "implicit" and self.solver.products(config) > 0
        forward = config.kl_direction == "target_to_proxy"
        return forward and ((solves and config.hvp != "exact") or config.inner_steps > 2)

    def _inner_step(self, lower: Objective) -> tuple[Tensor, Tensor]:
        gradient, loss, kl, _ = lower.gradient(self.params, self.config.bf16)
        for k, p in self.params.items():
            p.grad = gradient[k]
        torch.nn.utils.clip_grad_norm_(self.params.values(), self.config.grad_clip)
        self.proxy_optimizer.step()
        self.proxy_optimizer.zero_grad(set_to_none=True)
        return loss, kl

    def _implicit(self, lower: Objective, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """``d_i = < grad l_i, z >``, z from the solver at the proxy's new parameters."""
        config = self.config
        params: Tree = {k: v.detach() for k, v in self.params.items()}
        upper = self._upper().gradient(params, config.bf16)
        hvp = lower.hvp(params, config.hvp)
        if self.solver.measures_norm(config) and (self.hessian_norm is None or self.steps_done % config.log_every == 0):
            self.hessian_norm = linear_solve.spectral_norm(hvp, upper.tree)
        damping, eps = self.solver.damping(config, self.hessian_norm), self.proxy_optimizer.defaults["eps"]

        def second_moment() -> Tree:
            return linear_solve.second_moment_of(self.proxy_optimizer, self.params, upper.tree)

        system = System(hvp, upper.tree, damping, self.hessian_norm, second_moment, eps)
        solution = self.solver.solve(system, config)
        residual = solution.residual
        if residual is None and self.steps_done % config.log_every == 0:
            residual = relative_residual(hvp, upper.tree, solution.z, damping)
        d_B = directional(self.proxy, batch, params, solution.z, config.directional)
        more = {"residual": residual, "solver_note": solution.note, "hessian_norm": self.hessian_norm}
        return d_B, {**self._upper_losses(upper.ce, upper.ce_S), **more}

    def _upper(self) -> Objective:
        return upper_objective(self.proxy, next(self.upper), list(self.upper_sets.values()))

    def _upper_losses(self, loss: Tensor, loss_S: Tensor) -> dict[str, Any]:
        """f, and where there are several upper sets the mean loss of each."""
        total = sum(self.upper_sets.values())
        by_set = {
            name: part * total / weight for (name, weight), part in zip(self.upper_sets.items(), loss_S, strict=False)
        }
        return {"upper_loss": loss, **({"upper_loss_by_set": by_set} if by_set else {})}

    def _penalty(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """``d_i = lambda (l_i(m) - l_i(w))`` with twins that are synchronised every ``sync_every`` steps."""
        config = self.config
        if self.twins is None or self.steps_done % config.sync_every == 0:
            self.twins = Twins.train(
                self.params,
                self._draw,
                steps=config.reference_steps,
                learning_rate=config.reference_learning_rate or config.proxy_learning_rate,
                penalty=config.penalty,
                matched=config.baseline == "matched",
                grad_clip=config.grad_clip,
                bf16=config.bf16,
            )
        losses = document_losses(self.proxy, batch)
        with torch.no_grad():
            baseline = self.twins.matched if self.twins.matched is not None else self.params
            d_B = penalty_values(losses(baseline), losses(self.twins.reference), config.penalty)
        return d_B, {**self._upper_losses(self.twins.upper_loss, self.twins.upper_loss_S), "residual": None}

    def _draw(self) -> tuple[Objective, Objective]:
        batch = next(self.lower)
        with torch.no_grad():
            score_M, own = distributed.gather_rows(self._scores(batch))
        weight_B = document_weights(score_M, self.config.weighting)[own]
        return self._lower(batch, weight_B), self._upper()

    def _regress(self, score_B: Tensor, label_M: Tensor, own: slice) -> None:
        """Backward passes of the regression on this batch and ``replays`` earlier ones, each with the same weight."""
        lower = cast(BatchStream, self.lower)
        seen = np.random.default_rng(self.steps_done).permutation(len(self.kept))[: self.config.replays]
        _huber(score_B, label_M, own, 1 + len(seen)).backward()
        for rows, labels in (self.kept[k] for k in seen):
            _huber(self._scores(lower.batch(np.array(rows))), labels, own, 1 + len(seen)).backward()
        self.kept = [*self.kept, (lower.drawn.tolist(), label_M)][-KEPT_BATCHES:]

    def _score_step(self) -> None:
        gradients = {k: p.grad for k, p in self.score_model.named_parameters() if p.grad is not None}
        for k, gradient in distributed.sum_tree(gradients).items():
            gradients[k].copy_(gradient)
        torch.nn.utils.clip_grad_norm_(self.score_model.parameters(), self.config.grad_clip)
        self.score_optimizer.step()
        self.score_optimizer.zero_grad(set_to_none=True)
        for schedule in self.schedules:
            schedule.step()


def _huber(score_B: Tensor, label_M: Tensor, own: slice, batches: int) -> Tensor:
    """This rank's part of the mean Huber loss, over the documents of several global batches of one size."""
    total = torch.nn.functional.huber_loss(score_B, label_M[own].to(score_B.dtype), reduction="sum")
    return total / (len(label_M) * batches)


def _fetched(figures: dict[str, Any], values: Tensor) -> tuple[dict[str, Any], np.ndarray]:
    """Scalar tensors as floats, those in an inner dict too, and some values: all by one copy from the device."""
    inner = {(k, name): x for k, v in figures.items() if isinstance(v, dict) for name, x in v.items()}
    scalars = {k: v for k, v in (*figures.items(), *inner.items()) if isinstance(v, Tensor)}
    flat = torch.cat([torch.stack([v.double() for v in scalars.values()]), values.double().flatten()]).cpu().numpy()
    floats = dict(zip(scalars, flat.tolist(), strict=False))

    def plain(key: Any, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain((key, name), x) for name, x in value.items()}
        return floats.get(key, value)

    return {k: plain(k, v) for k, v in figures.items()}, flat[len(scalars) :].reshape(values.shape)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's; None where one of both is constant."""
    return float(spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else None
