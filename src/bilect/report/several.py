"""Several runs beside each other: results, costs, settings that differ, and on which documents their choices differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilect.errors import BilectError
from bilect.report import wording
from bilect.report.blocks import Block, Column, Html, Plot, Section, Table, Text, gaps
from bilect.report.choice import opened, view_of
from bilect.report.explore import of_selections
from bilect.report.inputs import RunFiles, flat_numbers, mapping, numbers, read_run, settings_of
from bilect.report.lines import Lines, lines_figure
from bilect.report.page import encoded, put_in_place, render_sections
from bilect.report.sections import curves
from bilect.report.verdict import Verdict

__all__ = ["write_several"]

Named = dict[str, RunFiles]


def write_several(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write one page that compares runs; returns it.

    Losses are comparable where the runs share target model and held-out data: settings that differ are listed.

    Args:
        run_dirs: two run directories or more; the first is the one that the others are set against.
        out: the HTML file.

    Raises:
        BilectError: fewer than two runs, the same twice, or a folder that is no run directory.
    """
    if len({path.resolve() for path in run_dirs}) < max(len(run_dirs), 2):
        raise BilectError("report: name two different run directories or more")
    for path in run_dirs:
        if not (path / "run.json").is_file():
            raise BilectError(f"report: {path} is not a run directory (no run.json)")
    runs = _named([read_run(path) for path in run_dirs])
    sections = [_results(runs), _curves(runs), _settings(runs), _documents(runs)]
    found = [section for section in sections if section is not None]
    html = render_sections(", ".join(runs), "bilect report: runs compared", _verdict(runs), found, "")
    out.parent.mkdir(parents=True, exist_ok=True)
    return put_in_place(out, encoded(html))


def _named(runs: Sequence[RunFiles]) -> Named:
    """Runs by name; by as much of their path as tells those of one name apart."""
    named: Named = {}
    for depth in range(1, 50):
        named = {wording.shown_name("/".join(run.root.resolve().parts[-depth:]), 60): run for run in runs}
        if len(named) == len(runs):
            return named
    return {f"{n}: {run.name}": run for n, run in enumerate(runs, 1)}


def _verdict(runs: Named) -> Verdict:
    losses = {name: run.losses[run.main] for name, run in runs.items() if run.main in run.losses}
    if not losses:
        return Verdict("unknown", "None of these runs has a held-out loss yet.")
    best = min(losses, key=lambda name: losses[name])
    others = [loss for name, loss in losses.items() if name != best]
    if not others:
        return Verdict("unknown", f"Only {best} has a held-out loss yet: {wording.decimal(losses[best])}.")
    return Verdict(
        "chosen",
        f"{best} has the lowest held-out loss, {wording.decimal(losses[best])}; the next has "
        f"{wording.decimal(min(others))}.",
        ["One run each. The losses are comparable where target model, tokens and held-out data are the same: see the "
         "settings that differ. `bilect compare` repeats runs over seeds and gives intervals."],
    )  # fmt: skip


def _results(runs: Named) -> Section:
    """A column per run: a page has room for more rows than columns."""
    found: dict[str, list[str]] = {}
    for run in runs.values():
        ours, random = run.losses.get(run.main), run.losses.get("random")
        cost = numbers(mapping(run.summary.get("cost")).get("flops"))
        last = next((r.selection for r in reversed(run.rounds) if r.selection), None)
        for title, text in (
            ("Chosen by", wording.arm_name(run.main)),
            ("Held-out loss", wording.decimal(ours)),
            ("Against its own random", wording.signed(None if ours is None or random is None else ours - random)),
            ("Choosing, FLOPs", wording.power(cost.get(f"choosing {run.main}", cost.get("selection")))),
            ("Training, FLOPs", wording.power(cost.get(run.main))),
            ("Time, all of it", wording.duration(flat_numbers(run.summary.get("seconds")).get("total"))),
            ("Documents kept", wording.whole(last and last.kept)),
            ("Tokens kept", wording.whole(last and last.kept_tokens)),
            ("Lowest score kept", wording.decimal(last and last.threshold)),
        ):
            found.setdefault(title, []).append(text)
    columns = [Column("Figure"), *(Column(name, str) for name in runs)]
    return Section("runs", "Runs", [Table("runs", columns, [[title, *texts] for title, texts in found.items()])])


