"""Keep the newest models at which every loss was a number, where a restart with other settings does not touch them."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from bilect.pipeline.context import RunContext
from bilect.runtime import distributed
from bilect.runtime.checkpoints import all_finite
from bilect.runtime.files import write_json
from bilect.runtime.sharding import has_shards

__all__ = ["keep_last_good"]


def keep_last_good(run: RunContext, scratch: Path, models: Mapping[str, PreTrainedModel], step: int | None) -> str:
    """Write models to ``last-good/<stage>/<name>``, loadable with transformers, and say where, for an error message.

    Args:
        run: the run.
        scratch: of the stage that stops.
        models: by name; an empty name is the folder itself.
        step: steps they have behind them; None if there are none to keep, as nothing was good in this attempt.
    """
    folder = run.root / "last-good" / scratch.name
    draft = folder.with_name(f"{folder.name}.draft")
    own = [m for m in models.values() if distributed.is_main() or has_shards(m)]
    bad = sum(not all_finite(map(distributed.local_part, m.parameters())) for m in own)
    keep = step is not None and distributed.sum_scalar(bad) == 0
    if distributed.is_main():
        shutil.rmtree(draft, ignore_errors=True)
    for name, model in models.items() if keep else ():
        run.save(model, draft / name)
    if keep and distributed.is_main():
        write_json(draft / "step.json", {"step": step})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)
    distributed.barrier()  # a rank that stops takes the others with it
    if not folder.is_dir():
        return "no state before it was good"
    kept = json.loads((folder / "step.json").read_text(encoding="utf-8"))["step"]
    return f"the last good state (step {kept}) is in {folder}"
