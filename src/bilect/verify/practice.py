"""The penalty gradient as it is really run: w and m take K first-order steps from a model u that is itself in training.

    w on f + lambda g,   m on lambda g,   d_n = lambda (l_n(m) - l_n(w));   m is u (``model``, BLADE) or ``matched``

Two yardsticks: the exact d at the solution of the lower level, and ``d_n`` of the next steps of u's own training, by
differentiating through them (``unrolled``). Theory speaks of one limit: under plain gradient steps eta -> 0 the terms
of g cancel between w and the matched twin, ``(m - w) / (K eta) -> grad f(u)``, so that d tends to the identity solver's
with an error O(eta), wherever u is.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bilect.bilevel.offline.twins import FirstOrderModel
from bilect.functional import hypergradient, linear_solve
from bilect.functional.directional import directional_jvp, hvp_exact
from bilect.functional.trees import Tree, add_scaled, scale
from bilect.verify.claims import Claim, cosine, log_slope, relative_error
from bilect.verify.exact import Solved, flat, gradient
from bilect.verify.problems import F64, Problem

__all__ = [
    "Optimizer", "Warm", "check_matched", "learning_rate_sweep", "steps_sweep", "sync_sweep", "twins", "unrolled",
    "warm_up", "warm_up_sweep",
]  # fmt: skip

Optimizer = Literal["adamw", "adamw, warm", "sgd"]
Baseline = Literal["model", "matched"]
BATCH = 16
PENALTY = 1.0  # lambda, as in the fit
STEPS = 10  # K, as in the fit


@dataclass(frozen=True)
class Warm:
    """A model in the middle of its training: parameters, and AdamW's second moment, bias corrected."""

    params: Tree
    second_moment: Tree


def batch_weights(n: int, generator: torch.Generator, whole: bool = False) -> Tensor:
    """Equal weights on 16 of n items drawn without replacement, zero elsewhere; on all of them if ``whole``."""
    size = n if whole else min(BATCH, n)
    chosen = torch.randperm(n, generator=generator)[:size]
    return torch.zeros(n, dtype=F64).index_fill_(0, chosen, 1 / size)


def warm_up(problem: Problem, steps: int, learning_rate: float) -> Warm:
    """AdamW on uniform lower batches, from the start."""
    generator = torch.Generator().manual_seed(0)
    model = FirstOrderModel(problem.start, learning_rate, grad_clip=1.0)
    for _ in range(steps):
        model.step(gradient(partial(problem.lower, batch_weights(problem.n_items, generator)), model.params))
    state, beta = model.optimizer.state, model.optimizer.defaults["betas"][1]
    moment = {k: state[p]["exp_avg_sq"] / (1 - beta ** float(state[p]["step"])) for k, p in model.params.items()}
    return Warm({k: v.detach().clone() for k, v in model.params.items()}, moment)


def _first_order(u: Warm, optimizer: Optimizer, learning_rate: float) -> FirstOrderModel:
    """A copy of u with the optimiser of the given kind; ``adamw`` is the project's, ``warm`` remembers u's batches."""
    model = FirstOrderModel(u.params, learning_rate, grad_clip=math.inf if optimizer == "sgd" else 1.0)
    if optimizer == "sgd":
        model.optimizer = torch.optim.SGD(list(model.params.values()), lr=learning_rate)  # type: ignore[assignment]
    elif optimizer == "adamw, warm":
        for k, p in model.params.items():  # a step count this high makes both bias corrections 1
            model.optimizer.state[p] = {
                "step": torch.tensor(1e6), "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": PENALTY**2 * u.second_moment[k],
            }  # fmt: skip
    return model


