"""Does choosing tokens pay where only an adapter learns? The arms of finished runs once more, with LoRA.

Takes runs of one comparison, trains an adapter on each one's warm target by every arm named, on the same batches,
target set and settings but for the learning rate, and prints the held-out losses beside those of the runs' own arms.
One file per training in --out: an interrupted call goes on at the first that is missing.

    bilect compare examples/pretrained.yaml --out runs/pretrained
    python benchmarks/lora.py runs/pretrained/base/seed-* --arms full blade --out runs/lora
"""

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model

from bilect.compare.page import interval
from bilect.compare.statistics import estimate
from bilect.config import load_config
from bilect.pipeline.context import WARM_TARGET, RunContext
from bilect.pipeline.training import online_of
from bilect.report.wording import markdown_table
from bilect.runtime.files import write_json
from bilect.runtime.progress import SilentProgress
from bilect.runtime.seeds import derive_seed
from bilect.training.evaluation import evaluate
from bilect.training.train import forget_training, train

ALL = "all weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, a seed each")
    parser.add_argument("--arms", nargs="+", default=["full", "blade"], help="that train on the whole shard")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter, on every linear layer but the head")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the model and of its reference")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    name = f"LoRA, rank {args.rank}, {args.learning_rate:g}"
    for folder in args.runs:
        run = RunContext(folder.resolve(), load_config(folder / "config.yaml"), SilentProgress())
        if run.config.training.branch_steps:
            parser.error(f"{folder}: its arms end with a decay branch, which an adapter has not; set decay_steps: 0")
        for arm in args.arms:
            file = args.out / f"{arm}-{run.config.seed}-{args.rank}-{args.learning_rate:g}.json"
            if not file.is_file():
                result = adapted(run, arm, args.rank, args.learning_rate, file.with_suffix(""))
                write_json(file, result)
                print(f"{file.stem}: {json.dumps(result)}", flush=True)
            found.setdefault((arm, name), {})[run.config.seed] = json.loads(file.read_text(encoding="utf-8"))
            if (own := run.root / run.target_folder(arm, 1)).is_dir():
                found.setdefault((arm, ALL), {})[run.config.seed] = losses_of(own.with_name("eval.json"))
        found.setdefault(("warm", ""), {})[run.config.seed] = losses_of(run.root / "warmup/eval.json")
    print("\n".join(table(found)))


def adapted(run: RunContext, arm: str, rank: int, learning_rate: float, scratch: Path) -> dict[str, float]:
    """Held-out losses after an arm's training of an adapter, by set, its ``seconds``, and the weights ``trained``."""
    settings = run.config.training.model_copy(update={"learning_rate": learning_rate})
    online, pool, seed = online_of(run, arm), run.pool(), derive_seed(run.config.seed, "train", 1)
    if online is not None:
        own = online.config.model_copy(update={"reference_learning_rate": learning_rate})
        online = replace(online, config=own)
    scratch.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)  # of the adapter's first weights
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = inject_adapter_in_model(lora, run.load(WARM_TARGET))  # still a causal LM of transformers
    begin = time.perf_counter()
    with run.progress.task(arm) as task:
        train(
            model, pool, run.shard(1, len(pool)), scratch, settings, task=task, seed=seed,
            context=run.config.data.context, checkpoint_every=settings.steps, weight_R=pool.weight_R,
            device=run.device, online=online,
        )  # fmt: skip
    seconds = time.perf_counter() - begin
    forget_training(scratch)
    batch, bf16 = run.config.score_batch_tokens, run.config.training.bf16
    losses = {n: evaluate(model, s, run.pad_id, batch, bf16=bf16).loss for n, s in run.heldout_sets().items()}
    return losses | {"seconds": seconds, "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def losses_of(file: Path) -> dict[str, float]:
    """Held-out losses of a run's own arm."""
    return {name: found["loss"] for name, found in json.loads(file.read_text(encoding="utf-8")).items()}


def table(found: Mapping[tuple[str, str], Mapping[int, Mapping[str, float]]]) -> list[str]:
    """Markdown: losses by seed, and less those of ``full`` with as many weights, paired by seed."""
    sets = list(next(iter(found["warm", ""].values())))
    heads = [part for name in sets for part in (name, "minus full")]
    rows = []
    for (arm, learns), own in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        full = found.get(("full", learns), {}) if arm != "full" else {}
        cells = [arm, learns or "-"]
        for name in sets:
            cells.append(", ".join(f"{own[seed][name]:.4f}" for seed in sorted(own)))
            cells.append(interval(estimate([own[s][name] - full[s][name] for s in sorted(own) if s in full])))
        spent = estimate([own[s]["seconds"] for s in own if "seconds" in own[s]])["mean"]
        rows.append([*cells, "-" if spent is None else f"{spent:.0f}"])
    return markdown_table(["arm", "what learns", *heads, "seconds"], rows)


if __name__ == "__main__":
    main()
