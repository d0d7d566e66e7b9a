"""Whether models, tokenizer and context fit together, told from configs and tokenizers alone: no weights are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase

from bilect.errors import BilectError
from bilect.models.loading import load_tokenizer, read_config, read_tokenizer
from bilect.models.presets import PRESETS

__all__ = ["check_context", "check_models", "check_vocabulary", "disagreement", "own_tokenizer", "positions"]

Spec = str | Mapping[str, Any]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


def check_models(
    models: Mapping[str, Spec], tokenizer: PreTrainedTokenizerBase | str | None, *, context: int | None, place: str
) -> None:
    """Check all models of a run before any of its stages.

    Args:
        models: by the name of its setting, such as ``models.proxy``; as for ``load_causal_lm``.
        tokenizer: of the run, or where it lies; None: one is yet to be trained, for models that are built here.
        context: longest input; positions of models that are built here are extended to it. None: not known.
        place: where the tokenizer lies, for messages.

    Raises:
        BilectError: a model is not there, is no causal LM, has fewer positions than the context or fewer ids than the
            tokenizer, has no weights in safetensors, or brings another tokenizer.
    """
    known = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    for name, spec in models.items():
        config = read_config(spec, name)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise BilectError(f"{name}: {config.model_type} is no causal LM of transformers; use one")
        if not isinstance(spec, str) or spec in PRESETS:
            continue
        if context is not None:
            check_context(name, spec, config, context)
        folder = Path(spec).expanduser()
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            raise BilectError(f"{name}: no *.safetensors in {spec}; save the model with save_pretrained")
        if known is not None:
            check_vocabulary(name, spec, known, place)
            check_rows(name, int(config.get_text_config().vocab_size), known)


def positions(config: PreTrainedConfig) -> int | None:
    """Longest input a model was made for, tokens; None where nothing bounds it (ALiBi, recurrent models)."""
    text = config.get_text_config()
    if text.model_type in ("bloom", "mpt") or getattr(text, "alibi", False):
        return None  # distances, not positions
    found = getattr(text, "max_position_embeddings", None)
    return int(found) if found is not None and found > 0 else None


def check_context(what: str, spec: str, config: PreTrainedConfig, context: int) -> None:
    """Inputs of ``context`` tokens must find positions.

    Raises:
        BilectError: there are too few.
    """
    longest = positions(config)
    if longest is not None and context > longest:
        raise BilectError(f"{what}: {spec} has {longest} positions, the context is {context} tokens; set "
                          f"data.context={longest} or less, or use a model with more")  # fmt: skip


def check_rows(what: str, rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every token needs a row of the embeddings, save tokens added at the end: rows are added for those.

    Raises:
        BilectError: there are too few rows.
    """
    added = tokenizer.added_tokens_decoder
    least = max((i for i in tokenizer.get_vocab().values() if i not in added), default=-1) + 1
    if rows < least:
        raise BilectError(f"{what}: its vocabulary of {rows} is smaller than the tokenizer's {len(tokenizer)}; use the "
                          "model's own tokenizer")  # fmt: skip


def check_vocabulary(what: str, spec: str, tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """A pretrained model that brings a tokenizer must bring the run's: else its ids mean something else.

    Args:
        what: name of the setting, for the message.
        spec: of the model; without a tokenizer of its own nothing is compared.
        tokenizer: of the run.
        place: where that one lies.

    Raises:
        BilectError: the vocabularies differ, or the model's cannot be read.
    """
    own = own_tokenizer(spec)
    if own is not None and (how := disagreement(own, tokenizer)) is not None:
        raise BilectError(f"{what}: the tokenizer of {spec} ({len(own)} tokens) differs from the run's in {place} "
                          f"({len(tokenizer)} tokens): {how}; use models of one vocabulary, or set "
                          f"data.tokenizer={spec} and train the others anew")  # fmt: skip


def own_tokenizer(spec: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a model, or None.

    Raises:
        BilectError: it is there and cannot be read.
    """
    path = Path(spec).expanduser()
    if path.is_dir() and not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return read_tokenizer(spec)
    except BilectError:
        if path.exists():
            raise
        return None  # nothing on the Hub


def disagreement(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """How the ids of two tokenizers differ in meaning, in words; None where they agree.

    They agree if every id that both have is the same token, and what one has more is added tokens (padding, say): texts
    are then cut alike. Padding of the embeddings, which no token has, plays no part.
    """
    token_a, token_b = ({i: token for token, i in t.get_vocab().items()} for t in (a, b))
    for i in sorted(token_a.keys() | token_b.keys()):
        if i in token_a and i in token_b:
            if token_a[i] != token_b[i]:
                return f"id {i} is {token_a[i]!r} in one and {token_b[i]!r} in the other"
        elif i not in (a if i in token_a else b).added_tokens_decoder:
            return f"only one has id {i}, {token_a.get(i, token_b.get(i))!r}"
    return None
