"""Runs, plans and selections as a person sees them: live progress, then a table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bilect.config import Config, load_config
from bilect.errors import BilectError
from bilect.runtime.files import make_folder
from bilect.runtime.progress import RichProgress
from bilect.runtime.terminal import PlainConsole

if TYPE_CHECKING:
    from bilect.cli.output import Result
    from bilect.compare.plan import PlannedVariant
    from bilect.pipeline.plan import PlannedStage

SHARES = ("pool_share", "kept_share", "kept_fraction")

__all__ = [
    "compare_with_progress",
    "plan_comparison",
    "plan_on_screen",
    "run_with_progress",
    "score_with_progress",
    "select_with_progress",
    "show_demo",
    "show_plan",
    "show_run",
    "write_pages",
]


def run_with_progress(
    config_file: Path,
    out: Path,
    overrides: Sequence[str],
    *,
    command: str = "run",
    number: int | None = None,
    arms: Sequence[Any] = (),
    repeat: bool = False,
) -> "Result":
    """``bilect run`` and its parts: read the config, then ``show_run``."""
    return show_run(load_config(config_file, overrides), out, command=command, number=number, arms=arms, repeat=repeat)


def show_run(
    config: Config,
    out: Path,
    *,
    command: Any = "run",
    number: int | None = None,
    arms: Sequence[Any] = (),
    repeat: bool = False,
) -> "Result":
    """Carry out a run, or one part of it, with live progress, and print its table; returns its figures."""
    with RichProgress() as progress:
        from transformers.utils import logging

        from bilect.pipeline.stages import run
        from bilect.runtime import distributed

        logging.disable_progress_bar()  # ours says more
        summary = run(config, out, progress, command=command, number=number, arms=arms, repeat=repeat)
        if command != "run":
            figures = {name: {k: v for k, v in record.items() if k != "made_of"} for name, record in summary.items()}
            result = {"out": out, "stages": figures}
        else:
            result = {"out": out, "report": out / "report.html", **summary}
        if not distributed.is_main():
            return result
        if command != "run":
            progress.console.print(_stage_table(summary))
            if arms:
                progress.console.print(_method_table(summary, arms))
            progress.note(f"Results: {out}")
            return result
        for part, reasons in summary.get("skipped", {}).items():
            listed = ", ".join(f"{n} ({reason})" for reason, n in reasons.items())
            if listed:
                progress.note(
                    f"tokenise {part}: left out {listed}; listed in {out / 'tokens' / f'skipped-{part}.jsonl'}"
                )
        progress.console.print(_table(summary))
        if "tasks" in summary:
            progress.console.print(_tasks_table(summary["tasks"]))
        progress.note(summary["verdict"])
        progress.note(f"Report: {out / 'report.html'}   Numbers: {out / 'summary.json'}")
    return result


def show_demo(out: Path, seed: int = 0, *, repeat: bool = False) -> None:
    """``bilect demo``: build the corpus, choose from it, then train on the choice and on random documents.

    Raises:
        BilectError: the data packages are missing.
    """
    from bilect.demo.corpus import build_demo_corpus
    from bilect.demo.settings import demo_config

    make_folder(out)  # before the corpus, which takes a while
    build_demo_corpus(out / "data")
    config, selected = demo_config((out / "data").resolve(), seed), out / "round-1" / "selected"
    with RichProgress() as progress:
        from transformers.utils import logging

        from bilect.cli.choosing import kept_table
        from bilect.pipeline.stages import run

        logging.disable_progress_bar()
        progress.note("1. Choose: which documents of the pool make a model better at the target?")
        records = run(config, out, progress, command="select", repeat=repeat)
        kept = records[f"round 1: select {config.method}"]
        by_source = {name: {share: kept[f"{share}_by_source"][name] for share in SHARES}
                     for name in kept["pool_share_by_source"]}  # fmt: skip
        title = f"{kept['documents']:,} documents, {kept['tokens']:,} tokens kept by {config.method}"
        progress.console.print(kept_table(title, by_source))
        progress.note(f"Records: {selected / 'records'}   Dropped, and why: {selected / 'dropped.parquet'}")
        progress.note("2. What it bought: one model trains on the choice, the same on as many random documents.")
    show_run(config, out, repeat=repeat)


def plan_on_screen(config_file: Path, out: Path, overrides: Sequence[str], arms: Sequence[Any] = ()) -> "Result":
    """``--dry-run``: the stages, what is done, and what the rest costs."""
    from bilect.pipeline.plan import plan_run

    return show_plan(plan_run(load_config(config_file, overrides), out, arms), out)


def show_plan(lines: "Sequence[PlannedStage]", out: Path) -> "Result":
    """A plan as a table; returns it."""
    from rich.table import Table

    table = Table(title=f"Plan of {out}: nothing is written")
    for name in ("stage", "state", "batch, all ranks", "tokens", "TFLOPs", "about"):
        table.add_column(name, justify="left" if name in ("stage", "state") else "right")
    for line in lines:
        state, costs = "done" if line.done else "to do", f"{line.flops / 1e12:,.2f}"
        table.add_row(line.name, state, line.batch, f"{line.tokens:,}", costs, _duration(line.seconds))
    left = [line for line in lines if not line.done]
    table.add_section()
    sums = [sum(getattr(line, name) for line in left) for name in ("tokens", "flops", "seconds")]
    table.add_row("left in all", "", "", f"{sums[0]:,}", f"{sums[1] / 1e12:,.2f}", _duration(sums[2]))
    console = PlainConsole()
    console.print(table)
    console.print("Tokens are estimated from samples of the files; times from a short probe of this machine.")
    _tell_curves(console, left)
    return {"out": out, "stages": [asdict(line) for line in lines],
            "left": dict(zip(("tokens", "flops", "seconds"), sums, strict=True))}  # fmt: skip


def _tell_curves(console: PlainConsole, lines: "Iterable[PlannedStage | PlannedVariant]") -> None:
    """Say so where learning curves take more than a tenth of the time."""
    curves = sum(line.curve_seconds for line in lines)
    if curves > 0.1 * sum(line.seconds for line in lines):
        console.print(f"Learning curves take about {_duration(curves)} of this; curve.every and curve.documents set "
                      "how many points they have, and of how many documents.")  # fmt: skip


def compare_with_progress(config_file: Path, out: Path, overrides: Sequence[str], *, repeat: bool = False) -> "Result":
    """``bilect compare``: a line per finished stage, then a table and the verdict of each variant."""
    from bilect.compare import compare

    console = PlainConsole()
    config = _compared(config_file, out, overrides)
    comparison = compare(config, out, lambda line: console.print(line, style="dim"), repeat=repeat)
    for name, variant in comparison["variants"].items():
        console.print(_comparison_table(name, variant))
        console.print(" ".join(variant["verdict"]))
    console.print(f"Page: {out / 'comparison.html'}   Numbers: {out / 'comparison.json'}, {out / 'comparison.csv'}")
    return {"out": out, "page": out / "comparison.html", **comparison}


def _compared(config_file: Path, folder: Path, overrides: Sequence[str]) -> Config:
    """The settings of a comparison: of a file, or of the demo, whose text is then written below ``folder``."""
    if str(config_file) != "demo" or config_file.is_file():
        return load_config(config_file, overrides)
    from bilect.demo.corpus import build_demo_corpus
    from bilect.demo.settings import demo_comparison

    config = demo_comparison((folder / "data").resolve(), overrides)  # wrong settings before anything is written
    make_folder(folder)
    build_demo_corpus(folder.resolve() / "data")
    return config


def plan_comparison(config_file: Path, out: Path, overrides: Sequence[str]) -> "Result":
    """``bilect compare --dry-run``: what is left of each variant, and what it costs."""
    from rich.table import Table

    from bilect.compare.plan import plan_cells

    table = Table(title=f"Plan of {out}: nothing is written")
    for name in ("variant", "runs", "stages left", "TFLOPs", "about"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    with TemporaryDirectory() as scratch:  # of the demo's text, where it is not written yet
        there = out if (out / "data").is_dir() else Path(scratch)
        lines = plan_cells(_compared(config_file, there, overrides), out)
    for line in lines:
        table.add_row(line.variant, str(line.runs), str(line.stages), f"{line.flops / 1e12:,.2f}",
                      _duration(line.seconds))  # fmt: skip
    table.add_section()
    table.add_row("in all", str(sum(n.runs for n in lines)), str(sum(n.stages for n in lines)),
                  f"{sum(n.flops for n in lines) / 1e12:,.2f}", _duration(sum(n.seconds for n in lines)))  # fmt: skip
    console = PlainConsole()
    console.print(table)
    console.print("Times are of one run after the other, from a short probe of this machine.")
    _tell_curves(console, lines)
    return {"out": out, "variants": [asdict(line) for line in lines]}


def score_with_progress(
    run_dir: Path,
    data: Sequence[str],
    out: Path,
    fields: Sequence[str],
    repeat: bool,
    workers: int | None,
    engine: str | None,
) -> "Result":
    """``bilect score RUN --data FILES``: scores of other files by a run's score model."""
    with RichProgress() as progress:
        from transformers.utils import logging

        from bilect.pipeline.reuse import score_files

        logging.disable_progress_bar()
        names = dict(_pair(text) for text in fields) if fields else None
        figures = score_files(
            run_dir, data, out, progress=progress, fields=names, repeat=repeat, workers=workers, engine=engine
        )
        counts = f"{figures['documents']:,} documents, {figures['tokens']:,} tokens"
        progress.note(f"{counts}: {out / 'scores'}; `bilect select {out} --keep 0.2` keeps the best")
    return {"out": out, "scores": out / "scores", **figures}


