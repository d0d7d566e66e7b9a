"""Read this first: a whole run, stage by stage, from raw text to a trained model, its controls and a report.

    text -> tokens -> warm-up -> [ fit -> score -> select -> train -> evaluate ] x rounds -> summary -> report
    (and, where the config names downstream tasks, each arm's last target on these)

Each stage is skipped when its result is already there (``directory.py``); what it does is in the
other modules of this room.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from bilect.config import Config
from bilect.errors import BilectError
from bilect.methods import choosers, get
from bilect.pipeline import choosing, downstream, texts, training
from bilect.pipeline.changes import check_repeats, model_content, sources_content
from bilect.pipeline.context import RunContext, target_folder
from bilect.pipeline.directory import RunDir, stage_key
from bilect.pipeline.summary import summarise
from bilect.report import write_report
from bilect.runtime import distributed
from bilect.runtime.files import write_json, write_text
from bilect.runtime.locks import locked
from bilect.runtime.memory import peak_gb, reset_peak
from bilect.runtime.progress import Progress, SilentProgress
from bilect.training.tasks import find_tasks

__all__ = ["Command", "Stage", "run", "stage_keys", "stages", "states", "wanted", "with_arms"]

Command = Literal["warmup", "fit", "score", "select", "train", "eval", "run"]


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: unique; in ``run.json`` and on the screen.
        action: writes results below the folder it is given and returns figures.
        settings: everything its result depends on that is no earlier stage.
        after: the stages whose results it reads.
        command: of the command line that it belongs to.
        round: 0 before the first round.
    """

    name: str
    action: Callable[[Path], Mapping[str, Any]]
    settings: Any
    after: tuple[str, ...] = ()
    command: Command = "warmup"
    round: int = 0

    @property
    def reads(self) -> tuple[str, ...]:
        """The same as ``after``."""
        return self.after


