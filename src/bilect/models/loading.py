"""Models by path, Hub name, preset or inline config; tokenizers likewise, or trained on the pool."""

import importlib.util
import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from bilect.errors import BilectError, reason
from bilect.models.own_memory import own_memory
from bilect.models.presets import PRESETS, preset_config
from bilect.models.score_model import ScoreModel
from bilect.runtime.files import pointer

__all__ = [
    "END_OF_TEXT",
    "extend_vocabulary",
    "load_causal_lm",
    "load_score_model",
    "load_tokenizer",
    "padded_vocabulary",
    "read_config",
    "read_tokenizer",
    "train_tokenizer",
]

END_OF_TEXT = "<|endoftext|>"


def load_causal_lm(
    spec: str | Mapping[str, Any], *, vocab_size: int | None = None, seed: int = 0, context: int | None = None
) -> PreTrainedModel:
    """A causal LM in float32.

    Args:
        spec: a preset (``pythia-31m``, random weights), a directory, Hub name or GGUF file (pretrained weights; those
            of a GGUF file are dequantised), or a dict ``{"model_type": ..., ...}`` (random weights).
        vocab_size: vocabulary of models that are built here.
        seed: of the random weights.
        context: longest input; the positions of models that are built here are extended to it.

    Raises:
        BilectError: nothing found there, an unknown architecture, or a checkpoint that is broken or lacks weights.
    """
    if isinstance(spec, str) and spec not in PRESETS:
        place, file = _place("model", spec)
        if not file:
            return _from_pretrained(
                AutoModelForCausalLM, "model", spec, place, _WANTED, dtype=torch.float32, trust_remote_code=False
            )
        with redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
            return _unquantised(
                _from_pretrained(
                    AutoModelForCausalLM, "model", spec, place, _WANTED, dtype=torch.float32, trust_remote_code=False,
                    quantization_config=GgufConfig(dequantize=True), **file,
                )
            )  # fmt: skip
    hf_config = _built("model", spec, vocab_size, context)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)


def read_config(
    spec: str | Mapping[str, Any], what: str = "model", *, vocab_size: int | None = None, context: int | None = None
) -> PreTrainedConfig:
    """The config of a model that ``load_causal_lm`` would load; no weights are read.

    Args:
        spec: of the model.
        what: name of the setting, for messages.
        vocab_size: of models that are built here.
        context: of models that are built here.

    Raises:
        BilectError: nothing found there, or an unknown architecture.
    """
    if not isinstance(spec, str) or spec in PRESETS:
        return _built(what, spec, vocab_size, context)
    place, file = _place(what, spec)
    try:
        with _quiet():
            return AutoConfig.from_pretrained(place, trust_remote_code=False, **file)
    except Exception as error:  # a broken file makes transformers raise anything
        raise BilectError(f"{what}: cannot load {spec!r}: {_why(place, error)} ({_WANTED})") from error


def _unquantised(model: PreTrainedModel) -> PreTrainedModel:
    """Without the marks of a quantised model: its weights are plain float32, to be trained and saved like any other."""
    model.hf_quantizer, model.is_quantized = None, False
    for config in (model.config, model.config.get_text_config()):
        for name in ("quantization_config", "_pre_quantization_dtype", "_is_quantized"):
            vars(config).pop(name, None)
    return model


_WANTED = f"a directory, a Hub name, a .gguf file, or a preset: {', '.join(PRESETS)}"


def _built(what: str, spec: str | Mapping[str, Any], vocab_size: int | None, context: int | None) -> PreTrainedConfig:
    """The config of a preset or an inline config."""
    config = preset_config(spec, vocab_size) if isinstance(spec, str) else dict(spec)
    if "model_type" not in config:
        raise BilectError(f"{what}: an inline config needs model_type, for instance {{model_type: llama, ...}}")
    if vocab_size is not None:
        config["vocab_size"] = vocab_size
    if context is not None:
        config["max_position_embeddings"] = max(context, config.get("max_position_embeddings", 0))
    try:
        return AutoConfig.for_model(**config)
    except (ValueError, KeyError) as error:
        raise BilectError(f"{what}: {reason(error)}") from error


def load_score_model(path: Path) -> ScoreModel:
    """A saved score model.

    Raises:
        BilectError: nothing found there, or a checkpoint that is broken or lacks weights.
    """
    place, _ = _place("score model", str(path))
    return _from_pretrained(ScoreModel, "score model", str(path), place, "a directory that a fit has written")


def _from_pretrained(cls: Any, what: str, spec: str, place: str, wanted: str, **settings: Any) -> Any:
    """Load with every weight in its place: transformers would draw missing ones at random."""
    try:
        with _quiet():
            model, report = cls.from_pretrained(
                place,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **settings,
            )
    except Exception as error:  # a broken checkpoint makes transformers raise anything
        raise BilectError(f"{what}: cannot load {spec!r}: {_why(place, error)} ({wanted})") from error
    misfits = sorted(str(key[0]) for key in report["mismatched_keys"])
    missing = sorted(report["missing_keys"])
    for keys, problem in ((misfits, "of another size than config.json says"), (missing, "missing")):
        if keys:
            others = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise BilectError(f"{what}: cannot load {spec!r}: weights {problem}: {keys[0]}{others} ({wanted})")
    return own_memory(model)


def _why(place: str, error: BaseException) -> str:
    """Why a model or a tokenizer cannot be loaded: a file that Git LFS has not fetched, or what its error says."""
    path = Path(place).expanduser()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as content:
                if told := pointer(content.read(64)):
                    return f"{file.name} is {told}"
    return reason(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the report that transformers logs of a checkpoint that does not fit: ours is one line."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _place(what: str, spec: str) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` is given: directory or Hub name, and the GGUF file in it, where ``spec`` is one.

    Raises:
        BilectError: nothing is there: a path that is none must not be taken for a Hub name; or the extra is missing.
    """
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise BilectError(f"{what}: no file {spec}")
        if importlib.util.find_spec("gguf") is None:
            raise BilectError(f"{what}: {spec}: GGUF files need the gguf library: pip install 'bilect[gguf]'")
        return str(path.parent), {"gguf_file": path.name}
    if spec.startswith((".", "/", "~")) and not path.is_dir():
        raise BilectError(f"{what}: no directory {spec}")
    return os.path.expanduser(spec), {}


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a directory, a Hub name, a ``tokenizer.json`` or a GGUF file.

    Raises:
        BilectError: none found there.
    """
    tokenizer = read_tokenizer(spec)
    if tokenizer.eos_token_id is None:
        raise BilectError(f"tokenizer: {spec} has no end-of-text token (eos_token)")
    return tokenizer


def read_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """As ``load_tokenizer``, also without an end-of-text token."""
    try:
        if not spec.endswith(".json"):
            place, file = _place("tokenizer", spec)
            with _quiet():
                return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **file)
        if not Path(spec).is_file():
            raise BilectError(f"tokenizer: no file {spec}")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=spec)
    except BilectError:
        raise
    except Exception as error:  # a broken file makes tokenizers raise a plain Exception
        raise BilectError(f"tokenizer: cannot load {spec!r}: {_why(spec, error)}") from error
    if tokenizer.eos_token is None and END_OF_TEXT in tokenizer.get_vocab():
        tokenizer.eos_token = END_OF_TEXT
    return tokenizer


def extend_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Rows of the embeddings for tokens that were added to a tokenizer, such as padding, where the model has none."""
    if model.get_input_embeddings().weight.shape[0] < len(tokenizer):
        with torch.random.fork_rng(), _quiet():
            torch.manual_seed(seed)
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


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
