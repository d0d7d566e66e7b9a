"""``bilect init --interactive``: five questions, each checked at once, and the settings that the answers are."""

from collections.abc import Callable, Mapping
from typing import Any

import typer

from bilect.config import parse_selection, parse_source
from bilect.config.template import starting_values
from bilect.errors import BilectError
from bilect.runtime.terminal import printable

__all__ = ["ask_settings"]

_SHOWN = 60  # characters of a text


def ask_settings(pool: str, target: str, heldout: str, size: str) -> dict[str, Any]:
    """Settings of a run, asked for on the terminal.

    Args:
        pool: what is taken where the answer is empty; so the others.
        target: target set.
        heldout: held-out set.
        size: "tiny" or "paper".
    """
    _say("Five questions; Enter takes what stands in brackets, Ctrl-C leaves nothing behind.")
    data = {
        "lower_data": _source("1. The pool to choose from: file, folder, glob or URL", pool),
        "upper_data": _source("2. The target: examples that say what good means", target),
    }
    data["heldout_data"] = _source("3. The held-out set, for reporting, with nothing of the target in it", heldout,
                                   other_than=data["upper_data"]["path"])  # fmt: skip
    selection = _ask("4. How much to keep: a share of the tokens, or tokens such as 25M", "0.2", _amount)
    scale, model = _ask("5. Size (tiny: minutes on a CPU; paper: 31M proxy, 410M target), or a trained model",
                       size, _size)  # fmt: skip
    values = starting_values([], [], [], scale, model)
    return {**values, "selection": selection, "data": {**values["data"], **{k: [source] for k, source in data.items()}}}


def _say(text: str) -> None:
    """A line for the reader; what is from data stays what it is."""
    typer.echo(printable(text))


def _ask(question: str, default: str, check: Callable[[str], Any]) -> Any:
    """An answer that passes its check; asked again until then."""

    def checked(answer: str) -> Any:
        try:
            return check(answer.strip())
        except BilectError as error:
            raise typer.BadParameter(printable(str(error))) from error

    return typer.prompt(question, default=default, value_proc=checked)


def _source(question: str, default: str, other_than: str = "") -> dict[str, Any]:
    """A source of the settings, whose first record holds a text."""
    from bilect.data.documents import Problem, bad_record, first_record
    from bilect.data.fields import Fields, value_at
    from bilect.data.sources import find

    def check(path: str) -> tuple[str, Any, Any, Mapping[str, Any], Any]:
        if path == other_than:
            raise BilectError("that is the target; what was chosen for it is reported on other examples")
        found = find(parse_source({"path": path}))
        record, document = first_record(found.inputs[0])
        if isinstance(document, Problem) and document.reason != "no text field":
            raise bad_record(found.inputs[0], document)
        return path, found, found.inputs[0], record, document

    path, found, first, record, document = _ask(question, default, check)
    files = sum(len(part.files) for part in found.inputs)
    _say(f"   {files:,} {'file' if files == 1 else 'files'}; the first record has {', '.join(map(repr, record))}")
    source: dict[str, Any] = {"path": path}
    if isinstance(document, Problem):

        def field(name: str) -> str:
            renamed = Fields({"text": name}).document(record, document.record, first.label)
            if isinstance(renamed, Problem):
                raise BilectError(f"{renamed.detail}; there are {', '.join(map(repr, record))}")
            return name

        longest = max(record, key=lambda name: len(v) if isinstance(v := value_at(record, name), str) else -1)
        source["fields"] = {"text": _ask("   Which field is the text", longest, field)}
        document = Fields(source["fields"]).document(record, document.record, first.label)
    text = " ".join(document.text[: 4 * _SHOWN].split())
    _say(f"   Its text: {text[:_SHOWN]}{'...' if len(text) > _SHOWN else ''}")
    return source


def _amount(answer: str) -> dict[str, Any]:
    from bilect.pipeline.reuse import selection_settings

    try:
        share = float(answer)
    except ValueError:
        share = 2.0
    settings = {"keep_ratio": share} if share <= 1 else selection_settings(budget_tokens=answer)
    parse_selection(settings)
    return settings


def _size(answer: str) -> tuple[Any, str | None]:
    """A size, or the size that goes with a model, and the model."""
    if answer in ("tiny", "paper"):
        return answer, None
    from pathlib import Path

    from bilect.models.loading import read_config

    read_config(answer)
    folder = Path(answer).expanduser()
    return "tiny", str(folder.absolute()) if folder.exists() else answer
