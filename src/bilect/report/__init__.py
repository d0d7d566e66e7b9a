"""The result in pictures, for people: one self-contained HTML page made from the files of a run directory.

The room reads files and nothing else, so a report can be rebuilt long after the run, on another machine, without the
models. Drawing needs matplotlib and Jinja2; both are imported on the first call, never on `import bilect.report`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["write_comparison", "write_report"]


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` atomically and return its path.

    Whatever is missing or unreadable in the run directory is named in its section; it never stops the report. Two
    calls on the same files give the same bytes.
    """
    from bilect.report.page import write_page

    return write_page(Path(run_dir))


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write one page that sets two runs or more beside each other, and return its path."""
    from bilect.report.several import write_several

    return write_several([Path(run_dir) for run_dir in run_dirs], Path(out))
