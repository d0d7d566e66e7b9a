"""``bilect choose`` as a person sees it: the plan in a line, live progress, what was kept of each source."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bilect.config.base import parse_overrides
from bilect.runtime.progress import RichProgress

__all__ = ["choose_with_progress", "kept_table"]


def choose_with_progress(
    pool: Sequence[str],
    target: Sequence[str],
    out: Path,
    amount: Mapping[str, Any],
    method: str | None,
    model: str | None,
    seed: int,
    overrides: Sequence[str],
    dry_run: bool,
    yes: bool,
) -> Mapping[str, Any]:
    """Choose, or show what choosing would cost; returns what it shows."""
    from bilect.pipeline.choose import METHOD, choose, choosing_config

    settings = parse_overrides(overrides)
    named = {"keep_ratio": "keep", "budget_tokens": "tokens", "top_k": "top_k"}
    given: dict[str, Any] = {
        **{named[k]: v for k, v in amount.items()},
        "method": method or METHOD, "model": model, "seed": seed, "settings": settings,
    }  # fmt: skip
    if dry_run:
        from bilect.cli.screens import show_plan
        from bilect.pipeline.plan import plan_run

        config = choosing_config(pool, target, **given)
        return show_plan(plan_run(config, out, command="select"), out)
    with RichProgress() as progress:
        from transformers.utils import logging

        from bilect.runtime import distributed

        logging.disable_progress_bar()
        progress.note(_plan_line(choosing_config(pool, target, **given)))
        chosen = choose(pool, target, out, progress=progress, repeat=yes, **given)
        if not distributed.is_main():
            return asdict(chosen)
        title = (f"{chosen.documents:,} of {chosen.pool_documents:,} documents, "
                 f"{chosen.tokens:,} of {chosen.pool_tokens:,} tokens kept")  # fmt: skip
        progress.console.print(kept_table(title, chosen.sources))
        progress.note(f"Records: {chosen.records}" if chosen.records else f"Kept, with text: {chosen.kept}")
        progress.note(f"Scores: {chosen.scores}   Dropped, with rank and reason: {chosen.dropped}")
        progress.note(f"Report: {chosen.report}")
        progress.note(f"Another amount, without scoring again: bilect select {chosen.out} --keep 0.1")
    return asdict(chosen)


def kept_table(title: str, sources: Mapping[str, Mapping[str, float]]) -> Any:
    """What was kept of each source, the most first."""
    from rich.table import Table

    table = Table(title=title)
    for name in ("source", "share of the pool", "share of what is kept", "documents kept"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for name, row in sorted(sources.items(), key=lambda item: -item[1]["kept_share"]):
        shares = (row["pool_share"], row["kept_share"], row["kept_fraction"])
        table.add_row(name, *(f"{100 * value:.1f}%" for value in shares))
    return table


def _plan_line(config: Any) -> str:
    """What judges the documents.

    Raises:
        BilectError: there is no such method.
    """
    from bilect.methods import methods_of

    if not methods_of(config)[config.method].uses_proxy:
        return f"Method {config.method}; no model is needed."
    steps, data = config.warmup.proxy, config.data
    if not steps.steps:
        return f"Method {config.method}; judged by {config.models.proxy}, as it is."
    seen = steps.steps * steps.batch_size * data.context
    trained = f"a proxy of the size {config.models.proxy} is trained on {seen:,} tokens of the pool first"
    return f"Method {config.method}; {trained} (--model takes yours). Of a document, {data.context} tokens count."
