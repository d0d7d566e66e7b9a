"""From a record to a document: which of its fields are the text, and what is learned of it.

Recognised without being told, in this order: ``prompt`` with ``response``; ``text``; a conversation (``messages`` of
``role`` and ``content``, or ``conversations`` of ``from`` and ``value``); ``prompt`` with ``completion``; and
``instruction`` with ``output``, or with ``response``, and what ``input`` or ``context`` adds to it. Names in the config
replace these. A name may be a path, ``meta.title``, into objects and lists.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bilect.data.chat import Messages, NotChat, Spans, messages_of, plain
from bilect.data.document import Document, Problem, hash64

__all__ = ["Fields", "value_at", "with_value_at"]

_CHATS = ("messages", "conversations", "conversation")
_PAIRS = ((("prompt",), "completion"),)
_INSTRUCTIONS = (("instruction", "input", "output"), ("instruction", "context", "response"))


class Fields:
    """The names of the fields of one input.

    Args:
        named: ``fields`` of the config: a name or path each; several, for ``text``, ``prompt`` and ``response``.
    """

    def __init__(self, named: Mapping[Any, str | Sequence[str]]) -> None:
        self.named = {kind: (names,) if isinstance(names, str) else tuple(names) for kind, names in named.items()}
        told = {"text", "prompt", "response", "messages"} & set(self.named)
        paired = {"prompt", "response"} & told
        self._told = bool(told)
        self.pair = (
            (self.named.get("prompt", ("prompt",)), self.named.get("response", ("response",)))
            if paired or not told
            else None
        )
        self.text = self.named.get("text", ("text",)) if paired or not told or "text" in told else None
        self.chats = self.named.get("messages", () if told else _CHATS)
        self.ids = self.named.get("id", ("doc_id", "id"))
        (self.source,) = self.named.get("source", ("source",))

    def columns(self, present: Sequence[str]) -> list[str] | None:
        """The columns to read; all where none holds a text, so that the message can name them."""
        content = [*(self.pair[0] + self.pair[1] if self.pair else ()), *(self.text or ()), *self.chats]
        if not self._told:
            content += ["completion", "instruction", "input", "output", "context", "system"]
        top = [n if n in present else n.split(".")[0] for n in content]
        if not any(n in present for n in top):
            return None
        top += [n if n in present else n.split(".")[0] for n in (*self.ids, self.source)]
        return [n for n in dict.fromkeys(top) if n in present]

    def absent(self, records: Iterator[Mapping[str, Any]]) -> list[str]:
        """The named fields that no record has; reads only as far as it must. Nothing is missing where nothing is."""
        missing = {name for names in self.named.values() for name in names}
        some = False
        for record in records:
            some = True
            missing = {name for name in missing if value_at(record, name) is None}
            if not missing:
                break
        return sorted(missing) if some else []

    def misfit(self, record: Mapping[str, Any]) -> str | None:
        """What is wrong with the id or the label of a record: both must be names, not objects."""
        for kind, names in (("id", self.ids), ("source", (self.source,))):
            for name in names:
                if isinstance(value := value_at(record, name), dict | list):
                    inside = f"{name}.{next(iter(value))}" if isinstance(value, dict) and value else "NAME"
                    what = "an object" if isinstance(value, dict) else "a list"
                    return f"field {name!r} is {what}, no name; say which with fields: {{{kind}: {inside}}}"
        return None

    def document(self, record: Mapping[str, Any], number: int, label: str) -> Document | Problem:
        """The document that a record is."""
        if wrong := self.misfit(record):
            return Problem(number, "id or source is not a name", wrong)
        try:
            content = self._content(record)
            if isinstance(content, _Unusable):
                return Problem(number, content.reason, content.detail)
            prompt, messages, learned = "", Messages(), Spans()
            if isinstance(content, Messages):
                messages = content
                text, learned = plain(messages)
                last = "".join(text[a:b] for a, b in learned)
            else:
                prompt, last = content
                text = prompt + last
            if not last.strip():
                answer = " (its response)" if prompt or messages else ""
                return Problem(number, "empty document", f"empty document{answer}")
            given = next((v for n in self.ids if (v := value_at(record, n)) not in (None, "")), None)
            source = _name(value_at(record, self.source) or label)
            doc_id = f"{hash64(text):016x}" if given is None else _name(given)
            (doc_id + source).encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
            half = f"\\u{ord(error.object[error.start]):04x}"
            return Problem(number, "not UTF-8", f"not UTF-8: {half} is half of a surrogate pair and no character")
        except UnicodeDecodeError:  # bytes of another encoding
            return Problem(number, "not UTF-8", "not UTF-8")
        return Document(doc_id, source, text, prompt, number, messages, learned)

    def _content(self, record: Mapping[str, Any]) -> "tuple[str, str] | Messages | _Unusable":
        """A prompt, which may be empty, and what follows it; or a conversation."""
        if self.pair and all(any(value_at(record, n) is not None for n in part) for part in self.pair):
            return _pair(record, *self.pair)
        if self.text and any(value_at(record, n) is not None for n in self.text):
            text = _joined(record, self.text)
            return text if isinstance(text, _Unusable) else ("", text)
        for name in self.chats:
            if (chat := value_at(record, name)) is not None:
                return _chat(chat, name, record)
        if not self._told:
            for prompts, response in _PAIRS:
                if all(record.get(n) is not None for n in (*prompts, response)):
                    return _pair(record, prompts, (response,))
            for instruction, more, answer in _INSTRUCTIONS:
                if record.get(instruction) is not None and record.get(answer) is not None:
                    return _instruction(record, instruction, more, answer)
        if self.text and self.text[0] in record:
            return _Unusable("no text field", f"field {self.text[0]!r} is null")
        return _Unusable("no text field", self._wanted(record))

    def _wanted(self, record: Mapping[str, Any]) -> str:
        there = ", ".join(map(repr, list(record)[:10])) or "no fields"
        texts = [name for name, value in record.items() if isinstance(value, str)]
        likely = max(texts, key=lambda name: len(record[name]), default="NAME")
        wanted = [" or ".join(map(repr, names)) for names in (self.text, self.chats if self._told else ()) if names]
        if self.pair:
            wanted.append(" with ".join(" and ".join(map(repr, names)) for names in self.pair))
        return f"no field {', nor '.join(wanted)}, but {there}; rename with fields: {{text: {likely}}}"


class _Unusable:
    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail


def value_at(record: Mapping[str, Any], path: str) -> Any:
    """The value under a name or a path; None where there is none."""
    if path in record:
        return record[path]
    value: Any = record
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def with_value_at(record: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a record with another value under a name or a path that it has."""
    first, _, rest = path.partition(".")
    if path in record or not rest:
        return {**record, path: value}
    return {**record, first: with_value_at(record[first], rest, value)}