def twins(
    problem: Problem,
    u: Warm,
    alpha_N: Tensor,
    learning_rate: float,
    optimizer: Optimizer = "adamw",
    *,
    whole: bool = False,
    seed: int = 0,
) -> Iterator[tuple[Tree, Tree]]:
    """w and m after each step from u; as ``bilevel.twins.Twins``, with other optimisers too.

    Args:
        problem: whose.
        u: the model both start from.
        alpha_N: weights of the lower level.
        learning_rate: of both.
        optimizer: of both; "sgd" is plain gradient descent.
        whole: on all items, else on batches of 16.
        seed: of the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    w, m = (_first_order(u, optimizer, learning_rate) for _ in range(2))
    n_upper = len(problem.upper_losses(u.params))
    while True:
        lower = partial(problem.lower, alpha_N * problem.n_items * batch_weights(problem.n_items, generator, whole))
        weight_U = batch_weights(n_upper, generator, whole)

        def upper(params: Tree, weight_U: Tensor = weight_U) -> Tensor:
            return (weight_U * problem.upper_losses(params)).sum()

        w.step(add_scaled(gradient(upper, w.params), gradient(lower, w.params), PENALTY))
        m.step(scale(gradient(lower, m.params), PENALTY))
        yield ({k: v.detach() for k, v in w.params.items()}, {k: v.detach() for k, v in m.params.items()})


def after(steps: int, pairs: Iterator[tuple[Tree, Tree]]) -> tuple[Tree, Tree]:
    """w and m after K steps."""
    for _ in range(steps - 1):
        next(pairs)
    return next(pairs)


def unrolled(problem: Problem, u: Tree, alpha_N: Tensor, steps: int, learning_rate: float) -> Tensor:
    """``-d/dalpha f(w_H)``, ``w_H`` = u after H gradient steps on g(alpha, .): what the next steps make of a weight."""
    alpha_N = alpha_N.clone().requires_grad_()
    w = {k: v.detach().requires_grad_() for k, v in u.items()}
    for _ in range(steps):
        g = torch.autograd.grad(problem.lower(alpha_N, w), list(w.values()), create_graph=True)
        w = {k: v - learning_rate * step for (k, v), step in zip(w.items(), g, strict=True)}
    (d_N,) = torch.autograd.grad(-problem.upper(w), alpha_N)
    return d_N


def values(problem: Problem, u: Tree, w: Tree, m: Tree) -> dict[Baseline, Tensor]:
    """d with both baselines."""
    with torch.no_grad():
        loss_u, loss_w, loss_m = (problem.losses(params) for params in (u, w, m))
    plain, matched = (hypergradient.penalty_values(loss_N, loss_w, PENALTY) for loss_N in (loss_u, loss_m))
    return {"model": plain, "matched": matched}


class Judge:
    """What estimates at one u are compared with."""

    def __init__(self, problem: Problem, solved: Solved, u: Tree, horizon: int = 30) -> None:
        self.problem, self.u, self.exact_N = problem, u, solved.d_N
        rate = 1 / solved.eigenvalues[1]  # the largest step that is safe
        self.unrolled_N = unrolled(problem, u, solved.alpha_N, horizon, rate)

    def __call__(self, d_N: Tensor) -> dict[str, float]:
        """Cosine with the exact and with the unrolled d."""
        return {"cosine": cosine(d_N, self.exact_N), "cosine_unrolled": cosine(d_N, self.unrolled_N)}

    def penalty(self, w: Tree, m: Tree) -> dict[Baseline, dict[str, float]]:
        """Both baselines."""
        return {baseline: self(d_N) for baseline, d_N in values(self.problem, self.u, w, m).items()}


def check_matched(problem: Problem, solved: Solved, u: Warm) -> Claim:
    """The limit of the module's docstring, on all items, at a u that has not converged."""
    exact_N = directional_jvp(problem.losses, u.params, gradient(problem.upper, u.params))
    rates = [x / solved.eigenvalues[1] / STEPS for x in (1e-3, 1e-2)]  # K eta lambda_max: well below 1
    errors = []
    for rate in rates:
        w, m = after(STEPS, twins(problem, u, solved.alpha_N, rate, "sgd", whole=True))
        d_N = values(problem, u.params, w, m)["matched"]
        errors.append(relative_error(d_N / (PENALTY * STEPS * rate), exact_N))
    text = f"{problem.name}: matched twin against its limit, identity: slope of log error against log learning rate"
    return Claim("practice", text, log_slope(rates, errors), "1 in theory; as wide as the penalty's", 0.8, 1.2)


def steps_sweep(
    problem: Problem, solved: Solved, u: Warm, steps: Sequence[int], learning_rates: dict[Optimizer, float]
) -> list[dict[str, Any]]:
    """Quality against K, per optimiser and baseline."""
    judge, rows = Judge(problem, solved, u.params), []
    for optimizer, rate in learning_rates.items():
        run = twins(problem, u, solved.alpha_N, rate, optimizer)
        for k in range(1, max(steps) + 1):
            w, m = next(run)
            if k in steps:
                rows += [
                    {"problem": problem.name, "optimizer": optimizer, "baseline": baseline, "k": k, **figures}
                    for baseline, figures in judge.penalty(w, m).items()
                ]
    return rows


