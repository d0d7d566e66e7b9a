"""What a document is, and what is said of a record that is none."""

import hashlib
from dataclasses import dataclass, field

__all__ = ["DAMAGED", "Document", "Problem", "hash64"]

DAMAGED = "cannot be read"  # reason of a problem


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        doc_id: stable name.
        source: label.
        text: the whole text; prompt and response together where there are both.
        prompt: its given part, empty for plain text and for conversations.
        record: its place within the input, from 1.
        messages: role and content of the turns of a conversation; ``text`` is a rendering of them.
        learned: of a conversation: the spans of characters that are learned; empty: all that follows the prompt.
    """

    doc_id: str
    source: str
    text: str
    prompt: str = ""
    record: int = field(default=0, compare=False)
    messages: tuple[tuple[str, str], ...] = ()
    learned: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Problem:
    """A record that cannot be used.

    Attributes:
        record: its place within the input, from 1.
        reason: the kind, for counting.
        detail: what exactly.
    """

    record: int
    reason: str
    detail: str


def hash64(text: str) -> int:
    """Hash of a text or an id; ``f"{hash64(text):016x}"`` is the id of a document that has none."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
