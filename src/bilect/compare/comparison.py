"""All runs of a comparison in numbers: ``comparison.json`` for programs, one row per arm and seed for spreadsheets."""

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from bilect.compare.cells import BASE, Cell
from bilect.compare.collect import Arm, collect
from bilect.compare.provenance import machine, nameless, program, setting
from bilect.compare.statistics import estimate, speedup
from bilect.compare.verdict import verdict

__all__ = ["compare_runs", "csv_text", "mean_curve", "spent_curve"]

Seeds = list[dict[str, Arm]]  # the arms of each seed
COLUMNS = (
    *("variant", "arm", "seed", "loss", "minus_random", "minus_full", "minus_base", "tokens"),
    *("choosing_seconds", "choosing_flops", "training_seconds", "training_flops", "peak_gb"),
    *("speedup_tokens", "speedup_flops", "speedup_flops_with_choosing"),
)


def compare_runs(cells: Sequence[Cell], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The content of ``comparison.json``.

    By variant and arm: ``loss`` (held-out, of the decayed model, on the set that decides), its paired differences from
    ``random`` and ``full``, and the loss on every held-out set, with its differences from ``random`` and from ``warm``
    (above 0: forgotten), each as ``statistics.estimate``; ``minus_base``, the same arm's in the base, where both losses
    are of the same tokens; ``speedup``, how many times fewer tokens or FLOPs than random it takes to come down to
    random's final loss on the learning curves; costs; shares by source; learning curves; ``overlap``, the Jaccard index
    of what any two arms kept. Beside them stands what they were made of and on (``provenance``), so that the file can
    be shown to others as it is (``published``).

    Args:
        cells: all runs, finished.
        settings: of the variants, for the record.
    """
    variants = {}
    for name in dict.fromkeys(cell.variant for cell in cells):
        own = [cell for cell in cells if cell.variant == name]
        given = {"settings": nameless(settings.get(name, {})), **setting(own[0])}
        variants[name] = {**given, **_variant(own, [collect(c) for c in own])}
    for variant in variants.values():
        _against_base(variant, variants[BASE])
    gpus = any(cell.config.device != "cpu" for cell in cells)
    seeds = list(dict.fromkeys(c.config.seed for c in cells))
    return {"schema": 2, "bilect": program(), "machine": machine(gpus), "seeds": seeds, "variants": variants}


def csv_text(comparison: Mapping[str, Any]) -> str:
    """A row per variant, arm and seed."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name, variant in comparison["variants"].items():
        for arm, figures in variant["arms"].items():
            for i, seed in enumerate(comparison["seeds"]):
                writer.writerow({"variant": name, "arm": arm, "seed": seed, **_row(figures, i)})
    return text.getvalue()


def _row(figures: Mapping[str, Any], i: int) -> dict[str, Any]:
    row = {key: figures[key]["values"][i] for key in ("loss", "minus_random", "minus_full", "minus_base")}
    row["tokens"] = figures["tokens"]
    for part in ("choosing", "training"):
        row |= {f"{part}_{key}": figures["cost"][part][key]["values"][i] for key in ("seconds", "flops")}
    row["peak_gb"] = figures["cost"]["peak_gb"]["values"][i]
    return row | {f"speedup_{key}": value["values"][i] for key, value in figures["speedup"].items()}


def _variant(cells: Sequence[Cell], seeds: Seeds) -> dict[str, Any]:
    loss_on = cells[0].config.compare.loss_on
    arms = {arm: _arm(arm, seeds, loss_on) for arm in seeds[0]}
    best = min((arm for arm in arms if arm != "warm"), key=lambda arm: arms[arm]["loss"]["mean"])
    for arm, figures in arms.items():
        figures["minus_best"] = _paired(seeds, arm, best, loss_on)
    variant = {"loss_on": loss_on, "best": best, "keep_ratio": cells[0].config.selection.keep_ratio, "arms": arms}
    return {**variant, "overlap": _overlap(seeds), "verdict": verdict(variant)}


def _against_base(variant: dict[str, Any], base: Mapping[str, Any]) -> None:
    """Paired differences from the base; none where the losses are of another set, text or tokenizer."""
    scale, its_scale = ((v["loss_on"], v["texts"]["heldout"]) for v in (variant, base))
    for arm, figures in variant["arms"].items():
        own, other = figures["loss"]["values"], base["arms"].get(arm)
        found = other is not None and variant is not base and scale == its_scale
        its = other["loss"]["values"] if found else [None] * len(own)
        figures["minus_base"] = estimate([None if b is None else a - b for a, b in zip(own, its, strict=True)])


def headline(sets: Mapping[str, Any], loss_on: str | None) -> float:
    """The loss that decides: of one held-out set, or the mean over all."""
    chosen = [sets[loss_on]] if loss_on is not None else list(sets.values())
    losses = [s["loss"] if isinstance(s, Mapping) else s for s in chosen]
    return float(sum(losses) / len(losses))


def _arm(arm: str, seeds: Seeds, loss_on: str | None) -> dict[str, Any]:
    own = [s[arm] for s in seeds]
    return {
        "loss": estimate([headline(a.heldout, loss_on) for a in own]),
        "minus_random": _paired(seeds, arm, "random", loss_on),
        "minus_full": _paired(seeds, arm, "full", loss_on),
        "heldout": {
            name: {
                **{k: estimate([a.heldout[name][k] for a in own]) for k in ("loss", "accuracy")},
                **{f"minus_{other}": _paired(seeds, arm, other, name) for other in ("warm", "random")},
            }
            for name in own[0].heldout
        },
        "tokens": own[0].tokens,
        "cost": {
            **{part: {k: estimate([getattr(a, part).get(k, 0.0) for a in own]) for k in ("seconds", "flops")}
               for part in ("choosing", "training")},
            "peak_gb": estimate([a.peak_gb for a in own]),
        },
        "speedup": _speedup(arm, seeds, loss_on),
        "curve": mean_curve(own, loss_on),
        **{key: _mean_shares([getattr(a, key) for a in own]) for key in ("kept_share", "kept_fraction")},
        "tasks": _tasks(own),
    }  # fmt: skip


def _paired(seeds: Seeds, arm: str, other: str, loss_on: str | None) -> dict[str, Any]:
    losses = [[headline(s[name].heldout, loss_on) for name in (arm, other)] for s in seeds]
    return estimate([None if arm == other else mine - its for mine, its in losses])


def _speedup(arm: str, seeds: Seeds, loss_on: str | None) -> dict[str, Any]:
    """``statistics.speedup``, spending tokens, FLOPs of training, or these with those of choosing."""
    ratios: dict[str, list[float | None]] = {"tokens": [], "flops": [], "flops_with_choosing": []}
    for s in seeds:
        for key, values in ratios.items():
            curve, control = (spent_curve(s[name], key, loss_on) for name in (arm, "random"))
            values.append(speedup(curve, control) if curve and arm != "random" else None)
    return {key: estimate(values) for key, values in ratios.items()}


def spent_curve(arm: Arm, key: str, loss_on: str | None) -> list[tuple[float, float]]:
    """(spent, loss) along a learning curve; ``key`` is ``tokens``, ``flops`` or ``flops_with_choosing``."""
    rate = 1.0 if key == "tokens" or not arm.curve else arm.training["flops"] / arm.tokens
    before = 1.0 if key == "flops_with_choosing" else 0.0
    return [(before * p.choosing + rate * p.tokens, headline(p.loss, loss_on)) for p in arm.curve]


def mean_curve(own: Sequence[Arm], loss_on: str | None) -> list[dict[str, Any]]:
    """The learning curves of one arm under several seeds, point by point."""
    rows = []
    for at in zip(*(a.curve for a in own), strict=True):
        loss = estimate([headline(p.loss, loss_on) for p in at])
        choosing = sum(p.choosing for p in at) / len(at)
        rows.append({"tokens": at[0].tokens, "choosing_flops": choosing, "mean": loss["mean"], "se": loss["se"]})
    return rows


def _mean_shares(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = sorted({name for s in shares for name in s})
    return {name: sum(s.get(name, 0.0) for s in shares) / len(shares) for name in names}


def _tasks(own: Sequence[Arm]) -> dict[str, Any]:
    """Each metric over the seeds, with the mean of its own standard error over the examples."""
    metrics = {(task, key) for a in own for task, found in a.tasks.items() for key in found if key != "n"}
    tasks: dict[str, Any] = {}
    for task, key in sorted(metrics):
        found = [a.tasks[task][key] for a in own]
        errors = [f["stderr"] for f in found if f.get("stderr") is not None]
        sampling = sum(errors) / len(errors) if errors else None
        tasks.setdefault(task, {})[key] = {**estimate([f["value"] for f in found]), "sampling_se": sampling}
    return tasks


def _overlap(seeds: Seeds) -> dict[str, dict[str, float]]:
    """Jaccard index of the documents of any two arms, mean over the seeds."""
    names = [arm for arm, a in seeds[0].items() if a.kept]
    table = {name: {name: 1.0} for name in names}
    for a, b in combinations(names, 2):
        pairs = [(s[a].kept, s[b].kept) for s in seeds]
        table[a][b] = table[b][a] = sum(len(x & y) / len(x | y) for x, y in pairs) / len(seeds)
    return table
