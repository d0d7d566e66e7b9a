"""``bilect tasks``: saved models on downstream tasks, each against the first on the same examples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilect.runtime.terminal import PlainConsole, printable

if TYPE_CHECKING:
    from bilect.cli.output import Result

__all__ = ["show_tasks"]


def show_tasks(
    models: Sequence[str], names: Sequence[str], limit: int | None, context: int | None, device: str, out: Path | None
) -> "Result":
    """Evaluate one model after the other, then show all of them.

    Raises:
        BilectError: as of ``task_examples``; a model given twice.
    """
    from bilect.errors import BilectError
    from bilect.runtime.device import pick_device
    from bilect.runtime.files import write_json
    from bilect.training.task_examples import TaskExamples, paired_difference
    from bilect.training.tasks import task_examples

    if len(set(models)) < len(models):
        raise BilectError("tasks: a model is given twice; give each once")
    if out is not None and not out.absolute().parent.is_dir():
        raise BilectError(f"--out {out}: no directory {out.parent}; create it")
    where, found, costs = pick_device(device), dict[str, dict[str, TaskExamples]](), dict[str, Any]()
    console = PlainConsole(soft_wrap=False)
    for model in models:
        found[model], costs[model] = task_examples(model, names, limit=limit, context=context, device=where)
        console.print(f"{printable(model)}: {costs[model]['tokens']:,} tokens, {costs[model]['flops']:.3g} FLOPs")
    first = models[0]
    differences = {
        model: {task: {m: paired_difference(found[first][task].metrics[m], e) for m, e in figures.metrics.items()}
                for task, figures in found[model].items()}
        for model in models[1:]
    }  # fmt: skip
    result = {
        "models": {model: {task: e.figures() for task, e in by_task.items()} for model, by_task in found.items()},
        "against": first,
        "differences": differences,
        "cost": costs,
    }
    console.print(_tables(result))
    if out is not None:
        write_json(out, result)
        console.print(f"Numbers: {out}")
    return result


def _tables(result: Mapping[str, Any]) -> Any:
    """A table per task; nothing in it is cut on a narrow terminal, or models would look alike."""
    from rich.console import Group
    from rich.table import Table

    from bilect.report.wording import decimal, measured

    shown, first = _short(list(result["models"])), result["against"]
    paired = bool(result["differences"])
    tables = []
    for task, figures in result["models"][first].items():
        table = Table(title=f"{printable(task)}, {figures['n']:,} examples", title_justify="left")
        for name in ("metric", "model"):
            table.add_column(name, overflow="fold")
        for name in ("value ± se", *((f"minus {shown[first]} (95%)", "p") if paired else ())):
            table.add_column(name, justify="right", overflow="fold")
        for metric in (m for m in figures if m != "n"):
            for model, by_task in result["models"].items():
                value = by_task[task][metric]
                row = [metric if model == first else "", shown[model], measured(value["value"], value["stderr"])]
                if paired:
                    row += _difference(result["differences"].get(model, {}).get(task, {}).get(metric), decimal)
                table.add_row(*row)
            table.add_section()
        tables.append(table)
    if paired:
        tables[-1].caption = "p: McNemar's exact test, on the examples that one of the two has right"
    return Group(*tables)


def _short(models: Sequence[str]) -> dict[str, str]:
    """The last part of a path or, of those that end alike, the parts that they do not share."""
    parts = {model: Path(model).parts or (model,) for model in models}
    names = dict[str, str]()
    for model, own in parts.items():
        alike = [other for other in parts.values() if other[-1] == own[-1]]
        told = [part for part in own if not all(part in other for other in alike)]
        names[model] = printable("/".join(told) if len(alike) > 1 else own[-1])
    unique = len(set(names.values())) == len(names) and all(names.values())
    return names if unique else {model: printable(model) for model in models}


def _difference(found: Mapping[str, Any] | None, decimal: Any) -> list[str]:
    if found is None:
        return ["", ""]
    shown = decimal(found["difference"], 3)
    if found["low"] is not None:
        shown += f" ({decimal(found['low'], 3)} to {decimal(found['high'], 3)})"
    return [shown, "" if found["p"] is None else f"{found['p']:.3g}"]
