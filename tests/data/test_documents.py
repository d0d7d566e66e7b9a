"""What is read: every format the same documents, every bad input one clear line."""

import gzip
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from bilect.config import SourceConfig
from bilect.data.documents import Document, bad_record, hash64, read_documents, read_input
from bilect.data.sources import identity, inputs, set_name
from bilect.data.token_files import TokenFiles
from bilect.data.tokens import TokenStore
from bilect.errors import BilectError
from bilect.models.loading import train_tokenizer

NOISE = b"".join(json.dumps({"text": random.Random(i).randbytes(20).hex()}).encode() + b"\n" for i in range(999))
TEXTS = ["the sun and the rain", "wind over water, wind over stone", "ümlaut — naïve 語", "a b c d e f g h i j"]
RECORDS = [{"id": f"a{i}", "text": t, "source": "s", "url": "u"} for i, t in enumerate(TEXTS)]


def read(path: Path | str, **more: Any) -> list[Document]:
    return list(read_documents((SourceConfig(path=str(path), **more),)))


def as_bytes(suffix: str, records: list[dict[str, Any]]) -> bytes:
    raw = "".join(json.dumps(r) + "\n" for r in records).encode()
    return {
        ".jsonl": raw,
        ".jsonl.gz": gzip.compress(raw),
        ".jsonl.zst": zstandard.ZstdCompressor().compress(raw[:90]) + zstandard.ZstdCompressor().compress(raw[90:]),
    }[suffix]


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_bytes(as_bytes("".join(path.suffixes), records))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_formats_give_the_same_documents(tmp_path, suffix):
    file = tmp_path / f"pool{suffix}"
    write(file, RECORDS)
    found = read(file)
    assert found == [Document(f"a{i}", "s", t) for i, t in enumerate(TEXTS)]
    assert [d.record for d in found] == [1, 2, 3, 4]
    assert read(tmp_path) == read(file) == read(tmp_path / "*") == read(f"file://{file}")
    write(file, [{"n": r["id"], "body": r["text"], "from": "s", "text": "not this", "prompt": "p", "response": "r"}
                 for r in RECORDS])  # fmt: skip
    assert read(file, fields={"id": "n", "text": "body", "source": "from"}) == found
    write(file, [{"q": "2+2=", "a": " 4"}])
    (prompted,) = read(file, fields={"prompt": "q", "response": "a"}, source="sums")
    assert prompted == Document(f"{hash64('2+2= 4'):016x}", "sums", "2+2= 4", "2+2=")


def test_urls_of_other_file_systems(tmp_path):
    remote = fsspec.filesystem("memory")
    for name, part in (("a", RECORDS[:2]), ("b", RECORDS[2:])):
        remote.pipe(f"/corpus/{name}.jsonl.zst", as_bytes(".jsonl.zst", part))
    assert read("memory://corpus/*.jsonl.zst") == read("memory://corpus") == [
        Document(f"a{i}", "s", t) for i, t in enumerate(TEXTS)
    ]  # fmt: skip
    (first, _) = inputs(SourceConfig(path="memory://corpus"))
    before = identity(first)
    assert before == identity(first)
    remote.pipe("/corpus/a.jsonl.zst", as_bytes(".jsonl.zst", RECORDS[:2])[::-1])  # of the same size
    assert identity(first) != before


