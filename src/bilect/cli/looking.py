"""What there is, for people and for programs: on this machine (``bilect doctor``), at a path (``bilect inspect``)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from bilect.runtime.terminal import PlainConsole, printable

if TYPE_CHECKING:
    from bilect.cli.output import Result
    from bilect.runtime.doctor import Check

__all__ = ["show_content", "show_machine"]

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


def show_content(path: Path) -> "Result":
    """``bilect inspect``: what it is, its figures, and what to type next."""
    from bilect.pipeline.inspecting import inspect

    found = inspect(path)
    console = PlainConsole(soft_wrap=False)
    console.print(f"{path}: a {found['kind']}")
    for line in _SHOWN[found["kind"]](found):
        console.print(line)
    if found.get("note"):
        console.print(found["note"])
    for command in found["next"]:
        console.print(f"Next: {command}")
    return found


def _run_lines(found: Mapping[str, Any]) -> list[Any]:
    controls = f", beside {', '.join(found['controls'])}" if found["controls"] else ""
    table = _table(None, "stage", "state", "tokens", "seconds")
    for name, record in found["done"].items():
        table.add_row(name, "done", f"{record.get('tokens', 0):,}", f"{record.get('seconds', 0):,.1f}")
    for name in found["left"]:
        table.add_row(name, "begun" if name in found["begun"] else "changed" if name in found["changed"] else "left")
    lines = [f"Chosen by {found['method']}{controls}; seed {found['seed']}", table]
    for kept in found["kept"]:
        title = (f"round {kept['round']}, {kept['arm']}: kept {kept['documents']:,} of {kept['pool_documents']:,} "
                 f"documents, {kept['tokens']:,} of {kept['pool_tokens']:,} tokens")  # fmt: skip
        shares = _table(title, "source", "share of the pool", "share of what is kept", "documents kept")
        for name in sorted(kept["kept_share_by_source"], key=lambda source: -kept["kept_share_by_source"][source]):
            figures = (kept[f"{share}_by_source"][name] for share in ("pool_share", "kept_share", "kept_fraction"))
            shares.add_row(name, *(f"{100 * value:.1f}%" for value in figures))
        lines.append(shares)
    if found["heldout_loss"]:
        lines.append("Held-out loss: " + ", ".join(f"{arm} {loss:.4f}" for arm, loss in found["heldout_loss"].items()))
    return [*lines, found["verdict"]] if found["verdict"] else lines


def _scores_lines(found: Mapping[str, Any]) -> list[Any]:
    title = f"{found['documents']:,} documents, {found['tokens']:,} tokens, {found['files']} files; quantiles of scores"
    table = _table(title, "source", "documents", "tokens", *found["quantiles"])
    for name, row in [*found["sources"].items(), ("in all", found)]:
        cuts = ("" if cut is None else f"{cut:.4g}" for cut in row["quantiles"].values())
        table.add_row(name, f"{row['documents']:,}", f"{row['tokens']:,}", *cuts)
    without = found["without_score"]
    return [table, f"{without:,} documents have no finite score"] if without else [table]


def _selection_lines(found: Mapping[str, Any]) -> list[Any]:
    table = _table(
        f"threshold {found['threshold']:.4g}", "source", "documents kept", "tokens kept", "documents dropped"
    )
    for name, row in [*found["sources"].items(), ("in all", found)]:
        dropped = f"{row['dropped']['documents']:,}" if row.get("dropped") else "?"
        table.add_row(name, f"{row['kept']['documents']:,}", f"{row['kept']['tokens']:,}", dropped)
    reasons = [f"Dropped, {reason}: {n:,}" for reason, n in found["reasons"].items()]
    return [table, *reasons, "The records are there, as they came." if found["records"] else "Without records."]


def _model_lines(found: Mapping[str, Any]) -> list[Any]:
    head = f" with a {found['head']} head" if found.get("head") else ""
    lines = [f"{found['architecture']}{head}: {found['parameters']:,} parameters in {found['tensors']} tensors "
             f"({', '.join(found['stored_as'])}), vocabulary {found['vocabulary']}, positions {found['positions']}, "
             f"{'with' if found['tokenizer'] else 'without'} a tokenizer"]  # fmt: skip
    return lines if found["step"] is None else [*lines, f"After step {found['step']:,} of a training"]


def _checkpoint_lines(found: Mapping[str, Any]) -> list[Any]:
    table = _table(
        "no step in it" if found["step"] is None else f"after step {found['step']:,}", "part", "tensors", "numbers"
    )
    for name, row in found["parts"].items():
        table.add_row(name, f"{row['tensors']:,}", f"{row['numbers']:,}")
    return [table]


_SHOWN: dict[str, Callable[[Mapping[str, Any]], list[Any]]] = {
    "run": _run_lines, "choice": _run_lines, "scores": _scores_lines, "selection": _selection_lines,
    "model": _model_lines, "score model": _model_lines, "checkpoint": _checkpoint_lines,
}  # fmt: skip


def _table(title: str | None, first: str, *others: str) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for name in (first, *others):
        table.add_column(name, justify="left" if name in (first, "state") else "right")
    return table
