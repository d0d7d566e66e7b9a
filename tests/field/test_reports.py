"""Reports of other tools that read training data, tried here: each test names the one it comes from."""

import gzip
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import bilect
from bilect.config import SourceConfig
from bilect.data.documents import Document, check_fields, read_documents, read_input
from bilect.data.sources import find, inputs
from bilect.data.store import TokenStore
from bilect.data.tokens import write_tokens
from bilect.errors import BilectError, explain
from bilect.integrations.exporters._kept import Kept
from bilect.models.loading import load_causal_lm, load_tokenizer, read_config, train_tokenizer
from bilect.runtime.terminal import PlainConsole
from tests.corpus import TINY, write_jsonl

LINES = b'{"text": "a b"}\n{"text": "c d"}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def texts(path: Path, **more: Any) -> list[str]:
    return [d.text for d in read_documents([SourceConfig(path=str(path), **more)])]


def refused(path: Path) -> str:
    with pytest.raises(BilectError) as caught:
        texts(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_byte_order_mark(tmp_path):
    """huggingface/datasets #8241: load_dataset("json") infers a different schema when the file starts with a BOM."""
    for name in ("a.jsonl", "a.json"):
        assert texts(written(tmp_path / name, b"\xef\xbb\xbf" + LINES)) == ["a b", "c d"]
    packed = written(tmp_path / "a.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + LINES))
    assert texts(packed) == ["a b", "c d"]


def test_signs_that_end_a_line_elsewhere(tmp_path):
    """huggingface/tau #354: don't split session JSONL on Unicode line separators (wbolster/jsonlines #53 likewise)."""
    odd = "a\u2028b\u2029c\x85d"
    file = written(tmp_path / "a.jsonl", f'{{"text": "{odd}"}}\r\n{{"text": "e"}}\r\n'.encode())
    assert texts(file) == [odd, "e"]


def test_archives_of_several_parts(tmp_path):
    """indygreg/python-zstandard #59: Files with multiple frames have frames skipped?"""
    first, second = LINES.splitlines(keepends=True)
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstandard.compress)):
        file = written(tmp_path / f"a.jsonl{suffix}", pack(first) + pack(b"") + pack(second))
        assert texts(file) == ["a b", "c d"]


def test_half_of_a_surrogate_pair_is_named(tmp_path):
    """openai/tiktoken #82: Encoding french document ('utf-8' codec can't encode character '\\udbc0')."""
    file = written(tmp_path / "a.jsonl", b'{"text": "a \\udbc0"}\n{"text": "\\ud83d\\ude00"}\n')
    assert refused(file).startswith(f"data: {file}, line 1: not UTF-8: \\udbc0 is half of a surrogate pair")
    (source,) = inputs(SourceConfig(path=str(file)))
    assert [d.text for d in read_input(source) if isinstance(d, Document)] == ["\U0001f600"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_pointer_in_the_place_of_a_file(tmp_path, name):
    """InertExpert2911/Mutual_Fund_Data #1: Parquet file refers to Git LFS pointer."""
    file = written(tmp_path / name, POINTER)
    message = refused(file)
    assert message.startswith(f"data: {file}") and "it is a Git LFS pointer" in message and "git lfs pull" in message


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["a b"]}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("content", "told"),
    [(gzip.compress(LINES), "packed with gzip; let its name end in .gz"),
     (zstandard.compress(LINES), "packed with zstd; let its name end in .zst"),
     (LINES.decode().encode("utf-16"), "it is UTF-16, not UTF-8"), (parquet(), "it is Parquet; ")],
    ids=["gzip", "zstd", "utf-16", "parquet"],
)  # fmt: skip
def test_a_file_is_something_else_than_its_name_says(tmp_path, content, told):
    """huggingface/datasets #6908: Fail to load "stas/c4-en-10k" (a gzip file without .gz: byte 0x8b in position 1)."""
    for name in ("a.jsonl", "a.json", "a.txt"):
        assert told in refused(written(tmp_path / name, content))
    assert texts(written(tmp_path / "golf.txt", b"PAR1 was a short hole")) == ["PAR1 was a short hole"]


