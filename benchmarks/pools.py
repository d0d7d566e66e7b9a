"""Pools on which word counts do not tell good documents from bad, from a mixture with ``id``, ``text`` and ``source``.

    prose.jsonl   one kind of text: the sources of general prose alone
    decoys.jsonl  the mathematical sources, half of their documents damaged, with about the same words:
                  shuffled   sentences in random order
                  exchanged  numbers and single letters are those of the next such document, in their order there
                  joined     the second half, by sentences, is that of the next such document

A damaged document has the source ``SOURCE/DAMAGE``, so that a run's report says how many of each are kept. The last
line is one JSON object: documents, and the share of their own word pairs that stay, by damage.

    python benchmarks/pools.py POOL.jsonl.zst --out DIR
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import zstandard

PROSE = ("books_novels", "books_classics", "news_simple", "encyc_wiki", "web_c4", "speech_us")
MATHEMATICS = ("math_stacks", "math_texts", "math_planetmath")
SENTENCE = re.compile(r"(?<=[.!?])\s+")
SYMBOL = re.compile(r"\d+(?:\.\d+)?|\b[A-Za-z]\b")

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    records = list(read(args.pool))
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "prose.jsonl", [r for r in records if r["source"] in PROSE])
    mathematical = [r for r in records if r["source"] in MATHEMATICS]
    damaged = decoys(mathematical, random.Random(args.seed))
    write(args.out / "decoys.jsonl", damaged)
    before = {r["id"]: r["text"] for r in mathematical}
    kept: dict[str, list[float]] = {}
    for record in damaged:
        damage = record["source"].partition("/")[2] or "whole"
        kept.setdefault(damage, []).append(pairs_kept(before[record["id"]], record["text"]))
    for damage, shares in sorted(kept.items()):
        print(f"{damage:10s} {len(shares):6d} documents, {sum(shares) / len(shares):.3f} of their word pairs stay")
    print(json.dumps({k: {"documents": len(v), "pairs": round(sum(v) / len(v), 4)} for k, v in sorted(kept.items())}))


def read(path: Path) -> Iterator[Record]:
    opened = zstandard.open(path, "rt", encoding="utf-8") if path.suffix == ".zst" else path.open(encoding="utf-8")
    with opened as file:
        yield from map(json.loads, file)


def write(path: Path, records: list[Record]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def decoys(records: list[Record], rng: random.Random) -> list[Record]:
    """The records in their order, a random half of them damaged, in equal parts by each of the three ways."""
    ways: list[tuple[str, Callable[[str, str], str]]] = [
        ("shuffled", lambda text, other: shuffled(text, rng)),
        ("exchanged", exchanged),
        ("joined", joined),
    ]
    chosen = rng.sample(range(len(records)), len(records) // 2)
    found = list(records)
    for k, (damage, way) in enumerate(ways):
        own = chosen[k :: len(ways)]
        for i, j in zip(own, [*own[1:], *own[:1]], strict=True):
            text = way(records[i]["text"], records[j]["text"])
            found[i] = {**records[i], "text": text, "source": f"{records[i]['source']}/{damage}"}
    return found


def shuffled(text: str, rng: random.Random) -> str:
    sentences = SENTENCE.split(text)
    rng.shuffle(sentences)
    return " ".join(sentences)


def exchanged(text: str, other: str) -> str:
    symbols = SYMBOL.findall(other)
    if not symbols:
        return text
    places = iter(range(10**9))
    return SYMBOL.sub(lambda _: symbols[next(places) % len(symbols)], text)


def joined(text: str, other: str) -> str:
    first, second = SENTENCE.split(text), SENTENCE.split(other)
    return " ".join([*first[: -(-len(first) // 2)], *second[-(-len(second) // 2) :]])


def pairs_kept(before: str, after: str) -> float:
    """Share of the word pairs of a text that another one has too, with multiplicity."""
    counts = [Counter(pairwise(words)) for words in (before.split(), after.split())]
    return (counts[0] & counts[1]).total() / max(counts[0].total(), 1)


if __name__ == "__main__":
    main()