def select_with_progress(
    source: Path,
    out: Path | None,
    settings: Mapping[str, Any],
    number: int | None,
    seed: int,
    repeat: bool,
    workers: int | None,
    engine: str | None,
) -> "Result":
    """``bilect select RUN``: another selection from scores that are there."""
    from bilect.cli.choosing import kept_table
    from bilect.pipeline.reuse import select_again

    with RichProgress() as progress:
        chosen, folder = select_again(
            source, out, settings, progress,
            number=number, seed=seed, repeat=repeat, workers=workers, engine=engine or "local",
        )  # fmt: skip
    title = (f"{chosen.documents:,} of {chosen.pool_documents:,} documents, "
             f"{chosen.tokens:,} of {chosen.pool_tokens:,} tokens kept")  # fmt: skip
    sources = {name: {"pool_share": share, "kept_share": chosen.kept_share[name],
                      "kept_fraction": chosen.kept_fraction[name]}
               for name, share in chosen.pool_share.items()}  # fmt: skip
    progress.console.print(kept_table(title, sources))
    if chosen.near_duplicates:
        progress.note(f"{chosen.near_duplicates:,} documents are near-duplicates of better ones")
    if chosen.note:
        progress.note(chosen.note)
    progress.note(f"Kept: {folder / 'kept.*'}   Dropped, with rank and reason: {folder / 'dropped.parquet'}")
    return {"out": folder, **asdict(chosen), "note": chosen.note}


