"""``bilect compare``: which selection method for this pool and target, and is it worth its cost?

config, seeds, variants -> cells.py -> grid.py -> collect.py -> comparison.py (+ statistics.py, verdict.py) -> page.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bilect.config import Config

__all__ = ["compare"]


def compare(
    config: Config, out: Path, say: Callable[[str], None] = lambda line: None, *, repeat: bool = False
) -> dict[str, Any]:
    """Carry out a comparison, or what is left of it, and write ``comparison.json``, ``.csv`` and ``.html``.

    Args:
        config: a run's, with ``compare``.
        out: folder; every cell of the comparison has its run directory there.
        say: takes a line for the reader whenever a stage has finished.
        repeat: as of ``pipeline.stages.run``.

    Returns:
        The content of ``comparison.json``, see ``comparison.compare_runs``.

    Raises:
        BilectError: wrong settings, before anything starts; or the first failure of a cell, when the others are done.
    """
    from bilect.compare.cells import cells, check
    from bilect.compare.comparison import compare_runs, csv_text
    from bilect.compare.grid import carry_out
    from bilect.compare.page import render
    from bilect.runtime.files import write_json, write_text
    from bilect.runtime.locks import locked

    out = out.resolve()
    found = cells(config, out)
    check(found)
    with locked(out):
        carry_out(found, config.compare.workers, say, repeat=repeat)
        comparison = compare_runs(found, config.compare.variants)
        write_json(out / "comparison.json", comparison)
        write_text(out / "comparison.csv", csv_text(comparison))
        write_text(out / "comparison.html", render(comparison))
    return comparison
