"""How well does one estimate of d separate the documents that resemble the target? AUC per estimator, at a warm start.

On the warm models of ``bliss_vs_random.py`` (run that first): uniform weights, the first lower batches of a fit, one
estimate of d per variant on the same probe documents. On-target documents are those of sources whose names contain
``--positive``; the labels are used for this figure only. An AUC of 0.5 is chance, below it the sign misleads.

    python benchmarks/estimator_signal.py --seeds 2 --target math --positive math
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from transformers.utils import logging

from bilect.bilevel.objective import (
    Objective,
    directional,
    document_losses,
    lower_objective,
    target_on_batch,
    upper_objective,
)
from bilect.bilevel.twins import FirstOrderModel, Twins
from bilect.config import SourceConfig
from bilect.data.batch import Batch, make_batch
from bilect.data.documents import read_documents
from bilect.data.loading import BatchStream
from bilect.data.tokens import TokenStore, write_tokens
from bilect.functional import linear_solve
from bilect.models.causal_lm import CausalLM
from bilect.models.loading import load_causal_lm, load_tokenizer


def auc(value_N: np.ndarray, positive_N: np.ndarray) -> float:
    """Probability that a positive document has the larger value."""
    ranks = rankdata(value_N)
    n, m = positive_N.sum(), (~positive_N).sum()
    return float((ranks[positive_N].sum() - n * (n + 1) / 2) / (n * m))


class Setting:
    """Warm proxy and target, a probe, and endless batches of one seed."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        base = (Path(args.out) / f"seed-{seed}" / "base").resolve()
        self.args = args
        self.pool = TokenStore(base / "tokens" / "pool")
        self.tokenizer = load_tokenizer(str(base / "tokenizer"))
        self.pad_id = int(self.tokenizer.eos_token_id)
        upper_file = base / f"upper-{args.target}.arrow"
        documents = read_documents((SourceConfig(path=str(Path(args.data) / "upper" / f"{args.target}.jsonl")),))
        write_tokens(documents, self.tokenizer, upper_file, context=args.context)
        upper = TokenStore(upper_file)
        self.proxy = CausalLM(load_causal_lm(str(base / "warmup" / "proxy")))
        self.target = CausalLM(load_causal_lm(str(base / "warmup" / "target")))
        order = np.random.default_rng(seed).permutation(len(self.pool))
        self.probe = order[: args.probe]
        device = torch.device("cpu")
        self.lower = BatchStream(self.pool, order[args.probe :], 16, self.pad_id, seed, device)
        self.upper = BatchStream(upper, np.arange(len(upper)), 16, self.pad_id, seed, device)
        self.positive = np.array([args.positive in source for source in self.pool.sources(self.probe)])
        self.adam = FirstOrderModel(self.proxy.params(), 5e-4, 1.0)
        for _ in range(args.inner_steps):  # the lower optimiser's moments, and a proxy that has moved a little
            self.adam.step(self.objective()[0].gradient(self.adam.params)[0])
        self.params = {k: v.detach() for k, v in self.adam.params.items()}
        with torch.no_grad():
            for k, p in self.proxy.params().items():
                p.copy_(self.params[k])

    def objective(self) -> tuple[Objective, Objective]:
        """A lower objective with uniform weights and an upper one, on fresh batches."""
        batch = next(self.lower)
        weight_B = torch.full((batch.n_documents,), 1.0 / batch.n_documents)
        target = target_on_batch(self.target, batch)
        return lower_objective(self.proxy, batch, weight_B, target=target, kl_coef=0.1), upper_objective(
            self.proxy, next(self.upper)
        )

    def batches(self) -> list[Batch]:
        """The probe's documents."""
        parts = np.array_split(self.probe, len(self.probe) // 32)
        return [make_batch(self.pool.rows(part), self.pad_id) for part in parts]

    def second_moment(self) -> dict[str, torch.Tensor]:
        state, beta = self.adam.optimizer.state, 0.999
        return {k: state[p]["exp_avg_sq"] / (1 - beta ** float(state[p]["step"])) for k, p in self.adam.params.items()}

    def implicit(self, solver: str) -> np.ndarray:
        """d on the probe from one lower and one upper batch."""
        lower, upper = self.objective()
        b = upper.gradient(self.params)[0]
        hvp = lower.hvp(self.params, "finite_difference")
        solution = {
            "identity": lambda: linear_solve.identity(b),
            "adam": lambda: linear_solve.adam(b, self.second_moment()),
            "neumann": lambda: linear_solve.neumann(hvp, b, steps=3, step_size=0.1, damping=0.1),
            "cg": lambda: linear_solve.cg(hvp, b, steps=3, damping=1.0),
            "sgd": lambda: linear_solve.sgd(hvp, b),
        }[solver]()
        d = [directional(self.proxy, batch, self.params, solution.z, "finite_difference") for batch in self.batches()]
        return torch.cat(d).numpy()

    def penalty(self, matched: bool, steps: int, learning_rate: float, penalty: float) -> np.ndarray:
        """Excess losses on the probe."""
        twins = Twins.train(
            self.params, self.objective, steps=steps, learning_rate=learning_rate, penalty=penalty, matched=matched,
            grad_clip=1.0,
        )  # fmt: skip
        baseline = twins.matched if twins.matched is not None else self.params
        with torch.no_grad():
            losses = [document_losses(self.proxy, batch) for batch in self.batches()]
            return torch.cat([f(baseline) - f(twins.reference) for f in losses]).numpy()


def variants(full: bool) -> dict[str, Any]:
    """Name -> d of a setting."""
    table: dict[str, Any] = {
        name: (lambda s, n=name: s.implicit(n)) for name in ("identity", "adam", "neumann", "cg", "sgd")
    }
    grid = [(m, k, lr, lam) for m in (True, False) for k in (3, 10, 30) for lr in (5e-5, 5e-4) for lam in (0.1, 1.0)]
    for matched, steps, rate, lam in grid if full else [(True, 10, 5e-4, 1.0), (False, 10, 5e-4, 1.0)]:
        name = f"{'matched' if matched else 'plain'} K={steps} lr={rate:g} lambda={lam:g}"
        table[name] = lambda s, a=(matched, steps, rate, lam): s.penalty(*a)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--out", default="runs/bliss_vs_random", help="of bliss_vs_random.py")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--target", default="math")
    parser.add_argument("--positive", default="math")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--probe", type=int, default=192)
    parser.add_argument("--inner-steps", type=int, default=10)
    parser.add_argument("--full", action="store_true", help="the grid of penalty settings too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    figures: dict[str, Any] = {}
    settings = [Setting(args, seed) for seed in range(args.seeds)]
    print(f"{'estimator':38}{'AUC per seed':>24}{'seconds':>9}   highest mean d by source (standardised)")
    for name, estimate in variants(args.full).items():
        start = time.perf_counter()
        values = [estimate(s) for s in settings]
        seconds = (time.perf_counter() - start) / args.seeds
        scores = [auc(v, s.positive) for v, s in zip(values, settings, strict=True)]
        first = (values[0] - values[0].mean()) / values[0].std()
        sources = np.array(settings[0].pool.sources(settings[0].probe))
        means = sorted(((first[sources == x].mean(), x) for x in set(sources)), reverse=True)[:3]
        figures[name] = {"auc": scores, "seconds": seconds}
        shown = " ".join(f"{a:.3f}" for a in scores)
        print(f"{name:38}{shown:>24}{seconds:>9.1f}   " + ", ".join(f"{x} {m:+.1f}" for m, x in means), flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
