"""Does BLISS beat random selection, and which estimator serves it best? Held-out loss at equal training tokens.

For every seed one pool, one warm-up and one target model; then, for every target set and every variant, a fit, a
scoring pass, a selection of a fifth and a training run. ``random`` and ``full`` train on as many tokens. All variants
spend the same number of floating-point operations on the fit as ``adam`` does in ``--fit-steps`` steps.

Cells run in parallel, one thread each, and are kept in ``--out``: started again, the grid goes on where it stopped.

    python benchmarks/bliss_vs_random.py --seeds 3
    python benchmarks/bliss_vs_random.py --seeds 3 --variants adam identity neumann cg sgd penalty matched
"""

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "bliss": {},
    "identity": {"hypergradient": "implicit", "solver": "identity"},
    "adam": {"hypergradient": "implicit", "solver": "adam"},
    "neumann": {"hypergradient": "implicit", "solver": "neumann", "solver_step_size": 0.1, "damping": 0.1},
    "cg": {"hypergradient": "implicit", "solver": "cg", "damping": 1.0},
    "sgd": {"hypergradient": "implicit", "solver": "sgd"},
    "penalty": {"hypergradient": "penalty", "baseline": "model"},
    "matched": {"hypergradient": "penalty", "baseline": "matched"},
    "matched-slow": {
        "hypergradient": "penalty",
        "baseline": "matched",
        "reference_learning_rate": 5e-5,
        "reference_steps": 5,
        "sync_every": 10,
    },
    "no-kl": {"kl_coef": 0.0},
    "kl-0.5": {"kl_coef": 0.5},
    "naive": {"weighting": "naive"},
    "not-standardised": {"standardise": False},
}


def config_of(args: argparse.Namespace, seed: int, target: str, fit: dict[str, Any], fit_steps: int) -> Any:
    """The run's settings; upper data is the given target's."""
    from bilect.config import parse_config

    data = Path(args.data).resolve()
    training = {"batch_size": 16, "learning_rate": 2e-3}
    return parse_config(
        {
            "seed": seed,
            "data": {
                "lower_data": [{"path": str(data / "pool_small.jsonl.zst")}],
                "upper_data": [{"path": str(data / "upper" / f"{target}.jsonl")}],
                "heldout_data": [{"path": str(data / "heldout" / f"{t}.jsonl")} for t in ("math", "lambada")],
                "context": args.context,
                "vocab_size": 4096,
            },
            "models": {"proxy": args.proxy, "target": args.target_model, "score_head": args.score_head},
            "warmup": {
                "share": 0.25,
                "proxy": {**training, "steps": args.warmup_steps},
                "target": {**training, "steps": args.warmup_steps, "decay_steps": args.decay_steps},
            },
            "fit": {
                "steps": fit_steps,
                "lower_batch_size": 16,
                "upper_batch_size": 16,
                "proxy_learning_rate": args.proxy_learning_rate,
                "score_learning_rate": args.score_learning_rate,
                **fit,
            },
            "selection": {"keep_ratio": 0.2},
            "training": {**training, "steps": args.train_steps, "decay_steps": args.decay_steps},
            "controls": ["random", "full"],
            "device": "cpu",
        }
    )


def equal_cost_steps(args: argparse.Namespace, base: Path, fit: dict[str, Any]) -> int:
    """Steps that cost as much as ``--fit-steps`` steps of ``adam``."""
    from bilect.bilevel.cost import fit_flops
    from bilect.config import FitConfig
    from bilect.models.loading import load_causal_lm

    proxy, target = (load_causal_lm(str((base / "warmup" / n).resolve())) for n in ("proxy", "target"))

    def cost(settings: dict[str, Any]) -> float:
        length = float(args.context)
        # the score model costs as much as the proxy, save for the head: near enough for choosing a number of steps
        return fit_flops(FitConfig(steps=1, **settings), proxy, proxy, target, lower_length=length, upper_length=length)

    return max(round(args.fit_steps * cost(VARIANTS["adam"]) / cost(fit)), 1)


def one_cell(args: argparse.Namespace, seed: int, target: str, variant: str) -> None:
    """``base``: tokens, warm-up and controls of a seed. Else one fit, selection and training run."""
    import torch
    from transformers.utils import logging

    from bilect.progress import SilentProgress
    from bilect.run_dir import RunDir
    from bilect.stages import choosing, texts, training
    from bilect.stages.context import RunContext, target_folder

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    base, root = _folder(args, seed, "base", ""), _folder(args, seed, variant, target)
    result_file = root / "result.json"
    if result_file.is_file():
        return
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    stage = partial(RunDir(root.resolve()).stage, settings=[])
    start, flops = time.perf_counter(), 0.0
    if variant == "base":
        run = RunContext(root.resolve(), config_of(args, seed, "math", {}, args.fit_steps), SilentProgress())
        stage("tokenise pool", partial(texts.tokenise_pool, run))
        stage("tokenise targets", partial(texts.tokenise_targets, run))
        for role in ("proxy", "target"):
            stage(f"warm up {role}", partial(training.warm_up, run, role=role))
        stage("evaluate warm", partial(training.evaluate, run, folder="warmup/target"))
        results = {"warm": json.loads((root / "warmup" / "eval.json").read_text())}
        for arm in ("random", "full"):
            stage(f"train {arm}", partial(training.train_arm, run, number=1, arm=arm))
            stage(f"evaluate {arm}", partial(training.evaluate, run, folder=target_folder(arm, 1)))
            results[arm] = json.loads((root / "controls" / arm / "round-1" / "eval.json").read_text())
        record: dict[str, Any] = {"evaluations": results}
    else:
        fit = VARIANTS[variant]
        steps = equal_cost_steps(args, base, fit)
        run = RunContext(root.resolve(), config_of(args, seed, target, fit, steps), SilentProgress())
        (root / "tokens").mkdir()
        for name in ("tokenizer", "warmup", "tokens/pool", "tokens/pool.json"):
            (root / name).symlink_to(base.resolve() / name)
        stage("tokenise targets", partial(texts.tokenise_targets, run))
        fitted = stage("fit", partial(choosing.fit, run, number=1))
        fit_seconds = time.perf_counter() - start
        scored = stage("score", partial(choosing.score, run, number=1))
        selected = stage("select", partial(choosing.select, run, number=1))
        stage("train bliss", partial(training.train_arm, run, number=1, arm="bliss"))
        stage("evaluate bliss", partial(training.evaluate, run, folder=target_folder("bliss", 1)))
        flops = fitted["flops"] + scored["flops"]
        record = {
            "evaluations": json.loads((root / "round-1" / "eval.json").read_text()),
            "fit_steps": steps,
            "fit_seconds": fit_seconds,
            "selection_flops": flops,
            "kept_share": selected["kept_share_by_source"],
            "kept_fraction": selected["kept_fraction_by_source"],
        }
    result_file.write_text(json.dumps({**record, "seconds": time.perf_counter() - start}))
    print(f"  done: seed {seed} {target} {variant} in {time.perf_counter() - start:.0f} s", flush=True)


