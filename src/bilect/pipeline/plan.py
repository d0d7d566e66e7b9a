"""What a run would do and cost, before it does it: ``bilect run ... --dry-run``.

Tokens are estimated from a sample of each input file, or counted where the pool is tokenised already; FLOPs are
counted from the models' matrices; seconds follow from the speed that proxy and target reach on this machine in a
probe of one or two steps, and are right to about a factor of two.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bilect.bilevel.cost import fit_flops, selecting_flops
from bilect.config import Config, FitConfig, SourceConfig, TrainConfig
from bilect.data import formats
from bilect.data.documents import Document, bad_record, read_input
from bilect.data.files import filesystem
from bilect.data.input import Input
from bilect.data.packing import packed
from bilect.data.sources import inputs
from bilect.errors import BilectError
from bilect.methods import methods_of
from bilect.methods._score_model import ScoreModelMethod
from bilect.methods.bliss import BilevelMethod
from bilect.models.causal_lm import CausalLM
from bilect.models.flops import forward_flops
from bilect.models.loading import load_tokenizer, padded_vocabulary, read_config, train_tokenizer
from bilect.models.score_model import ScoreModel, ScoreModelConfig
from bilect.pipeline import texts
from bilect.pipeline.context import RunContext
from bilect.pipeline.directory import read_manifest
from bilect.pipeline.stages import Command, Stage, stages, states, wanted, with_arms
from bilect.pipeline.training import PROBE_DOCUMENTS
from bilect.runtime.device import pick_device
from bilect.runtime.progress import SilentProgress

__all__ = ["PlannedStage", "plan_run"]

SAMPLE_CHARACTERS = 1 << 20  # of each file
SAMPLED_INPUTS = 16
PROBE_FLOPS = {"cpu": 1e11, "cuda": 1e14}


@dataclass(frozen=True)
class PlannedStage:
    """One line of the plan.

    Attributes:
        name: of the stage.
        done: its result is there, with these settings and inputs.
        tokens: it passes through a model, or tokenises.
        flops: floating-point operations.
        seconds: estimated.
        batch: what a step learns from, over all ranks; empty where there are no steps.
    """

    name: str
    done: bool
    tokens: int
    flops: float
    seconds: float
    batch: str = ""


@dataclass(frozen=True)
class _Corpus:
    tokens: float
    documents: float

    @property
    def length(self) -> float:
        return self.tokens / max(self.documents, 1)


def plan_run(config: Config, out: Path, arms: Sequence[str] = (), command: Command = "run") -> list[PlannedStage]:
    """The stages of a run with their costs; writes nothing.

    Args:
        config: of the run.
        out: the run directory; need not exist.
        arms: only these controls, as in ``run``.
        command: only its stages, as in ``run``.

    Raises:
        BilectError: input files or models are not there.
    """
    config = with_arms(config, arms)
    context = RunContext(out.resolve(), config, SilentProgress())
    plan = stages(context, texts.input_hashes(context))
    manifest = read_manifest(out)
    done, records = states(plan, manifest), manifest["stages"]
    if arms or command != "run":
        plan = wanted(plan, done, "train" if arms else command, None, arms)
    tokenise = _Tokeniser(config, out)
    data = config.data
    pool, upper = (
        tokenise.estimate(data.lower_data, chunk=data.long_documents == "chunk"),
        tokenise.estimate(data.upper_data),
    )
    heldout = tokenise.estimate(data.heldout_data)
    if done["tokenise pool"]:
        record = records["tokenise pool"]
        pool = _Corpus(record["tokens"], record["documents"])
    costs = _Costs(config, tokenise.vocabulary, pool, upper, heldout)
    speed = costs.speed()
    lines = []
    for stage in plan:
        tokens, flops, model = costs.of(stage)
        seconds = tokens / tokenise.speed if model is None else flops / speed[model]
        lines.append(PlannedStage(stage.name, done[stage.name], int(tokens), flops, seconds, costs.batch(stage)))
    return lines


class _Tokeniser:
    """Estimates a corpus from samples of its inputs, with the run's tokenizer or one trained on such a sample."""

    def __init__(self, config: Config, out: Path) -> None:
        self.context, self.tokens, self.seconds = config.data.context, 0, 0.0
        self.skip = config.data.on_bad_record == "skip"
        trained = str(out / "tokenizer") if (out / "tokenizer").is_dir() else None
        spec = texts.given_tokenizer(config) or trained
        if spec is not None:
            self.tokenizer = load_tokenizer(spec)
        else:
            sample, _ = _take(inputs(config.data.lower_data[0])[0], SAMPLE_CHARACTERS, self.skip)
            self.tokenizer = train_tokenizer((d.text for d in sample), config.data.vocab_size)
        self.vocabulary = padded_vocabulary(self.tokenizer)

    @property
    def speed(self) -> float:
        """Tokens per second, so far."""
        return max(self.tokens, 1) / max(self.seconds, 1e-3)

    def estimate(self, sources: tuple[SourceConfig, ...], *, chunk: bool = False) -> _Corpus:
        tokens = documents = 0.0
        for source in sources:
            parts = inputs(source)
            sampled = parts[:: -(-len(parts) // SAMPLED_INPUTS)]
            corpora = [self._input(part, chunk) for part in sampled]
            scale = sum(map(_size, parts)) / max(sum(map(_size, sampled)), 1) if len(sampled) < len(parts) else 1.0
            tokens += scale * sum(c.tokens for c in corpora)
            documents += scale * sum(c.documents for c in corpora)
        return _Corpus(tokens, documents)

    def _input(self, part: Input, chunk: bool) -> _Corpus:
        taken, whole = _take(part, SAMPLE_CHARACTERS, self.skip)
        sample = self._sample(taken, chunk)
        if whole:
            return sample
        count, scale = formats.get(part.format).count(part), 1.0  # a dataset that is streamed does not tell its size
        if count is not None:
            scale = count / len(taken)
        elif part.files:
            content = "\n".join(d.text for d in taken).encode()
            scale = max(_size(part) / len(packed(content, part.packing)), 1.0)
        return _Corpus(sample.tokens * scale, sample.documents * scale)

    def _sample(self, documents: Sequence[Document], chunk: bool) -> _Corpus:
        start = time.perf_counter()
        encoded = self.tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"]
        self.seconds += time.perf_counter() - start
        lengths, room = np.array([len(ids) for ids in encoded]), self.context - 1
        self.tokens += int(lengths.sum())
        pieces = np.maximum(-(-lengths // room), 1) if chunk else np.ones_like(lengths)
        kept = lengths if chunk else np.minimum(lengths, room)
        return _Corpus(float((kept + pieces).sum()), float(pieces.sum()))


def _take(part: Input, characters: int, skip: bool) -> tuple[list[Document], bool]:
    """The first documents of an input, about so many characters, and whether that is all of it."""
    taken, size = list[Document](), 0
    for item in read_input(part):
        if isinstance(item, Document):
            taken.append(item)
            size += len(item.text)
            if size > characters:
                return taken, False
        elif not skip:
            raise bad_record(part, item)
    if not taken:
        raise BilectError(f"data: no documents in {part.where}")
    return taken, True


class _Costs:
    """Tokens and FLOPs of each stage."""

    def __init__(self, config: Config, vocabulary: int, pool: _Corpus, upper: _Corpus, heldout: _Corpus) -> None:
        self.config, self.pool, self.upper, self.heldout, self.vocabulary = config, pool, upper, heldout, vocabulary
        self.methods = methods_of(config)
        self.proxy, self.target = (self._shape(spec) for spec in (config.models.proxy, config.models.target))
        trunk = getattr(self.proxy, self.proxy.base_model_prefix).config.to_dict()
        with torch.device("meta"):
            self.score_model = ScoreModel(ScoreModelConfig(trunk=trunk))

    def _shape(self, spec: Any) -> PreTrainedModel:
        """The model without its weights."""
        config = read_config(spec, vocab_size=self.vocabulary, context=self.config.data.context)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    def of(self, stage: Stage) -> tuple[float, float, str | None]:
        """Tokens, FLOPs and the model that sets the pace (None: the tokenizer) of a stage."""
        config, name = self.config, stage.kind
        set_aside = 0.0 if config.warmup.candidates else config.warmup.share
        shard = self.pool.tokens * (1 - set_aside) / config.rounds
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
        method = self.methods.get(stage.arm)
        if name == "fit" and isinstance(method, BilevelMethod):
            fit = method.config
            lengths = {"lower_length": self.pool.length, "upper_length": self.upper.length}
            flops = fit_flops(fit, self.proxy, self.score_model, self.target, **lengths)
            return fit.steps * fit.lower_batch_size * self.pool.length, flops, "proxy"
        if name == "score":
            scoring = isinstance(method, ScoreModelMethod)  # what other methods cost is not foreseen
            return shard, forward_flops(self.score_model, shard, self.pool.length) if scoring else 0.0, "proxy"
        if name == "evaluate":
            tokens = self.heldout.tokens
            return tokens, forward_flops(self.target, tokens, self.heldout.length), "target"
        if name == "fidelity":
            tokens = 4 * PROBE_DOCUMENTS * self.pool.length
            return tokens, forward_flops(self.target, tokens, self.pool.length), "target"
        return 0.0, 0.0, "target"

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


def _size(part: Input) -> int:
    sizes = [fs.size(path) for fs, path in map(filesystem, part.files)]
    return sum(int(size or 0) for size in sizes)