def write_pages(runs: Sequence[Path], export: str | None, out: Path | None) -> list[Path]:
    """``bilect report``: the page of a run, its plots as files, or one page of several runs; returns what was written.

    Raises:
        BilectError: no run directory; several runs or plots without a folder for them.
    """
    if export is None and len(runs) == 1:
        from bilect.report import write_report

        if not (runs[0] / "run.json").is_file():
            raise BilectError(f"report: {runs[0]} is not a run directory (no run.json)")
        files = [write_report(runs[0])]
    elif out is None:
        raise BilectError("report: --out DIR is missing (where plots, or the page of several runs, are written)")
    elif export is None:
        from bilect.report import write_comparison

        files = [write_comparison(runs, out / "runs.html")]
    elif len(runs) > 1:
        raise BilectError("report: --export takes one run")
    else:
        from bilect.report.export import export_plots

        files = list(export_plots(runs[0], out, export))
    console = PlainConsole()
    for file in files:
        console.print(str(file))
    return files


def _pair(text: str) -> tuple[str, str]:
    name, sign, field = text.partition("=")
    if not (name and sign and field):
        raise BilectError(f"--field {text}: expected NAME=FIELD, for instance text=content")
    return name, field


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _stage_table(records: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table()
    for name in ("stage", "tokens", "seconds", "TFLOPs"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for name, record in records.items():
        table.add_row(
            name, f"{record.get('tokens', 0):,}", f"{record['seconds']:.1f}", f"{record.get('flops', 0) / 1e12:.2f}"
        )
    return table


def _comparison_table(name: str, variant: Mapping[str, Any]) -> Any:
    """The arms of a variant, the lowest loss first."""
    from rich.table import Table

    from bilect.compare.verdict import cost_ratio

    arms, loss_on = variant["arms"], variant["loss_on"]
    table = Table(title=f"{name}: held-out loss{f' on {loss_on}' if loss_on else ''} at equal training tokens")
    for column in ("arm", "loss (se)", "minus random", "minus full", "cost", "speed-up"):
        table.add_column(column, justify="left" if column == "arm" else "right")

    def difference(value: Mapping[str, Any]) -> str:
        if value["mean"] is None:
            return ""
        return f"{value['mean']:+.3f} ± {value['high'] - value['mean']:.3f}"

    for arm in sorted(arms, key=lambda a: arms[a]["loss"]["mean"]):
        f = arms[arm]
        fast = f["speedup"]["flops_with_choosing"]
        table.add_row(
            arm, f"{f['loss']['mean']:.3f} ({f['loss']['se']:.3f})", difference(f["minus_random"]),
            difference(f["minus_full"]), "" if arm == "warm" else f"{cost_ratio(arms, arm):.2f}",
            f"{fast['mean']:.2f}" if fast["n"] == f["loss"]["n"] else "",
        )  # fmt: skip
    table.caption = (
        "±: half of the 95% interval; cost: FLOPs of choosing and training, times random's; speed-up: in "
        "FLOPs, to random's final loss"
    )
    return table


def _method_table(records: Mapping[str, Any], arms: Sequence[str]) -> Any:
    """What each way to choose tokens gained, and what it cost."""
    from rich.table import Table

    table = Table(title="Held-out loss at equal training tokens")
    for name in ("method", "loss", "training tokens", "seconds", "TFLOPs"):
        table.add_column(name, justify="left" if name == "method" else "right")
    table.add_row("before", f"{records['evaluate warm']['heldout_loss']:.4f}", "", "", "")
    for arm in dict.fromkeys(arms):
        trained, evaluated = (next(r for name, r in records.items() if name.endswith(f": {what} {arm}"))
                              for what in ("train", "evaluate"))  # fmt: skip
        figures = f"{trained['tokens']:,}", f"{trained['seconds']:.0f}", f"{trained['flops'] / 1e12:.2f}"
        table.add_row(arm, f"{evaluated['heldout_loss']:.4f}", *figures)
    return table


def _table(summary: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="Held-out loss at equal training tokens")
    for name in ("data", "loss", "perplexity", "training tokens", "seconds", "TFLOPs"):
        table.add_column(name, justify="left" if name == "data" else "right")
    for arm, loss in summary["heldout_loss"].items():
        sets = summary["heldout"][arm]
        perplexity = f"{next(iter(sets.values()))['perplexity']:.1f}" if len(sets) == 1 else "-"
        tokens = summary["tokens"]["warmup_target" if arm == "warm" else arm]
        costs = [
            summary[key]["warm up target"] if arm == "warm" else summary["cost"][key][arm]
            for key in ("seconds", "flops")
        ]
        table.add_row(arm, f"{loss:.4f}", perplexity, f"{tokens:,}", f"{costs[0]:.0f}", f"{costs[1] / 1e12:.2f}")
        if len(sets) > 1:
            for name, figures in sets.items():
                table.add_row(f"  {name}", f"{figures['loss']:.4f}", f"{figures['perplexity']:.1f}", "", "", "")
    table.add_section()
    for name in summary["cost"]["seconds"]:
        if name == "selection" or name.startswith("choosing "):
            label = f"choosing {summary['method']}" if name == "selection" else name
            cost = summary["cost"]["seconds"][name], summary["cost"]["flops"][name] / 1e12
            table.add_row(label, "", "", "", f"{cost[0]:.0f}", f"{cost[1]:.2f}")
    return table


def _tasks_table(results: Mapping[str, Any]) -> Any:
    from rich.table import Table

    from bilect.report.wording import measured

    table = Table(title="Downstream tasks, ± one standard error")
    for name in ("task", "metric", "examples", *results):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, figures in next(iter(results.values())).items():
        for metric in (m for m in figures if m != "n"):
            found = [by_task[task][metric] for by_task in results.values()]
            table.add_row(task, metric, f"{figures['n']:,}", *(measured(f["value"], f["stderr"]) for f in found))
    return table
