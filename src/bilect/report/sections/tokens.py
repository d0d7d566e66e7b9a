"""Online token selection: what was chosen by Delta, over training and on a few documents."""

from __future__ import annotations

from bilect.report import wording
from bilect.report.blocks import Block, Column, Html, Plot, Section, Table, Text, gaps
from bilect.report.inputs import RunFiles
from bilect.report.tokens import (
    choice_figure,
    delta_figure,
    distance_figure,
    records,
    settings,
    source_rows,
    token_views,
)

ORDER = 60
_CAPTIONS = (
    (
        delta_figure,
        "Δ over the batch: the line is the median, the bands hold the middle 50%, 90% and 98% of the tokens. Where the "
        "share above 0 falls towards nothing, the model has caught up with its reference and the choice says little; "
        "synchronisations renew it.",
    ),
    (
        distance_figure,
        "Euclidean distances in the space of the parameters: of the model u from its reference w, and from itself at "
        "the last synchronisation. Synchronisations make a saw-tooth; without them the model only moves away.",
    ),
    (
        choice_figure,
        "Agreement: of the tokens of one fixed batch that this or the previous record selected, the share that both "
        "did; 1 means that nothing changed. An oracle’s loss, where there was one, is strong on the selected tokens "
        "and faint on all of them: below is easier, or cleaner, than the average token.",
    ),
)
_ABOUT = (
    "These arms trained on a part of every batch, chosen token by token. Δ is the loss of the model in training minus "
    "the loss of the reference: a token with Δ > 0 is one that the reference, which has seen the target set, predicts "
    "better. Random tokens have no Δ."
)


def build(run: RunFiles) -> Section | None:
    """None where no arm chose tokens."""
    missing = run.gaps(r".*/target/online\.json$")
    if not run.online and not missing:
        return None
    runs = {arm: run.online[arm].content for arm in run.ordered(run.online)}
    blocks: list[Block] = [
        Text(_ABOUT),
        *gaps(missing),
    ]
    keys = ("keep_ratio", "kept", "sync_every", "reference_steps", "synchronisations")
    rows = [
        [row["arm"], row["method"], run.online[row["arm"]].round, *(row[key] for key in keys), row["entries"]]
        for row in settings(runs)
    ]
    if rows:
        compact = wording.compact
        columns = [Column("Data", arm=True), Column("Chosen by"), Column("Round", compact),
                   Column("To keep", wording.percent), Column("Kept", wording.percent), Column("Every", compact),
                   Column("Steps", compact), Column("Times", compact), Column("Records", compact)]  # fmt: skip
        caption = (
            "The share of tokens to keep and the share kept. Then the reference: every how many training steps it was "
            "synchronised, with how many steps of its own each time, and how often."
        )
        blocks.append(Table("token-settings", columns, rows, caption))
    for draw, caption in _CAPTIONS:
        if (svg := draw(runs)) is not None:
            blocks.append(Plot(svg, caption, *records(runs)))
    if found := source_rows(runs):
        columns = [Column("Source"), Column("Data", arm=True), Column("Tokens recorded", wording.whole),
                   Column("Selected, all records", wording.percent),
                   Column("Selected, last record", wording.percent)]  # fmt: skip
        data = [[wording.shown_name(r["source"]), r["arm"], r["tokens"], r["mean"], r["last"]] for r in found]
        blocks += [Text("Selected share by source", "h3"), Table("token-sources", columns, data, limit=200)]
    if views := token_views(runs):
        note = (
            "Underlined: chosen. Colour: Δ, blue where the reference is better, orange where the model in training is, "
            "the stronger the further from 0. Point at a token, or tap it, to read its Δ in nats."
        )
        blocks += [Text("Chosen tokens", "h3"), Text(note, "note"), Html("report/tokens.html.j2", {"views": views})]
    return Section("tokens", "Tokens", blocks)
