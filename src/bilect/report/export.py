"""The report's plots and tables as files: CSV for programs, SVG and PNG for papers and slides."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from bilect.errors import BilectError
from bilect.report.blocks import Plot, Table, walk
from bilect.report.inputs import read_run
from bilect.report.page import put_in_place
from bilect.report.svg import SCREEN, Svg

__all__ = ["Format", "export_plots"]

Format = Literal["csv", "png", "svg"]
DPI = 200


def export_plots(run_dir: Path, out: Path, form: str) -> list[Path]:
    """Write every plot of a run's report into a folder, or with ``csv`` the numbers of every plot and table.

    Args:
        run_dir: a run directory.
        out: folder of the files, NAME.csv and so on; files of these names are replaced, others stay.
        form: "csv", "png" or "svg".

    Returns:
        The files, in the order of the page.

    Raises:
        BilectError: no such format, no run directory, or a run that has nothing to export.
    """
    from bilect.report.sections import build_sections

    if form not in get_args(Format):
        raise BilectError(f"report: --export is one of {', '.join(get_args(Format))}, not {form!r}")
    if not (run_dir / "run.json").is_file():
        raise BilectError(f"report: {run_dir} is not a run directory (no run.json)")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for section in build_sections(read_run(run_dir)):
        for block in walk(section.blocks):
            if isinstance(block, Plot) and form != "csv":
                files.append(put_in_place(out / f"{block.name}.{form}", _picture(block.svg, form)))
            elif isinstance(block, Plot) and block.rows:
                files.append(put_in_place(out / f"{block.name}.csv", _table(block.header, block.rows)))
            elif isinstance(block, Table) and form == "csv":
                header = [column.title for column in block.columns]
                files.append(put_in_place(out / f"table-{block.name}.csv", _table(header, block.rows)))
    if not files:
        raise BilectError(f"report: {run_dir} has no plot to export yet")
    return files


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if value is None else _safe(value) for value in row] for row in rows)
    return text.getvalue().encode("utf-8", errors="replace")


def _safe(value: object) -> object:
    """A name that a spreadsheet would take for a formula gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _picture(svg: Svg, form: str) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": svg.name}):
        metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
        svg.figure.savefig(buffer, format=form, dpi=DPI, facecolor=SCREEN, metadata=metadata)
    return buffer.getvalue()
