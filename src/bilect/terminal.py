"""A run as a person sees it: live progress, then a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilect.config import Config, load_config
from bilect.progress import RichProgress

__all__ = ["run_with_progress", "show_run"]


def run_with_progress(config_file: Path, out: Path, overrides: Sequence[str]) -> None:
    """``bilect run``: read the config, then ``show_run``."""
    show_run(load_config(config_file, overrides), out)


def show_run(config: Config, out: Path) -> dict[str, Any]:
    """Carry out a run with live progress and print its table."""
    with RichProgress() as progress:
        from transformers.utils import logging

        from bilect.pipeline import run

        logging.disable_progress_bar()  # ours says more
        summary = run(config, out, progress)
        progress.console.print(_table(summary))
        progress.note(summary["verdict"])
        progress.note(f"Report: {out / 'report.html'}   Numbers: {out / 'summary.json'}")
    return summary


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
    table.add_section()
    cost = summary["cost"]["seconds"]["selection"], summary["cost"]["flops"]["selection"] / 1e12
    table.add_row("choosing (bliss only)", "", "", "", f"{cost[0]:.0f}", f"{cost[1]:.2f}")
    return table