def test_datasets_local_and_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "web" / "data.parquet", RECORDS)
    expected = [Document(f"a{i}", "s", t) for i, t in enumerate(TEXTS)]

    def load(**more: Any) -> list[Document]:
        return list(read_documents((SourceConfig(**more),)))

    assert load(dataset=str(tmp_path / "web")) == expected
    unlabelled = datasets.Dataset.from_list([{"body": t} for t in TEXTS])
    unlabelled.save_to_disk(str(tmp_path / "one"))
    found = load(dataset=str(tmp_path / "one"), fields={"text": "body"})
    assert found == [Document(f"{hash64(t):016x}", "one", t) for t in TEXTS]
    datasets.DatasetDict({"train": unlabelled, "test": unlabelled.select([3])}).save_to_disk(str(tmp_path / "two"))
    assert load(dataset=str(tmp_path / "two"), split="test", fields={"text": "body"}) == [
        Document(f"{hash64(TEXTS[3]):016x}", "two", TEXTS[3])
    ]
    with pytest.raises(BilectError, match="has no split 'dev'; it has 'train', 'test'"):
        load(dataset=str(tmp_path / "two"), split="dev")
    with pytest.raises(BilectError, match=r"dataset .*one, record 1: no field 'text'.* but 'body'"):
        load(dataset=str(tmp_path / "one"))
    with pytest.raises(BilectError, match="cannot load dataset") as caught:
        load(dataset=str(tmp_path / "web"), split="nosuch")
    assert "\n" not in str(caught.value)
    (web,) = inputs(SourceConfig(dataset=str(tmp_path / "web")))
    before = identity(web)
    write(tmp_path / "web" / "data.parquet", RECORDS[:2])
    assert identity(web) != before
    with pytest.raises(BilectError, match="no directory /nowhere"):
        identity(inputs(SourceConfig(dataset="/nowhere"))[0])


def test_datasets_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BilectError) as caught:
        list(read_documents((SourceConfig(dataset=str(tmp_path)),)))
    assert str(caught.value) == f"data: dataset {tmp_path} needs the datasets library: pip install 'bilect[hub]'"