def not_utf8(kind: pa.DataType) -> pa.Array:
    """Two good texts and, between them, one in Latin-1, which Parquet does not check."""
    raw = pa.array([b"good", b"caf\xe9", b"good too"], pa.large_binary() if kind == pa.large_string() else pa.binary())
    return pa.Array.from_buffers(kind, 3, raw.buffers())


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary", "struct", "list"])
def test_only_rows_that_are_not_utf8_are_left_out(tmp_path, kind):
    """apache/arrow #29635: [C++] parquet with invalid utf8 does not error."""
    column = not_utf8(pa.large_string() if kind == "large_string" else pa.string())
    name, fields, shown = "text", {}, ["good", "good too"]
    if kind == "dictionary":
        column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int32()), column)
    elif kind == "struct":
        column, name, fields = pa.StructArray.from_arrays([column], ["t"]), "m", {"text": "m.t"}
    elif kind == "list":
        turn = pa.StructArray.from_arrays([pa.array(["assistant"] * 3), column], ["role", "content"])
        column, name = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), turn), "messages"
        shown = [f"Assistant: {text}" for text in shown]
    pq.write_table(pa.table({name: column}), tmp_path / "a.parquet", row_group_size=3)
    (source,) = inputs(SourceConfig(path=str(tmp_path / "a.parquet"), fields=fields))
    check_fields(source)
    first, bad, last = read_input(source)
    assert [first.text, last.text] == shown and last.record == 3
    assert (bad.record, bad.reason) == (2, "not UTF-8")


@pytest.mark.parametrize(
    "dates",
    [pa.array([1 << 60, 1], pa.timestamp("us")), pa.array([-1_000_000, 1], pa.date32()),
     pa.array([1, 2], pa.timestamp("us", "Mars/Olympus"))],
    ids=["timestamp", "date", "zone"],
)  # fmt: skip
def test_dates_that_python_does_not_have(tmp_path, dates):
    """apache/arrow #41266: How to work with dates outside of CPython bounds in pyarrow?"""
    pq.write_table(pa.table({"body": ["a b", "c d"], "crawled": dates}), tmp_path / "a.parquet")
    source = SourceConfig(path=str(tmp_path / "a.parquet"), fields={"text": "body"})
    check_fields(*inputs(source))
    assert [d.text for d in read_documents([source])] == ["a b", "c d"]
    inside = pa.StructArray.from_arrays([pa.array(["a b", "c d"]), dates], ["body", "crawled"])
    pq.write_table(pa.table({"page": inside}), tmp_path / "b.parquet")
    (nested,) = inputs(SourceConfig(path=str(tmp_path / "b.parquet"), fields={"text": "page.body"}))
    assert {d.reason for d in read_input(nested) if not isinstance(d, Document)} == {"cannot be read"}
    named = source.model_copy(update={"fields": {"text": "body", "id": "crawled"}})  # as an id: their number
    ids = [d.doc_id for d in read_documents([named])]
    assert len(set(ids)) == 2 and ids[0] == str(dates.cast("int64" if dates.type != "date32" else "int32")[0])


def test_ids_that_are_bytes(tmp_path):
    """memsql/memsql-python #21: `_bytes_to_utf8` crashes with `BINARY` type columns (UUIDs as BINARY(16))."""
    ids = [bytes(range(240, 256)), b"plain"]
    pq.write_table(pa.table({"text": ["a b", "c d"], "id": pa.array(ids, pa.binary())}), tmp_path / "a.parquet")
    documents = read_documents([SourceConfig(path=str(tmp_path / "a.parquet"))])
    assert [d.doc_id for d in documents] == ["f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", "plain"]


def test_a_conversation_as_one_object_of_lists(tmp_path):
    """huggingface/datasets #7137: dataset_info sequence format unexpected behavior (a list of objects read as one)."""
    turns = [{"role": ["user", "assistant"], "content": ["Who?", "Me."]}]
    pq.write_table(pa.table({"messages": turns}), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "b.jsonl", [{"conversations": {"from": ["human", "gpt"], "value": ["Who?", "Me."]}}])
    assert texts(tmp_path / "a.parquet") == texts(tmp_path / "b.jsonl") == ["User: Who?\n\nAssistant: Me."]
    write_jsonl(tmp_path / "c.jsonl", [{"messages": {"role": ["user"], "content": ["a", "b"]}}])  # no turns
    assert "field 'messages': expected a list of objects with role and content" in refused(tmp_path / "c.jsonl")


