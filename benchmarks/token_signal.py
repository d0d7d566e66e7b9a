"""Which tokens are worth learning, and which Delta knows it? The matched twin and plain BLADE against the influence.

While a model trains by BLADE, at several ages of the reference (steps since the synchronisation), on a batch of the
pool: Spearman's rank correlation of the excess losses l(u) - l(w) and l(m) - l(w) with the influence of each token on
the target loss, <grad l_n(u), grad L_upper(u)>, taken by central differences along grad L_upper; and the same with
Adam's second moment as metric, which is how a token's gradient really moves the model.

    python benchmarks/token_signal.py --small --pool pool_small.jsonl.zst \
        --upper upper/math.jsonl --heldout heldout/math.jsonl
"""

import json
import statistics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from token_methods import Data, build, parse_args, warm_up
from torch import Tensor
from transformers import PreTrainedModel

from bilect.bilevel.online.selector import OnlineTokenSelector
from bilect.bilevel.online.token_loss import TokenBatch, TokenForward
from bilect.runtime.device import pick_device

AGES = (0, 5, 10, 25, 49)
UPPER_BATCHES = 8
STEP = 1e-3  # length of a displacement over the length of the weights


class Both(OnlineTokenSelector):
    """Keeps the twin in step, and chooses as if there were none."""

    def _delta(self, tokens: TokenBatch) -> Any:
        assert self._synchroniser is not None
        twin, self._synchroniser.twin = self._synchroniser.twin, None
        try:
            return super()._delta(tokens)
        finally:
            self._synchroniser.twin = twin


def main() -> None:
    args = parse_args(need_out=False)
    torch.set_num_threads(args.threads) if args.threads else None
    data = Data(args, pick_device(args.device))
    seen: dict[tuple[str, int, str, str], list[float]] = {}
    for seed in range(args.seeds):
        warm = warm_up(args, data, data.device, seed)
        for trained_by, kind in (("l(u) - l(w)", Both), ("l(m) - l(w)", OnlineTokenSelector)):
            model = build(args, data, seed).to(data.device).train()
            model.load_state_dict(warm.state_dict())
            for age, metric, delta, value in follow(args, data, model, kind, seed):
                seen.setdefault((trained_by, age, metric, delta), []).append(value)
                print(f"seed {seed}, by {trained_by}, age {age}, {metric}: {delta} {value:.3f}", flush=True)
    table = Table(
        title="rank correlation with the influence on the target loss: mean (deviation) over all synchronisations"
    )
    for column in ("trained by", "metric", "Delta", *(f"age {age}" for age in AGES)):
        table.add_column(column)
    for trained_by, metric, delta in dict.fromkeys((k[0], k[2], k[3]) for k in seen):
        values = [seen[trained_by, age, metric, delta] for age in AGES]
        cells = (f"{statistics.mean(v):.3f} ({statistics.pstdev(v):.3f})" for v in values)
        table.add_row(trained_by, metric, delta, *cells)
    Console(width=130).print(table)
    print(json.dumps({"|".join(map(str, k)): round(statistics.mean(v), 4) for k, v in seen.items()}))


def follow(args: Any, data: Data, model: PreTrainedModel, kind: type[OnlineTokenSelector], seed: int) -> Any:
    """Train over three synchronisations; correlations at each age of each."""
    every = AGES[-1] + 1
    steps = max(round(args.reference_share * every), 1)
    upper = torch.utils.data.DataLoader(data.examples(data.upper), batch_size=None, shuffle=True)
    selector = kind(
        model, upper, sync_every=every, reference_steps=steps, baseline="matched", seed=seed,
        reference_learning_rate=args.reference_learning_rate, keep_ratio=args.keep_ratio[0],
        lower_loader=list(data.windows(3000 + seed, steps)),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.1)
    probe = TokenBatch.of(next(iter(data.windows(5000 + seed, 1))))
    targets = data.examples(data.upper)[:UPPER_BATCHES]
    for step, batch in enumerate(data.windows(2000 + seed, 3 * every)):
        loss = selector.loss(model, batch)
        loss.backward()
        if step % every in AGES:
            yield from ((step % every, *found) for found in correlations(model, selector, optimizer, probe, targets))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        selector.step()


def correlations(
    model: PreTrainedModel, selector: OnlineTokenSelector, optimizer: torch.optim.Optimizer, probe: TokenBatch,
    targets: list[dict[str, Tensor]],
) -> list[tuple[str, str, float]]:  # fmt: skip
    """Of both Delta with both influences, on the probe."""
    synchroniser, forward = selector._synchroniser, TokenForward(model)
    assert synchroniser is not None and synchroniser.reference is not None and synchroniser.twin is not None
    loss_w, loss_m = synchroniser.reference.losses(probe), synchroniser.twin.losses(probe)
    deltas = {"l(u) - l(w)": forward.losses(model, probe) - loss_w, "l(m) - l(w)": loss_m - loss_w}
    params = list(model.parameters())
    total = torch.stack(
        [forward.loss(model, t, torch.full((t.n,), 1 / t.n)) for t in map(TokenBatch.of, targets)]
    ).sum()
    gradient = torch.autograd.grad(total, params)
    metrics = {"plain": gradient}
    if optimizer.state:
        moments = [optimizer.state[p]["exp_avg_sq"].sqrt() + 1e-8 for p in params]
        metrics["Adam"] = tuple(g / m for g, m in zip(gradient, moments, strict=True))
    return [
        (metric, name, float(spearmanr(delta, influence(model, forward, probe, params, z)).statistic))
        for metric, z in metrics.items()
        for name, delta in deltas.items()
    ]


@torch.no_grad()
def influence(
    model: PreTrainedModel, forward: TokenForward, probe: TokenBatch, params: list[Tensor], z: tuple[Tensor, ...]
) -> Tensor:
    """``<grad l_n, z>`` of every token up to a positive factor."""
    length = sum(float(p.square().sum()) for p in params) ** 0.5 / sum(float(d.square().sum()) for d in z) ** 0.5
    losses = []
    for sign in (1, -2):
        for p, d in zip(params, z, strict=True):
            p.add_(d, alpha=sign * STEP * length)
        losses.append(forward.losses(model, probe))
    for p, d in zip(params, z, strict=True):
        p.add_(d, alpha=STEP * length)
    return losses[0] - losses[1]


if __name__ == "__main__":
    main()
