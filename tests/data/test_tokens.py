"""Documents, token files, batches and packed windows."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bilect.config import SourceConfig
from bilect.data.batch import IGNORE, make_batch
from bilect.data.documents import Document, read_documents
from bilect.data.loading import PackedWindows, cycle_batches, length_bucketed
from bilect.data.tokens import TokenStore, write_tokens
from bilect.errors import BilectError
from bilect.models.loading import train_tokenizer

NOISE = b"".join(json.dumps({"text": random.Random(i).randbytes(20).hex()}).encode() + b"\n" for i in range(999))
TEXTS = ["the sun and the rain", "wind over water, wind over stone", "ümlaut — naïve 語", "a b c d e f g h i j"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 5, 300)


def read(path: Path, **more: str) -> list[Document]:
    return list(read_documents((SourceConfig(path=str(path), **more),)))


def as_bytes(suffix: str, records: list[dict[str, str]]) -> bytes:
    raw = "".join(json.dumps(r) + "\n" for r in records).encode()
    return {".jsonl": raw, ".jsonl.gz": gzip.compress(raw), ".jsonl.zst": zstandard.ZstdCompressor().compress(raw)}[
        suffix
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_formats_give_the_same_documents(tmp_path, suffix):
    records = [{"id": f"a{i}", "text": t, "source": "s"} for i, t in enumerate(TEXTS)]
    file = tmp_path / f"pool{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), file)
    else:
        file.write_bytes(as_bytes(suffix, records))
    assert read(file) == [Document(f"a{i}", "s", t) for i, t in enumerate(TEXTS)]
    assert read(tmp_path) == read(file) == read(tmp_path / "*")


def test_text_files_prompts_and_hashes(tmp_path):
    (tmp_path / "b.txt").write_text("plain text")
    (document,) = read(tmp_path / "b.txt", source="notes")
    assert document == Document("b.txt", "notes", "plain text")
    (tmp_path / "c.jsonl").write_text('{"prompt": "2+2=", "response": " 4"}\n\n{"text": "x"}\n')
    first, second = read(tmp_path / "c.jsonl")
    assert (first.text, first.prompt, first.source) == ("2+2= 4", "2+2=", "c")
    assert len(first.doc_id) == 16 and first.doc_id != second.doc_id
    assert first.doc_id == read(tmp_path / "c.jsonl")[0].doc_id


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1: no text field"),
        ("a.jsonl", b'{"text": "  "}\n', "line 1: empty document"),
        ("a.jsonl", b'{"prompt": "x", "response": ""}\n', "line 1: empty document"),
        ("a.jsonl", b"[1]\n", "line 1: expected an object"),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(NOISE)[:5000], "cannot read"),
        ("a.jsonl.gz", gzip.compress(NOISE)[:5000], "cannot read"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.parquet", b"PAR1 not really", "cannot read"),
        ("a.csv", b"x", "is none of"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BilectError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_paths(tmp_path):
    with pytest.raises(BilectError, match="no file or directory"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BilectError, match="files in"):
        read(tmp_path / "empty")


def store(tmp_path: Path, documents: list[Document], tokenizer, context: int = 64, chunk: bool = False) -> TokenStore:
    write_tokens(documents, tokenizer, tmp_path / "t.arrow", context=context, chunk=chunk)
    return TokenStore(tmp_path / "t.arrow")


def test_rows_start_with_the_start_token_and_decode_to_the_text(tmp_path, tokenizer):
    tokens = store(tmp_path, [Document(f"d{i}", "s", t) for i, t in enumerate(TEXTS)], tokenizer)
    for i, text in enumerate(TEXTS):
        ids, n_given = tokens.row(i)
        assert ids[0] == tokenizer.bos_token_id and n_given == 1
        assert tokenizer.decode(ids[1:]) == text == tokens.texts([i])[0]
        assert tokens.length_R[i] == len(ids)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5), st.integers(34, 70))
def test_chunks_join_to_the_document(tmp_path_factory, tokenizer, texts, context):
    folder = tmp_path_factory.mktemp("t")
    tokens = store(folder, [Document(str(i), "s", t * 20) for i, t in enumerate(texts)], tokenizer, context, chunk=True)
    assert tokens.length_R.max() <= context
    for i, text in enumerate(texts):
        rows = [r for r, d in enumerate(tokens.doc_ids) if d.split("#")[0] == str(i)]
        whole = tokenizer(text * 20, add_special_tokens=False)["input_ids"]
        joined = torch.cat([tokens.row(r)[0][1:] for r in rows]).tolist()
        assert joined == whole[: len(joined)] and len(whole) - len(joined) < min(32, (context - 1) // 4)


def test_truncation_keeps_the_start_and_prompts_lose_theirs(tmp_path, tokenizer):
    long = "one two three four five six seven eight nine ten"
    prompted = Document("p", "s", long + " END", long)
    tokens = store(tmp_path, [Document("d", "s", long), prompted], tokenizer, context=12)
    whole = tokenizer(long, add_special_tokens=False)["input_ids"]
    assert tokens.row(0)[0].tolist() == [tokenizer.bos_token_id, *whole[:11]]
    ids, n_given = tokens.row(1)
    assert len(ids) == 12 and tokenizer.decode(ids[n_given:]) == " END"
    batch = make_batch([(ids, n_given)], 0)
    assert tokenizer.decode(batch.labels_N) == " END"  # only the response is learned


def test_duplicate_ids_are_refused(tmp_path, tokenizer):
    with pytest.raises(BilectError, match="'d' occurs twice"):
        store(tmp_path, [Document("d", "s", "x"), Document("d", "s", "y")], tokenizer)


def test_batch_targets_are_the_next_tokens():
    batch = make_batch([(torch.tensor([9, 1, 2, 3]), 1), (torch.tensor([9, 4, 5]), 2)], pad_id=0, multiple=4)
    assert batch.input_ids_BT.tolist() == [[9, 1, 2, 3], [9, 4, 5, 0]]
    assert batch.target_BT.tolist() == [[1, 2, 3, IGNORE], [IGNORE, 5, IGNORE, IGNORE]]
    assert batch.mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.labels_N.tolist() == [1, 2, 3, 5] and batch.document_N.tolist() == [0, 0, 0, 1]
    weights = batch.token_mean_weight_N(torch.tensor([0.6, 0.4]))
    torch.testing.assert_close(weights, torch.tensor([0.2, 0.2, 0.2, 0.4], dtype=torch.float64))


def test_packed_windows_lay_documents_end_to_end(tmp_path, tokenizer):
    tokens = store(tmp_path, [Document(f"d{i}", "s", t) for i, t in enumerate(TEXTS)], tokenizer)
    rows = np.array([0, 2, 3])
    windows = PackedWindows(tokens, rows, context=7, n_windows=30, seed=1)
    stream = torch.cat([windows[i]["input_ids"] for i in range(30)]).tolist()
    expected = [t for r in windows.order for t in tokens.row(int(r))[0].tolist()][: len(stream)]
    assert stream == expected and len(stream) == 210
    assert sorted(windows.order[:3]) == [0, 2, 3] and sorted(windows.order[3:6]) == [0, 2, 3]
    assert windows.passes == pytest.approx(210 / tokens.length_R[rows].sum())
    again = PackedWindows(tokens, rows, context=7, n_windows=30, seed=1)
    assert (again.order == windows.order).all()


def test_packed_prompts_are_not_learned(tmp_path, tokenizer):
    tokens = store(tmp_path, [Document("p", "s", "the sun END", "the sun")], tokenizer)
    window = PackedWindows(tokens, np.array([0]), context=int(tokens.length_R[0]), n_windows=1, seed=0)[0]
    n_given = tokens.row(0)[1]
    learned = window["labels"] != IGNORE
    assert learned.tolist() == [False] + [False] * (n_given - 1) + [True] * (len(learned) - n_given)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 600))
def test_length_buckets_partition_the_rows_within_the_budget(lengths, budget):
    length_R = np.array(lengths)
    rows = np.arange(len(lengths))[::2]
    parts = list(length_bucketed(length_R, rows, budget))
    assert sorted(np.concatenate(parts)) == rows.tolist()
    assert all(len(p) == 1 or len(p) * length_R[p].max() <= budget for p in parts)


def test_cycled_batches_cover_every_pass(tmp_path, tokenizer):
    tokens = store(tmp_path, [Document(f"d{i}", "s", f"{t} {i}") for i, t in enumerate(TEXTS * 2)], tokenizer)
    batches = cycle_batches(tokens, np.arange(8), 4, 0, seed=3, device=torch.device("cpu"))
    seen = [tuple(row.tolist()) for _ in range(2) for row in next(batches).input_ids_BT[:, :6]]
    other = cycle_batches(tokens, np.arange(8), 4, 0, seed=3, device=torch.device("cpu"))
    assert [tuple(r.tolist()) for _ in range(2) for r in next(other).input_ids_BT[:, :6]] == seen
    lengths = sorted(int(n) for _ in range(2) for n in next(batches).length_B)
    assert lengths == sorted(tokens.length_R.tolist())  # the second pass holds every document once