def test_two_colons_in_a_name(tmp_path):
    """fsspec/filesystem_spec #1782: Use of '::' in file's name."""
    file = written(tmp_path / "c++" / "std::sort.jsonl", LINES)
    written(tmp_path / "c++" / "zip::std.jsonl.gz", gzip.compress(LINES))
    pq.write_table(pa.table({"text": ["e f"]}), tmp_path / "c++" / "std::map.parquet")
    assert texts(file) == ["a b", "c d"]
    assert texts(tmp_path / "c++") == ["e f", "a b", "c d", "a b", "c d"]
    assert texts(tmp_path / "c++" / "std::*.parquet") == ["e f"]


def test_a_pipe_among_the_files(tmp_path):
    """MemPalace/mempalace #2221: mine hangs forever on a named pipe in the mined directory."""
    written(tmp_path / "a.jsonl", LINES)
    os.mkfifo(tmp_path / "b.jsonl")
    found = find(SourceConfig(path=str(tmp_path)))
    assert [i.name for i in found.inputs] == ["a"]
    assert found.not_read == [(str(tmp_path / "b.jsonl"), "a pipe or a device, no file")]
    assert f"{tmp_path}/b.jsonl is a pipe or a device, no file; " in refused(tmp_path / "b.jsonl")


def test_a_link_that_leads_nowhere(tmp_path):
    """KatherLab/MediSwarm #481: dangling symlinks in the data dir are silently dropped."""
    written(tmp_path / "a.jsonl", LINES)
    (tmp_path / "notes").symlink_to("gone")  # nothing that would be read
    (tmp_path / "self").symlink_to(".")  # and a circle
    assert texts(tmp_path) == ["a b", "c d"]
    (tmp_path / "b.jsonl").symlink_to("/mnt/gone.jsonl")
    assert f"{tmp_path}/b.jsonl is a link to /mnt/gone.jsonl, which is not there" in refused(tmp_path)


def test_a_name_in_another_encoding(tmp_path):
    """GoogleCloudPlatform/gsutil #1625: gsutil doesn't gracefully handle non-UTF8 filenames."""
    folder = os.fsencode(tmp_path)
    with open(folder + b"/caf\xe9.jsonl", "wb") as file:
        file.write(LINES)
    assert refused(tmp_path) == f"data: the name of {tmp_path}/caf\\xe9.jsonl is not UTF-8; rename the file or folder"
    tokenizer = train_tokenizer(["a b c"] * 5, 300)
    with pytest.raises(UnicodeEncodeError) as caught:  # of an output, wherever a library meets it
        tokenizer.save_pretrained(os.fsdecode(folder + b"/\xe9"))
    assert explain(caught.value) == f"a name is not UTF-8 ({tmp_path}/\\xe9/tokenizer.json); rename the file or folder"


def test_a_pointer_in_the_place_of_weights_or_a_tokenizer(tmp_path):
    """huggingface/transformers #27923: SafetensorError: Error while deserializing header: HeaderTooLarge."""
    load_causal_lm(TINY, vocab_size=320).save_pretrained(tmp_path)
    train_tokenizer(["a b c"] * 5, 300).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).eos_token_id is not None
    told = "is a Git LFS pointer that stands for the file; `git lfs pull` fetches the file itself"
    for name, load in (("model.safetensors", load_causal_lm), ("tokenizer.json", load_tokenizer),
                       ("config.json", read_config)):  # fmt: skip
        file = tmp_path / name
        whole = file.read_bytes()
        file.write_bytes(POINTER)
        specs = (str(tmp_path), str(file)) if load is load_tokenizer else (str(tmp_path),)
        for spec in specs:
            with pytest.raises(BilectError) as caught:
                load(spec)
            assert f": cannot load {spec!r}: {name} {told}" in str(caught.value)
        file.write_bytes(whole)


