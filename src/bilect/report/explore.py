"""Documents to look at: a stratified sample of what was scored, and what one selection kept and another did not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bilect.data.tables import kept_file, kept_table
from bilect.report.choice import opened, view_of
from bilect.report.inputs import Json, RunFiles, number
from bilect.report.wording import arm_name, shown_name, visible

__all__ = ["explorer", "of_selections"]

SAMPLE, NEAR_CUT, ENDS, PAIR = 320, 10, 8, 24  # documents
MAX_OTHERS = 5  # selections beside the first
TEXT_BYTES, CHARACTERS = 2_000_000, 2000  # of all texts on the page; of one


def explorer(run: RunFiles) -> Json | None:
    """The documents of the last round that has a selection, and the selections of the arms that chose in it."""
    for files in sorted(run.rounds, key=lambda r: -r.number):
        if files.selection is not None:
            folders = {arm: run.root / run.folder(arm, files.number) / "selected" for arm in run.arms}
            names = {arm_name(arm): folder for arm, folder in folders.items()}
            shown = of_selections(names, files.selection.deciles, [run.root / "tokens" / "pool"])
            return {**shown, "round": files.number}
    return None


def of_selections(folders: Mapping[str, Path], deciles: Sequence[float], pools: Sequence[Path]) -> Json:
    """What the page's script shows.

    Args:
        folders: name -> folder of a selection, the first of them the one that is sampled; those without files are
            left out.
        deciles: cuts between tenths of the first selection's scores.
        pools: folders of token files with the texts.

    Returns:
        ``documents``, each with its place among ``sources``, ``reasons`` and ``arms`` (those that kept it);
        ``pairs``: for each other selection, how many documents both, only the first and only the other kept, and
        places of documents among ``documents`` that only one of the two kept.
    """
    with opened() as db:
        arms = [name for n, (name, folder) in enumerate(folders.items()) if n == 0 or folder.is_dir()]
        arms = [name for n, name in enumerate(arms) if view_of(db, f"arm{n}", folders[name])][: MAX_OTHERS + 1]
        tenth = "1" + "".join(f" + (score > {cut!r})::INT" for cut in deciles)
        picked = [row[0] for row in db.execute(_picking(tenth)).fetchall()]
        pairs = []
        for n in range(1, len(arms)):
            sides = []
            for a, b in ((0, n), (n, 0)):
                rows = db.execute(
                    f"""SELECT doc_id FROM arm{a} WHERE kept AND doc_id NOT IN (SELECT doc_id FROM arm{b} WHERE kept)
                        ORDER BY md5(doc_id), doc_id LIMIT {PAIR}"""
                ).fetchall()
                sides.append([row[0] for row in rows])
            both, first, other = db.execute(
                f"""SELECT (SELECT count(*) FROM arm0 JOIN arm{n} USING (doc_id) WHERE arm0.kept AND arm{n}.kept),
                           (SELECT count(*) FROM arm0 WHERE kept), (SELECT count(*) FROM arm{n} WHERE kept)"""
            ).fetchone()
            pairs.append({"arm": n, "both": both, "first": first - both, "other": other - both, "sides": sides})
        ids = list(dict.fromkeys([*picked, *(i for pair in pairs for side in pair["sides"] for i in side)]))
        db.execute("CREATE TABLE wanted AS SELECT unnest(?::VARCHAR[]) AS doc_id", [ids])
        found_in: dict[str, tuple[Any, ...]] = {}
        for n in reversed(range(len(arms))):  # one that the first did not score has the other's source and length
            score = f"score, {tenth}, reason" if n == 0 else "NULL, NULL, NULL"
            query = f"SELECT doc_id, source, n_tokens, {score} FROM arm{n} SEMI JOIN wanted USING (doc_id)"
            found_in |= {row[0]: row for row in db.execute(query).fetchall()}
        rows = [found_in[doc_id] for doc_id in ids]
        kept_by = [
            {row[0] for row in db.execute(f"SELECT doc_id FROM arm{n} SEMI JOIN wanted USING (doc_id) WHERE kept")
             .fetchall()}
            for n in range(len(arms))
        ]  # fmt: skip
        found: dict[str, str] = {}
        for pool in pools:
            found |= texts(pool, [i for i in ids if i not in found])
        if len(found) < len(ids):
            found = {**_kept_texts(db, folders[arms[0]]), **found}
    place = {doc_id: n for n, doc_id in enumerate(ids)}
    return {
        **_packed(rows, found, kept_by),
        "arms": arms,
        "sample": len(picked),
        "pairs": [{**pair, "sides": [[place[i] for i in side] for side in pair["sides"]]} for pair in pairs],
    }


def _picking(tenth: str) -> str:
    """The sample: round after round one document of each tenth, source and fate; the ends; both sides of the cut."""
    return f"""
        WITH drawn AS (
            SELECT doc_id, md5(doc_id) AS draw, row_number() OVER (
                PARTITION BY {tenth}, source, kept, reason ORDER BY md5(doc_id), doc_id) AS turn FROM arm0)
        SELECT doc_id FROM (SELECT doc_id FROM drawn ORDER BY turn, draw, doc_id LIMIT {SAMPLE})
        UNION SELECT doc_id FROM (SELECT doc_id FROM arm0 ORDER BY score DESC, doc_id LIMIT {ENDS})
        UNION SELECT doc_id FROM (SELECT doc_id FROM arm0 ORDER BY score, doc_id LIMIT {ENDS})
        UNION SELECT doc_id FROM (SELECT doc_id FROM arm0 WHERE kept ORDER BY score, doc_id LIMIT {NEAR_CUT})
        UNION SELECT doc_id FROM (SELECT doc_id FROM arm0 WHERE NOT kept ORDER BY score DESC, doc_id LIMIT {NEAR_CUT})
        ORDER BY doc_id"""


def _packed(rows: Sequence[tuple[Any, ...]], found: Mapping[str, str], kept_by: Sequence[set[str]]) -> Json:
    sources = sorted({row[1] for row in rows})
    reasons = sorted({row[5] for row in rows if row[5] is not None})
    room = TEXT_BYTES // max(len(rows), 1)
    documents = []
    for doc_id, source, n_tokens, score, tenth, reason in rows:
        raw = found.get(doc_id)
        text = None if raw is None else fitting(raw, room)
        documents.append(
            {
                "id": shown_name(doc_id),
                "source": sources.index(source),
                "tokens": n_tokens,
                "score": number(score),
                "tenth": tenth,
                "reason": None if reason is None else reasons.index(reason),
                "arms": [n for n, kept in enumerate(kept_by) if doc_id in kept],
                "text": text,
                "more": 0 if raw is None or text is None else len(raw) - len(text),
            }
        )
    return {"documents": documents, "sources": [*map(shown_name, sources)], "reasons": [*map(shown_name, reasons)]}


def fitting(text: str, room: int) -> str:
    """The start of a text that takes no more than `room` bytes in the page, however it has to be escaped."""
    text = visible(text[:CHARACTERS].replace("\r\n", "\n"))
    while (size := len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")) + 5 * _escaped(text)) > room:
        text = text[: min(int(len(text) * room / size), len(text) - 1)]
    return text


def _escaped(text: str) -> int:
    return sum(map(text.count, "<>&"))


def texts(folder: Path, ids: Iterable[str]) -> dict[str, str]:
    """Texts of documents from token files, through the memory map: only their own pages are read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted, found = pa.array(list(ids), pa.string()), dict[str, str]()
    for path in sorted(folder.glob("*.arrow")):
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
                for batch in reader:
                    rows = pc.indices_nonzero(pc.is_in(batch.column("doc_id"), wanted))
                    for key, text in zip(
                        batch.column("doc_id").take(rows).to_pylist(),
                        batch.column("text").take(rows).to_pylist(),
                        strict=True,
                    ):
                        found.setdefault(key, text)
        except (OSError, ValueError, KeyError):  # damaged, or being written: its documents are shown without text
            continue
    return found


def _kept_texts(db: Any, folder: Path) -> dict[str, str]:
    """Texts from the records of a selection, where no token files are there."""
    import duckdb

    if (file := kept_file(folder)) is None:
        return {}
    table = kept_table(file, {"text": "VARCHAR"})
    try:
        rows = db.execute(f"SELECT doc_id, text FROM {table} SEMI JOIN wanted USING (doc_id)").fetchall()
    except duckdb.Error:  # no column of that name
        return {}
    return {key: text for key, text in rows if isinstance(text, str)}
