"""The cells of a comparison: a run directory per variant and seed, which shares what it can with the base of its seed.

OUT/base/seed-0/  OUT/base/seed-1/ ...  OUT/VARIANT/seed-0/ ...
"""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilect.config import Config, parse_config
from bilect.config.base import put
from bilect.config.compare import CompareConfig
from bilect.data.sources import set_name
from bilect.errors import BilectError
from bilect.methods import methods_of
from bilect.pipeline import texts
from bilect.pipeline.context import RunContext
from bilect.pipeline.directory import read_manifest
from bilect.pipeline.stages import stages, states, with_arms
from bilect.runtime.files import write_json
from bilect.runtime.locks import locked
from bilect.runtime.progress import SilentProgress
from bilect.training.tasks import find_tasks

__all__ = ["BASE", "CONTROLS", "Cell", "cells", "check", "share"]

BASE = "base"
SHARED, PUBLISHED = ("tokenizer", "tokens", "warmup"), ("proxy", "score_model", "target")
CONTROLS = ("random", "full")  # of every comparison
POINTS = 8  # of a learning curve, where the config does not say


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        variant: its name, or BASE.
        config: of the run; its seed is the cell's.
        folder: the run directory.
        base: that of the base with this seed; None for the base itself.
    """

    variant: str
    config: Config
    folder: Path
    base: Path | None

    @property
    def name(self) -> str:
        return f"{self.variant}, seed {self.config.seed}"


def cells(config: Config, out: Path) -> list[Cell]:
    """All runs of a comparison, the bases first.

    Args:
        config: with ``compare``; the controls ``random`` and ``full`` and a learning curve are added where missing.
        out: folder of the comparison.

    Raises:
        BilectError: a variant whose settings are wrong.
    """
    variants = {BASE: config} | {name: _variant(config, name) for name in config.compare.variants}
    found = []
    for name, settings in variants.items():
        settings = with_arms(settings, CONTROLS)
        curve = settings.curve
        if curve.every is None:
            curve = curve.model_copy(update={"every": max(settings.training.steps // POINTS, 1)})
        for k in range(config.compare.seeds):
            seed = config.seed + k
            alone = {"seed": seed, "curve": curve, "compare": CompareConfig(loss_on=settings.compare.loss_on)}
            base = None if name == BASE else out / BASE / f"seed-{seed}"
            found.append(Cell(name, settings.model_copy(update=alone), out / name / f"seed-{seed}", base))
    return found


def check(found: Iterable[Cell]) -> None:
    """What can be wrong with a comparison before it starts.

    Raises:
        BilectError: data that is not there, a control that is no method, a deciding set that is not held out.
    """
    for cell in {cell.variant: cell for cell in found}.values():
        try:
            methods_of(cell.config)
            if cell.config.tasks.names:
                find_tasks(cell.config.tasks.names, cell.config.tasks.limit)
            texts.input_hashes(RunContext(cell.folder, cell.config, SilentProgress()))
            names = [set_name(source) for source in cell.config.data.heldout_data]
            if (loss_on := cell.config.compare.loss_on) not in (None, *names):
                raise BilectError(f"compare.loss_on: {loss_on!r} is no held-out set; there are {', '.join(names)}")
        except BilectError as error:
            raise BilectError(str(error) if cell.base is None else f"variant {cell.variant}: {error}") from error


def share(cell: Cell) -> None:
    """Give a new cell what its run has in common with the base: hard links, since results are replaced, never changed.

    Where links are not possible the files are copied.
    """
    if cell.base is None or (cell.folder / "run.json").is_file():
        return
    with locked(cell.base, wait=True):  # nobody replaces what is being linked; another variant may be linking
        context = RunContext(cell.base, cell.config, SilentProgress())
        manifest = read_manifest(cell.base)
        done = states(stages(context, texts.input_hashes(context)), manifest)
        draft = cell.folder.with_name(f".{cell.folder.name}.partial")
        shutil.rmtree(draft, ignore_errors=True)
        rounds = (f"round-{n}" for n in range(1, cell.config.rounds + 1))
        controls = (f"controls/{arm}" for arm in cell.config.controls)
        _link(cell.base, draft, [*SHARED, *(PUBLISHED if done["publish"] else ()), *rounds, *controls])
    kept = {name: record for name, record in manifest["stages"].items() if done.get(name)}
    write_json(draft / "run.json", {**manifest, "stages": kept})
    shutil.rmtree(cell.folder, ignore_errors=True)  # of a start that was interrupted before it had a manifest
    draft.rename(cell.folder)


def _variant(config: Config, name: str) -> Config:
    values, changes = config.model_dump(mode="json", exclude_unset=True), config.compare.variants[name]
    for key, value in changes.items():
        where = f"compare.variants.{name}: {key}"
        if key.partition(".")[0] in ("seed", "compare") and key != "compare.loss_on":
            raise BilectError(f"{where} is the same for all variants; set it outside of them")
        put(values, key, value, where)
    if "controls" in changes and "methods" not in changes:  # settings of the base's other controls have no use here
        kept = (values.get("method", config.method), *(values["controls"] or ()))
        values["methods"] = {arm: own for arm, own in config.methods.items() if arm in kept}
    try:
        return parse_config(values)
    except BilectError as error:
        raise BilectError(f"compare.variants.{name}: {error}") from error


def _link(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, copy_function=_link_file)


def _link_file(source: str, target: str) -> Any:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
