"""The fit: its losses, the solver's residual, effective sample size, and how well the proxy stands for the target."""

from __future__ import annotations

from bilect.report import wording
from bilect.report.blocks import Block, Column, Plot, Section, Table, Text, gaps
from bilect.report.curves import CURVES, learning_figure
from bilect.report.inputs import RunFiles, number, objects

ORDER = 70


def build(run: RunFiles) -> Section | None:
    """None where the method has nothing to fit, or logs nothing of it."""
    logged = any(r.metrics for r in run.rounds)
    rows = objects(run.summary.get("fidelity"))
    if not logged and not rows and (run.only_chose or run.main != "bliss"):
        return None
    blocks: list[Block] = gaps(run.gaps(r"round-\d+/(metrics\.jsonl)?$"))
    if logged and (svg := learning_figure(run.rounds)) is not None:
        names = [key for keys in CURVES.values() for key in keys]
        data = [
            [r.number, *(number(row.get(key)) for key in ("step", *names))] for r in run.rounds for row in r.metrics
        ]
        caption = (
            "The bilevel fit, round after round (divided by thin lines). Faint: every step; strong: a running mean. "
            "Scores: mean, one standard deviation either way, and the full range. An effective sample size near the "
            "batch size means nearly uniform weights; near one, a single document decides."
        )
        blocks.append(Plot(svg, caption, ("round", "step", *names), data))
    blocks += _labels(run)
    if not run.only_chose:
        blocks += _fidelity(rows)
    return Section("fit", "The fit", blocks)


def _labels(run: RunFiles) -> list[Block]:
    """Correlation of the fitted scores with labels that the fit did not see, of methods that have such labels."""
    found = []
    for files in run.rounds:
        with_labels = [row for row in files.metrics if number(row.get("label_correlation")) is not None]
        if with_labels:
            row = with_labels[-1]
            found.append([files.number, number(row.get("step")), number(row.get("label_correlation"))])
    if not found:
        return []
    columns = [Column("Round", wording.compact), Column("Step", wording.whole),
               Column("Correlation with held-out labels", lambda v: wording.decimal(v, 3))]  # fmt: skip
    return [Table("label-correlation", columns, found, "Of the last step that recorded it.")]


def _fidelity(rows: list[dict[str, object]]) -> list[Block]:
    text = (
        "Documents are chosen by what helps the small proxy, so the choice is only as good as the proxy’s "
        "likeness to the target. The rank correlation is 1 where both put documents in the same order and 0 where "
        f"their orders have nothing in common. {wording.fidelity(rows)}"
    )
    blocks: list[Block] = [Text("Proxy fidelity", "h3"), Text(text)]
    if not rows:
        return [*blocks, *gaps(["fidelity is not in summary.json"])]
    keys = ("loss_rank_correlation", "change_rank_correlation")
    columns = [
        Column("Round", wording.compact),
        Column("Rank correlation of losses", lambda v: wording.decimal(v, 3)),
        Column("Of their change over the round", lambda v: wording.decimal(v, 3)),
    ]
    data = [[number(row.get("round", n)), *(number(row.get(key)) for key in keys)] for n, row in enumerate(rows, 1)]
    return [*blocks, Table("fidelity", columns, data)]
