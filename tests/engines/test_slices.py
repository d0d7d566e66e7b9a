"""Slices of an input are all of it, each record once, with its place; blocks are taken over by another engine."""

import gzip
import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bilect.config import SourceConfig
from bilect.data.blocks import Block, Tokenise
from bilect.data.documents import Document, read_input
from bilect.data.formats import _json, parquet, slices
from bilect.data.formats import text as text_format
from bilect.data.formats.contract import Slice
from bilect.data.sources import inputs
from bilect.data.token_files import TokenFiles
from bilect.data.tokens import TokenStore
from bilect.engines import Here
from bilect.errors import BilectError
from bilect.models.loading import train_tokenizer

TEXTS = [f"text {n} " + "word " * (n % 7) for n in range(40)]
LINES = [json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(TEXTS)]
LINES[5], LINES[11] = "\n", "no json\n"  # one line holds nothing, one is wrong


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("BILECT_CACHE", str(tmp_path / "cache"))
    cut_small(monkeypatch)


def cut_small(monkeypatch):
    for module, name, size in ((_json, "SLICE_BYTES", 300), (_json, "_BLOCK", 100), (parquet, "SLICE_BYTES", 300),
                               (text_format, "_FILES", 15)):  # fmt: skip
        monkeypatch.setattr(module, name, size)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, 300)


def only(path):
    (source,) = inputs(SourceConfig(path=str(path)))
    return source


def lines_file(path):
    path.write_bytes(b"\xef\xbb\xbf" + "".join(LINES).rstrip("\n").encode())  # a mark at the start, no end at the end


def parquet_file(path):
    table = pa.table({"id": [f"d{n}" for n in range(40)], "text": TEXTS})
    pq.write_table(table, path, row_group_size=3)


def packed_file(path):
    path.write_bytes(gzip.compress("".join(LINES).encode()))


def array_file(path):
    path.write_text(json.dumps([{"text": text} for text in TEXTS]))


def text_folder(path):
    path.mkdir()
    for n, text in enumerate(TEXTS):
        (path / f"{n:02d}.txt").write_text(text)


FILES = {
    "a.jsonl": (lines_file, True),
    "a.json": (lines_file, True),
    "a.parquet": (parquet_file, True),
    "a.jsonl.gz": (packed_file, False),
    "b.json": (array_file, False),
    "folder": (text_folder, True),
}


@pytest.mark.parametrize("name", FILES)
def test_slices_are_all_of_an_input_each_record_once(tmp_path, name):
    write, several = FILES[name]
    write(tmp_path / name)
    source = only(tmp_path / name)
    parts = list(slices(source))
    assert (len(parts) > 1) == several
    whole = list(read_input(source))
    assert len(whole) == (39 if write in (lines_file, packed_file) else 40)
    found = [item for part in parts for item in read_input(source, part)]
    assert found == whole and [item.record for item in found] == [item.record for item in whole]
    assert all(list(read_input(source, part)) for part in parts)  # none is empty
    if write is lines_file:
        assert [i.record for i in whole if not isinstance(i, Document)] == [12]


def test_a_line_longer_than_a_slice_and_an_empty_file(tmp_path):
    long = json.dumps({"text": "x" * 1000}) + "\n"
    whole = LINES[0] + long + LINES[1] * 19
    (tmp_path / "a.jsonl").write_text(whole)
    parts = list(slices(only(tmp_path / "a.jsonl")))
    assert parts[0].end >= len(LINES[0] + long) and len(parts) > 2 and parts[-1].end == len(whole)
    assert [part.begin for part in parts] == [0, *(part.end for part in parts[:-1])]
    assert [part.first for part in parts] == [1 + whole[: part.begin].count("\n") for part in parts]
    (tmp_path / "b.jsonl").write_bytes(b"")
    assert list(slices(only(tmp_path / "b.jsonl"))) == [Slice(1, 0, 0)]


def tokenised(tokenizer, paths, tmp_path, engine, name="scratch", skip=True):
    files = TokenFiles(tokenizer, context=16, chunk=True, skip=skip, engine=engine, scratch=tmp_path / name)
    return list(files.all([only(path) for path in paths]))


def test_engines_write_the_same_files(tmp_path, tokenizer, two):
    for name in ("a.jsonl", "a.parquet", "folder"):
        FILES[name][0](tmp_path / name)
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "again.jsonl")
    paths = [tmp_path / name for name in ("a.jsonl", "a.parquet", "folder", "a.jsonl", "again.jsonl")]
    made, contents = [], []
    for engine in (Here(), two):
        made.append(tokenised(tokenizer, paths, tmp_path, engine))
        contents.append([entry.path.read_bytes() for entry in made[-1]])
        shutil.rmtree(tmp_path / "cache")
        assert list((tmp_path / "scratch").iterdir()) == []
    assert made[0] == made[1] and contents[0] == contents[1]
    assert made[0][0] == made[0][3] != made[0][4]  # another label
    assert [problem.record for problem in made[0][0].skipped] == [12]


def test_another_number_of_workers_goes_on_at_the_first_missing_block(tmp_path, tokenizer, two, monkeypatch):
    lines_file(tmp_path / "a.jsonl")
    (whole,) = tokenised(tokenizer, [tmp_path / "a.jsonl"], tmp_path, None)
    content = whole.path.read_bytes()
    shutil.rmtree(tmp_path / "cache")
    calls, make = [], Tokenise._make

    def stopping(self, block: Block):
        calls.append(block.part)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return make(self, block)

    monkeypatch.setattr(Tokenise, "_make", stopping)
    with pytest.raises(KeyboardInterrupt):
        tokenised(tokenizer, [tmp_path / "a.jsonl"], tmp_path, None)
    (folder,) = (tmp_path / "scratch").iterdir()
    notes = sorted(folder.glob("*.json"))
    assert len(notes) == 3
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    notes[1].write_text(notes[1].read_text().replace('"first": ', '"first": 1'))  # of another slice
    remade = notes[1].with_suffix(".arrow")
    monkeypatch.undo()
    monkeypatch.setenv("BILECT_CACHE", str(tmp_path / "cache"))
    cut_small(monkeypatch)
    monkeypatch.setattr(shutil, "rmtree", lambda folder: None)
    (resumed,) = tokenised(tokenizer, [tmp_path / "a.jsonl"], tmp_path, two)
    assert resumed == whole and resumed.path.read_bytes() == content
    kept = [file for file, time in times.items() if file.stat().st_mtime_ns == time]
    assert len(kept) == 4 and remade not in kept


def test_the_first_wrong_record_in_order_is_the_error_whoever_finds_it(tmp_path, tokenizer, two):
    lines = list(LINES)
    lines[30] = "worse\n"
    (tmp_path / "a.jsonl").write_text("".join(lines))
    with pytest.raises(BilectError, match=r"a\.jsonl, line 12: not valid JSON"):
        tokenised(tokenizer, [tmp_path / "a.jsonl"], tmp_path, two, skip=False)
    assert os.listdir(tmp_path / "cache" / "tokens") == []


def test_a_store_is_sent_as_its_files(tmp_path, tokenizer):
    import pickle

    lines_file(tmp_path / "a.jsonl")
    (made,) = tokenised(tokenizer, [tmp_path / "a.jsonl"], tmp_path, None)
    store = TokenStore([made.path], [2.0], excluded=[3])
    sent = pickle.dumps(store)
    again = pickle.loads(sent)
    assert len(sent) < 1000 and again.texts(range(len(store))) == store.texts(range(len(store)))
    assert again.excluded.tolist() == [3] and (again.weight_R == 2).all()
