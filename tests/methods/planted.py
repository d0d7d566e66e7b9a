"""A pool of five sources, each with words of its own, and a target that is drawn as one of them."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bilect.config import TrainConfig
from bilect.data.documents import Document
from bilect.data.tokens import TokenStore, write_tokens
from bilect.methods.contract import Inputs
from bilect.models.loading import load_causal_lm
from bilect.runtime.progress import SilentProgress
from bilect.training.train import train

SOURCES, OWN = 5, 12
TARGET = "s2"
WORDS = [f"w{i}" for i in range(SOURCES * OWN)]
CONTEXT = 33
TINY = {
    "model_type": "gpt_neox", "vocab_size": len(WORDS) + 4, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": CONTEXT,
    "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", bos_token="<eos>")


def text_of(source: int, rng: random.Random) -> str:
    """Half the words are the source's own, the others anybody's."""
    own = WORDS[source * OWN : (source + 1) * OWN]
    return " ".join(rng.choice(own if rng.random() < 0.5 else WORDS) for _ in range(rng.randint(12, 30)))


def store_of(path: Path, texts: list[tuple[str, str]]) -> TokenStore:
    """Token file of (source, text)."""
    documents = [Document(f"{path.stem}{i}", source, text, record=i + 1) for i, (source, text) in enumerate(texts)]
    write_tokens(documents, tokenizer(), path, context=CONTEXT)
    return TokenStore(path)


def planted(folder: Path, seed: int, documents: int = 240, **changes: Any) -> Inputs:
    """Inputs whose pool has the target's distribution in a fifth of its documents, with warm models."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    pool = store_of(folder / "pool.arrow", [(f"s{i % 5}", text_of(i % 5, rng)) for i in range(documents)])
    upper = [
        (name, weight, store_of(folder / f"{name}.arrow", [("upper", text_of(2, rng)) for _ in range(n)]))
        for name, weight, n in (("one", 1.0, 24), ("two", 2.0, 16))
    ]
    for role, width, steps in (("proxy", 16, 80), ("target", 24, 30)):
        config = TrainConfig(steps=steps, batch_size=8, learning_rate=5e-3, decay_steps=0, weight_decay=0.01)
        model = load_causal_lm({**TINY, "hidden_size": width}, seed=seed)
        rows, out = np.arange(documents), folder / role
        out.mkdir(exist_ok=True)
        with SilentProgress().task(role) as task:
            train(model, pool, rows, out, config, context=CONTEXT, seed=seed, task=task, checkpoint_every=1000,
                  device=torch.device("cpu"))  # fmt: skip
        model.save_pretrained(out)
    given = {"proxy": folder / "proxy", "target": folder / "target", "scratch": folder / "scratch", "pad_id": 0}
    return Inputs(
        pool, np.arange(documents), upper, **{**given, "seed": seed, "device": torch.device("cpu"), **changes}
    )


def precision(inputs: Inputs, scores: np.ndarray) -> float:
    """Share of the target's documents among the fifth with the highest scores; 0.2 by chance."""
    kept = np.argsort(-scores, kind="stable")[: len(inputs.rows) // 5]
    return float(np.mean([source == TARGET for source in inputs.pool.sources(inputs.rows[kept])]))


class Killed(Exception):
    pass


class Counted:
    """Progress that counts, and dies in the middle if told to."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.amounts: list[float] = []
        self.dies_at = dies_at

    def advance(self, amount: float = 1, **figures: float | None) -> None:
        self.amounts.append(amount)
        if len(self.amounts) == self.dies_at:
            raise Killed
