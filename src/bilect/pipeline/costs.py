"""What the stages of a run will cost: tokens and FLOPs counted from sizes and settings, speed from a probe."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bilect.bilevel.cost import selecting_flops
from bilect.config import Config, FitConfig, TrainConfig
from bilect.methods import methods_of
from bilect.methods.contract import DocumentMethod, Foresight, Sizes
from bilect.models.causal_lm import CausalLM
from bilect.models.flops import forward_flops
from bilect.models.loading import read_config
from bilect.models.score_model import ScoreModel, ScoreModelConfig
from bilect.pipeline.stages import Stage
from bilect.pipeline.training import PROBE_DOCUMENTS
from bilect.runtime.device import pick_device

__all__ = ["Corpus", "Costs"]

PROBE_FLOPS = {"cpu": 1e11, "cuda": 1e14}


@dataclass(frozen=True)
class Corpus:
    """Size of a set of documents."""

    tokens: float
    documents: float

    @property
    def length(self) -> float:
        """Mean tokens of a document."""
        return self.tokens / max(self.documents, 1)


class Costs:
    """Tokens and FLOPs of each stage.

    Args:
        config: of the run.
        vocabulary: of its models, where they are made here.
        pool: its size.
        upper: size of each source of upper data.
        heldout: the same of held-out data.
    """

    def __init__(
        self, config: Config, vocabulary: int, pool: Corpus, upper: Sequence[Corpus], heldout: Sequence[Corpus]
    ) -> None:
        self.config, self.pool, self.vocabulary = config, pool, vocabulary
        self.upper, self.heldout, self.heldout_sets = _sum(upper), _sum(heldout), heldout
        self.methods = methods_of(config)
        self.proxy, self.target = (self._shape(spec) for spec in (config.models.proxy, config.models.target))
        set_aside = 0.0 if config.warmup.candidates else config.warmup.share
        weights = [source.weight for source in config.data.upper_data]
        self.sizes = Sizes(
            self.proxy,
            self.target,
            self._score_model,
            documents=pool.documents * (1 - set_aside) / config.rounds,
            length=pool.length,
            upper=[(corpus.documents, corpus.length) for corpus in upper],
            upper_length=float(np.average([corpus.length for corpus in upper], weights=weights)) if upper else 0.0,
            sources=len(config.data.lower_data),
        )

    def _shape(self, spec: Any) -> PreTrainedModel:
        """The model without its weights."""
        config = read_config(spec, vocab_size=self.vocabulary, context=self.config.data.context)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    def _score_model(self, layers: int | None) -> PreTrainedModel:
        with torch.device("meta"):
            return ScoreModel(ScoreModelConfig.on(self.proxy, layers=layers))

    @cached_property
    def foreseen(self) -> dict[str, Foresight]:
        """By arm that chooses documents."""
        return {arm: m.foresee(self.sizes) for arm, m in self.methods.items() if isinstance(m, DocumentMethod)}

    def of(self, stage: Stage) -> tuple[float, float, str | None]:
        """Tokens, FLOPs and the model that sets the pace (None: the tokenizer) of a stage."""
        config, name = self.config, stage.kind
        if name == "tokenise pool":
            return self.pool.tokens, 0.0, None
        if name in ("tokenise upper", "tokenise held-out"):
            return (self.upper if name == "tokenise upper" else self.heldout).tokens, 0.0, None
        if stage.name.startswith("warm up"):
            role = stage.name.removeprefix("warm up ")
            return self._training(config.warmup.proxy if role == "proxy" else config.warmup.target, role)
        if name == "train":
            tokens, flops, model = self._training(config.training, "target")
            return tokens, flops + self._selecting(stage.arm, tokens), model
        if name == "fit":
            return self.foreseen[stage.arm].fit_tokens, self.foreseen[stage.arm].fit_flops, "proxy"
        if name == "score":
            return self.sizes.tokens, self.foreseen[stage.arm].score_flops, "proxy"
        if name == "evaluate":
            tokens = self.heldout.tokens
            return tokens, forward_flops(self.target, tokens, self.heldout.length), "target"
        if name == "fidelity":
            tokens = 4 * PROBE_DOCUMENTS * self.pool.length
            return tokens, forward_flops(self.target, tokens, self.pool.length), "target"
        return 0.0, 0.0, "target"

    def curve(self, stage: Stage) -> float:
        """FLOPs of the held-out losses along a training; none of them is counted as training."""
        every, documents, steps = self.config.curve.every, self.config.curve.documents, self.config.training.steps
        if stage.kind != "train" or every is None:
            return 0.0
        measured = [(min(documents, corpus.documents) * corpus.length, corpus.length) for corpus in self.heldout_sets]
        point = sum(forward_flops(self.target, tokens, length) for tokens, length in measured)
        return (1 + math.ceil(steps / every)) * point

    def batch(self, stage: Stage) -> str:
        """The global batch of a stage, in words."""
        config, fit = self.config, getattr(self.methods.get(stage.arm), "config", None)
        trained = {"warm up proxy": config.warmup.proxy, "warm up target": config.warmup.target}
        settings = config.training if stage.kind == "train" else trained.get(stage.name)
        if settings is not None:
            return f"{settings.batch_size} x {config.data.context} tokens" if settings.steps else ""
        if stage.kind == "fit" and isinstance(fit, FitConfig):
            return f"{fit.lower_batch_size} + {fit.upper_batch_size} documents"
        return ""

    def _training(self, settings: TrainConfig, role: str) -> tuple[float, float, str]:
        model = self.proxy if role == "proxy" else self.target
        steps = settings.steps + (settings.branch_steps if role == "target" else 0)
        tokens = float(steps * settings.batch_size * self.config.data.context)
        return tokens, 3 * forward_flops(model, tokens, self.config.data.context), role

    def _selecting(self, arm: str, tokens: float) -> float:
        """What the choice of tokens adds to the training of an arm."""
        online, settings, context = self.config.online_of(arm), self.config.training, self.config.data.context
        if online is None:
            return 0.0
        every = online.sync_every if isinstance(online.sync_every, int) else min(online.sync_every.values())
        batch_tokens = settings.batch_size // settings.gradient_accumulation * context
        synchronisations = math.ceil((settings.steps + settings.decay_steps) / every) if online.method == "blade" else 1
        upper_tokens = online.upper_batch_size * self.upper.length
        return selecting_flops(
            online,
            self.target,
            tokens=tokens,
            context=context,
            batch_tokens=batch_tokens,
            upper_tokens=upper_tokens,
            synchronisations=synchronisations if online.needs_upper_data else 0,
        )

    def speed(self) -> dict[str, float]:
        """FLOPs per second that each model reaches in training, with random weights."""
        device = pick_device(self.config.device)
        bf16 = {"proxy": self.config.warmup.proxy.bf16, "target": self.config.training.bf16}
        return {role: self._probe(shape, device, bf16[role])
                for role, shape in (("proxy", self.proxy), ("target", self.target))}  # fmt: skip

    def _probe(self, shape: PreTrainedModel, device: torch.device, bf16: bool) -> float:
        context = self.config.data.context
        budget = PROBE_FLOPS.get(device.type, 1e11)
        rows = int(budget / (3 * forward_flops(shape, context, context)))
        batch, width = (min(rows, 16), context) if rows else (1, 64)
        with torch.random.fork_rng():
            model = AutoModelForCausalLM.from_config(shape.config, dtype=torch.float32).to(device)
        lm, ids_BT = CausalLM(model), torch.zeros(batch, width, dtype=torch.long, device=device)
        seconds = float("inf")
        for _ in range(2):  # the first warms up
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                hidden_ND = lm.hidden(ids_BT).flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(lm.head().logits(hidden_ND), ids_BT.flatten())
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = min(seconds, time.perf_counter() - start)
            model.zero_grad()
        return 3 * forward_flops(shape, batch * width, width) / seconds


def _sum(corpora: Sequence[Corpus]) -> Corpus:
    return Corpus(sum(c.tokens for c in corpora), sum(c.documents for c in corpora))
