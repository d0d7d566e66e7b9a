"""Which files of a folder, a glob or a path are read, in which form, and what is said of the others."""

import bz2
import gzip
import json
import lzma

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bilect.config import SourceConfig
from bilect.data.documents import read_documents
from bilect.data.formats.json_ import texts as json_texts
from bilect.data.packing import blocks
from bilect.data.sources import find, inputs, places, set_name
from bilect.data.tables import parquet_table
from bilect.errors import BilectError

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def texts(path, **more):
    return [d.text for d in read_documents((SourceConfig(path=str(path), **more),))]


def lines(*texts):
    return "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()


def test_every_usual_name_of_a_file_of_records_is_read_in_any_case(tmp_path):
    names = [f"{stem}{packing}" for stem in ("a.jsonl", "b.json", "c.ndjson", "d.txt") for packing in PACK]
    for name in [*names, "E.JSONL", "F.Json.GZ", "c4-train.00000-of-00512.json.gz"]:
        packing = next((p for p in PACK if p and name.lower().endswith(p)), "")
        text = f"text of {name}"
        (tmp_path / name).write_bytes(PACK[packing](text.encode() if ".txt" in name else lines(text)))
    pq.write_table(pa.table({"text": ["text of G.PARQUET"]}), tmp_path / "G.PARQUET")
    expected = {f"text of {p.name}" for p in tmp_path.iterdir()}
    assert set(texts(tmp_path)) == expected and len(expected) == 24
    for name in ("E.JSONL", "F.Json.GZ", "G.PARQUET", "d.txt.xz"):
        assert texts(tmp_path / name) == [f"text of {name}"]


JSON_FILES = {
    "lines": b'{"text": "a"}\n\n{"text": "b"}\n',
    "array": b'[{"text": "a"}, {"text": "b"}]',
    "array over lines": b'\xef\xbb\xbf \n[\n  {"text":\n "a"},\n  {"text": "b"}\n]\n',
    "objects over lines": b'{\n  "text": "a"\n}\n{\n  "text": "b"\n}',
    "no newline": b'{"text": "a"} {"text": "b"}',
}


