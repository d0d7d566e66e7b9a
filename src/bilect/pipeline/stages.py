"""Read this first: a whole run, stage by stage, from raw text to trained models, their comparison and a report.

    text -> tokens -> warm-up -> for each round and arm [ fit -> score -> select -> train -> evaluate ] -> report

An arm is a method: the one that the run is about, and its controls. A stage is skipped when its result is already there
(``directory.py``); ``graph.py`` declares what each reads, writes and depends on, and the other modules of this room say
what each does.
"""

from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from bilect.config import Config
from bilect.engines import Engine, Led, open_engine
from bilect.errors import BilectError
from bilect.methods import methods_of
from bilect.methods.contract import DocumentMethod
from bilect.models.checks import check_models
from bilect.pipeline import texts
from bilect.pipeline.changes import check_repeats
from bilect.pipeline.context import RunContext
from bilect.pipeline.directory import RunDir, stage_key
from bilect.pipeline.graph import Command, Graph, Stage
from bilect.pipeline.summary import summarise
from bilect.report import write_report
from bilect.runtime import distributed
from bilect.runtime.files import write_json, write_text
from bilect.runtime.locks import locked
from bilect.runtime.progress import Progress, SilentProgress
from bilect.training.tasks import find_tasks
from bilect.training.train import per_rank_batch

__all__ = ["Command", "Stage", "run", "stage_keys", "stages", "states", "wanted", "with_arms"]


def stages(context: RunContext, inputs: Mapping[str, Any]) -> list[Stage]:
    """All stages of a run, in order.

    Args:
        context: of the run.
        inputs: identity of the input files by role, see ``texts.input_hashes``.
    """
    config, graph = context.config, Graph(context, inputs)
    plan = [graph.tokenise_pool(), graph.tokenise_heldout(), graph.tokenise_upper()]
    plan += [graph.warm_up("proxy"), graph.warm_up("target")]

    def evaluate(arm: str, number: int) -> None:
        plan.append(graph.evaluate(arm, number))
        if config.tasks.names and number in (0, config.rounds):
            plan.append(graph.tasks(arm, number))

    evaluate("warm", 0)
    for number in range(1, config.rounds + 1):
        for arm, method in graph.methods.items():
            if method.scores_documents:
                plan += [graph.fit(arm, number), graph.score(arm, number), graph.select(arm, number)]
            plan.append(graph.train(arm, number))
            evaluate(arm, number)
        main = graph.methods[config.method]
        if isinstance(main, DocumentMethod) and main.moves_proxy:
            plan.append(graph.fidelity(number))
    plan.append(graph.publish())
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
    methods_of(config)  # wrong ones leave no run directory behind
    if not config.data.heldout_data and (command in ("run", "eval") or arms):
        raise BilectError("data.heldout_data: nothing is held out to report on; give a set that is not in upper_data "
                          "(or only choose: bilect choose, bilect select)")  # fmt: skip
    if main and config.tasks.names and command in ("run", "eval"):
        find_tasks(config.tasks.names, config.tasks.limit)  # likewise
    out = out.resolve()
    with _engine(config, out) as engine, ExitStack() as stack:
        context = RunContext(out, config, progress if progress is not None and main else SilentProgress(), engine)
        inputs = texts.input_hashes(context)
        if main:
            stack.enter_context(locked(out))
        directory = RunDir(out, config.seed, main=main, barrier=distributed.barrier)
        return _carry_out(context, directory, inputs, command, number, arms, repeat)


