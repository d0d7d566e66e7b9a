"""The demo: a choice from a few megabytes of real English, sized for two CPU cores and a few minutes.

The pool mixes speeches, scripture, technical documentation and an almanac of countries; the target is the almanac's
prose about *other* countries. Nobody tells the method which document is which.
"""

from pathlib import Path

from bilect.config import Config, parse_config

__all__ = ["demo_config"]


def demo_config(data: Path, seed: int = 0) -> Config:
    """The demo's settings; sizes were chosen by measurement, see docs/results_log.md.

    Args:
        data: folder with pool.jsonl, upper.jsonl and heldout.jsonl.
        seed: of the run.
    """
    training = {"batch_size": 16, "learning_rate": 2e-3, "warmup_ratio": 0.1}
    return parse_config(
        {
            "seed": seed,
            "data": {
                "lower_data": [{"path": str(data / "pool.jsonl")}],
                "upper_data": [{"path": str(data / "upper.jsonl")}],
                "heldout_data": [{"path": str(data / "heldout.jsonl")}],
                "context": 128,
                "long_documents": "chunk",
                "vocab_size": 2048,
            },
            "models": {"proxy": "tiny-100k", "target": "tiny-300k"},
            "warmup": {
                "share": 0.25,
                "proxy": {**training, "steps": 150},
                "target": {**training, "steps": 150, "decay_steps": 20},
            },
            "selection": {"keep_ratio": 0.2},
            "training": {**training, "steps": 120, "decay_steps": 20},
            "controls": ["random"],
            "device": "cpu",
        }
    )
