"""What was kept: by source against the pool, by score, by length, round by round."""

from __future__ import annotations

from bilect.report import figures, wording
from bilect.report.blocks import Block, Column, Fold, Plot, Section, Table, Text, gaps
from bilect.report.choice import Selection
from bilect.report.inputs import RoundFiles, RunFiles, number, numbers, objects

ORDER = 40


def build(run: RunFiles) -> Section:
    """The shares are the summary's, or counted from the files where there is none."""
    last = next((r for r in reversed(run.rounds) if r.selection is not None), None)
    blocks: list[Block] = gaps(run.gaps(r"round-\d+/(scores/|selected/)?$"))
    blocks += _sources(run, last.selection if last else None)
    if last is not None and last.selection is not None:
        blocks += _choice(last.selection, last.number)
    blocks += _ridges(run)
    return Section("kept", "What was kept", [*blocks, *_rounds(run)])


def _sources(run: RunFiles, found: Selection | None) -> list[Block]:
    keys = ("pool_share_by_source", "kept_share_by_source", "kept_fraction_by_source")
    pool, kept, fraction = (numbers(run.summary.get(key)) for key in keys)
    if found is not None and not (pool or kept):
        pool = {s.name: s.tokens / max(found.tokens, 1) for s in found.sources}
        kept = {s.name: s.kept_tokens / max(found.kept_tokens, 1) for s in found.sources}
        fraction = {s.name: s.kept / s.documents for s in found.sources}
    if not pool and not kept:
        return gaps(["shares by source are neither in summary.json nor among the selected documents"])
    sources = sorted({*pool, *kept, *fraction}, key=lambda s: (-kept.get(s, 0.0), -pool.get(s, 0.0), s))
    rows = [
        [s, pool.get(s), kept.get(s), kept[s] / pool[s] if s in kept and pool.get(s) else None, fraction.get(s)]
        for s in sources
    ]
    columns = [
        Column("Source"),
        Column("Share of pool", wording.percent),
        Column("Share of kept", wording.percent),
        Column("Ratio", lambda v: f"{wording.decimal(v, 2)}×" if v is not None else wording.DASH),
        Column("Documents kept", wording.percent),
    ]
    more = f" The {figures.MAX_SHARES} of {len(sources):,} sources with the greatest share." if len(
        sources) > figures.MAX_SHARES else ""  # fmt: skip
    caption = "A source whose blue bar is longer than its grey one was favoured by the selection." + more
    header = ("source", "pool", "kept", "ratio", "documents kept")
    return [
        Plot(figures.shares_figure(pool, kept), caption, header, rows),
        Table("sources", columns, [[wording.shown_name(row[0]), *row[1:]] for row in rows]),
    ]


def _choice(found: Selection, number_of: int) -> list[Block]:
    blocks: list[Block] = []
    if found.histogram:
        cut = "" if found.threshold is None else f" The dashed line is the lowest score kept, {found.threshold:.4g}."
        blocks.append(
            Plot(
                figures.histogram_figure(found),
                f"Round {number_of}: the scores of {found.documents:,} documents; {found.kept:,} were kept.{cut}",
                ("from", "to", "kept", "left out"),
                found.histogram,
            )
        )
    if found.reasons:
        columns = [Column("Left out because"), Column("Documents", wording.whole)]
        blocks.append(Table("reasons", columns, [[wording.shown_name(k), n] for k, n in found.reasons.items()]))
    if len(found.lengths) > 1:
        blocks.append(
            Plot(
                figures.length_figure(found.lengths),
                "Does the choice follow length? Left: median score of documents of about one length, with bands for "
                "the middle 50% and 90%. Right: the share of them that was kept.",
                ("tokens, about", "documents", "kept", "score 5%", "25%", "50%", "75%", "95%"),
                [(b.tokens, b.documents, b.kept, *b.quantiles) for b in found.lengths],
            )
        )
    return blocks


def _ridges(run: RunFiles) -> list[Block]:
    shown = [files for files in reversed(run.rounds) if files.scores is not None]
    blocks: list[Block] = []
    for n, files in enumerate(shown):
        plot = _ridge(run, files)
        blocks.append(plot if n == 0 else Fold(f"Scores by source, round {files.number}", [plot]))
    return [Text("Scores by source", "h3"), *blocks] if blocks else []


def _ridge(run: RunFiles, files: RoundFiles) -> Plot:
    thresholds = {number(row.get("round")): number(row.get("threshold")) for row in objects(run.summary.get("rounds"))}
    threshold = thresholds.get(float(files.number))
    if threshold is None and files.selection is not None:
        threshold = files.selection.threshold
    scores = files.scores
    assert scores is not None
    caption = (
        f"Round {files.number}: the scores of {scores.documents:,} documents, one ridge per source, each to its own "
    )
    caption += "height."
    if threshold is not None:
        caption += f" The dashed line is the cut at {wording.decimal(threshold)}: documents to its right were kept."
    if scores.folded:
        caption += f" The {scores.folded} smallest sources are shown together."
    if scores.left_out:
        caption += f" {scores.left_out:,} documents without a finite score are left out."
    rows = [(s.name, s.documents, *(s.quantile(q) for q in (0.05, 0.25, 0.5, 0.75, 0.95))) for s in scores.sources]
    svg = figures.scores_figure(scores, threshold, f"scores{files.number}")
    return Plot(svg, caption, ("source", "documents", "5%", "25%", "50%", "75%", "95%"), rows)


def _rounds(run: RunFiles) -> list[Block]:
    rounds = objects(run.summary.get("rounds"))
    if not rounds:
        return [] if run.only_chose else gaps(["rounds is not in summary.json"])
    arms = run.ordered({arm: None for row in rounds for arm in numbers(row.get("heldout_loss"))})
    columns = [
        Column("Round", wording.compact),
        Column("Documents kept", wording.whole),
        Column("Score cut", wording.decimal),
    ]
    columns += [Column(f"Loss, {wording.arm_name(arm)}", wording.decimal) for arm in arms]
    rows = []
    for n, row in enumerate(rounds, 1):
        losses = numbers(row.get("heldout_loss"))
        found = [number(row.get("round", n)), number(row.get("documents_kept")), number(row.get("threshold"))]
        rows.append([*found, *(losses.get(arm) for arm in arms)])
    return [Text("Round by round", "h3"), Table("rounds", columns, rows)]
