"""``--quiet`` and ``--json``, the same for every command that has a result."""

import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from bilect.errors import BilectError
from bilect.runtime.terminal import silenced

__all__ = ["Result", "shown"]

Result = Mapping[str, Any]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but errors; results are written all the same.")]
Json = Annotated[bool, typer.Option("--json", help="Result as one JSON object on standard output, nothing else there.")]


def shown(command: Callable[..., Result | tuple[Result, int]]) -> Callable[..., None]:
    """Give a command ``--quiet`` and ``--json``.

    Args:
        command: says to people what it does, and returns its result for programs, also with an exit code.
    """

    @wraps(command)
    def run(*, quiet: bool, as_json: bool, **given: Any) -> None:
        if quiet and as_json:
            raise BilectError("--quiet and --json exclude each other; give one of them")
        with ExitStack() as stack:
            if quiet:
                stack.enter_context(silenced())
            if as_json:
                stack.enter_context(redirect_stdout(sys.stderr))  # people may read what goes on there
            returned = command(**given)
        result, code = returned if isinstance(returned, tuple) else (returned, 0)
        if as_json and os.environ.get("RANK", "0") == "0":  # of several ranks, one speaks
            print(json.dumps(_plain(result), ensure_ascii=False, allow_nan=False))
        if code:
            raise typer.Exit(code)

    own = inspect.signature(command)
    keyword = inspect.Parameter.KEYWORD_ONLY
    more = [inspect.Parameter("quiet", keyword, default=False, annotation=Quiet),
            inspect.Parameter("as_json", keyword, default=False, annotation=Json)]  # fmt: skip
    signature = own.replace(parameters=[*own.parameters.values(), *more], return_annotation=None)
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, "quiet": Quiet, "as_json": Json, "return": None}
    del run.__wrapped__
    return run


def _plain(value: Any) -> Any:
    """What JSON can hold: paths as text, and null where a number is none."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