@pytest.mark.parametrize("content", JSON_FILES.values(), ids=JSON_FILES.keys())
def test_the_content_of_a_json_file_says_how_its_records_lie(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    assert texts(tmp_path / "x.json") == ["a", "b"]


@pytest.mark.parametrize(
    "content", [b'[{"text": "a"}, {"text": ', b'{\n "text": "a"', b'[{"text": "a"}] more', b"[1 2"]
)
def test_a_json_file_that_breaks_off_is_one_line(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(BilectError, match=r"x\.json") as caught:
        texts(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


values = st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3), max_leaves=5)


@settings(max_examples=60)
@given(st.lists(st.dictionaries(st.text(max_size=3), values, max_size=3), max_size=6), st.integers(1, 9), st.booleans())
def test_elements_of_an_array_are_found_whatever_the_blocks(tmp_path_factory, records, block, indent):
    file = tmp_path_factory.mktemp("j") / "x.json"
    file.write_text(json.dumps(records, indent=2 if indent else None, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bilect.data.packing._BLOCK", block)
        assert [json.loads(text) for text in json_texts(blocks(f"file://{file}"))[1]] == records


def test_hidden_and_half_written_things_are_no_data_and_what_is_not_read_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("good"))
    for name in (".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl", "_temporary/0/part.jsonl", "_SUCCESS", ".a.crc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(lines("bad"))
    (tmp_path / "notes.csv").write_text("x,y\n")
    found = find(SourceConfig(path=str(tmp_path)))
    assert texts(tmp_path) == texts(tmp_path / "*") == texts(tmp_path / "**" / "*.jsonl") == ["good"]
    assert sorted((p.removeprefix(f"{tmp_path}/"), why) for p, why in found.not_read) == [
        ("._a.jsonl", "hidden or temporary"),
        (".a.crc", "hidden or temporary"),
        (".ipynb_checkpoints/a-checkpoint.jsonl", "hidden or temporary"),
        ("_SUCCESS", "hidden or temporary"),
        ("_temporary/0/part.jsonl", "hidden or temporary"),
        ("notes.csv", "of another kind"),
    ]
    assert (
        texts(tmp_path / "._a.jsonl")
        == texts(tmp_path / "_temporary" / "0")
        == texts(tmp_path / "_*" / "**")
        == ["bad"]
    )
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "t.csv").write_text("x")
    with pytest.raises(BilectError, match=r"no \.json, .* files in .*only; not read: t\.csv"):
        texts(tmp_path / "only")


def test_a_folder_below_a_hidden_one_is_not_hidden(tmp_path):
    (tmp_path / ".cache" / "_runs" / "pool").mkdir(parents=True)
    (tmp_path / ".cache" / "_runs" / "pool" / "a.jsonl").write_bytes(lines("good"))
    assert texts(tmp_path / ".cache" / "_runs" / "pool") == texts(tmp_path / ".cache/_runs/*/*.jsonl") == ["good"]


def test_folders_that_spark_writes_are_found_by_path_and_by_glob_and_are_one_source(tmp_path):
    for folder in ("web.parquet", "books.parquet"):
        (tmp_path / folder).mkdir()
        for part in (0, 1):
            name = tmp_path / folder / f"part-0000{part}-c0ffee.c000.snappy.parquet"
            pq.write_table(pa.table({"text": [f"{folder} {part}"]}), name)
        (tmp_path / folder / "_SUCCESS").touch()
    (tmp_path / "one.json").mkdir()
    (tmp_path / "one.json" / "part-00000-c0ffee.json").write_bytes(lines("json"))
    assert texts(tmp_path / "web.parquet") == ["web.parquet 0", "web.parquet 1"]
    assert texts(tmp_path / "*.parquet") == [f"{f}.parquet {n}" for f in ("books", "web") for n in (0, 1)]
    assert [i.label for i in inputs(SourceConfig(path=str(tmp_path)))] == ["books", "books", "one", "web", "web"]
    assert [i.label for i in inputs(SourceConfig(path=str(tmp_path / "*.json")))] == ["one"]


def test_folders_of_partitions_are_folders(tmp_path):
    for label in ("source=c4", "lr=0.01"):
        (tmp_path / label).mkdir()
        pq.write_table(pa.table({"text": [label], "source": ["mine"]}), tmp_path / label / "x.parquet")
    found = list(read_documents((SourceConfig(path=str(tmp_path)),)))
    assert [(d.text, d.source) for d in found] == [("lr=0.01", "mine"), ("source=c4", "mine")]


def test_a_path_that_is_there_is_that_path_whatever_signs_it_has(tmp_path):
    (tmp_path / "dir[x]" / "deep").mkdir(parents=True)
    (tmp_path / "a[1].jsonl").write_bytes(lines("brackets"))
    (tmp_path / "a1.jsonl").write_bytes(lines("glob"))
    (tmp_path / "what?.jsonl").write_bytes(lines("question"))
    (tmp_path / "dir[x]" / "b.jsonl").write_bytes(lines("inside"))
    (tmp_path / "dir[x]" / "deep" / "c.jsonl").write_bytes(lines("deeper"))
    assert texts(tmp_path / "a[1].jsonl") == ["brackets"] and texts(tmp_path / "what?.jsonl") == ["question"]
    assert texts(tmp_path / "a[12].jsonl") == ["glob"]  # nothing is called so
    assert texts(tmp_path / "dir[x]") == ["inside", "deeper"] == texts(tmp_path / "dir[x]" / "*")
    assert texts(tmp_path / "dir[x]" / "*.jsonl") == ["inside"]
    assert texts(tmp_path / "dir[x]" / "deep" / "*.jsonl") == ["deeper"]
    assert set_name(SourceConfig(path=str(tmp_path / "a[1].jsonl"))) == "a_1_"
    with pytest.raises(BilectError, match=r"no file or directory .*dir\[x\]/none"):
        texts(tmp_path / "dir[x]" / "none.jsonl")


def test_a_glob_reaches_what_lies_deeper(tmp_path):
    for name in ("sub/a.jsonl", "sub/year/b.jsonl", "sub/year/month/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(lines(name))
    assert texts(tmp_path / "sub" / "*") == ["sub/a.jsonl", "sub/year/b.jsonl", "sub/year/month/c.jsonl"]


def test_places_tell_all_inputs_apart(tmp_path):
    for name in ("x/part.jsonl", "y/part.jsonl", "y/n/1.txt", "y/n/2.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(lines(name))
    found = inputs(SourceConfig(path=str(tmp_path)))
    assert places(found) == ["x/part.jsonl", "y/part.jsonl", "."] or places(found)[1] == "."  # text: its own paths
    assert places(found[:1]) == ["part.jsonl"] and len(set(places([*found, *found]))) == 2 * len(found)


def test_an_archive_with_a_large_window_is_read(tmp_path):
    params = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.ZstdCompressor(compression_params=params).compress(lines("good")))
    assert texts(tmp_path / "x.jsonl.zst") == ["good"]


def test_duckdb_takes_a_column_from_a_path_unless_told_not_to(tmp_path):
    """What the queries of bilect are guarded against."""
    (tmp_path / "source=c4").mkdir()
    file = tmp_path / "source=c4" / "x.parquet"
    pq.write_table(pa.table({"source": ["mine"]}), file)
    with duckdb.connect() as db:
        assert db.sql(f"SELECT source FROM read_parquet('{file}')").fetchall() == [("c4",)]
        assert db.sql(f"SELECT source FROM {parquet_table(file)}").fetchall() == [("mine",)]
