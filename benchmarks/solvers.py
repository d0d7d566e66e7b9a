"""Which solver for the fit? Their scores against what retraining does, each at the FLOPs of the config's own fit.

Next to all document methods with the settings of the config: a longer form of ``bilect verify --retrain``, with every
solver again for as many steps as the fit of the config costs.

    python benchmarks/solvers.py config.yaml runs/solvers --subsets 128 --seeds 3
"""

import argparse
from pathlib import Path
from typing import Any

SOLVERS: dict[str, dict[str, Any]] = {
    "cg, 0": {"solver": "cg", "damping": 0.0},
    "cg, 0.1": {"solver": "cg", "damping": 0.1},
    "cg, 1": {"solver": "cg", "damping": 1.0},
    "neumann, 0": {"solver": "neumann", "damping": 0.0},
    "neumann, 1": {"solver": "neumann", "damping": 1.0},
    "sgd": {"solver": "sgd"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--subsets", type=int, default=128)
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int)
    args = parser.parse_args()

    from bilect.bilevel.cost import fit_flops
    from bilect.config import load_config
    from bilect.pipeline import stages as pipeline
    from bilect.pipeline.context import WARM_TARGET, RunContext
    from bilect.runtime.progress import RichProgress
    from bilect.verify.retraining import run_retraining
    from bilect.verify.retraining.scores import VARIANTS

    config = load_config(args.config)
    with RichProgress() as progress:
        pipeline.run(config, args.out / "run", progress, command="warmup")
        run = RunContext(args.out / "run", config, progress)
        proxy, target = run.load("warmup/proxy"), run.load(WARM_TARGET)
        lengths = {
            "lower_length": float(run.pool().length_R.mean()),
            "upper_length": float(run.upper().length_R.mean()),
        }

    solvers = {name: {"hypergradient": "implicit", **settings} for name, settings in SOLVERS.items()}

    def cost(**settings: Any) -> float:
        fit = config.fit.model_copy(update=settings)
        # the score model costs what the proxy does, save for the head: near enough to choose a number of steps by
        return fit_flops(fit, proxy, proxy, target, **lengths)

    equal = {
        f"bliss {name}, equal": ("bliss", {**settings, "steps": round(config.fit.steps * cost() / cost(**settings))})
        for name, settings in solvers.items()
    }
    more = {"bliss cg, 1": ("bliss", solvers["cg, 1"])}
    variants = {**VARIANTS, **equal, **more}
    run_retraining(config, args.out, subsets=args.subsets, candidates=args.candidates, seeds=args.seeds,
                   workers=args.workers, variants=variants)  # fmt: skip


if __name__ == "__main__":
    main()
