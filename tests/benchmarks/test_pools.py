"""Damaged documents have the words of whole ones, and are other texts."""

import random
from collections import Counter

from benchmarks.pools import decoys, exchanged, joined, pairs_kept, shuffled

RECORDS = [
    {"id": str(i), "source": "math_texts", "text": f"Let x be {i}. Then y is {i + 1}. So z follows. Hence {i} holds."}
    for i in range(12)
]


def test_half_of_the_documents_are_damaged_each_way_alike() -> None:
    found = decoys(RECORDS, random.Random(0))
    assert [r["id"] for r in found] == [r["id"] for r in RECORDS]
    assert Counter(r["source"] for r in found) == {
        "math_texts": 6, "math_texts/shuffled": 2, "math_texts/exchanged": 2, "math_texts/joined": 2,
    }  # fmt: skip
    for new, old in zip(found, RECORDS, strict=True):
        assert (new["text"] == old["text"]) == (new["source"] == "math_texts")


def test_each_damage_does_what_it_says() -> None:
    text = RECORDS[3]["text"]
    mixed = shuffled(text, random.Random(1))
    assert mixed != text and Counter(mixed.split()) == Counter(text.split())
    assert exchanged("Let x be 3. Then y is 4.", "a 7 b") == "Let a be 7. Then b is a."
    assert exchanged("Let x be 3.", "no symbols") == "Let x be 3."
    assert joined("One. Two. Three.", "Four. Five. Six. Seven.") == "One. Two. Six. Seven."
    assert pairs_kept("a b c d", "c d a b") == 2 / 3
