"""A tiny corpus of two domains in two vocabularies, and a config that runs on it within seconds."""

import json
import random
from pathlib import Path
from typing import Any

WEATHER = ["sun", "rain", "wind", "cloud", "storm", "sky", "blue", "grey"]
MATHS = ["sum", "root", "prime", "angle", "proof", "lemma", "set", "map"]
TINY = {
    "model_type": "gpt_neox",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def write_corpus(folder: Path, pool: int = 240) -> None:
    """Two thirds weather, one third maths; the target is maths."""
    rng = random.Random(0)

    def words(vocabulary: list[str], low: int = 20, high: int = 60) -> str:
        return " ".join(rng.choice(vocabulary) for _ in range(rng.randint(low, high)))

    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {"id": f"d{i}", "text": words(WEATHER if i % 3 else MATHS), "source": "weather" if i % 3 else "maths"}
        for i in range(pool)
    ]
    write_jsonl(folder / "pool.jsonl", records)
    for name in ("upper", "heldout"):
        write_jsonl(folder / f"{name}.jsonl", [{"id": f"{name}{i}", "text": words(MATHS)} for i in range(20)])


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def tiny_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run on ``write_corpus``; ``changes`` replace top-level settings."""
    training = {"batch_size": 4, "learning_rate": 5e-3, "decay_steps": 4}
    return {
        "method": "bliss",  # the one with the most to resume, share and divide among ranks
        "data": {
            "lower_data": [{"path": str(folder / "pool.jsonl")}],
            "upper_data": [{"path": str(folder / "upper.jsonl")}],
            "heldout_data": [{"path": str(folder / "heldout.jsonl")}],
            "context": 48,
            "vocab_size": 320,
        },
        "models": {"proxy": TINY, "target": {**TINY, "hidden_size": 24, "intermediate_size": 48}},
        "warmup": {"proxy": {**training, "steps": 30}, "target": {**training, "steps": 30}},
        "fit": {
            "steps": 30,
            "lower_batch_size": 8,
            "upper_batch_size": 4,
            "proxy_learning_rate": 1e-3,
            "score_learning_rate": 3e-3,
        },
        "training": {**training, "steps": 30},
        "device": "cpu",
        **changes,
    }