def stages(context: RunContext, inputs: Mapping[str, Any]) -> list[Stage]:
    """All stages of a run, in order.

    Args:
        context: of the run.
        inputs: identity of the input files by role, see ``stages.texts.input_hashes``.
    """
    config, plan = context.config, list[Stage]()
    settings = config.model_dump()
    data, models, warmup = settings["data"], settings["models"], settings["warmup"]
    del data["upper_data"], data["heldout_data"]
    drawing = {"seed": config.seed, "ranks": distributed.world_size(), "share": warmup["share"]}
    split = {**drawing, "rounds": config.rounds}

    lower = sources_content(config.data.lower_data, inputs["lower_data"])
    upper, heldout = (
        sources_content(sources, inputs[role], named=True)
        for role, sources in (("upper_data", config.data.upper_data), ("heldout_data", config.data.heldout_data))
    )

    def add(
        command: Command, in_round: int, name: str, action: Any, settings: Any, after: Iterable[str], **more: Any
    ) -> None:
        name = f"round {in_round}: {name}" if in_round else name
        act = partial(_measured, context, partial(action, context, **more))
        plan.append(Stage(name, act, settings, tuple(after), command, in_round))

    reading = {"data": {**data, "tokenizer": model_content(texts.given_tokenizer(config)), "lower_data": lower}}
    add("warmup", 0, "tokenise pool", texts.tokenise_pool, reading, [])
    # its documents are taken out of the pool, so everything that draws from the pool comes after it
    held_out, targets = {"data.heldout_data": heldout}, {"data.upper_data": upper}
    add("warmup", 0, "tokenise held-out", texts.tokenise_heldout, held_out, ["tokenise pool"])
    add("warmup", 0, "tokenise upper", texts.tokenise_upper, targets, ["tokenise held-out"])
    for role in ("proxy", "target"):
        add(
            "warmup",
            0,
            f"warm up {role}",
            training.warm_up,
            {"drawing": drawing, f"models.{role}": model_content(models[role]), f"warmup.{role}": warmup[role]},
            ["tokenise held-out"],
            role=role,
        )
    after = ["tokenise held-out", "warm up target"]
    add("eval", 0, "evaluate warm", training.evaluate, [], after, folder="warmup/target")

    def add_tasks(in_round: int, arm: str, folder: str, after: str) -> None:
        if config.tasks.names:
            on = [settings["tasks"], inputs["tasks"], data["context"]]
            add("eval", in_round, f"tasks {arm}", downstream.evaluate_on_tasks, on, [after], folder=folder)

    add_tasks(0, "warm", "warmup/target", "warm up target")

    arms = ["bliss", *config.controls]
    chosen = {arm: method.config.model_dump(mode="json") for arm, method in choosers(config).items()}
    ready = {arm: "warm up target" for arm in arms}  # the last stage of each arm's target
    carried = ["warm up proxy", "tokenise upper"]  # what the next fit starts from, besides the target
    for n in range(1, config.rounds + 1):
        fitting = {"drawing": split, "fit": settings["fit"], "models.score_head": models["score_head"]}
        if n > 1:
            fitting |= {"reset_proxy": config.reset_proxy, "carry_score_model": config.carry_score_model}
        add("fit", n, "fit", choosing.fit, fitting, [*carried, ready["bliss"]], number=n)
        add("score", n, "score", choosing.score, [], [f"round {n}: fit"], number=n)
        add(
            "select",
            n,
            "select",
            choosing.select,
            {"selection": settings["selection"]},
            [f"round {n}: score"],
            number=n,
        )
        for arm in arms:
            after = [f"round {n}: select", ready[arm]] if arm == "bliss" else [ready[arm]]
            if arm in chosen:
                choosing_by = [split, chosen[arm], settings["selection"], settings["fit"]["bf16"]]
                uses = {"warm up proxy": get(arm).uses_proxy, "tokenise upper": get(arm).uses_upper}
                before = [*(name for name, used in uses.items() if used), ready[arm]]
                add("select", n, f"choose {arm}", choosing.choose, choosing_by, before, number=n, arm=arm)
                after.append(plan[-1].name)
            with_ = [split, settings["training"]]
            if arm == "random":
                with_.append({key: settings["selection"][key] for key in training.OF_RANDOM})
            if (online := config.online_of(arm)) is not None:
                with_.append(online.model_dump())
                after += ["tokenise upper"] if online.needs_upper_data else []
            if config.curve.every is not None:
                with_.append(settings["curve"])
            add("train", n, f"train {arm}", training.train_arm, with_, after, number=n, arm=arm)
            ready[arm] = plan[-1].name
            after = ["tokenise held-out", ready[arm]]
            add("eval", n, f"evaluate {arm}", training.evaluate, [], after, folder=target_folder(arm, n))
            if n == config.rounds:
                add_tasks(n, arm, target_folder(arm, n), ready[arm])
        add("eval", n, "fidelity", training.fidelity, [], [f"round {n}: fit", ready["bliss"]], number=n)
        carried = [f"round {n}: fit", "warm up proxy", "tokenise upper"]
    add("run", 0, "publish", training.publish, [], [ready["bliss"]])
    return plan


def run(
    config: Config,
    out: Path,
    progress: Progress | None = None,
    *,
    command: Command = "run",
    number: int | None = None,
    arms: Sequence[str] = (),
    repeat: bool = False,
) -> dict[str, Any]:
    """Carry out a run, or what is left of it, and return its summary.

    Args:
        config: of the run.
        out: the run directory.
        progress: what the reader sees; nothing by default.
        command: "run" for everything; otherwise only the stages of this command in one round, and what they need.
        number: the round; by default the first whose target is not trained yet (for "eval": the last that is).
        arms: with "train": only these controls, which then need not be among the config's, and their evaluation.
        repeat: stages of a finished run whose settings or inputs have changed, and replace their results.

    Returns:
        The summary; of a part of a run, the records of its stages by name.

    Raises:
        BilectError: one line on what is wrong with the input, or what has changed since the run there was finished.
    """
    distributed.start()
    main = distributed.is_main()
    config = with_arms(config, arms)
    choosers(config)  # wrong ones leave no run directory behind
    if main and config.tasks.names and command in ("run", "eval"):
        find_tasks(config.tasks.names, config.tasks.limit)  # likewise
    out = out.resolve()
    context = RunContext(out, config, progress if progress is not None and main else SilentProgress())
    inputs = texts.input_hashes(context)
    with locked(out) if main else nullcontext():
        directory = RunDir(out, config.seed, main=main, barrier=distributed.barrier)
        return _carry_out(context, directory, inputs, command, number, arms, repeat)


