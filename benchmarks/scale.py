"""What choosing from 1B, 100B and 15T tokens costs, from the package's own counts of operations and stated speeds.

Nothing is run. Operations are those of ``models/flops.py`` and ``bilevel/cost.py`` at the default settings, sequences
have 1024 tokens. GPUs are assumed to reach 40% of their peak and to share the work evenly; speeds of CPUs were measured
(docs/results_log.md). ``docs/scale.md`` has the tables and what follows from them.

    python benchmarks/scale.py
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bilect.bilevel.cost import fit_flops, selecting_flops
from bilect.config import FitConfig
from bilect.config.online import BladeConfig
from bilect.methods.excess import ExcessConfig
from bilect.methods.influence import InfluenceConfig
from bilect.models.flops import forward_flops
from bilect.models.presets import preset_config
from bilect.models.score_model import ScoreModel, ScoreModelConfig

CORPORA, GPUS, CONTEXT, KEPT = {"1B": 1e9, "100B": 1e11, "15T": 1.5e13}, (1, 8, 64), 1024.0, 0.2
# assumed: 40% of an H100's dense peaks (SXM): bfloat16, and float32 outside the matrix units, which differences want
BF16, FLOAT32 = 0.4 * 989e12, 0.4 * 67e12
# measured, one core: a million documents of 181M tokens are tokenised in 198 s, DSIR is fitted in 36 s and scores in 40
TOKENISING, DSIR = 181e6 / 198, 181e6 / 76


@dataclass(frozen=True)
class Cost:
    """FLOPs by the arithmetic that they are done in."""

    bf16: float = 0.0
    float32: float = 0.0

    def hours(self, gpus: int) -> float:
        return (self.bf16 / BF16 + self.float32 / FLOAT32) / gpus / 3600


def model(name: str) -> PreTrainedModel:
    """Shapes alone."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**preset_config(name)))


def score_model(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return ScoreModel(ScoreModelConfig(trunk=preset_config(name)))


def choosing(proxy: PreTrainedModel, scorer: PreTrainedModel, target: PreTrainedModel) -> dict[str, Callable]:
    """Method -> cost of fitting it and scoring so many tokens."""
    fit, excess, influence = FitConfig(), ExcessConfig(), InfluenceConfig()

    def forward(tokens: float) -> float:
        return forward_flops(proxy, tokens, CONTEXT)

    fitted = fit_flops(fit, proxy, scorer, target, lower_length=CONTEXT, upper_length=CONTEXT)
    differences = 2 * fit.steps * forward(fit.lower_batch_size * CONTEXT)  # d_i; the default solver has no products
    upper = 3 * forward(excess.steps * excess.batch_size * CONTEXT)
    gradients = 3 * forward((influence.steps * influence.batch_size + influence.upper_documents) * CONTEXT)
    return {
        "perplexity": lambda tokens: Cost(bf16=forward(tokens)),
        "excess": lambda tokens: Cost(bf16=upper + 2 * forward(tokens)),
        "influence": lambda tokens: Cost(bf16=gradients, float32=2 * forward(tokens)),
        "less": lambda tokens: Cost(float32=3 * forward(tokens)),
        "bliss": lambda tokens: Cost(fitted - differences + forward_flops(scorer, tokens, CONTEXT), differences),
    }


def training(target: PreTrainedModel) -> dict[str, Callable]:
    """Of the target on the kept part; BLADE chooses among the tokens of it."""

    def plain(tokens: float) -> float:
        return 3 * forward_flops(target, KEPT * tokens, CONTEXT)

    def blade(tokens: float) -> Cost:
        batch, config = 512 * CONTEXT, BladeConfig()
        every = config.sync_every or 1000
        more = selecting_flops(config, target, tokens=KEPT * tokens, context=int(CONTEXT), batch_tokens=batch,
                               upper_tokens=batch, synchronisations=KEPT * tokens / batch / every)  # fmt: skip
        return Cost(plain(tokens) + more)

    return {"training": lambda tokens: Cost(plain(tokens)), "training with blade": blade}


def main() -> None:
    target, results = model("pythia-410m"), {}
    rows = {("pythia-410m", k): v for k, v in training(target).items()}
    for name in ("pythia-160m", "pythia-31m"):
        proxy = model(name)
        rows = {(name, k): v for k, v in choosing(proxy, score_model(name), target).items()} | rows
    print("| model | | " + " | ".join(f"{size}: {', '.join(map(str, GPUS))} GPUs" for size in CORPORA) + " |")
    print("|---|---|" + "---|" * len(CORPORA))
    for (name, method), cost in rows.items():
        hours = {size: [cost(tokens).hours(gpus) for gpus in GPUS] for size, tokens in CORPORA.items()}
        results[f"{name}, {method}"] = hours
        print(f"| {name} | {method} | " + " | ".join(", ".join(f"{h:.2g}" if h < 10 else f"{h:,.0f}" for h in each)
                                                     for each in hours.values()) + " |")  # fmt: skip
    print("\n| on CPU cores | " + " | ".join(f"{size}: core-hours" for size in CORPORA) + " |")
    print("|---|" + "---|" * len(CORPORA))
    for name, rate in {"tokenising": TOKENISING, "dsir": DSIR}.items():
        results[name] = {size: tokens / rate / 3600 for size, tokens in CORPORA.items()}
        print(f"| {name} | " + " | ".join(f"{h:,.1f}" for h in results[name].values()) + " |")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
