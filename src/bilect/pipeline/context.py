"""What every stage is given: the run directory, the config, the progress display, and how to read earlier results."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, wraps
from itertools import chain
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bilect.config import Config
from bilect.data.sources import set_name
from bilect.data.store import Naming
from bilect.data.tokens import TokenStore
from bilect.engines import Engine, Here, Led, Together
from bilect.models.loading import load_causal_lm, load_tokenizer
from bilect.runtime import distributed
from bilect.runtime.device import pick_device
from bilect.runtime.progress import Progress, SilentProgress
from bilect.runtime.seeds import derive_seed
from bilect.runtime.sharding import save_pretrained, shard
from bilect.selection.near_duplicates import cluster_file

__all__ = [
    "WARM_TARGET",
    "Figures",
    "RunContext",
    "arm_folder",
    "find_clusters",
    "on_main",
    "open_pool",
    "target_folder",
]

Figures = dict[str, Any]
P = ParamSpec("P")

WARM_TARGET = "warmup/target"


@dataclass(frozen=True)
class RunContext:
    """One run, as its stages see it.

    Attributes:
        root: the run directory.
        config: of the run.
        progress: what the reader sees.
        engine: where work is done that many processes can share.
    """

    root: Path
    config: Config
    progress: Progress
    engine: Engine = field(default_factory=Here)

    def for_workers(self) -> "RunContext":
        """The run as a worker sees it, which can be pickled: silent, and with no engine of its own."""
        return RunContext(self.root, self.config, SilentProgress())

    @property
    def together(self) -> Engine:
        """Where work of a stage that all ranks are in is shared out."""
        return self.engine if distributed.world_size() == 1 else Together()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer, read once: every batch asks for its padding."""
        return load_tokenizer(str(self.root / "tokenizer"))

    @property
    def pad_id(self) -> int:
        """Padding token; never learned, never read."""
        return int(self.tokenizer.eos_token_id)

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return pick_device(self.config.device)

    def pool(self) -> TokenStore:
        """The pool's tokens: the rows of all its inputs, those that are never used among them."""
        return open_pool(self.root / "tokens")

    def pool_note(self) -> dict[str, Any]:
        """The pool's token files and, by reason, its rows that are never used: ``pool.json`` and ``held-out.json``."""
        return _pool_note(self.root / "tokens")

    def excluded(self) -> np.ndarray:
        """Rows of the pool that are never used: documents that repeat an earlier one, or are held out."""
        return _excluded(self.pool_note())

    def clusters(self) -> Path | None:
        """Near-duplicates of the pool, looked for if that is not done; None where there is no cap."""
        selection, tokens = self.config.selection, self.root / "tokens"
        if selection.max_per_cluster is None:
            return None
        return find_clusters(tokens, selection.cluster_similarity, self.progress, self.engine)

    def upper_sets(self) -> list[tuple[str, float, TokenStore]]:
        """Name, weight and tokens of each target set, in the order of the config."""
        sets = [(set_name(source), source.weight) for source in self.config.data.upper_data]
        return [(name, w, TokenStore(self.root / "tokens" / "upper" / f"{name}.arrow")) for name, w in sets]

    def upper(self) -> TokenStore:
        """The tokens of all target sets together."""
        return TokenStore([path for _, _, store in self.upper_sets() for path in store.paths])

    def heldout_sets(self) -> dict[str, TokenStore]:
        """Tokens of each held-out set, by name."""
        return {p.stem: TokenStore(p) for p in sorted((self.root / "tokens" / "heldout").glob("*.arrow"))}

    def shard(self, number: int, n_rows: int) -> np.ndarray:
        """Rows of one of the random shards: 0 for the warm-up, 1..R for the rounds; no excluded row.

        They are disjoint, but for the warm-up's where its documents are candidates too (``warmup.candidates``).
        """
        order = np.random.default_rng(derive_seed(self.config.seed, "shards")).permutation(n_rows)
        order = order[~np.isin(order, self.excluded())]
        warmup = self.config.warmup
        first = round(len(order) * warmup.share)
        rest = order if warmup.candidates else order[first:]
        return np.sort([order[:first], *np.array_split(rest, self.config.rounds)][number])

    def arm_folder(self, arm: str, number: int) -> str:
        """See ``arm_folder``."""
        return arm_folder(self.config, arm, number)

    def target_folder(self, arm: str, number: int) -> str:
        """See ``target_folder``."""
        return target_folder(self.config, arm, number)

    def load(self, folder: str) -> PreTrainedModel:
        """A model saved by an earlier stage."""
        return load_causal_lm(str((self.root / folder).resolve())).to(self.device)

    def load_placed(self, folder: str) -> PreTrainedModel:
        """A model saved by an earlier stage, to be trained or evaluated by all ranks: see ``place``."""
        return self.place(load_causal_lm(str((self.root / folder).resolve())))

    @property
    def shards(self) -> bool:
        """Whether models that are trained or evaluated are spread over the ranks."""
        return self.config.models.shard and distributed.world_size() > 1

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        """A model to be trained or evaluated by all ranks: on the device of each, or spread over them."""
        if not self.shards:
            return model.to(self.device)
        shard(model, self.device)
        return model

    def evaluated(self, folder: str) -> str:
        """The folder of the model that stands for a target in evaluations: its decayed copy, where it has one.

        The settings say so, not the disk: a copy may be left from other settings.
        """
        training = self.config.warmup.target if folder == WARM_TARGET else self.config.training
        return f"{folder}-decayed" if training.branch_steps else folder

    def training_of(self, folder: str) -> Path | None:
        """The folder of a target whose training can go on; None of one that is taken as it is, without a warm-up."""
        return None if folder == WARM_TARGET and not self.config.warmup.target.steps else self.root / folder

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """A model with its tokenizer, on the main rank; called on all, which may each have a part of it."""
        save_pretrained(model, folder)
        if distributed.is_main():
            self.tokenizer.save_pretrained(folder)


