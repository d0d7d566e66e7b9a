"""The demo: a choice from a few megabytes of real English, sized for two CPU cores and a few minutes.

The pool mixes speeches, scripture, technical documentation and an almanac of countries; the target is the almanac's
prose about *other* countries. Nobody tells the method which document is which.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilect.config import Config, parse_config
from bilect.config.base import apply_overrides

__all__ = ["demo_comparison", "demo_config"]


def demo_config(data: Path, seed: int = 0) -> Config:
    """The demo's settings; sizes were chosen by measurement, see docs/results_log.md.

    Args:
        data: folder with pool.jsonl, upper.jsonl and heldout.jsonl.
        seed: of the run.
    """
    return parse_config(_values(data, seed))


def demo_comparison(data: Path, overrides: Sequence[str] = ()) -> Config:
    """The demo over three seeds, beside DSIR and both controls: ``bilect compare demo``.

    Args:
        data: as of ``demo_config``.
        overrides: ``key.path=value`` settings.

    Raises:
        BilectError: a wrong setting.
    """
    values = _values(data, 0)
    for role, name in (("lower_data", "demo-pool"), ("upper_data", "almanac"), ("heldout_data", "almanac")):
        values["data"][role][0]["source"] = name
    values |= {"controls": ["random", "full", "dsir"], "methods": {"dsir": {"length": "mean"}}, "compare": {"seeds": 3}}
    return parse_config(apply_overrides(values, overrides))


def _values(data: Path, seed: int) -> dict[str, Any]:
    training = {"batch_size": 16, "learning_rate": 2e-3, "warmup_ratio": 0.1}
    return {
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
