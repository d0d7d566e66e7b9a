"""Models by path, Hub name, preset or inline config; tokenizers likewise, or trained on the pool."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from bilect.errors import BilectError
from bilect.models.presets import PRESETS, preset_config

__all__ = ["END_OF_TEXT", "load_causal_lm", "load_tokenizer", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"


def load_causal_lm(
    spec: str | Mapping[str, Any], *, vocab_size: int | None = None, seed: int = 0, context: int | None = None
) -> PreTrainedModel:
    """A causal LM in float32.

    Args:
        spec: a preset (``pythia-31m``, random weights), a directory or Hub name (pretrained weights), or a dict
            ``{"model_type": ..., ...}`` (random weights).
        vocab_size: vocabulary of models that are built here.
        seed: of the random weights.
        context: longest input; the positions of models that are built here are extended to it.

    Raises:
        BilectError: nothing found there, or an unknown architecture, or safetensors weights are missing.
    """
    if isinstance(spec, str) and spec not in PRESETS:
        _check_directory("model", spec)
        try:
            return AutoModelForCausalLM.from_pretrained(
                os.path.expanduser(spec), dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            known = ", ".join(PRESETS)
            reason = str(error).strip().splitlines()[0]
            raise BilectError(
                f"model: cannot load {spec!r}: {reason} (a directory, a Hub name, or a preset: {known})"
            ) from error
    config = preset_config(spec, vocab_size) if isinstance(spec, str) else dict(spec)
    if "model_type" not in config:
        raise BilectError("model: an inline config needs model_type, for instance {model_type: llama, ...}")
    if vocab_size is not None:
        config["vocab_size"] = vocab_size
    if context is not None:
        config["max_position_embeddings"] = max(context, config.get("max_position_embeddings", 0))
    try:
        hf_config = AutoConfig.for_model(**config)
    except (ValueError, KeyError) as error:
        raise BilectError(f"model: {str(error).strip().splitlines()[0]}") from error
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)


def _check_directory(what: str, spec: str) -> None:
    """A path that is none must not be taken for a Hub name."""
    if spec.startswith((".", "/", "~")) and not Path(spec).expanduser().is_dir():
        raise BilectError(f"{what}: no directory {spec}")


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a directory, a Hub name or a ``tokenizer.json`` file.

    Raises:
        BilectError: none found there.
    """
    try:
        if spec.endswith(".json"):
            if not Path(spec).is_file():
                raise BilectError(f"tokenizer: no file {spec}")
            tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(tokenizer_file=spec)
            if tokenizer.eos_token is None and END_OF_TEXT in tokenizer.get_vocab():
                tokenizer.eos_token = END_OF_TEXT
        else:
            _check_directory("tokenizer", spec)
            tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(spec), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BilectError(f"tokenizer: cannot load {spec!r}: {str(error).strip().splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise BilectError(f"tokenizer: {spec} has no end-of-text token (eos_token)")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on ``texts``; any string can be encoded.

    Args:
        texts: training text.
        vocab_size: number of ids, end-of-text included.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