def test_a_tokenizer_that_cuts_pads_and_adds_tokens_by_itself(tmp_path):
    """huggingface/transformers #24179: Loading a tokenizer doesn't transfer over padding/truncation correctly.

    ggml-org/llama.cpp #7107 (tokenization: no double BOS tokens) likewise. Each document starts with one start token.
    """
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer(["one two three four five"] * 5, 300)
    want = [0, *tokenizer("one two three four five").input_ids]
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(2)
    backend.enable_padding(length=40, pad_token="<|endoftext|>")
    end = "<|endoftext|>"
    backend.post_processor = TemplateProcessing(single=f"{end} $A {end}", special_tokens=[(end, 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    document = Document("a", "s", "one two three four five")
    assert write_tokens([document], loaded, tmp_path / "t.arrow", context=64) == 1
    assert TokenStore(tmp_path / "t.arrow").row(0)[0].tolist() == want and len(want) > 5


def test_a_terminal_of_no_columns(monkeypatch, capsys):
    """lerna/lerna #9: Emacs shell reports columns to be 0 (rich prints nothing at all then)."""
    for columns, width in (("0", 80), ("40", 40)):
        monkeypatch.setenv("COLUMNS", columns)
        console = PlainConsole()
        assert console.width == width
        console.print("60 of 293 documents kept")
        assert capsys.readouterr().out == "60 of 293 documents kept\n"


def test_nothing_is_spilt_in_the_working_directory(tmp_path, monkeypatch):
    """duckdb/duckdb #19879: Failed to create directory ".tmp": Read-only file system."""
    rows = {"doc_id": ["a", "b"], "source": ["s", "t"], "n_tokens": [3, 4], "score": [1.0, 0.5], "rank": [1, 2]}
    pq.write_table(pa.table(rows), tmp_path / "kept.parquet")
    kept, seen, select = Kept(tmp_path / "kept.parquet"), [], Kept._select

    def seeing(self: Kept, db: Any, columns: list[str]) -> Any:
        seen.extend(db.execute("SELECT current_setting('temp_directory')").fetchall()[0])
        return select(self, db, columns)

    monkeypatch.setattr(Kept, "_select", seeing)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "it's here"))
    (tmp_path / "it's here").mkdir()
    assert kept.by_source() == [("t", 1, 4), ("s", 1, 3)]
    assert [b["doc_id"].to_pylist() for b in kept.batches(text=False)] == [["a", "b"]]
    assert [Path(folder).parent for folder in seen] == [tmp_path / "it's here"] * 2
    assert not list((tmp_path / "it's here").iterdir())


def test_a_pool_of_such_files_from_one_end_to_the_other(tmp_path):
    """What the reports above have in common: files of many hands in one folder, of which all that is good is chosen."""
    pool, names = tmp_path / "pool", [f"{i:016x}" for i in range(40)]
    pool.mkdir()
    written(pool / "gone.txt", POINTER)
    words = [f"{'sum root prime' if i % 4 == 0 else 'rain wind cloud'} {i}" for i in range(40)]
    web = {"text": words, "id": pa.array([bytes.fromhex(n) + b"\xff" for n in names]),
           "crawled": pa.array([1 << 60] * 40, pa.timestamp("us"))}  # fmt: skip
    pq.write_table(pa.table(web), pool / "std::web.parquet")
    pq.write_table(pa.table({"text": not_utf8(pa.large_string())}), pool / "bad.parquet")
    write_jsonl(tmp_path / "target.jsonl", [{"text": f"sum prime root {i}"} for i in range(9)])
    given = {"data.context": 32, "data.vocab_size": 300, "data.on_bad_record": "skip", "device": "cpu"}
    kept = bilect.choose(pool, tmp_path / "target.jsonl", tmp_path / "out", top_k=12, method="dsir", settings=given)
    assert (kept.documents, kept.pool_documents) == (12, 42)
    table = pq.read_table(kept.records / "std::web.parquet")
    assert table.schema.equals(pa.table(web).schema) and table.num_rows == 10
    assert set(table["text"].to_pylist()) == {w for w in words if w.startswith("sum")}
    assert pq.read_table(kept.records / "bad.parquet")["text"].to_pylist() == ["good", "good too"]
