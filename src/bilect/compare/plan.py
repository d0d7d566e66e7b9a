"""What a comparison would do and cost: ``bilect compare ... --dry-run``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bilect.compare.cells import Cell, cells, check
from bilect.config import Config
from bilect.pipeline import texts
from bilect.pipeline.context import RunContext
from bilect.pipeline.directory import read_manifest
from bilect.pipeline.plan import plan_run
from bilect.pipeline.stages import stage_keys, stages
from bilect.runtime.progress import SilentProgress

__all__ = ["PlannedVariant", "plan_cells"]


@dataclass(frozen=True)
class PlannedVariant:
    """One line of the plan: all seeds of a variant, less what is done and what the base does for it."""

    variant: str
    runs: int
    stages: int
    flops: float
    seconds: float
    curve_seconds: float


def plan_cells(config: Config, out: Path) -> list[PlannedVariant]:
    """A line per variant; writes nothing.

    Raises:
        BilectError: as ``compare``.
    """
    found = cells(config, out.resolve())
    check(found)
    lines = []
    for variant in dict.fromkeys(c.variant for c in found):
        own = [c for c in found if c.variant == variant]
        costs = {s.name: s for s in plan_run(own[0].config, own[0].folder)}  # those of another seed are alike
        left = [costs[name] for cell in own for name in _left(cell, found)]
        flops, seconds, of_curves = (sum(getattr(s, k) for s in left) for k in ("flops", "seconds", "curve_seconds"))
        lines.append(PlannedVariant(variant, len(own), len(left), flops, seconds, of_curves))
    return lines


def _left(cell: Cell, found: Sequence[Cell]) -> list[str]:
    """Stages that are not done, nor will be by the base before this cell begins."""
    keys, records = _keys(cell), read_manifest(cell.folder)["stages"]
    shared = dict[str, str]()
    if not records and cell.base is not None:
        shared = _keys(next(c for c in found if c.folder == cell.base))
    return [name for name, key in keys.items() if key not in (records.get(name, {}).get("key"), shared.get(name))]


def _keys(cell: Cell) -> dict[str, str]:
    context = RunContext(cell.folder, cell.config, SilentProgress())
    return stage_keys(stages(context, texts.input_hashes(context)))
