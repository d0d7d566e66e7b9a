"""The page of plots, ``verify.html``: one file that loads nothing, in the style of the report."""

from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any

from bilect.report.lines import Lines, group, lines_figure
from bilect.report.page import render_template

__all__ = ["render"]

Rows = Sequence[dict[str, Any]]


def render(result: dict[str, Any]) -> str:
    """HTML of a ``verify.json``."""
    figures = result["figures"]
    return render_template(
        "verify/template.html.j2",
        {"short": lambda value: "–" if value is None else f"{value:.3g}"},
        result=result,
        missed=[c for c in result["claims"] if not c["passed"]],
        choices=_choices(figures["selections"]),
        plots={
            "implicit": _implicit(figures["implicit"]),
            "penalty": _penalty(figures["penalty"]),
            "steps": _steps(figures["steps"]),
            "warm_up": _warm_up(figures["warm_up"]),
            "learning_rate": _learning_rate(figures["learning_rate"]),
            "sync": _sync(figures["sync"]),
            "selections": _selections(figures["selections"]),
        },
    )


def _problems(rows: Rows) -> list[str]:
    return list(dict.fromkeys(r["problem"] for r in rows))


def _of(rows: Rows, **wanted: Any) -> Rows:
    return [r for r in rows if all(r[key] == value for key, value in wanted.items())]


def _implicit(rows: Rows) -> str:
    ends = sorted({r["k"] for r in rows if r["k"]})[:: len({r["k"] for r in rows if r["k"]}) - 1]
    named = []
    for row in rows:
        name = row["solver"] + (f", damping {row['damping']:g}" if row["damping"] else "")
        # a solver without a choice of k is a level line
        at = ends if row["solver"] in ("identity", "adam", "sgd, published") else [row["k"]]
        named += [{**row, "name": name, "k": k, "distance": max(1 - row["cosine"], 1e-6)} for k in at]
    panels = [
        Lines(problem, "Hessian products k", "1 − cosine with the exact d",
              group(_of(named, problem=problem), lambda r: r["name"], "k", "distance"), log_y=True)
        for problem in _problems(rows)
    ]  # fmt: skip
    return lines_figure("implicit", panels, "Distance of each solver's d from the exact one against Hessian products.")


def _penalty(rows: Rows) -> str:
    rows = [{**r, "lack": 1 - r["cosine"]} for r in rows]
    panels = [
        Lines("both inner problems solved", "lambda", label,
              group(rows, lambda r: r["problem"], "penalty", y), log_y=True)
        for y, label in (("relative_error", "relative error of d"), ("lack", "1 − cosine with the exact d"))
    ]  # fmt: skip
    return lines_figure("penalty", panels, "Error of the penalty gradient against lambda; theory: slope -1.")


def _steps(rows: Rows) -> str:
    panels = [
        Lines(problem, "steps K of w and m", "cosine with the exact d",
              group(_of(rows, problem=problem), lambda r: f"{r['baseline']}, {r['optimizer']}", "k", "cosine"))
        for problem in _problems(rows)
    ]  # fmt: skip
    return lines_figure("steps", panels, "Cosine with the exact d against K, from the solution.")


def _warm_up(rows: Rows) -> str:
    panels = [
        Lines(problem, "steps u has been trained", label,
              group(_of(rows, problem=problem), lambda r: r["estimator"], "warm_up", y))
        for problem in _problems(rows)
        for y, label in (("cosine", "cosine with the exact d"), ("cosine_unrolled", "cosine with the unrolled d"))
    ]  # fmt: skip
    return lines_figure("warm-up", panels, "Cosine of each estimator against how far the model has been trained.")


def _learning_rate(rows: Rows) -> str:
    panels = [
        Lines(f"{problem}: baseline {baseline}", "learning rate of w and m", "cosine with the exact d",
              group(_of(rows, problem=problem, baseline=baseline), lambda r: r["optimizer"], "learning_rate", "cosine"))
        for problem in _problems(rows) for baseline in ("model", "matched")
    ]  # fmt: skip
    return lines_figure("rates", panels, "Cosine with the exact d against the learning rate, per optimiser.")


def _sync(rows: Rows) -> str:
    panels = [
        Lines(problem, "steps of u", label,
              group(_of(rows, problem=problem), lambda r: f"{r['reference']}, {r['baseline']}", "step", y), log_x=False)
        for problem in _problems(rows)
        for y, label in (("cosine", "cosine with the exact d"), ("distance", "||u − w||"))
    ]  # fmt: skip
    return lines_figure("sync", panels, "Cosine with the exact d, and distance of u and w, while u trains on.")


def _title(study: dict[str, Any]) -> str:
    return f"{study['problem']}, {study['k']} of {study['n']}"


def _selections(studies: Rows) -> str:
    panels = []
    for study in _of(studies, seed=0):
        curves = {f"{c['estimate']}, {c['kind']}": c for c in study["curves"]}
        gaps = {k: list(enumerate(accumulate(c["gap"][1:], min), start=1)) for k, c in curves.items()}
        phis = {k: [(t, v - study["best"]) for t, v in enumerate(c["phi"][1:], start=1)] for k, c in curves.items()}
        panels.append(Lines(_title(study), "iteration", "least duality gap so far", gaps, log_y=True))
        panels.append(Lines(_title(study), "iteration", "Phi less the best subset's", phis))
    return lines_figure("selections", panels, "Duality gap and objective of Frank-Wolfe against iterations.")


def _choices(studies: Rows) -> list[dict[str, Any]]:
    """Each way of choosing, over the seeds."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for study in studies:
        for row in study["rows"]:
            rows.setdefault((_title(study), row["choice"]), []).append(row)
    return [
        {"problem": title, "choice": choice, "seeds": len(own), "worst": max(r["regret"] for r in own),
         **{key: fmean(r[key] for r in own) for key in ("overlap", "regret", "better")}}
        for (title, choice), own in rows.items()
    ]  # fmt: skip
