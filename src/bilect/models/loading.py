"""Models by path, Hub name, preset or inline config; tokenizers likewise, or trained on the pool."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
from transformers.utils import logging

from bilect.errors import BilectError, reason
from bilect.models.presets import PRESETS, preset_config
from bilect.models.score_model import ScoreModel

__all__ = [
    "END_OF_TEXT",
    "check_vocabulary",
    "load_causal_lm",
    "load_score_model",
    "load_tokenizer",
    "padded_vocabulary",
    "train_tokenizer",
]

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
        BilectError: nothing found there, an unknown architecture, or a checkpoint that is broken or lacks weights.
    """
    if isinstance(spec, str) and spec not in PRESETS:
        _check_directory("model", spec)
        return _from_pretrained(
            AutoModelForCausalLM,
            "model",
            spec,
            f"a directory, a Hub name, or a preset: {', '.join(PRESETS)}",
            dtype=torch.float32,
            trust_remote_code=False,
        )
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
        raise BilectError(f"model: {reason(error)}") from error
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)


def load_score_model(path: Path) -> ScoreModel:
    """A saved score model.

    Raises:
        BilectError: nothing found there, or a checkpoint that is broken or lacks weights.
    """
    _check_directory("score model", str(path))
    return _from_pretrained(ScoreModel, "score model", str(path), "a directory that a fit has written")


def _from_pretrained(cls: Any, what: str, spec: str, wanted: str, **settings: Any) -> Any:
    """Load with every weight in its place: transformers would draw missing ones at random."""
    try:
        with _quiet():
            model, report = cls.from_pretrained(
                os.path.expanduser(spec),
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **settings,
            )
    except Exception as error:  # a broken checkpoint makes transformers raise anything
        raise BilectError(f"{what}: cannot load {spec!r}: {reason(error)} ({wanted})") from error
    misfits = sorted(str(key[0]) for key in report["mismatched_keys"])
    missing = sorted(report["missing_keys"])
    for keys, problem in ((misfits, "of another size than config.json says"), (missing, "missing")):
        if keys:
            others = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise BilectError(f"{what}: cannot load {spec!r}: weights {problem}: {keys[0]}{others} ({wanted})")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the report that transformers logs of a checkpoint that does not fit: ours is one line."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_directory(what: str, spec: str) -> None:
    """A path that is none must not be taken for a Hub name."""
    if spec.startswith((".", "/", "~")) and not Path(spec).expanduser().is_dir():
        raise BilectError(f"{what}: no directory {spec}")


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a directory, a Hub name or a ``tokenizer.json`` file.

    Raises:
        BilectError: none found there.
    """
    tokenizer = _read_tokenizer(spec)
    if tokenizer.eos_token_id is None:
        raise BilectError(f"tokenizer: {spec} has no end-of-text token (eos_token)")
    return tokenizer


def check_vocabulary(what: str, spec: str, tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """A pretrained model that brings a tokenizer must bring the run's: else its ids mean something else.

    Args:
        what: name of the setting, for the message.
        spec: directory or Hub name of the model; without a tokenizer of its own nothing is compared.
        tokenizer: of the run.
        place: where that one lies.

    Raises:
        BilectError: the vocabularies differ, or the model's cannot be read.
    """
    folder = Path(spec).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return
    try:
        own = _read_tokenizer(spec)
    except BilectError:
        if folder.is_dir():
            raise
        return  # nothing on the Hub
    if _vocabulary_hash(own) != _vocabulary_hash(tokenizer):
        raise BilectError(f"{what}: the tokenizer of {spec} ({len(own)} tokens) differs from the run's in {place} "
                          f"({len(tokenizer)} tokens); use models of one vocabulary, or set data.tokenizer={spec} and "
                          "train the others anew")  # fmt: skip


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


def _vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _read_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    try:
        if not spec.endswith(".json"):
            _check_directory("tokenizer", spec)
            return AutoTokenizer.from_pretrained(os.path.expanduser(spec), trust_remote_code=False)
        if not Path(spec).is_file():
            raise BilectError(f"tokenizer: no file {spec}")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=spec)
    except BilectError:
        raise
    except Exception as error:  # a broken file makes tokenizers raise a plain Exception
        raise BilectError(f"tokenizer: cannot load {spec!r}: {reason(error)}") from error
    if tokenizer.eos_token is None and END_OF_TEXT in tokenizer.get_vocab():
        tokenizer.eos_token = END_OF_TEXT
    return tokenizer


def padded_vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of the embeddings that are built for a tokenizer: a multiple of 64."""
    return -(-len(tokenizer) // 64) * 64


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on ``texts``; any string can be encoded.

    No token reaches across the cuts in a run of 256 characters or more without white space, or of nothing else: after
    every 256 of them. Training takes time that grows with the square of a word's length otherwise.

    Args:
        texts: training text.
        vocab_size: number of ids, end-of-text included.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    cuts = pre_tokenizers.Split(Regex(rf"\S{{{_RUN}}}|\s{{{_RUN}}}"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([cuts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _interruptible(lambda some: bpe.train_from_iterator(some, trainer), texts)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


_RUN = 256


def _interruptible(work: Callable[[Iterator[str]], None], texts: Iterable[str]) -> None:
    """Do what runs outside of Python for long, where an interrupt would wait for its end; texts then come to an end."""
    outcome, stopped, done = list[BaseException](), threading.Event(), threading.Event()

    def until_stopped() -> Iterator[str]:
        for text in texts:
            if stopped.is_set():
                raise InterruptedError
            yield text

    def run() -> None:
        try:
            work(until_stopped())
        except BaseException as error:
            outcome.append(error)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True).start()
    try:
        while not done.wait(0.2):  # not join: interrupted, it may take a thread that goes on for one that has ended
            pass
    except BaseException:
        stopped.set()
        done.wait(2)  # reading ends at once; what counts and merges is left to the end of the process
        raise
    if outcome:
        raise outcome[0]