def _curves(runs: Named) -> Section | None:
    for file, title in (("heldout.jsonl", "Held out"), ("training.jsonl", "In training")):
        found = {name: curve for name, run in runs.items() if (curve := curves.read_curve(run, run.main, file))}
        if found:
            lines = Lines(title, "training step", "loss, nats per token", found, log_x=False, zero=False)
            note = "" if file == "heldout.jsonl" else " Each run is measured on its own text."
            svg = lines_figure(
                "run-curves", [lines], f"Loss of each run's target over training steps: {title.lower()}."
            )
            rows = [(name, step, loss) for name, curve in found.items() for step, loss in curve]
            plot = Plot(
                svg, f"Loss of the target that each run’s own choice trained.{note}", ("run", "step", "loss"), rows
            )
            return Section("curves", "Learning curves", [plot])
    return None


def _settings(runs: Named) -> Section:
    flat = {name: dict(_flat(settings_of(run.config))) for name, run in runs.items()}
    keys = list(dict.fromkeys(key for settings in flat.values() for key in settings))
    rows = [
        [key, *(wording.shown_name(settings.get(key, wording.DASH), 80) for settings in flat.values())]
        for key in keys
        if len({repr(settings.get(key)) for settings in flat.values()}) > 1
    ]
    if not rows:
        return Section("settings", "Settings that differ", [Text("None.")])
    columns = [Column("Setting"), *(Column(name) for name in runs)]
    return Section("settings", "Settings that differ", [Table("settings", columns, rows, limit=400)])


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in settings.items():
        pairs += _flat(mapping(value), f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs


def _documents(runs: Named) -> Section:
    """The last round of each run; documents are the same where their ids are."""
    folders = {}
    for name, run in runs.items():
        chosen = [r for r in run.rounds if r.selection is not None]
        if chosen:
            folders[name] = run.root / f"round-{chosen[-1].number}" / "selected"
    if len(folders) < 2:
        return Section("documents", "Documents", gaps(["fewer than two of these runs have a selection"]))
    with opened() as db:
        shown = [name for n, name in enumerate(folders) if view_of(db, f"run{n}", folders[name])]
        overlap: list[list[Any]] = [[name] for name in shown]
        for a in range(len(shown)):
            for b in range(len(shown)):
                both, either = db.execute(
                    f"""WITH a AS (SELECT doc_id FROM run{a} WHERE kept), b AS (SELECT doc_id FROM run{b} WHERE kept)
                        SELECT (SELECT count(*) FROM a SEMI JOIN b USING (doc_id)),
                               (SELECT count(*) FROM (SELECT doc_id FROM a UNION SELECT doc_id FROM b))"""
                ).fetchone()
                overlap[a].append(both / either if either else None)
    columns = [Column("Kept by"), *(Column(name, lambda v: wording.decimal(v, 2)) for name in shown)]
    caption = "Documents of the last round that two runs both kept, over those that either kept (Jaccard index)."
    first = next(run for name, run in runs.items() if name in folders)
    selection = next(r.selection for r in reversed(first.rounds) if r.selection is not None)
    pools = [run.root / "tokens" / "pool" for name, run in runs.items() if name in folders]
    data = of_selections(folders, selection.deciles, pools)
    blocks: list[Block] = [Table("overlap", columns, overlap, caption),
                           Html("report/explorer.html.j2", {"data": data, "id": "explorer"})]  # fmt: skip
    return Section("documents", "Documents", blocks)