def _engine(config: Config, out: Path) -> Engine:
    """That of the config; of several ranks, themselves."""
    if distributed.world_size() == 1:
        return open_engine(config.engine, config.workers, out)
    if config.engine != "local":
        raise BilectError(f"engine: the ranks that torchrun has started share the work; leave out {config.engine}, or "
                          "start one process alone")  # fmt: skip
    return Led()


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
    done = states(plan, directory.manifest)
    chosen = plan if command == "run" else wanted(plan, done, command, number, arms)
    left = {s.name for s in chosen if not done[s.name]}
    _check_trainings(config, left)
    _check_models(context, left)
    check_repeats(out, directory.manifest, chosen, inputs, repeat=repeat)
    directory.manifest["inputs"] = inputs
    if main:
        write_text(out / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    if command != "run":
        records = {s.name: directory.stage(s.name, s.action, settings=s.settings, after=s.reads) for s in chosen}
        directory.save()
        return {s.name: records[s.name] for s in chosen}
    for s in plan:
        directory.stage(s.name, s.action, settings=s.settings, after=s.reads)
    directory.finish()
    records = {s.name: directory.manifest["stages"][s.name] for s in plan}  # without those of earlier settings
    summary = summarise(out, config, {**directory.manifest, "stages": records})
    if main:
        write_json(out / "summary.json", summary)
        write_report(out)
    distributed.barrier()
    return summary


def _check_trainings(config: Config, left: Set[str]) -> None:
    """Whether all trainings have steps, which divide into the ranks there are: before the first, not at the last."""
    trainings = {"warmup.proxy": (config.warmup.proxy, "warm up proxy" in left),
                 "warmup.target": (config.warmup.target, "warm up target" in left),
                 "training": (config.training, any(": train " in name for name in left))}  # fmt: skip
    for name, (training, wanted) in trainings.items():
        if name == "training" and wanted and not training.steps:
            raise BilectError("training.steps: 0 steps train nothing; to choose only: bilect choose, bilect select")
        if wanted and training.steps:
            per_rank_batch(training.batch_size, training.gradient_accumulation, f"{name}.batch_size")


def _check_models(context: RunContext, left: Set[str]) -> None:
    """What can be wrong with a model, before any stage begins; of a role that is warm already nothing is needed."""
    config = context.config
    models = {
        f"models.{role}": getattr(config.models, role) for role in ("proxy", "target") if f"warm up {role}" in left
    }
    given = texts.given_tokenizer(config)
    check_models(models, given, context=config.data.context, place=given or str(context.root / "tokenizer"))


def states(plan: Sequence[Stage], manifest: Mapping[str, Any]) -> dict[str, bool]:
    """Which stages are done with their present settings and inputs."""
    records = manifest.get("stages", {})
    return {name: records.get(name, {}).get("key") == key for name, key in stage_keys(plan).items()}


def stage_keys(plan: Sequence[Stage]) -> dict[str, str]:
    """Key of each stage, by name, with its present settings and inputs."""
    keys = dict[str, str]()
    for s in plan:
        keys[s.name] = stage_key(s.name, s.settings, [keys[name] for name in s.reads])
    return keys


def with_arms(config: Config, arms: Sequence[str]) -> Config:
    """The config with further controls, where they are not its own method."""
    further = (arm for arm in arms if arm != config.method)
    return config.model_copy(update={"controls": tuple(dict.fromkeys([*config.controls, *further]))})


def wanted(
    plan: Sequence[Stage], done: Mapping[str, bool], command: Command, number: int | None, arms: Sequence[str]
) -> list[Stage]:
    """The stages of a command in one round, with everything that they need, in order."""
    rounds = max(s.round for s in plan)
    if number is None:
        training = [s for s in plan if s.kind == "train"]
        among = arms or (training[0].arm,)  # the first is that of the method
        trained = [n for n in range(1, rounds + 1)
                   if all(done[s.name] for s in training if s.round == n and s.arm in among)]  # fmt: skip
        current = min(max(trained, default=0) + 1, rounds)
        number = max(trained, default=current) if command == "eval" else current
    if not 1 <= number <= rounds:
        raise BilectError(f"round {number}: the config has rounds 1 to {rounds}")
    names = {s.name for s in plan if s.command == command and s.round in (0, number)}
    if arms:
        names = {s.name for s in plan if s.kind in ("train", "evaluate") and s.round == number and s.arm in arms}
        names.add("evaluate warm")
    for s in reversed(plan):
        if s.name in names:
            names |= set(s.reads)
    return [s for s in plan if s.name in names]
