"""One bilevel step as published, in plain PyTorch: what ``bilevel_step.py`` measures ours against.

Written from the description in BLISS, arXiv 2510.06048, section 3 and algorithm 1, with nothing of the project's
mathematics in it, so that it serves as an independent check too:

* float32; whole logits; the target model runs forward twice per step, once for the inner step and once for the
  hypergradient
* Hessian products by double backward (math attention), z by three clipped gradient steps from 1/numel
* one backward pass per document, a copy of the whole gradient kept for each, then its inner product with z

Where the description leaves a choice, the cheaper one is taken, which makes the comparison harder for us: the graph
of the lower gradient is built once per step and reused by all Hessian products; logits are normalised once for
cross-entropy and divergence together; every document has its own forward pass, so that its backward pass does not run
through the rest of the batch; padding on the right needs no attention mask.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from bilect.config import FitConfig
from bilect.data.batch import IGNORE, Batch
from bilect.functional.linear_solve import SGD_STEP_SIZE
from bilect.models.score_model import ScoreModel

__all__ = ["PublishedStep"]


class PublishedStep:
    """The counterpart of ``bilect.bilevel.offline.fit.BilevelFit`` with the ``sgd`` solver; same arguments.

    Attributes:
        z: solution of the last step's linear system, one tensor per parameter.
        d_B: inner products of the last step, one per document.
    """

    def __init__(
        self,
        proxy: PreTrainedModel,
        score_model: ScoreModel,
        target: PreTrainedModel,
        lower: Iterator[Batch],
        upper: Iterator[Batch],
        config: FitConfig,
    ) -> None:
        self.proxy, self.score_model, self.target = proxy.eval(), score_model.eval(), target.eval()
        self.lower, self.upper, self.config = lower, upper, config
        self.params = list(proxy.parameters())
        decay = config.weight_decay
        self.proxy_optimizer = torch.optim.AdamW(self.params, lr=config.proxy_learning_rate, weight_decay=decay)
        self.score_optimizer = torch.optim.AdamW(
            score_model.parameters(), lr=config.score_learning_rate, weight_decay=decay
        )
        self.schedules = [
            get_cosine_schedule_with_warmup(optimizer, int(config.warmup_ratio * config.steps), config.steps)
            for optimizer in (self.proxy_optimizer, self.score_optimizer)
        ]

    def step(self) -> None:
        """One bilevel step."""
        config = self.config
        batch = next(self.lower)
        score_B = self.score_model(batch.input_ids_BT, batch.mask_BT).scores
        weight_B = torch.softmax(score_B, dim=0).detach()

        for _ in range(config.inner_steps):
            self.lower_loss(batch, weight_B).backward()
            torch.nn.utils.clip_grad_norm_(self.params, config.grad_clip)
            self.proxy_optimizer.step()
            self.proxy_optimizer.zero_grad(set_to_none=True)

        upper = next(self.upper)
        upper_gradient = torch.autograd.grad(self.token_mean_loss(upper), self.params)
        self.z = self._solve(batch, weight_B, upper_gradient)
        gradients = [
            torch.autograd.grad(self.document_losses(batch.rows(slice(i, i + 1)))[0], self.params)
            for i in range(batch.n_documents)
        ]
        self.d_B = torch.stack(
            [sum((g * z).sum() for g, z in zip(gradient, self.z, strict=True)) for gradient in gradients]
        )

        (-(torch.softmax(score_B, dim=0) * self.d_B).sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.score_model.parameters(), config.grad_clip)
        self.score_optimizer.step()
        self.score_optimizer.zero_grad(set_to_none=True)
        for schedule in self.schedules:
            schedule.step()

    def lower_loss(self, batch: Batch, weight_B: Tensor) -> Tensor:
        """``sum_i P_i l_i + kl_coef * mean KL(target || proxy) + l2_coef ||theta||^2``."""
        logp_BTV = torch.log_softmax(self.proxy(batch.input_ids_BT, use_cache=False).logits, dim=-1)
        with torch.no_grad():
            logq_BTV = torch.log_softmax(self.target(batch.input_ids_BT, use_cache=False).logits, dim=-1)
        kl_BTV = torch.nn.functional.kl_div(logp_BTV, logq_BTV, log_target=True, reduction="none")
        predicted_BT = batch.target_BT != IGNORE
        kl = (kl_BTV.sum(dim=-1) * predicted_BT).sum() / predicted_BT.sum()
        l2 = torch.stack([p.square().sum() for p in self.params]).sum()
        ce = (_document_means(_token_losses(logp_BTV, batch), batch) * weight_B).sum()
        return ce + self.config.kl_coef * kl + self.config.l2_coef * l2

    def document_losses(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of every document."""
        return _document_means(self._losses(batch), batch)

    def token_mean_loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy over all predicted tokens."""
        return self._losses(batch).sum() / (batch.target_BT != IGNORE).sum()

    def _losses(self, batch: Batch) -> Tensor:
        logits_BTV = self.proxy(batch.input_ids_BT, use_cache=False).logits
        return _token_losses(torch.log_softmax(logits_BTV, dim=-1), batch)

    def _solve(self, batch: Batch, weight_B: Tensor, upper_gradient: tuple[Tensor, ...]) -> list[Tensor]:
        config = self.config
        numel = sum(p.numel() for p in self.params)
        z = [torch.full_like(p, 1.0 / numel) for p in self.params]
        step_size = config.solver_step_size or SGD_STEP_SIZE
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivatives
            lower_gradient = torch.autograd.grad(self.lower_loss(batch, weight_B), self.params, create_graph=True)
            for _ in range(config.solver_steps):
                products = torch.autograd.grad(lower_gradient, self.params, grad_outputs=z, retain_graph=True)
                residuals = [h - b for h, b in zip(products, upper_gradient, strict=True)]
                scales = [torch.clamp(1.0 / r.norm(), max=1.0) for r in residuals]
                z = [v - step_size * scale * r for v, r, scale in zip(z, residuals, scales, strict=True)]
        return z


def _token_losses(logp_BTV: Tensor, batch: Batch) -> Tensor:
    labels_BT = batch.target_BT.clamp(min=0)
    return -logp_BTV.gather(2, labels_BT[..., None])[..., 0] * (batch.target_BT != IGNORE)


def _document_means(loss_BT: Tensor, batch: Batch) -> Tensor:
    return loss_BT.sum(dim=1) / (batch.target_BT != IGNORE).sum(dim=1).clamp(min=1)
