"""Downstream tasks: the last target of an arm, evaluated by lm-eval."""

from pathlib import Path

from bilect.pipeline.context import Figures, RunContext, on_main
from bilect.runtime.files import write_json
from bilect.training.tasks import run_tasks

__all__ = ["evaluate_on_tasks"]


@on_main
def evaluate_on_tasks(run: RunContext, scratch: Path, folder: str) -> Figures:
    """Results of the decayed copy of a target (or of itself, without a decay branch), beside its held-out losses."""
    tasks = run.config.tasks
    with run.progress.task(f"downstream tasks of {folder}"):
        results, cost = run_tasks(
            run.root / run.evaluated(folder),
            tasks.names,
            limit=tasks.limit,
            context=run.config.data.context,
            batch_tokens=run.config.score_batch_tokens,
            device=run.device,
        )
    write_json((scratch / folder).with_name("tasks.json"), results)
    return cost
