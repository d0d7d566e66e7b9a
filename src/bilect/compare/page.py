"""The page of a comparison, ``comparison.html``: one file that loads nothing, in the style of the report."""

from collections.abc import Mapping
from typing import Any

from bilect.compare import figures
from bilect.compare.cells import BASE, CONTROLS
from bilect.compare.verdict import cost_ratio
from bilect.report import wording
from bilect.report.page import render_template

__all__ = ["interval", "render"]


def render(comparison: Mapping[str, Any]) -> str:
    """HTML of a ``comparison.json``."""
    filters = {name: getattr(wording, name) for name in ("decimal", "percent", "power", "duration")}
    filters["interval"] = interval
    return render_template(
        "compare/template.html.j2",
        filters,
        seeds=comparison["seeds"],
        variants=[_variant(n, name, v) for n, (name, v) in enumerate(comparison["variants"].items())],
        across=_across(comparison),
    )


def _variant(n: int, name: str, variant: Mapping[str, Any]) -> dict[str, Any]:
    arms = variant["arms"]
    trained = {arm: f for arm, f in arms.items() if arm != "warm"}
    order = sorted(arms, key=lambda arm: arms[arm]["loss"]["mean"])
    sources = sorted({s for f in arms.values() for s in f["kept_fraction"]})
    choosers = [arm for arm in order if arms[arm]["kept_fraction"]]
    fractions = {s: {arm: arms[arm]["kept_fraction"].get(s, 0.0) for arm in choosers} for s in sources}
    overlap = {arm: variant["overlap"][arm] for arm in choosers}
    keep = variant["keep_ratio"]
    return {
        "id": f"v{n}",
        "name": name,
        "settings": variant["settings"],
        "loss_on": variant["loss_on"],
        "verdict": variant["verdict"],
        "rows": [{"arm": arm, **arms[arm], "times": cost_ratio(arms, arm) if arm != "warm" else None} for arm in order],
        "sets": list(arms["random"]["heldout"]),
        "tasks": sorted({(task, key) for f in arms.values() for task, found in f["tasks"].items() for key in found}),
        "chance": keep / (2 - keep) if keep else None,
        "gains": figures.gains_figure(f"gains{n}", trained),
        "cost": figures.cost_figure(f"cost{n}", trained),
        "curves": figures.curves_figure(f"curves{n}", trained),
        "fractions": figures.heat_figure(
            f"sources{n}", fractions, choosers, "Share of each source's documents that each method kept."
        ),
        "overlap": figures.heat_figure(
            f"overlap{n}", overlap, choosers, "Jaccard index of the documents that any two methods kept."
        ),
    }


def _across(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each arm that variants change: its differences from the random of its own variant, and from the base."""
    variants = comparison["variants"]
    shown = []
    for n, (arm, own) in enumerate(variants[BASE]["arms"].items()):
        named = {name: v["arms"][arm] for name, v in variants.items() if arm in v["arms"]}
        changed = {name: f for name, f in named.items() if any(f["minus_base"]["values"])}  # neither None nor 0
        if arm not in ("warm", *CONTROLS) and changed:
            gains = {name: f["minus_random"] for name, f in {BASE: own, **changed}.items()}
            rows = sorted(changed.items(), key=lambda row: row[1]["minus_base"]["mean"])
            shown.append({"arm": arm, "figure": figures.variants_figure(f"variants{n}", gains), "rows": rows})
    return shown


def interval(value: Mapping[str, Any] | None) -> str:
    """Mean and half the width of the 95% interval."""
    if not value or value["mean"] is None:
        return wording.DASH
    if value["low"] is None:
        return wording.signed(value["mean"], 3)
    return f"{wording.signed(value['mean'], 3)} ± {value['high'] - value['mean']:.3f}"