def on_main(stage: Callable[Concatenate[RunContext, P], Figures]) -> Callable[Concatenate[RunContext, P], Figures]:
    """A stage that the main rank carries out; the others do what its engine hands them."""

    @wraps(stage)
    def carried_out(run: RunContext, *args: P.args, **kwargs: P.kwargs) -> Figures:
        if not isinstance(run.engine, Led):
            return stage(run, *args, **kwargs)
        if not distributed.is_main():
            run.engine.serve()
            return {}
        try:
            return stage(run, *args, **kwargs)
        finally:
            run.engine.release()

    return carried_out


def open_pool(tokens: Path) -> TokenStore:
    """The pool behind a folder with ``pool.json`` and ``pool/``."""
    note = _pool_note(tokens)
    paths = [tokens / "pool" / f["file"] for f in note["files"]]
    naming = [Naming(**f.get("naming", {})) for f in note["files"]]
    return TokenStore(paths, [f["weight"] for f in note["files"]], _excluded(note), naming)


def find_clusters(tokens: Path, similarity: float, progress: Progress, engine: Engine) -> Path:
    """Near-duplicates of a pool, in a file beside its tokens: once for all rounds, arms and later selections."""
    store, file = open_pool(tokens), _cluster_path(tokens, similarity)
    with progress.task("near-duplicates", len(store) - len(store.excluded), unit="documents") as task:
        return cluster_file(store, file, similarity, task.advance, engine)


def _cluster_path(tokens: Path, similarity: float) -> Path:
    return tokens / f"near-duplicates-{similarity:g}.parquet"


def _pool_note(tokens: Path) -> dict[str, Any]:
    note, held_out = json.loads((tokens / "pool.json").read_text(encoding="utf-8")), tokens / "held-out.json"
    if held_out.is_file():  # a file of its own stage: what two stages write, neither knows to be there
        note["excluded"] |= json.loads(held_out.read_text(encoding="utf-8"))["excluded"]
    return dict(note)


def _excluded(note: dict[str, Any]) -> np.ndarray:
    return np.array(sorted(chain.from_iterable(note["excluded"].values())), dtype=np.int64)


def arm_folder(config: Config, arm: str, number: int) -> str:
    """Where the results of an arm in a round lie; round 0 is the warm-up."""
    if number == 0:
        return "warmup"
    return f"round-{number}" if arm == config.method else f"controls/{arm}/round-{number}"


def target_folder(config: Config, arm: str, number: int) -> str:
    """Where an arm's target lies after a round."""
    return f"{arm_folder(config, arm, number)}/target"
