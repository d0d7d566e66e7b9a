"""What is written to a terminal: as it is, whatever it holds, on any terminal.

Labels, paths, messages and ids come from people's data. Nothing in them is a command: not rich's ``[markup]`` or
``:emoji:``, not control characters, which could clear the screen or set its title. Our own styling is given as styles.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rich.console import Console
from rich.text import Text

__all__ = ["PlainConsole", "any_terminal", "printable", "silenced"]

# C0 and C1 controls but tab and line feed, surrogates (bytes of a path that are no text), and what turns the direction
# of writing round or is not seen at all
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def printable(text: str) -> str:
    r"""The text with its control characters written out, as ``\x1b``."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def any_terminal() -> None:
    """Let standard output write what its encoding cannot (``LANG=C``, Latin-1) as an escape, not as an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


_silent = False


@contextmanager
def silenced() -> Iterator[None]:
    """Within it no console that is made prints, and standard output goes nowhere; standard error is for errors."""
    global _silent
    before, _silent = _silent, True
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        _silent = before


class PlainConsole(Console):
    """A console that prints strings, cells and titles of tables among them, as they are; ``Text`` carries styles."""

    def __init__(self, *, stderr: bool = False, soft_wrap: bool = True) -> None:
        columns = os.environ.get("COLUMNS", "")
        unknown = columns.isdigit() and not int(columns)  # a terminal without a size; nothing is seen in no columns
        super().__init__(stderr=stderr, soft_wrap=soft_wrap, quiet=_silent, highlight=False, markup=False, emoji=False,
                         width=80 if unknown else None)  # fmt: skip

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as rich sees it; every string that is printed passes here."""
        return super().render_str(printable(text), **options)
