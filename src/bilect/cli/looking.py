"""What there is, for people and for programs: on this machine (``bilect doctor``)."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from bilect.runtime.terminal import PlainConsole, printable

if TYPE_CHECKING:
    from bilect.cli.output import Result
    from bilect.runtime.doctor import Check

__all__ = ["show_machine"]

_WORDS = {"ok": ("works", "green"), "optional": ("-", "yellow"), "failed": ("FAILS", "bold red")}


def show_machine(folder: Path) -> "tuple[Result, int]":
    """``bilect doctor``: a line for each thing; of the required packages that are there, one for all."""
    from bilect.runtime.doctor import examine

    checks = examine(folder)
    failed = [check for check in checks if check.state == "failed"]
    console = PlainConsole(soft_wrap=False)
    console.print(_machine_table(checks, plain=not console.is_terminal))
    names = ", ".join(check.name for check in failed)
    console.print(f"What is required fails: {names}" if failed else "All that is required works.")
    return {"ok": not failed, "folder": folder.absolute(), "checks": [asdict(check) for check in checks]}, int(
        bool(failed)
    )


def _machine_table(checks: "Sequence[Check]", plain: bool) -> Any:
    from rich.box import ROUNDED
    from rich.table import Table

    table = Table(box=None if plain else ROUNDED, pad_edge=not plain)
    for name in ("what", "state", "found", "what to do"):
        table.add_column(name, overflow="fold")
    there = [check for check in checks if check.part == "package" and check.state == "ok"]
    for check in checks:
        word, style = _WORDS[check.state]
        name, found = f"extra {check.name}" if check.part == "extra" else check.name, check.found
        if check in there:
            if check is not there[0]:
                continue
            name, found = "packages", f"{len(there)} that are required, new enough"
        table.add_row(name, Text(word, style), printable(found), check.remedy)
    return table
