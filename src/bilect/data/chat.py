"""Conversations as text: by the tokenizer's chat template, or in a plain form; the assistant's turns are learned."""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from bilect.data.document import Document, Problem
from bilect.errors import reason

__all__ = ["Messages", "NotChat", "Spans", "in_template", "messages_of", "plain"]


class Messages(tuple[tuple[str, str], ...]):
    """Role and content of each turn."""


class Spans(tuple[tuple[int, int], ...]):
    """Of characters, each from its first to the one after its last."""


_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
          "model": "assistant"}  # fmt: skip


class NotChat(Exception):
    """What should be a conversation is none; the message says why."""


def messages_of(turns: Any, system: Any = None) -> Messages:
    """Role and content of each turn.

    Args:
        turns: objects with ``role`` and ``content``, or ``from`` and ``value``; a content may be a list of texts. Or
            one object of lists, a list of all roles and one of all contents, as a ``Sequence`` of ``datasets`` is.
        system: what the record has beside its turns, put before them.

    Raises:
        NotChat: it is something else, or the assistant says nothing.
    """
    if isinstance(turns, dict) and len({len(v) if isinstance(v, list) else -1 for v in turns.values()}) == 1:
        turns = [dict(zip(turns, turn, strict=True)) for turn in zip(*turns.values(), strict=True)]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise NotChat("expected a list of objects with role and content, or from and value")
    found = []
    for number, turn in enumerate(turns, 1):
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(p["text"] for p in content)
        if not isinstance(role, str):
            raise NotChat(f"turn {number} has no role, but {', '.join(map(repr, list(turn)[:10])) or 'no fields'}")
        if not isinstance(content, str):
            raise NotChat(f"turn {number} ({role}) has no text as its content")
        content.encode()
        found.append((_ROLES.get(role.lower(), role.lower()), content))
    if isinstance(system, str) and system.strip() and found[0][0] != "system":
        found.insert(0, ("system", system))
    if not any(role == "assistant" for role, _ in found):
        raise NotChat("no turn is the assistant's, so that there is nothing to learn")
    return Messages(found)


def plain(messages: Messages) -> tuple[str, Spans]:
    """``Role: content`` with a blank line between turns, and where the assistant's contents lie in it."""
    text, spans = "", list[tuple[int, int]]()
    for role, content in messages:
        text += ("\n\n" if text else "") + f"{role.capitalize()}: "
        if role == "assistant" and content:
            spans.append((len(text), len(text) + len(content)))
        text += content
    return text, Spans(spans)


def in_template(document: Document, tokenizer: PreTrainedTokenizerBase) -> Document | Problem:
    """A conversation in the tokenizer's chat template, where it has one; any other document as it is.

    What is learned of a turn is its content and what the template puts after it: the sign of its end. Where a template
    words earlier turns anew as later ones come, it is the content alone.
    """
    if not document.messages or not tokenizer.chat_template:
        return document
    turns = [{"role": role, "content": content} for role, content in document.messages]
    try:
        text = _apply(tokenizer, turns)
        spans = _spans(tokenizer, turns, text)
    except Exception as error:  # templates raise what they please: a role, or an order of roles, that they do not know
        return Problem(document.record, "refused by the chat template", f"the chat template refuses: {reason(error)}")
    return replace(document, text=text, learned=spans)


def _spans(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], text: str) -> Spans:
    spans, at = [], 0
    for number, turn in enumerate(turns):
        content = turn["content"].strip()
        if turn["role"] == "assistant" and content:
            before = _apply(tokenizer, turns[:number], add_generation_prompt=True) if number else ""
            upto = _apply(tokenizer, turns[: number + 1]).rstrip("\n")
            if before and text.startswith(before) and text.startswith(upto) and upto.startswith(before):
                spans.append((max(text.find(content, len(before), len(upto)), len(before)), len(upto)))
                at = len(upto)
                continue
            begin = text.find(content, at)
            if begin < 0:
                raise ValueError(f"it leaves out or rewords the assistant's turn {number + 1}")
            spans.append((begin, begin + len(content)))
        if (begin := text.find(content, at)) >= 0:
            at = begin + len(content)
    return Spans(spans)


def _apply(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **more: Any) -> str:
    return str(tokenizer.apply_chat_template(turns, tokenize=False, **more))
