"""Held-out results of each arm, by set, and on downstream tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bilect.report import figures, wording
from bilect.report.blocks import Block, Column, Fold, Plot, Section, Table, Text, gaps
from bilect.report.inputs import Json, RunFiles, mapping, number

ORDER = 10
MAX_SETS = 100
_SET_COLUMNS = (
    Column("Set"),
    Column("Data", arm=True),
    Column("Loss", wording.decimal),
    Column("Perplexity", lambda v: wording.decimal(v, 2)),
    Column("Accuracy", wording.percent),
    Column("Documents", wording.whole),
    Column("Tokens", wording.whole),
)


def build(run: RunFiles) -> Section | None:
    """None where nothing was trained: there is no result then."""
    if run.only_chose:
        return None
    losses, tokens = run.losses, mapping(run.summary.get("tokens"))
    heldout = {arm: named(sets) for arm, sets in mapping(run.summary.get("heldout")).items()}
    one_set = all(len(sets) <= 1 for sets in heldout.values()) and any(heldout.values())
    rows = []
    for arm in run.ordered({**losses, **heldout}):
        loss, against, sets = losses.get(arm), losses.get("random"), [*heldout.get(arm, {}).values()]
        one = sets[0] if len(sets) == 1 else {}
        difference = None if loss is None or against is None or arm == "random" else loss - against
        row = [arm, loss, difference, number(one.get("perplexity")), number(one.get("accuracy"))]
        rows.append([*(row if one_set else row[:3]), wording.tokens_of(arm, tokens)])
    blocks: list[Block] = []
    if not losses:
        blocks += gaps([run.missing.get("summary.json") or "it has no heldout_loss"])
    if rows:
        blocks.append(
            Table(
                "result",
                [
                    Column("Data", arm=True),
                    Column("Held-out loss", wording.decimal),
                    Column("Against random", wording.signed),
                    *([Column("Perplexity", lambda v: wording.decimal(v, 2))] if one_set else []),
                    *([Column("Accuracy", wording.percent)] if one_set else []),
                    Column("Tokens trained", wording.whole),
                ],
                rows,
                "Held-out results of the target after each way of choosing its training data. Lower loss is better.",
                strong=lambda row: row[0] == run.main,
            )
        )
    if losses:
        blocks.append(_figure(run, losses, heldout))
    by_set = [
        [
            name,
            arm,
            *(number(heldout[arm][name].get(key)) for key in ("loss", "perplexity", "accuracy", "documents", "tokens")),
        ]
        for name in dict.fromkeys(name for arm in run.ordered(heldout) for name in heldout[arm])
        for arm in run.ordered(heldout)
        if name in heldout[arm]
    ]
    if by_set:
        table = Table("heldout-sets", _SET_COLUMNS, by_set, limit=MAX_SETS)
        blocks.append(Fold("Every held-out set", [table], open=not one_set))
    return Section("result", "Result", [*blocks, *_downstream(run)])


def _figure(run: RunFiles, losses: Mapping[str, float], heldout: Mapping[str, Mapping[str, Json]]) -> Plot:
    ours, random = heldout.get(run.main, {}), heldout.get("random", {})
    pairs = {s: (number(ours[s].get("loss")), number(random.get(s, {}).get("loss"))) for s in ours}
    by_set = {s: a - b for s, (a, b) in pairs.items() if a is not None and b is not None}
    return Plot(
        figures.arms_figure(losses, by_set if len(by_set) > 1 else {}, run.main),
        "Bars start at random selection’s loss: a bar to the left is a gain over random, one to the right a loss. "
        "The axis does not start at zero.",
        ("what", "name", "value"),
        [*(("held-out loss", arm, loss) for arm, loss in losses.items()),
         *((f"{run.main} minus random", s, d) for s, d in by_set.items())],
    )  # fmt: skip


def _downstream(run: RunFiles) -> list[Block]:
    """A row per metric, a column per arm."""
    results = {arm: named(found) for arm, found in mapping(run.summary.get("tasks")).items()}
    arms = run.ordered(results)
    keys = dict.fromkeys((task, metric) for arm in arms for task, f in results[arm].items() for metric in named(f))
    if not keys:
        return []
    rows: list[list[Any]] = []
    for task, metric in keys:
        found = [named(results[arm].get(task)).get(metric, {}) for arm in arms]
        n = next(results[arm][task].get("n") for arm in arms if task in results[arm])
        rows.append([task, metric, n, *(wording.measured(f.get("value"), f.get("stderr")) for f in found)])
    columns = [Column("Task"), Column("Metric"), Column("Examples", wording.whole)]
    columns += [Column(wording.arm_name(arm), str) for arm in arms]
    caption = (
        "Zero-shot results by lm-eval, ± one standard error over the examples of the task. Accuracies: higher is "
        "better; perplexity and bits per byte: lower."
    )
    return [Text("Downstream tasks", "h3"), Table("tasks", columns, rows, caption)]


def named(value: object) -> dict[str, Json]:
    """The JSON objects of a JSON object."""
    return {name: mapping(item) for name, item in mapping(value).items() if isinstance(item, dict)}
