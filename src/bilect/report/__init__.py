"""The result in pictures, for people: one self-contained HTML page made from the files of a run directory.

The room reads files and nothing else, so a report can be rebuilt long after the run, on another machine, without the
models. Drawing needs matplotlib and Jinja2; both are imported on the first call, never on `import bilect.report`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["export", "watch", "write_comparison", "write_report"]


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` atomically and return its path.

    Whatever is missing or unreadable in the run directory is named in its section; it never stops the report. Two
    calls on the same files give the same bytes.
    """
    from bilect.report.page import write_page

    return write_page(Path(run_dir))


def export(run_dir: Path, out: Path, form: str) -> list[Path]:
    """Write every plot of a run's report into `out`, as "csv" (the tables too), "png" or "svg"; returns the files."""
    from bilect.report.export import export_plots

    return export_plots(Path(run_dir), Path(out), form)


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write one page that sets two runs or more beside each other, and return its path."""
    from bilect.report.several import write_several

    return write_several([Path(run_dir) for run_dir in run_dirs], Path(out))


def watch(run_dir: Path, port: int = 0, on_start: Callable[[str], None] = print) -> None:
    """Serve the report of a run that goes on, to this machine's browser only, until interrupted."""
    from bilect.report.watch import serve

    serve(Path(run_dir), port, on_start)