def _pair(record: Mapping[str, Any], prompts: Sequence[str], responses: Sequence[str]) -> Any:
    if len(prompts) == len(responses) == 1 and isinstance(turns := value_at(record, prompts[0]), list):
        answer = value_at(record, responses[0])  # a conversation up to the answer, and the answer
        more = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        return _chat([*turns, *more], prompts[0], record)
    parts = _joined(record, prompts), _joined(record, responses)
    return next((p for p in parts if isinstance(p, _Unusable)), parts)


def _joined(record: Mapping[str, Any], names: Sequence[str]) -> "str | _Unusable":
    """One field as it is; of several, those that hold anything, each on lines of its own."""
    parts = []
    for name in names:
        part = value_at(record, name)
        part = "" if part is None else part.decode() if isinstance(part, bytes) else part
        if not isinstance(part, str):
            kind = {dict: "an object", list: "a list", bool: "a truth value"}.get(type(part), "a number")
            return _Unusable("text is not a string", f"field {name!r} is {kind}, not a string")
        part.encode()
        parts.append(part)
    return parts[0] if len(parts) == 1 else "".join(f"{p}\n" for p in parts if p.strip())


def _instruction(record: Mapping[str, Any], instruction: str, more: str, answer: str) -> "Messages | _Unusable":
    parts = [_joined(record, (name,)) for name in (instruction, more, answer)]
    for part in parts:
        if isinstance(part, _Unusable):
            return part
    task = "\n\n".join(str(p) for p in parts[:2] if str(p).strip())
    turns = [{"role": "user", "content": task}, {"role": "assistant", "content": parts[2]}]
    return _chat(turns, instruction, record)


def _chat(turns: Any, name: str, record: Mapping[str, Any]) -> "Messages | _Unusable":
    try:
        return messages_of(turns, record.get("system"))
    except NotChat as error:
        return _Unusable("not a conversation", f"field {name!r}: {error}")


def _name(value: Any) -> str:
    """Text as it is; other bytes, such as those of a UUID, in hexadecimal digits."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.hex()
