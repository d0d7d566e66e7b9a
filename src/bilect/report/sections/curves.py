"""Learning curves: what each arm's target lost in training, and on held-out data where that was measured."""

from __future__ import annotations

from statistics import fmean

from bilect.report.blocks import Block, Plot, Section, gaps
from bilect.report.figures import arm_ink
from bilect.report.inputs import RunFiles, mapping, number, numbers
from bilect.report.lines import Lines, lines_figure
from bilect.report.wording import arm_name

ORDER = 20
POINTS = 60  # of a curve, each the mean of its neighbours


def build(run: RunFiles) -> Section | None:
    """None where nothing was trained."""
    if run.only_chose:
        return None
    training = {arm: curve for arm in run.arms if (curve := read_curve(run, arm, "training.jsonl"))}
    heldout = {arm: curve for arm in run.arms if (curve := read_curve(run, arm, "heldout.jsonl"))}
    inks = {arm_name(a): ink for a in run.arms if (ink := arm_ink(a, run.main)) != "other"}
    panels = [
        Lines(title, "training step", "loss, nats per token", {arm_name(a): c for a, c in found.items()}, log_x=False,
              zero=False, inks=inks)
        for title, found in (("In training", training), ("Held out", heldout)) if found
    ]  # fmt: skip
    if not panels:
        blocks: list[Block] = gaps(["no arm has a training.jsonl"])
        return Section("curves", "Learning curves", blocks)
    svg = lines_figure("curves", panels, f"Loss over training steps of {', '.join(p.title.lower() for p in panels)}.")
    rows = [(what, arm, step, loss) for what, found in (("training", training), ("heldout", heldout))
            for arm, curve in found.items() for step, loss in curve]  # fmt: skip
    note = (
        "Loss of each arm’s target, the rounds one after another. In training each arm is measured on its own text, so "
        "these curves are not to be compared with each other; "
    )
    note += (
        "the held-out ones are, on the same sample of held-out documents." if heldout
        else "held-out losses along the way are measured where the setting curve.every is given."
    )  # fmt: skip
    return Section("curves", "Learning curves", [Plot(svg, note, ("curve", "arm", "step", "loss"), rows)])


def read_curve(run: RunFiles, arm: str, name: str) -> list[tuple[float, float]]:
    """(step, loss) of an arm's target, the rounds one after another; losses on held-out sets are their mean."""
    points: list[tuple[float, float]] = []
    start = 0.0
    for files in run.rounds:
        rows = run.lines(f"{run.folder(arm, files.number)}/target/{name}")
        last = start
        for row in rows:
            loss = row.get("loss")
            value = fmean(sets.values()) if (sets := numbers(mapping(loss))) else number(loss)
            step = number(row.get("step"))
            if step is not None and value is not None:
                points.append((start + step, value))
                last = max(last, start + step)
        start = last
    size = -(-len(points) // POINTS) if name == "training.jsonl" else 1
    groups = [points[i : i + size] for i in range(0, len(points), size or 1)]
    return [(fmean(x for x, _ in g), fmean(y for _, y in g)) for g in groups]
