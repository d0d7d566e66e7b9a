"""Read this first: a whole run, stage by stage, from raw text to a trained model, its controls and a report.

    text -> tokens -> warm-up -> [ fit -> score -> select -> train -> evaluate ] x rounds -> summary -> report

Each stage is skipped when its result is already there (``run_dir.py``); what it does is in ``stages.py``.
"""

from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bilect.config import Config
from bilect.progress import Progress, SilentProgress
from bilect.report import write_report
from bilect.run_dir import RunDir, write_json, write_text
from bilect.runtime import distributed
from bilect.stages import choosing, texts, training
from bilect.stages.context import RunContext, target_folder
from bilect.summary import summarise

__all__ = ["run"]


def run(config: Config, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Carry out a run, or what is left of it, and return its summary.

    Args:
        config: of the run.
        out: the run directory.
        progress: what the reader sees; nothing by default.

    Raises:
        BilectError: one line on what is wrong with the input.
    """
    distributed.start()
    main = distributed.is_main()
    out = out.resolve()
    context = RunContext(out, config, progress if progress is not None and main else SilentProgress())
    inputs = texts.input_hashes(context)
    directory = RunDir(out, config.seed, main=main, barrier=distributed.barrier)
    directory.manifest["inputs"] = inputs
    if main:
        write_text(out / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))

    settings = config.model_dump()
    data, models, warmup = settings["data"], settings["models"], settings["warmup"]
    upper, heldout = data.pop("upper_data"), data.pop("heldout_data")
    split = {"seed": config.seed, "ranks": distributed.world_size(), "rounds": config.rounds, "share": warmup["share"]}
    step = directory.stage

    step("tokenise pool", partial(texts.tokenise_pool, context), settings=[data, models, inputs["lower_data"]])
    step(
        "tokenise targets",
        partial(texts.tokenise_targets, context),
        settings=[upper, heldout, inputs["upper_data"], inputs["heldout_data"]],
        after=["tokenise pool"],
    )
    for role in ("proxy", "target"):
        warm = partial(training.warm_up, context, role=role)
        step(f"warm up {role}", warm, settings=[split, models[role], warmup[role]], after=["tokenise pool"])
    evaluate = partial(training.evaluate, context, folder="warmup/target")
    step("evaluate warm", evaluate, settings=[], after=["tokenise targets", "warm up target"])

    arms = ["bliss", *config.controls]
    ready = {arm: "warm up target" for arm in arms}  # the last stage of each arm's target
    carried = ["warm up proxy", "tokenise targets"]  # what the next fit starts from, besides the target
    for number in range(1, config.rounds + 1):
        r = f"round {number}"
        fitting = [split, settings["fit"], models["score_head"], config.reset_proxy, config.carry_score_model]
        step(
            f"{r}: fit",
            partial(choosing.fit, context, number=number),
            settings=fitting,
            after=[*carried, ready["bliss"]],
        )
        step(f"{r}: score", partial(choosing.score, context, number=number), settings=[], after=[f"{r}: fit"])
        select = partial(choosing.select, context, number=number)
        step(f"{r}: select", select, settings=settings["selection"], after=[f"{r}: score"])
        for arm in arms:
            train = partial(training.train_arm, context, number=number, arm=arm)
            after = [f"{r}: select", ready[arm]] if arm == "bliss" else [ready[arm]]
            step(f"{r}: train {arm}", train, settings=[split, settings["training"], settings["selection"]], after=after)
            ready[arm] = f"{r}: train {arm}"
            evaluate = partial(training.evaluate, context, folder=target_folder(arm, number))
            step(f"{r}: evaluate {arm}", evaluate, settings=[], after=["tokenise targets", ready[arm]])
        fidelity = partial(training.fidelity, context, number=number)
        step(f"{r}: fidelity", fidelity, settings=[], after=[f"{r}: fit", ready["bliss"]])
        carried = [f"{r}: fit", "warm up proxy", "tokenise targets"]
    step("publish", partial(training.publish, context), settings=[], after=[ready["bliss"]])

    directory.finish()
    summary = summarise(out, config, directory.manifest)
    if main:
        write_json(out / "summary.json", summary)
        write_report(out)
    distributed.barrier()
    return summary
