"""Floating-point operations (FLOPs) of a bilevel fit and of online selection, counted from what each step does."""

from transformers import PreTrainedModel

from bilect.bilevel.offline import solvers
from bilect.config import FitConfig
from bilect.config.online import BladeConfig
from bilect.functional.linear_solve import NORM_PRODUCTS
from bilect.models.flops import forward_flops

__all__ = ["fit_flops", "selecting_flops"]


def fit_flops(
    config: FitConfig,
    proxy: PreTrainedModel,
    score_model: PreTrainedModel,
    target: PreTrainedModel | None,
    *,
    lower_length: float,
    upper_length: float,
) -> float:
    """FLOPs of all steps of a fit; a backward pass counts as two forward passes.

    Args:
        config: of the fit.
        proxy: theta_p.
        score_model: theta_s.
        target: theta_t, or None without divergence.
        lower_length: mean tokens of a pool document.
        upper_length: mean tokens of a target-set document.
    """
    lower_tokens = config.lower_batch_size * lower_length
    upper_tokens = config.upper_batch_size * upper_length
    lower = forward_flops(proxy, lower_tokens, lower_length)
    upper = forward_flops(proxy, upper_tokens, upper_length)
    score = forward_flops(score_model, lower_tokens, lower_length)
    kl = forward_flops(target, lower_tokens, lower_length) if target is not None and config.kl_coef else 0.0
    seen = 1 + (config.replays if config.learn == "regression" else 0)
    step = kl + 3 * score * seen + 3 * lower * config.inner_steps
    if config.hypergradient == "implicit":
        solver = solvers.get(config.solver)
        products: float = solver.products(config)
        products += 0 if solver.knows_residual else 1 / config.log_every  # the residual that is logged
        products += NORM_PRODUCTS / config.log_every if solver.measures_norm(config) else 0
        each, once = {"exact": (9, 0), "finite_difference": (6, 0), "forward_difference": (3, 3)}[config.hvp]
        step += 3 * upper + lower * (each * products + once * min(products, 1))
        step += {"jvp": 2, "finite_difference": 2, "ghost": 3}[config.directional] * lower
    else:
        twins = 2 if config.baseline == "matched" else 1
        twin_step = kl + score + 3 * upper + 3 * lower * twins
        step += 2 * lower + config.reference_steps / config.sync_every * twin_step
    return config.steps * step


def selecting_flops(
    config: BladeConfig,
    model: PreTrainedModel,
    *,
    tokens: float,
    context: int,
    batch_tokens: float,
    upper_tokens: float,
    synchronisations: float,
) -> float:
    """FLOPs that choosing tokens adds to a training: forward passes of the followers, and their own steps.

    Args:
        config: of the selection.
        model: u.
        tokens: trained on.
        context: tokens of a sequence.
        batch_tokens: of a training batch that a reference step learns from, all ranks.
        upper_tokens: of an upper batch, all ranks.
        synchronisations: how often w started from u.
    """
    if config.method not in ("blade", "rho1") or config.keep_ratio == 1:
        return 0.0
    twins = 2 if config.baseline == "matched" else 1
    lower = batch_tokens if config.method == "blade" and config.penalty else 0.0
    trained = synchronisations * config.reference_steps * (upper_tokens + twins * lower)
    return forward_flops(model, tokens * twins + 3 * trained, context)