def test_plain_text_is_labelled_with_its_folder_and_named_by_its_path(tmp_path):
    folder = tmp_path / "notes"
    for name in ("b.txt", "a.txt", "old/a.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    expected = [Document(n, "notes", f"text of {n}") for n in ("a.txt", "b.txt", "old/a.txt")]
    assert read(folder) == read(f"{folder}/") == read(folder / "**" / "*.txt") == expected
    assert len(inputs(SourceConfig(path=str(folder)))) == 1  # one token file for all of them
    assert read(folder / "b.txt") == [Document("b.txt", "b", "text of b.txt")]
    assert read(folder / "b.txt", source="mine")[0].source == "mine"
    before = identity(inputs(SourceConfig(path=str(folder)))[0])
    (folder / "old" / "a.txt").rename(folder / "old" / "c.txt")
    assert identity(inputs(SourceConfig(path=str(folder)))[0]) != before
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbftext")
    assert read(folder / "b.txt")[0].text == "text"  # without the byte order mark


def test_folders_keep_the_order_of_their_paths(tmp_path):
    for name in ("a.txt", "c.txt", "d.txt"):
        (tmp_path / name).write_text(name)
    write(tmp_path / "b.jsonl", [{"id": "b", "text": "b"}])
    assert [d.doc_id for d in read(tmp_path)] == ["a.txt", "b", "c.txt", "d.txt"]
    assert [d.source for d in read(tmp_path)] == [tmp_path.name, "b", tmp_path.name, tmp_path.name]


def test_ids_are_stable_and_blank_lines_hold_nothing(tmp_path):
    (tmp_path / "c.jsonl").write_text(
        '{"prompt": "2+2=", "response": " 4"}\n\n{"text": "x", "id": ""}\n{"text":"y","id":7}'
    )
    first, second, third = read(tmp_path / "c.jsonl")
    assert (first.text, first.prompt, first.source) == ("2+2= 4", "2+2=", "c")
    assert first.doc_id == f"{hash64('2+2= 4'):016x}" and second.doc_id == f"{hash64('x'):016x}"
    assert third.doc_id == "7" and third.record == 4


BAD_RECORDS = {
    "json": (b'{"text": ', "not valid JSON", ["not valid JSON"]),
    "deep": (b"[" * 100_000, "not valid JSON", ["not valid JSON"]),
    "list": (b"[1]", "not an object", ["expected an object"]),
    "encoding": (b'{"text": "\xff"}', "not UTF-8", ["not UTF-8"]),
    "surrogate": (b'{"text": "\\ud800"}', "not UTF-8", ["not UTF-8"]),
    "missing": (b'{"body": "x", "n": 1}', "no text field", ["no field 'text'", "'body', 'n'", "fields: {text: body}"]),
    "null": (b'{"text": null}', "no text field", ["field 'text' is null"]),
    "half": (b'{"prompt": "x"}', "no text field", ["nor 'prompt' with 'response'", "but 'prompt'"]),
    "number": (b'{"text": 3}', "text is not a string", ["field 'text' is a number, not a string"]),
    "object": (b'{"prompt": "x", "response": {}}', "text is not a string", ["field 'response' is an object"]),
    "blank": (b'{"text": " \\n"}', "empty document", ["empty document"]),
    "no-answer": (b'{"prompt": "x", "response": ""}', "empty document", ["empty document (its response)"]),
    "tokens": (b'{"text": "<|endoftext|>"}', "no tokens", ["the document has no tokens"]),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 5, 300)


def token_files(tokenizer, skip: bool) -> TokenFiles:
    return TokenFiles(tokenizer, context=64, chunk=False, skip=skip)


def check(tmp_path: Path, tokenizer, file: Path, place: str, reason: str, parts: list[str], rows: int) -> None:
    """One bad record: an error that names it under fail, listed and left out under skip."""
    (source,) = inputs(SourceConfig(path=str(file)))
    with pytest.raises(BilectError) as caught:
        token_files(tokenizer, False).get(source)
    message = str(caught.value)
    assert message.startswith(f"data: {place}: ") and message.endswith(
        " (data.on_bad_record=skip leaves such records out)"
    )
    assert all(part in message for part in parts) and "\n" not in message
    made = token_files(tokenizer, True).get(source)
    assert made.rows == rows and [p.reason for p in made.skipped] == [reason]
    with pytest.raises(BilectError) as again:  # from the cache, the same
        token_files(tokenizer, False).get(source)
    assert str(again.value) == message == str(bad_record(source, made.skipped[0]))


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_lines(tmp_path, tokenizer, name):
    line, reason, parts = BAD_RECORDS[name]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good too"}\n')
    check(tmp_path, tokenizer, file, f"{file}, line 3", reason, parts, rows=2)


def test_bad_rows_of_parquet(tmp_path, tokenizer):
    text = pa.array([b"good", b"\xff", b"good too"]).view(pa.binary())
    column = pa.StringArray.from_buffers(3, text.buffers()[1], text.buffers()[2])
    pq.write_table(pa.table({"text": column, "id": ["a", "b", "c"]}), tmp_path / "a.parquet")
    file = tmp_path / "a.parquet"
    check(tmp_path, tokenizer, file, f"{file}, row 2", "not UTF-8", ["not UTF-8"], rows=2)
    pq.write_table(pa.table({"text": pa.array(["good", None, "good too"]), "m": [1, 2, 3]}), file)
    check(tmp_path, tokenizer, file, f"{file}, row 2", "no text field", ["field 'text' is null"], rows=2)
    pq.write_table(pa.table({"text": pa.array([b"good", b"good too"])}), file)  # bytes that are UTF-8
    assert [d.text for d in read(file)] == ["good", "good too"]
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), file)
    with pytest.raises(BilectError, match=r"row 1: no field 'text'.* but 'body', 'n'; rename with fields"):
        read(file)


def test_bad_text_files(tmp_path, tokenizer):
    folder = tmp_path / "notes"
    folder.mkdir()
    for name, content in (("a.txt", b"good"), ("b.txt", b"good\xff"), ("c.txt", b"good too")):
        (folder / name).write_bytes(content)
    check(tmp_path, tokenizer, folder, str(folder / "b.txt"), "not UTF-8", ["not UTF-8 (byte 4)"], rows=2)
    (folder / "b.txt").write_bytes(b" ")
    check(tmp_path, tokenizer, folder, str(folder / "b.txt"), "empty document", ["empty document"], rows=2)


