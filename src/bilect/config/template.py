"""A config to start from: every setting with its meaning and default, the ones a user decides filled in."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel

from bilect.config import Config, SourceConfig
from bilect.errors import BilectError, reason

__all__ = ["TRAINED_RATE", "Size", "check_new", "config_template", "starting_values", "write_template"]

Size = Literal["tiny", "paper"]
TRAINED_RATE = 1e-5  # of AdamW, for a model that is trained already

_TITLES = {
    "curve": "Held-out losses while the arms train, for learning curves; nothing is chosen by them.",
    "compare": "For `bilect compare`: the same run with several seeds, and variants of it, see docs/compare.md.",
    "data": "The pool to choose from, the target set that says what good means, and what is reported on.",
    "models": "A preset (tiny-100k to tiny-3m, pythia-14m to pythia-1b), a directory, a Hub name, or an inline config.",
    "warmup": "Round 0: proxy and target train on random documents of the pool.",
    "fit": "The bilevel fit of the score model, for method: bliss.",
    "selection": "What is kept of a scored shard; another choice needs no new scores: bilect select RUN --help",
    "training": "Training of the target in each round.",
    "online": "Choice of tokens inside that training (BLADE), beside the choice of documents; method full: none.",
    "tasks": "Downstream tasks that the final models are evaluated on, see docs/howto/tasks.md.",
}


def starting_values(
    pool: Sequence[str], upper: Sequence[str], heldout: Sequence[str], size: Size, model: str | None = None
) -> dict[str, Any]:
    """The settings a user decides.

    Args:
        pool: files, directories or globs of the pool.
        upper: of the target set.
        heldout: of the held-out set.
        size: "tiny" runs in minutes on a CPU; "paper" is BLISS at 31M proxy and 410M target.
        model: directory or Hub name of a trained model, as proxy and target; it brings its tokenizer, and learns more
            slowly. With size "tiny".
    """
    data: dict[str, Any] = {
        "lower_data": [{"path": p} for p in pool],
        "upper_data": [{"path": p} for p in upper],
        "heldout_data": [{"path": p} for p in heldout],
    }
    if size == "paper":
        return {
            "data": {**data, "context": 1024, "tokenizer": "EleutherAI/pythia-410m"},
            "models": {"proxy": "pythia-31m", "target": "pythia-410m"},
            "method": "bliss",
            "fit": {"sample_fraction": 0.001, "lower_batch_size": 64, "upper_batch_size": 64, "bf16": True},
            "warmup": {"proxy": {"decay_steps": 0, "bf16": True}, "target": {"learning_rate": 3e-4, "bf16": True}},
            "selection": {"keep_ratio": 0.2},
            "training": {"learning_rate": 3e-4, "bf16": True},
            "online": {"method": "full"},
            "rounds": 4,
        }
    training = {"batch_size": 16, "learning_rate": 2e-3 if model is None else 2e-5}
    return {
        "data": {**data, "context": 128, "long_documents": "chunk", **({"vocab_size": 2048} if model is None else {})},
        "models": {"proxy": model or "tiny-100k", "target": model or "tiny-300k"},
        "warmup": {
            "proxy": {**training, "steps": 150, "decay_steps": 0},
            "target": {**training, "steps": 150, "decay_steps": 20},
        },
        "fit": {
            "steps": 80,
            "proxy_learning_rate": 5e-4 if model is None else TRAINED_RATE,
            "score_learning_rate": 1e-3,
        },
        **({} if model is None else {"methods": {"excess": {"learning_rate": TRAINED_RATE}}}),
        "selection": {"keep_ratio": 0.2},
        "training": {**training, "steps": 120, "decay_steps": 20},
        "online": {"method": "full", "sync_every": 40, "reference_steps": 12, "diagnose_every": 10},
        "rounds": 1,
    }


def config_template(values: Mapping[str, Any]) -> str:
    """YAML of ``values``, with all other settings as comments: name, default, meaning.

    Args:
        values: settings to fill in, see ``starting_values``.
    """
    lines = [
        "# Settings of a bilect run:  bilect run THIS_FILE --out runs/NAME   (with --dry-run: what it would cost)",
        "# A line that starts with '# ' and a name shows a default: remove the '# ' to change it.",
        "",
    ]
    return "\n".join(lines + _group(Config, values, 0)) + "\n"


def _group(model: type[BaseModel], values: Mapping[str, Any], depth: int) -> list[str]:
    pad, lines = "  " * depth, list[str]()
    for name, field in model.model_fields.items():
        inner = field.annotation
        meaning = field.description or ""
        if name in ("lower_data", "upper_data", "heldout_data"):
            lines += _wrapped(meaning, pad)
            lines += [f"{pad}{name}:", *(f"{pad}  - {_plain(source)}" for source in values.get(name, ()))]
            if name == "lower_data":
                known = ", ".join(SourceConfig.model_fields)
                text = (f"each source may have: {known}. Text is in text, or prompt and response (then only the "
                        "response is learned); id and source are kept where given.")  # fmt: skip
                lines += _wrapped(text, pad + "  ")
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            if depth == 0:
                lines += ["", *_wrapped(_TITLES.get(name, meaning), pad)]
            settings = _group(inner, values.get(name, {}), depth + 1)
            lines += (
                [f"{pad}{name}:", *settings] if name in values else ["# " + line for line in _shown(name, settings)]
            )
        else:
            if depth == 0 and lines and lines[-1].startswith("  "):
                lines.append("")
            given = name in values
            shown = f"{pad}{'' if given else '# '}{name}: {_plain(values[name] if given else field.default)}"
            lines += [f"{shown:<44}  # {part}" if i == 0 else f"{'':<44}  # {part}"
                      for i, part in enumerate(textwrap.wrap(meaning, 74, break_on_hyphens=False) or [""])]  # fmt: skip
    return lines


def _shown(name: str, settings: Sequence[str]) -> list[str]:
    """A group of which nothing is filled in, to be commented out as a whole."""
    return [f"{name}:", *(f"  {line[4:]}" if line.startswith("  # ") else line[2:] for line in settings)]


def _wrapped(text: str, pad: str) -> list[str]:
    return [f"{pad}# {line}" for line in textwrap.wrap(text, 118 - len(pad), break_on_hyphens=False)]


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
    return text.removesuffix("...").strip()


def _seen_from(folder: Path, values: Mapping[str, Any]) -> Mapping[str, Any]:
    def seen(path: str) -> str:
        if "://" in path or path.startswith(("/", "~")) or folder.resolve() == Path.cwd():
            return path
        return os.path.relpath(path, folder) + "/" * path.endswith("/")

    roles = ("lower_data", "upper_data", "heldout_data")
    data = {role: [{**source, "path": seen(source["path"])} for source in values["data"][role]] for role in roles}
    return {**values, "data": {**values["data"], **data}}


def check_new(path: Path) -> None:
    """See that no file is replaced.

    Raises:
        BilectError: there is one.
    """
    if os.path.lexists(path):
        raise BilectError(f"init: {path} exists; name another file, or remove it")


def write_template(path: Path, values: Mapping[str, Any]) -> None:
    """Write ``config_template`` to a new file; relative paths of data, from here, become relative to it.

    Raises:
        BilectError: the file exists.
    """
    check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(config_template(_seen_from(path.parent, values)))
    except OSError as error:
        raise BilectError(f"init: cannot write {path}: {reason(error)}; name another file") from error