def learning_rate_sweep(
    problem: Problem, solved: Solved, u: Warm, learning_rates: Sequence[float], seeds: int
) -> list[dict[str, Any]]:
    """Every kind of optimiser against the twins' learning rate; one row per seed of the batches."""
    judge, rows = Judge(problem, solved, u.params), []
    for optimizer in get_args(Optimizer):
        for rate in learning_rates:
            for seed in range(seeds):
                w, m = after(STEPS, twins(problem, u, solved.alpha_N, rate, optimizer, seed=seed))
                rows += [
                    {"problem": problem.name, "optimizer": optimizer, "learning_rate": rate, "baseline": baseline,
                     "seed": seed, **figures} for baseline, figures in judge.penalty(w, m).items()
                ]  # fmt: skip
    return rows


def implicit_at(problem: Problem, solved: Solved, u: Warm) -> dict[str, Tensor]:
    """The implicit estimators at a model that has not converged: the same formula, with everything taken at u."""
    b = gradient(problem.upper, u.params)
    hvp = hvp_exact(partial(problem.lower, solved.alpha_N), u.params)
    size = linear_solve.spectral_norm(hvp, b)
    solutions = {
        "identity": linear_solve.identity(b),
        "adam": linear_solve.adam(b, u.second_moment),
        "cg(3), undamped": linear_solve.cg(hvp, b, steps=3),
        "cg(3), as in the fit": linear_solve.cg(hvp, b, steps=3, damping=linear_solve.CG_DAMPING * size),
        "neumann(3)": linear_solve.neumann(hvp, b, steps=3, step_size=1 / size),
    }
    return {name: directional_jvp(problem.losses, u.params, s.z) for name, s in solutions.items()}


def warm_up_sweep(
    problem: Problem, solved: Solved, warm_up_steps: Sequence[int], learning_rate: float
) -> list[dict[str, Any]]:
    """Quality against how far u has been trained: implicit estimators, and twins at a tenth of u's learning rate."""
    rows = []
    for done in warm_up_steps:
        u = warm_up(problem, done, learning_rate)
        judge = Judge(problem, solved, u.params)
        estimates = {name: judge(d_N) for name, d_N in implicit_at(problem, solved, u).items()}
        for optimizer in ("adamw", "adamw, warm"):
            w, m = after(STEPS, twins(problem, u, solved.alpha_N, learning_rate / 10, optimizer))
            estimates |= {f"{baseline}, {optimizer}": figures for baseline, figures in judge.penalty(w, m).items()}
        rows += [{"problem": problem.name, "warm_up": done, "estimator": k, **v} for k, v in estimates.items()]
    return rows


def sync_sweep(
    problem: Problem, solved: Solved, u: Warm, learning_rate: float, every: int, syncs: int
) -> list[dict[str, Any]]:
    """u goes on training; w and m are made again every T steps, or only once (``static``)."""
    generator = torch.Generator().manual_seed(7)
    model, rows = FirstOrderModel(u.params, learning_rate, grad_clip=1.0), []
    pairs: dict[str, tuple[Tree, Tree]] = {}
    for t in range(every * syncs):
        now = {k: v.detach().clone() for k, v in model.params.items()}
        if t % every == 0:
            here = Warm(now, u.second_moment)
            pairs["synchronised"] = after(STEPS, twins(problem, here, solved.alpha_N, learning_rate / 10, seed=t))
            pairs.setdefault("static", pairs["synchronised"])
        if t % max(every // 4, 1) == 0:
            rows += [
                {"problem": problem.name, "step": t, "reference": kind, "baseline": baseline,
                 "distance": float((flat(now) - flat(w)).norm()), "cosine": cosine(d_N, solved.d_N)}
                for kind, (w, m) in pairs.items() for baseline, d_N in values(problem, now, w, m).items()
            ]  # fmt: skip
        model.step(gradient(partial(problem.lower, batch_weights(problem.n_items, generator)), model.params))
    return rows
