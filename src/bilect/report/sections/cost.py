"""What choosing and training cost, beside what it bought; and every stage's time and arithmetic."""

from __future__ import annotations

from typing import Any

from bilect.report import figures, wording
from bilect.report.blocks import Block, Column, Fold, Plot, Section, Table, gaps
from bilect.report.inputs import Json, RunFiles, flat_numbers, mapping, number, numbers

ORDER = 30


def build(run: RunFiles) -> Section | None:
    """Costs by arm where the run has arms, and by stage."""
    blocks = [*_bought(run), *_stages(run)]
    tokens = flat_numbers(run.summary.get("tokens"))
    if tokens:
        columns = [Column("Tokens of"), Column("Number", wording.compact)]
        blocks.append(Fold("Tokens", [Table("tokens-of-stages", columns, [*tokens.items()], limit=400)]))
    return Section("cost", "Cost, and what it bought", blocks)


def _bought(run: RunFiles) -> list[Block]:
    seconds, flops = (numbers(mapping(run.summary.get("cost")).get(key)) for key in ("seconds", "flops"))
    random = flops.get("random")
    rows: list[list[Any]] = []
    for arm in run.arms:
        if arm not in flops or arm not in run.losses:
            continue
        chose = [
            c.get(f"choosing {arm}", c.get("selection", 0.0) if arm == run.main else 0.0) for c in (seconds, flops)
        ]
        total = chose[1] + flops[arm]
        gain = run.losses["random"] - run.losses[arm] if "random" in run.losses else None
        rows.append([arm, chose[0], chose[1], seconds.get(arm), flops[arm], total / random if random else None, gain])
    if not rows:
        return []
    columns = [
        Column("Data", arm=True),
        Column("Choosing: time", wording.duration),
        Column("Choosing: FLOPs", wording.power),
        Column("Training: time", wording.duration),
        Column("Training: FLOPs", wording.power),
        Column("Both, times random’s", lambda v: wording.decimal(v, 2)),
        Column("Loss below random’s", wording.signed),
    ]
    caption = (
        "What choosing (warm-up of the proxy, fit, scores, selection) and training took, and the held-out loss that it "
        "saved. A gain is worth its cost where training random data for the same total would not reach the same loss."
    )
    blocks: list[Block] = [Table("cost-of-arms", columns, rows, caption, strong=lambda row: row[0] == run.main)]
    drawn: dict[str, tuple[Any, Any]] = {str(row[0]): (row[5], row[6]) for row in rows if None not in row[5:]}
    if len(drawn) > 1:
        svg = figures.bought_figure(drawn, run.main)
        blocks.append(Plot(svg, "Higher and further left is better. Random is at (1, 0).",
                           ("arm", "total FLOPs, times random's", "loss below random's"),
                           [(arm, *at) for arm, at in drawn.items()]))  # fmt: skip
    return blocks


def _stages(run: RunFiles) -> list[Block]:
    stages = {name: mapping(item) for name, item in mapping(run.run.get("stages")).items()}
    values: dict[str, dict[str, float]] = {}
    for key in ("seconds", "flops"):
        stated = flat_numbers(run.summary.get(key))
        recorded = {name: plain for name, item in stages.items() if (plain := number(item.get(key))) is not None}
        values[key] = stated or recorded
    totals = {key: values[key].pop("total", sum(values[key].values())) for key in values if values[key]}
    tokens = {name: number(item.get("tokens")) for name, item in stages.items()}
    # The fullest record knows the order best; what only another one has comes after.
    records: list[Json] = sorted((values["seconds"], values["flops"], stages), key=len, reverse=True)
    order = [s for s in dict.fromkeys(s for r in records for s in r) if s in values["seconds"] or s in values["flops"]]
    if not order:
        return gaps(["neither summary.json nor run.json records time or FLOPs"])
    seconds, flops = ({s: values[key][s] for s in order if s in values[key]} for key in ("seconds", "flops"))
    rows = [[s, seconds.get(s), flops.get(s), tokens.get(s)] for s in order]
    columns = [Column("Stage"), Column("Time", wording.duration), Column("FLOPs", wording.power),
               Column("Tokens", wording.whole)]  # fmt: skip
    total = [["Total", totals.get("seconds"), totals.get("flops"), None]]
    return [
        Plot(
            figures.cost_figure(seconds, flops),
            "Stages in the order they ran; percentages are of the total.",
            ("stage", "seconds", "flops"),
            [(s, seconds.get(s), flops.get(s)) for s in order],
        ),
        Fold("Every stage", [Table("stages", columns, [*rows, *total], strong=lambda r: r[0] == "Total", limit=400)]),
    ]