def _folder(args: argparse.Namespace, seed: int, variant: str, target: str) -> Path:
    return Path(args.out) / f"seed-{seed}" / (f"{target}-{variant}" if target else variant)


def _result(args: argparse.Namespace, seed: int, variant: str, target: str) -> dict[str, Any]:
    return json.loads((_folder(args, seed, variant, target) / "result.json").read_text())


def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Print the table and return the figures."""
    seeds, figures = range(args.seeds), {}
    for target in args.targets:
        base = [_result(args, s, "base", "") for s in seeds]
        losses = {arm: [b["evaluations"][arm][target]["loss"] for b in base] for arm in ("warm", "full", "random")}
        cells = {v: [_result(args, s, v, target) for s in seeds] for v in args.variants}
        losses |= {v: [c["evaluations"][target]["loss"] for c in cells[v]] for v in args.variants}
        print(f"\nupper/{target}: held-out loss, mean over {args.seeds} seeds (standard error); differences are paired")
        print(f"{'':18}{'loss':>16}{'minus random':>20}{'fit steps':>11}{'fit s':>8}{'TFLOPs':>8}")
        rows: dict[str, Any] = {}
        for name, values in losses.items():
            mean, error = mean_error(values)
            difference, spread = mean_error([v - r for v, r in zip(values, losses["random"], strict=True)])
            rows[name] = {"losses": values, "mean": mean, "standard_error": error, "difference": difference,
                          "difference_standard_error": spread}  # fmt: skip
            cost = ""
            if name in cells:
                rows[name]["beats_random"] = bool(args.seeds > 1 and difference < -2 * spread)
                first = cells[name][0]
                cost = f"{first['fit_steps']:>11}{first['fit_seconds']:>8.0f}{first['selection_flops'] / 1e12:>8.2f}"
            print(f"{name:18}{mean:>9.4f} ({error:.3f}){difference:>12.4f} ({spread:.3f}){cost}")
        print("share of each source's documents kept (chance: about 0.2); most kept first")
        for name, runs in cells.items():
            kept = {k: statistics.fmean(r["kept_fraction"].get(k, 0.0) for r in runs) for k in runs[0]["kept_fraction"]}
            top = sorted(kept.items(), key=lambda item: -item[1])[:6]
            rows[name]["kept_fraction_by_source"] = kept
            rows[name]["kept_share_by_source"] = {
                k: statistics.fmean(r["kept_share"].get(k, 0.0) for r in runs) for k in runs[0]["kept_share"]
            }
            print(f"  {name:16} " + "  ".join(f"{k} {v:.2f}" for k, v in top))
        figures[target] = rows
    return figures


def main() -> None:
    """Fill the grid, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="folder with pool_small.jsonl.zst, upper/, heldout/")
    parser.add_argument("--out", default="runs/bliss_vs_random")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--targets", nargs="+", default=["math", "lambada"])
    parser.add_argument("--variants", nargs="+", default=["bliss"], choices=sorted(VARIANTS))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--proxy", default="tiny-100k")
    parser.add_argument("--target-model", default="tiny-300k")
    parser.add_argument("--score-head", default="sigmoid", choices=["sigmoid", "linear"])
    parser.add_argument("--warmup-steps", type=int, default=300)
    parser.add_argument("--fit-steps", type=int, default=150)
    parser.add_argument("--train-steps", type=int, default=200)
    parser.add_argument("--decay-steps", type=int, default=40)
    parser.add_argument("--proxy-learning-rate", type=float, default=5e-4)
    parser.add_argument("--score-learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    if not (Path(args.data) / "pool_small.jsonl.zst").is_file():
        print(f"bliss_vs_random: no {Path(args.data) / 'pool_small.jsonl.zst'}; say where with --data", file=sys.stderr)
        sys.exit(2)
    start = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(one_cell, args, seed, "", "base"): seed for seed in range(args.seeds)}
        cells = []
        for base in as_completed(waiting):
            base.result()
            cells += [pool.submit(one_cell, args, waiting[base], t, v) for t in args.targets for v in args.variants]
        for cell in as_completed(cells):
            cell.result()
    figures = report(args)
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "out", "workers")}
    print(json.dumps({**figures, "settings": settings, "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
