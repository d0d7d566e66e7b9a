"""A whole run, from text to held-out losses of what was trained on the choice: seconds and peak memory of every stage.

BLISS, excess, influence and random choose from the pool of ``choose.py``; a target is trained on what each keeps. The
sizes show that all stages work and where the time goes, not which choice is best.

    python benchmarks/end_to_end.py
    python benchmarks/end_to_end.py --proxy pythia-31m --target pythia-160m --rows 20000 --steps 100       # a GPU
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from choose import write_pool

from bilect.config import parse_config
from bilect.pipeline.directory import read_manifest
from bilect.pipeline.stages import run


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--steps", type=int, default=4, help="of every training and fit")
    parser.add_argument("--proxy", default="tiny-100k")
    parser.add_argument("--target", default="tiny-300k")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=cuda)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, rows, words in (("pool", args.rows, 60), ("upper", 200, 61), ("heldout", 100, 62)):
            write_pool(folder / f"{name}.jsonl", rows, words)  # other lengths, other texts
        summary = run(parse_config(settings(args, folder)), folder / "run")
        stages = read_manifest(folder / "run")["stages"]
    print(f"{'stage':<40}{'seconds':>10}{'peak GB':>10}")
    for name, record in stages.items():
        print(f"{name:<40}{record['seconds']:>10.1f}{record['peak_gb']:>10.2f}")
    losses = summary["heldout_loss"]
    print("held-out loss: " + ", ".join(f"{arm} {loss:.3f}" for arm, loss in losses.items()))
    if not all(map(math.isfinite, losses.values())):
        raise SystemExit("a held-out loss is not a number")
    seconds = sum(record["seconds"] for record in stages.values())
    peak = max(record["peak_gb"] for record in stages.values())
    print(json.dumps({"seconds": seconds, "peak_gb": peak, "heldout_loss": losses}))


def settings(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    def files(name: str) -> list[dict[str, str]]:
        return [{"path": str(folder / f"{name}.jsonl")}]

    training = {"batch_size": 8, "steps": args.steps, "decay_steps": 0, "bf16": args.bf16}
    data = {f"{name}_data": files(file) for name, file in
            {"lower": "pool", "upper": "upper", "heldout": "heldout"}.items()}  # fmt: skip
    return {
        "method": "bliss",
        "data": {**data, "context": 128, "vocab_size": 2048},
        "models": {"proxy": args.proxy, "target": args.target},
        "warmup": {"proxy": training, "target": training},
        "fit": {"steps": args.steps, "lower_batch_size": 8, "upper_batch_size": 8, "bf16": args.bf16},
        "training": training,
        "controls": ["random", "excess", "influence"],
        "methods": {"excess": {"steps": args.steps}, "influence": {"steps": args.steps, "upper_documents": 32}},
        "selection": {"keep_ratio": 0.2},
    }


if __name__ == "__main__":
    main()