def _carry_out(
    context: RunContext,
    directory: RunDir,
    inputs: Mapping[str, Any],
    command: Command,
    number: int | None,
    arms: Sequence[str],
    repeat: bool,
) -> dict[str, Any]:
    config, out, main = context.config, context.root, distributed.is_main()
    plan = stages(context, inputs)
    chosen = plan if command == "run" else wanted(plan, states(plan, directory.manifest), command, number, arms)
    check_repeats(out, directory.manifest, chosen, inputs, repeat=repeat)
    directory.manifest["inputs"] = inputs
    if main:
        write_text(out / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    if command != "run":
        records = {s.name: directory.stage(s.name, s.action, settings=s.settings, after=s.after) for s in chosen}
        directory.save()
        return {s.name: records[s.name] for s in chosen}
    for s in plan:
        directory.stage(s.name, s.action, settings=s.settings, after=s.after)
    directory.finish()
    records = {s.name: directory.manifest["stages"][s.name] for s in plan}  # without those of earlier settings
    summary = summarise(out, config, {**directory.manifest, "stages": records})
    if main:
        write_json(out / "summary.json", summary)
        write_report(out)
    distributed.barrier()
    return summary


def states(plan: Sequence[Stage], manifest: Mapping[str, Any]) -> dict[str, bool]:
    """Which stages are done with their present settings and inputs."""
    records = manifest.get("stages", {})
    return {name: records.get(name, {}).get("key") == key for name, key in stage_keys(plan).items()}


def stage_keys(plan: Sequence[Stage]) -> dict[str, str]:
    """Key of each stage, by name, with its present settings and inputs."""
    keys = dict[str, str]()
    for s in plan:
        keys[s.name] = stage_key(s.name, s.settings, [keys[name] for name in s.after])
    return keys


def _measured(context: RunContext, action: Callable[[Path], Mapping[str, Any]], scratch: Path) -> dict[str, Any]:
    """A stage and its peak memory."""
    device = context.device if torch.cuda.is_available() else None
    reset_peak(device)
    return {**action(scratch), "peak_gb": round(peak_gb(device), 3)}


def with_arms(config: Config, arms: Sequence[str]) -> Config:
    """The config with further controls."""
    return config.model_copy(update={"controls": tuple(dict.fromkeys([*config.controls, *arms]))})


def wanted(
    plan: Sequence[Stage], done: Mapping[str, bool], command: Command, number: int | None, arms: Sequence[str]
) -> list[Stage]:
    """The stages of a command in one round, with everything that they need, in order."""
    rounds = max(s.round for s in plan)
    if number is None:
        trained = [n for n in range(1, rounds + 1) if all(done[f"round {n}: train {a}"] for a in arms or ("bliss",))]
        current = min(max(trained, default=0) + 1, rounds)
        number = max(trained, default=current) if command == "eval" else current
    if not 1 <= number <= rounds:
        raise BilectError(f"round {number}: the config has rounds 1 to {rounds}")
    names = {s.name for s in plan if s.command == command and s.round in (0, number)}
    if arms:
        names = {f"round {number}: {what} {arm}" for what in ("train", "evaluate") for arm in arms} | {"evaluate warm"}
    for s in reversed(plan):
        if s.name in names:
            names |= set(s.after)
    return [s for s in plan if s.name in names]
