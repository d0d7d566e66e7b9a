"""Named architectures, built from configs: the Pythia ladder and sizes for CPUs.

The Pythia sizes (Biderman et al. 2023, arXiv 2304.01373) are the ones BLISS uses. ``tiny-*`` train within minutes on
a CPU; their names give the parameters of the trunk, the embeddings come on top and depend on the vocabulary.
"""

from typing import Any

__all__ = ["PRESETS", "preset_config"]


def _neox(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "vocab_size": 50304,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **more,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "pythia-14m": _neox(128, 6, 4),
    "pythia-31m": _neox(256, 6, 8),
    "pythia-70m": _neox(512, 6, 8),
    "pythia-160m": _neox(768, 12, 12),
    "pythia-410m": _neox(1024, 24, 16),
    "pythia-1b": _neox(2048, 16, 8),
    "tiny-100k": _neox(64, 2, 4, tie_word_embeddings=True),
    "tiny-300k": _neox(96, 3, 4, tie_word_embeddings=True),
    "tiny-800k": _neox(128, 4, 4, tie_word_embeddings=True),
    "tiny-3m": _neox(256, 4, 8, tie_word_embeddings=True),
}


def preset_config(name: str, vocab_size: int | None = None) -> dict[str, Any]:
    """The Hugging Face config of a preset, as a dict.

    Args:
        name: a key of ``PRESETS``.
        vocab_size: overrides the preset's vocabulary.

    Raises:
        KeyError: no such preset.
    """
    config = dict(PRESETS[name])
    if vocab_size is not None:
        config["vocab_size"] = vocab_size
    return config
