"""What a run would do and cost, before it does it: ``bilect run ... --dry-run``.

Tokens are estimated from a sample of each input file, or counted where the pool is tokenised already; FLOPs are
counted from the models' matrices; seconds follow from the speed that proxy and target reach on this machine in a
probe of one or two steps, and are right to about a factor of two.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bilect.config import Config, SourceConfig
from bilect.data import formats
from bilect.data.documents import Document, bad_record, read_input
from bilect.data.files import filesystem
from bilect.data.input import Input
from bilect.data.packing import packed
from bilect.data.sources import inputs
from bilect.errors import BilectError
from bilect.models.loading import load_tokenizer, padded_vocabulary, train_tokenizer
from bilect.pipeline import texts
from bilect.pipeline.context import RunContext
from bilect.pipeline.costs import Corpus, Costs
from bilect.pipeline.directory import read_manifest
from bilect.pipeline.stages import Command, stages, states, wanted, with_arms
from bilect.runtime.progress import SilentProgress

__all__ = ["PlannedStage", "plan_run"]

SAMPLE_CHARACTERS = 1 << 20  # of each file
SAMPLED_INPUTS = 16


@dataclass(frozen=True)
class PlannedStage:
    """One line of the plan.

    Attributes:
        name: of the stage.
        done: its result is there, with these settings and inputs.
        tokens: it passes through a model, or tokenises.
        flops: floating-point operations.
        seconds: estimated, those of the learning curve among them.
        batch: what a step learns from, over all ranks; empty where there are no steps.
        curve_seconds: of measuring the points of the learning curve, whose FLOPs count for nothing.
    """

    name: str
    done: bool
    tokens: int
    flops: float
    seconds: float
    batch: str = ""
    curve_seconds: float = 0.0


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
    pool = tokenise.estimate(data.lower_data, chunk=data.long_documents == "chunk")
    if done["tokenise pool"]:
        record = records["tokenise pool"]
        pool = Corpus(record["tokens"], record["documents"])
    upper, heldout = ([tokenise.estimate((s,)) for s in sources] for sources in (data.upper_data, data.heldout_data))
    costs = Costs(config, tokenise.vocabulary, pool, upper, heldout)
    speed = costs.speed()
    lines = []
    for stage in plan:
        tokens, flops, model = costs.of(stage)
        seconds = tokens / tokenise.speed if model is None else flops / speed[model]
        curve = costs.curve(stage) / speed["target"]
        name, known = stage.name, done[stage.name]
        lines.append(PlannedStage(name, known, int(tokens), flops, seconds + curve, costs.batch(stage), curve))
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

    def estimate(self, sources: tuple[SourceConfig, ...], *, chunk: bool = False) -> Corpus:
        tokens = documents = 0.0
        for source in sources:
            parts = inputs(source)
            sampled = parts[:: -(-len(parts) // SAMPLED_INPUTS)]
            corpora = [self._input(part, chunk) for part in sampled]
            scale = sum(map(_size, parts)) / max(sum(map(_size, sampled)), 1) if len(sampled) < len(parts) else 1.0
            tokens += scale * sum(c.tokens for c in corpora)
            documents += scale * sum(c.documents for c in corpora)
        return Corpus(tokens, documents)

    def _input(self, part: Input, chunk: bool) -> Corpus:
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
        return Corpus(sample.tokens * scale, sample.documents * scale)

    def _sample(self, documents: Sequence[Document], chunk: bool) -> Corpus:
        start = time.perf_counter()
        encoded = self.tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"]
        self.seconds += time.perf_counter() - start
        lengths, room = np.array([len(ids) for ids in encoded]), self.context - 1
        self.tokens += int(lengths.sum())
        pieces = np.maximum(-(-lengths // room), 1) if chunk else np.ones_like(lengths)
        kept = lengths if chunk else np.minimum(lengths, room)
        return Corpus(float((kept + pieces).sum()), float(pieces.sum()))


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


def _size(part: Input) -> int:
    sizes = [fs.size(path) for fs, path in map(filesystem, part.files)]
    return sum(int(size or 0) for size in sizes)
