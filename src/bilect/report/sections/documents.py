"""Documents to look at: the explorer, and without it the best and the worst."""

from __future__ import annotations

import re

from bilect.report import wording
from bilect.report.blocks import Block, Fold, Html, Section, Text, gaps
from bilect.report.explore import explorer
from bilect.report.inputs import Json, RoundFiles, RunFiles

ORDER = 50
TEXT_LIMIT = 4000  # characters of a document shown


def build(run: RunFiles) -> Section:
    """The explorer needs a selection on the disk; the best and the worst come from extremes.json."""
    blocks: list[Block] = gaps(run.gaps(r"round-\d+/(extremes\.json)?$"))
    data = explorer(run)
    if data is not None:
        blocks.append(Html("report/explorer.html.j2", {"data": data, "id": "explorer"}))
    rounds = [files for files in reversed(run.rounds) if files.best or files.worst]
    for n, files in enumerate(rounds):
        shown = _extremes(files)
        title = f"Best and worst documents, round {files.number}"
        blocks.append(Fold(title, shown, open=n == 0 and data is None))
    return Section("documents", "Documents", blocks)


def _extremes(files: RoundFiles) -> list[Block]:
    blocks: list[Block] = []
    for title, rows in (("Best", files.best), ("Worst", files.worst)):
        if rows:
            blocks.append(Text(f"{title} scores, round {files.number}", "h3"))
            blocks.append(Html("report/documents.html.j2", {"documents": [_document(row) for row in rows]}))
    return blocks


def _document(row: Json) -> Json:
    raw = row.get("text")
    text = raw if isinstance(raw, str) else ""
    lead = " ".join(wording.visible(text[:600]).split())
    doc_id, source = row.get("doc_id"), row.get("source")
    return {
        "doc_id": wording.shown_name(doc_id) if isinstance(doc_id, str) else wording.DASH,
        "source": wording.shown_name(source) if isinstance(source, str) and source else "(no source)",
        "n_tokens": row.get("n_tokens"),
        "score": row.get("score"),
        "lead": lead[:110] + ("…" if len(lead) > 110 else ""),
        "text": re.sub(r"[^\S\n\t]+\n", "\n", wording.visible(text[:TEXT_LIMIT])),
        "cut": max(len(text) - TEXT_LIMIT, 0),
    }
