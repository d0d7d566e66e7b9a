"""A training that is interrupted and goes on with its model in shards, or whole again; run as a script by a test."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from bilect.config import TrainConfig
from bilect.data.documents import Document
from bilect.data.tokens import TokenStore, write_tokens
from bilect.models.loading import load_causal_lm, train_tokenizer
from bilect.runtime import distributed
from bilect.runtime.sharding import save_pretrained, shard
from bilect.training.evaluation import document_losses, evaluate
from bilect.training.train import train
from tests.distributed.ranks import main

TIED = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "tie_word_embeddings": True,
}  # fmt: skip
CPU = torch.device("cpu")


class Killed(BaseException):
    """Stands for SIGKILL."""


class Task:
    """Ends the training at its ``at``-th advance; keeps what it was told."""

    def __init__(self, at: int = 10**9) -> None:
        self.at, self.amounts = at, list[float]()

    def advance(self, amount: float = 1, **figures: Any) -> None:
        if amount:
            self.amounts.append(amount)
            if len(self.amounts) == self.at:
                raise Killed


def tokens(folder: Path) -> TokenStore:
    words = ["the", "sun", "and", "rain", "over", "a", "blue", "hill", "or", "green", "field", "by", "old", "stone"]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, size=rng.integers(5, 40))) for _ in range(41)]
    documents = [Document(f"d{i}", "s", t, t[: len(t) // 2] if i % 2 else "") for i, t in enumerate(texts)]
    write_tokens(documents, train_tokenizer(texts, 320), folder / "t.arrow", context=48)
    return TokenStore(folder / "t.arrow")


def attempt(store: TokenStore, folder: Path, task: Task, *, sharded: bool, **more: Any) -> PreTrainedModel:
    """One process's life, to its end or to the ``Killed``."""
    model = load_causal_lm(TIED, vocab_size=320, seed=0)
    if sharded:
        shard(model, CPU)
    config = TrainConfig(steps=8, batch_size=6, decay_steps=4, learning_rate=1e-2, gradient_accumulation=1)
    folder.mkdir(exist_ok=True)
    train(model, store, np.arange(len(store)), folder, config, context=32, seed=1, task=task, checkpoint_every=3,
          device=CPU, **more)  # fmt: skip
    return model


def weights(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """As they are saved."""
    save_pretrained(model, folder)
    distributed.barrier()
    return load_file(folder / "model.safetensors")


def story(store: TokenStore, folder: Path, *lives: bool) -> dict[str, Any]:
    """A training and the decay after it; each life but the last is ended at step 5, and ``lives`` says which shard."""
    for sharded in lives[:-1]:
        try:
            attempt(store, folder, Task(5), sharded=sharded)
        except Killed:
            continue
    task = Task()
    trained = weights(attempt(store, folder, task, sharded=lives[-1]), folder / "saved")
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    down = attempt(store, folder, Task(), sharded=lives[-1], start_from=folder, decay=True)
    return {
        "amounts": task.amounts, "trained": trained, "optimizer": optimizer,
        "decayed": weights(down, folder / "decayed"), "evaluated": evaluate(down, store, 0, 200).as_dict(),
        "losses": torch.from_numpy(document_losses(down, store, np.arange(len(store)), 0, 200)),
    }  # fmt: skip


STORIES = {"whole": [False], "shards": [True], "whole, then shards": [False, True], "shards, then whole": [True, False]}


def work() -> dict[str, Any]:
    out = Path(f"{sys.argv[1]}.{distributed.world_size()}.stories")
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as own:
        store = tokens(Path(own))
        return {name: story(store, out / name, *lives) for name, lives in STORIES.items()}


if __name__ == "__main__":
    main(work)
