"""What one finished run of a comparison says of its arms."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bilect.compare.cells import Cell
from bilect.methods import methods_of
from bilect.methods.contract import Method
from bilect.pipeline.context import arm_folder, target_folder
from bilect.pipeline.directory import read_manifest
from bilect.pipeline.summary import choosing_stages
from bilect.selection.records import kept_ids

__all__ = ["Arm", "Point", "collect"]


@dataclass(frozen=True)
class Point:
    """Of a learning curve.

    Attributes:
        tokens: trained on so far, without decay branches.
        choosing: FLOPs spent so far on choosing documents.
        loss: by held-out set.
    """

    tokens: float
    choosing: float
    loss: dict[str, float]


@dataclass(frozen=True)
class Arm:
    """One arm of one run.

    Attributes:
        heldout: figures of the decayed model by held-out set.
        curve: losses of the undecayed model along its training, all rounds.
        tokens: trained on, decay branches included.
        choosing: seconds and flops of choosing documents; zero where nothing is chosen.
        training: the same of training, choice of tokens included.
        peak_gb: greatest memory of these stages.
        kept: ids of the chosen documents; empty where there is no record of a choice.
        kept_share: share of the kept tokens by source, last round.
        kept_fraction: share of each source's documents that was kept, last round.
        tasks: downstream tasks, where there are any.
    """

    heldout: dict[str, dict[str, Any]]
    curve: list[Point] = field(default_factory=list)
    tokens: int = 0
    choosing: dict[str, float] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)
    peak_gb: float = 0.0
    kept: frozenset[str] = frozenset()
    kept_share: dict[str, float] = field(default_factory=dict)
    kept_fraction: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)


def collect(cell: Cell) -> dict[str, Arm]:
    """All arms of a finished run, and ``warm``, the model they start from."""
    summary = json.loads((cell.folder / "summary.json").read_text(encoding="utf-8"))
    records, tasks = read_manifest(cell.folder)["stages"], summary.get("tasks", {})
    found = {"warm": Arm(summary["heldout"]["warm"], tasks=tasks.get("warm", {}))}
    for arm, method in methods_of(cell.config).items():
        numbers = range(1, cell.config.rounds + 1)
        choosing = [_choosing(records, method, n) for n in numbers]
        training = [records[f"round {n}: train {arm}"] for n in numbers]
        last = choosing[-1][-1] if choosing[-1] else {}
        key, cost = ("selection" if arm == cell.config.method else f"choosing {arm}"), summary["cost"]
        found[arm] = Arm(
            heldout=summary["heldout"][arm],
            curve=_curve(cell, records, method, choosing, training),
            tokens=summary["tokens"][arm],
            choosing={k: cost[k].get(key, 0.0) for k in ("seconds", "flops")},
            training={k: cost[k][arm] for k in ("seconds", "flops")},
            peak_gb=max(r.get("peak_gb", 0.0) for r in (*training, *(r for rs in choosing for r in rs))),
            kept=_kept(cell, arm) if last else frozenset(),
            kept_share=last.get("kept_share_by_source", {}),
            kept_fraction=last.get("kept_fraction_by_source", {}),
            tasks=tasks.get(arm, {}),
        )
    return found


def _choosing(records: Mapping[str, Any], method: Method[Any], n: int) -> list[dict[str, Any]]:
    """The stages of one round in which an arm chooses its documents; none where it does not choose."""
    return [records[f"round {n}{end}"] for end in choosing_stages(method) if end.startswith(":")]


def _kept(cell: Cell, arm: str) -> frozenset[str]:
    folders = (arm_folder(cell.config, arm, n) for n in range(1, cell.config.rounds + 1))
    return frozenset(i for folder in folders for i in kept_ids(cell.folder / folder / "selected"))


def _curve(
    cell: Cell,
    records: Mapping[str, Any],
    method: Method[Any],
    choosing: Sequence[Sequence[Mapping[str, Any]]],
    training: Sequence[Mapping[str, Any]],
) -> list[Point]:
    """All rounds one after another; a round's choosing is spent when it begins, the proxy's warm-up with the first."""
    settings, points, before = cell.config.training, list[Point](), 0.0
    spent = float(records["warm up proxy"]["flops"]) if choosing[0] and method.uses_proxy else 0.0
    for n, record in enumerate(training, start=1):
        spent += sum(float(r["flops"]) for r in choosing[n - 1])
        per_step = record["tokens"] / (settings.steps + settings.decay_steps)
        file = cell.folder / target_folder(cell.config, method.name, n) / "heldout.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines()
        points += [Point(before + row["step"] * per_step, spent, row["loss"]) for row in map(json.loads, lines)]
        before += settings.steps * per_step
    return points
