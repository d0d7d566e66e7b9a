"""``bilect verify``: every estimator of the project against the truth, on problems that can be solved exactly."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from bilect import __version__
from bilect.runtime.files import make_folder, write_json, write_text
from bilect.runtime.terminal import PlainConsole
from bilect.verify import direct, implicit, penalty, practice, selections
from bilect.verify.claims import Claim, Reported
from bilect.verify.exact import solve
from bilect.verify.page import render
from bilect.verify.problems import Problem, language_model, ridge, softmax_regression, weighted_mean

__all__ = ["run_verify"]

WARM_RATE = 1e-2  # learning rate of the proxy: here parameters are of order 0.3, in a language model of order 0.02
PANELS = ("problems", "implicit", "penalty", "steps", "warm_up", "learning_rate", "sync", "selections")
SMALL: dict[str, Callable[[int, int], Problem]] = {  # N, seed -> to enumerate
    "mean": lambda n, seed: weighted_mean(n, seed=seed),
    "ridge": lambda n, seed: ridge(n, width=4, seed=seed),
    "softmax": lambda n, seed: softmax_regression(n, width=3, classes=3, seed=seed),
}


@dataclass(frozen=True)
class Sizes:
    """How much is computed."""

    language_model: dict[str, int]
    warm_up_steps: tuple[int, ...]
    steps: tuple[int, ...]
    learning_rates: tuple[float, ...]
    batch_seeds: int
    sync_every: int
    enumerated: tuple[tuple[str, int, int, int], ...]  # problem, N, k, seeds
    iterations: int


FULL = Sizes(
    language_model={},
    warm_up_steps=(10, 30, 100, 300),
    steps=(1, 3, 10, 30, 100),
    learning_rates=(1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    batch_seeds=2,
    sync_every=40,
    enumerated=(("mean", 12, 6, 3), ("ridge", 12, 6, 3), ("softmax", 12, 6, 3), ("ridge", 16, 8, 1)),
    iterations=40,
)
QUICK = Sizes(
    language_model={"n": 16, "length": 6, "vocab": 5, "width": 4, "n_upper": 12},
    warm_up_steps=(10, 50),
    steps=(1, 10),
    learning_rates=(1e-3, 1e-1),
    batch_seeds=1,
    sync_every=8,
    enumerated=(("mean", 10, 5, 1), ("ridge", 10, 5, 1)),
    iterations=20,
)


def run_verify(out: Path, quick: bool = False) -> int:
    """Carry out the study and write ``verify.json`` and ``verify.html`` into ``out``.

    Args:
        out: folder.
        quick: the short form, for tests and CI.

    Returns:
        The exit code: 0 where every tolerance is met, else 1.
    """
    make_folder(out)  # now rather than after minutes
    start = time.perf_counter()
    figures, found = study(QUICK if quick else FULL, PlainConsole(stderr=True, soft_wrap=False))
    claims = [c for c in found if isinstance(c, Claim)]
    reported = [c for c in found if isinstance(c, Reported)]
    missed = sum(not c.passed for c in claims)
    result = {
        "schema": 1,
        "quick": quick,
        "passed": missed == 0,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {"bilect": __version__, "torch": torch.__version__},
        "claims": [c.record() for c in claims],
        "reported": [{**asdict(c), "value": c.value if math.isfinite(c.value) else None} for c in reported],
        "figures": figures,
    }
    write_json(out / "verify.json", result)
    write_text(out / "verify.html", render(result))
    console = PlainConsole(soft_wrap=False)
    console.print(_claims(claims), _reported(reported), sep="\n")
    console.print(
        f"{len(claims) - missed} of {len(claims)} claims hold, in {result['seconds']:.0f} s. {out / 'verify.html'}"
    )
    return 0 if missed == 0 else 1


def study(sizes: Sizes, console: PlainConsole) -> tuple[dict[str, Any], list[Claim | Reported]]:
    """All figures, by panel, and what is claimed and reported of them."""
    figures: dict[str, Any] = {name: [] for name in PANELS}
    found: list[Claim | Reported] = []
    for problem in (ridge(), softmax_regression(), language_model(**sizes.language_model)):
        console.print(f"{problem.name}: {problem.n_items} items, {problem.n_params} parameters")
        _estimators(problem, sizes, figures, found)
    for name, n, k, seeds in sizes.enumerated:
        console.print(f"{name}: all {math.comb(n, k)} subsets of {k} out of {n}, {seeds} times")
        studies = [selections.study(SMALL[name](n, seed), k, sizes.iterations) for seed in range(seeds)]
        figures["selections"] += [{"seed": seed, **s} for seed, s in enumerate(studies)]
        found += selections.check_selections(studies)
    return figures, found


def _estimators(problem: Problem, sizes: Sizes, figures: dict[str, Any], found: list[Claim | Reported]) -> None:
    solved = solve(problem, problem.uniform())
    figures["problems"].append(
        {"problem": problem.name, "items": problem.n_items, "parameters": problem.n_params, "l2": problem.l2,
         "eigenvalues": list(solved.eigenvalues),
         "upper_loss": [float(problem.upper(problem.start)), float(problem.upper(solved.params))]}
    )  # fmt: skip
    rows = implicit.sweep(problem, solved)
    figures["implicit"] += rows
    found += [*implicit.check_oracle(problem, solved), *implicit.check_solvers(rows, solved, problem.convex)]
    rows = penalty.sweep(problem, solved)
    figures["penalty"] += rows
    found += [*penalty.check_penalty(rows), *direct.check_direct(problem, solved)]
    if problem.name == "ridge":
        return  # of the two convex problems one is enough for what follows
    converged = practice.Warm(solved.params, problem.tree(implicit.adam_second_moment(solved)))
    rates: dict[practice.Optimizer, float] = {
        "sgd": 0.5 / solved.eigenvalues[1], "adamw": WARM_RATE / 10, "adamw, warm": WARM_RATE / 10
    }  # fmt: skip
    figures["steps"] += practice.steps_sweep(problem, solved, converged, sizes.steps, rates)
    figures["warm_up"] += practice.warm_up_sweep(problem, solved, sizes.warm_up_steps, WARM_RATE)
    u = practice.warm_up(problem, sizes.warm_up_steps[-1], WARM_RATE)
    found.append(practice.check_matched(problem, solved, u))
    figures["learning_rate"] += practice.learning_rate_sweep(
        problem, solved, u, sizes.learning_rates, sizes.batch_seeds
    )
    early = practice.warm_up(problem, sizes.warm_up_steps[-1] // 10, WARM_RATE)
    figures["sync"] += practice.sync_sweep(problem, solved, early, WARM_RATE, sizes.sync_every, syncs=4)


def _claims(claims: Sequence[Claim]) -> Table:
    table = Table(title="What must hold")
    table.add_column("panel")
    table.add_column("claim")
    table.add_column("figure", justify="right")
    table.add_column("tolerance", justify="right")
    table.add_column("")
    for c in claims:
        table.add_row(c.panel, c.text, f"{c.value:.4g}", c.tolerance, "ok" if c.passed else Text("MISSED", style="red"),
                      style=None if c.passed else "bold")  # fmt: skip
    return table


def _reported(reported: Sequence[Reported]) -> Table:
    table = Table(title="Reported without a verdict")
    table.add_column("panel")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for r in reported:
        table.add_row(r.panel, r.text, f"{r.value:.4g}")
    return table