def cut_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [str(random.Random(i).random()) for i in range(9999)]}), sink)
    whole = sink.getvalue().to_pybytes()
    return whole[:1000] + bytes(2000) + whole[3000:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(NOISE)[:5000], "cannot read .*: the archive is cut off"),
        ("b.jsonl.zst", b"no zstandard", "cannot read"),
        ("a.jsonl.gz", gzip.compress(NOISE)[:5000], "cannot read .*: Compressed file ended before"),
        ("b.jsonl.gz", NOISE, "cannot read .*: Not a gzipped file"),
        ("a.parquet", b"PAR1 not really", "cannot read"),
        ("b.parquet", cut_parquet(), "cannot read"),
    ],
)
def test_damaged_bytes_are_one_line_or_a_record_that_is_left_out(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    (source,) = inputs(SourceConfig(path=str(tmp_path / name)))
    with pytest.raises(BilectError, match=message) as caught:
        token_files(tokenizer, False).get(source)
    assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)
    *_, problem = token_files(tokenizer, True).get(source).skipped
    assert problem.reason == "cannot be read" and re.search(message, problem.detail)


def test_a_damaged_row_group_costs_no_other(tmp_path, tokenizer):
    table, file = pa.table({"text": [f"text {random.Random(i).random()}" for i in range(40)]}), tmp_path / "a.parquet"
    pq.write_table(table, file, row_group_size=10, compression="zstd", use_dictionary=False)
    column = pq.read_metadata(file).row_group(2).column(0)
    content = bytearray(file.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 20] = bytes(20)
    file.write_bytes(content)
    (source,) = inputs(SourceConfig(path=str(file)))
    with pytest.raises(BilectError, match=r"a\.parquet, row 21: cannot read rows 21 to 30: .*on_bad_record=skip"):
        token_files(tokenizer, False).get(source)
    made = token_files(tokenizer, True).get(source)
    assert [(p.record, p.reason) for p in made.skipped] == [(21, "cannot be read")]
    assert TokenStore(made.path).column_R("record").tolist() == [*range(1, 21), *range(31, 41)]


def test_another_kind_of_file_is_one_line(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"x")
    with pytest.raises(BilectError, match=r"a\.csv is none of \.json, \.jsonl"):
        inputs(SourceConfig(path=str(tmp_path / "a.csv")))


def test_missing_paths_and_permissions(tmp_path, monkeypatch):
    with pytest.raises(BilectError, match="no file or directory"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BilectError, match=r"no \.json, .* files in"):
        read(tmp_path / "empty")
    with pytest.raises(BilectError, match=r"files in .*\*\.jsonl"):
        read(tmp_path / "*.jsonl")
    with pytest.raises(BilectError, match="cannot open nosuch://x: Protocol not known"):
        read("nosuch://x")
    write(tmp_path / "a.jsonl", RECORDS)
    (source,) = inputs(SourceConfig(path=str(tmp_path / "a.jsonl")))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("bilect.data.sources.file_hash", refuse)
    with pytest.raises(BilectError, match=r"cannot read .*a\.jsonl: Permission denied$"):
        identity(source)
    monkeypatch.setattr("bilect.data.packing.open_file", refuse)
    with pytest.raises(BilectError, match=r"cannot read .*a\.jsonl: Permission denied$"):
        list(read_input(source))


def test_names_of_target_sets():
    names = {"data/math.v2.jsonl": "math", "data/web/": "web", "data/*.jsonl": "data", "s3://b/x/**/*.txt": "x"}
    assert {p: set_name(SourceConfig(path=p)) for p in names} == names
    assert set_name(SourceConfig(path="x.jsonl", source="math/algebra")) == "math_algebra"
    assert set_name(SourceConfig(dataset="owner/name")) == "name"
