"""Kept records come back as they were: whole, byte for byte, in files of the same kind, readable as a pool."""

import bz2
import gzip
import io
import json
import lzma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from bilect.config import SourceConfig, parse_config
from bilect.data.documents import read_documents
from bilect.errors import BilectError
from bilect.models.loading import train_tokenizer
from bilect.pipeline.context import RunContext
from bilect.pipeline.texts import pool_inputs, tokenise_files
from bilect.runtime.progress import SilentProgress
from bilect.selection.originals import write_records
from bilect.selection.records import attach_text, kept_ids, kept_rows

OPEN = {"": open, ".gz": gzip.open, ".zst": zstandard.open, ".bz2": bz2.open, ".xz": lzma.open}
TOKENIZER = train_tokenizer(["word document text of long 0123456789"] * 5, 300)
UUIDS = [f"0b8f1c52-7d1e-4b5a-9c3a-0000000000{i:02d}" for i in range(12)]


def tokenised(folder: Path, pool: Path | str, **data) -> RunContext:
    for name in ("upper", "heldout"):
        (folder / f"{name}.jsonl").write_text('{"text": "some other text"}\n')
    sets = {f"{n}_data": [{"path": str(folder / f"{n}.jsonl")}] for n in ("upper", "heldout")}
    settings = {"lower_data": [{"path": str(pool), **data.pop("source", {})}], **sets, "context": 12, "vocab_size": 300}
    config = parse_config({"data": {**settings, **data}})
    run = RunContext(folder / "lr=0.01" / "score=0" / "run", config, SilentProgress())
    run.root.mkdir(parents=True)
    tokenise_files(run, run.root, TOKENIZER)
    return run


def keep(run: RunContext, rows: list[int]) -> Path:
    """A selection of some rows, in the order given."""
    store, folder = run.pool(), run.root / "selected"
    folder.mkdir(exist_ok=True)
    columns = {"doc_id": store.doc_ids(rows), "source": store.sources(rows), "n_tokens": store.length_R[rows]}
    ranked = {"score": np.linspace(1, 0, len(rows), dtype=np.float32), "rank": np.arange(1, len(rows) + 1)}
    pq.write_table(pa.table({**columns, **ranked}), folder / "kept.parquet")
    return folder


def records(run: RunContext, rows: list[int]) -> Path:
    folder = keep(run, rows)
    assert write_records(folder, run.pool(), pool_inputs(run.root / "tokens")) == len(rows)
    return folder / "records"


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


LINES = [
    json.dumps(
        {"n": 10**20 + i, "text": f"document {i} " + "long " * 40, "id": UUIDS[i], "f": 1e-7, "meta": {"é": None}},
        ensure_ascii=bool(i % 2),
        separators=((", ", ": "), (" ,", " :"))[i % 2],
    )
    for i in range(6)
]


@pytest.mark.parametrize("packing", OPEN)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.NDJSON"])
def test_lines_are_copied_byte_for_byte(tmp_path, name, packing):
    with OPEN[packing](tmp_path / (name + packing), "wb") as file:
        file.write(("\n".join([LINES[0], "", *LINES[1:]])).encode())  # a blank line, and none at the end
    out = records(tokenised(tmp_path, tmp_path / (name + packing)), [5, 0, 3])
    assert files(out) == [name + packing]
    with OPEN[packing](out / (name + packing), "rb") as file:
        assert file.read().decode() == "".join(f"{LINES[i]}\n" for i in (0, 3, 5))


def test_elements_of_an_array_stay_one(tmp_path):
    (tmp_path / "a.json").write_text("[" + " ,\n ".join(LINES) + "]")
    out = records(tokenised(tmp_path, tmp_path / "a.json"), [1, 4])
    assert (out / "a.json").read_text() == f"[\n{LINES[1]},\n{LINES[4]}\n]\n"


def test_rows_of_parquet_keep_schema_metadata_and_codec(tmp_path):
    rows = [{**json.loads(line), "n": i, "tags": [{"a": i}], "meta": {"x": None}} for i, line in enumerate(LINES)]
    schema = pa.schema(
        [("text", pa.large_string()), ("n", pa.int8()), ("tags", pa.list_(pa.struct([("a", pa.int16())]))),
         ("id", pa.string()), ("meta", pa.struct([("x", pa.timestamp("us"))]))], metadata={"who": "me"},
    )  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, tmp_path / "a.parquet", compression="gzip", row_group_size=2)
    out = records(tokenised(tmp_path, tmp_path / "a.parquet"), [4, 1, 2])
    found = pq.ParquetFile(out / "a.parquet")
    before = pq.ParquetFile(tmp_path / "a.parquet")
    assert found.read().equals(before.read().take([1, 2, 4]))
    assert found.schema.equals(before.schema) and found.schema_arrow.equals(before.schema_arrow, check_metadata=True)
    assert found.metadata.row_group(0).column(0).compression == "GZIP"


def test_files_of_text_and_a_tree_of_inputs(tmp_path):
    pool = tmp_path / "pool"
    for name in ("x/part.jsonl", "y/part.jsonl", "y/n/b.txt", "y/n/a.txt.gz"):
        (pool / name).parent.mkdir(parents=True, exist_ok=True)
        text = f"{name} " + "word " * 30
        with OPEN[".gz" if name.endswith("gz") else ""](pool / name, "wb") as file:
            file.write((text if ".txt" in name else json.dumps({"id": 1, "text": text, "k": name}) + "\n").encode())
    run = tokenised(tmp_path, pool)
    assert len(set(run.pool().doc_ids(range(4)))) == 4
    out = records(run, [0, 1, 2, 3])
    kept = sorted(d.text for d in read_documents((SourceConfig(path=str(out)),)))
    assert kept == sorted(d.text for d in read_documents((SourceConfig(path=str(pool)),))) and len(kept) == 4
    by_name = {Path(name).name: (out / name).read_bytes() for name in files(out)}
    assert by_name["b.txt"] == (pool / "y/n/b.txt").read_bytes()
    assert by_name["a.txt.gz"] == (pool / "y/n/a.txt.gz").read_bytes()


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_a_kept_piece_is_its_record_with_its_own_text(tmp_path, kind):
    record = {"meta": {"body": "".join(f"word{i} " for i in range(40)), "k": 1}, "id": "d"}
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([record]), file)
    else:
        file.write_text(json.dumps(record) if kind == "jsonl" else record["meta"]["body"])
    source = {} if kind == "txt" else {"source": {"fields": {"text": "meta.body"}}}
    run = tokenised(tmp_path, file, long_documents="chunk", **source)
    texts = run.pool().texts([2, 5])
    out = records(run, [5, 2])
    if kind == "txt":
        assert {name: (out / name).read_text() for name in files(out)} == {"a#2.txt": texts[0], "a#5.txt": texts[1]}
        return
    raw = pq.ParquetFile(out / "a.parquet").read().to_pylist() if kind == "parquet" else [
        json.loads(line) for line in (out / "a.jsonl").read_text().splitlines()
    ]  # fmt: skip
    assert raw == [{"meta": {"body": t, "k": 1}, "id": "d"} for t in texts]


def test_prompts_and_conversations_come_back_as_they_were(tmp_path):
    found = [{"prompt": f"{i}?", "response": "yes " * 30, "x": i} for i in range(3)]
    found.append({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], "x": 3})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    out = records(tokenised(tmp_path, tmp_path / "a.jsonl"), [3, 1])
    assert [json.loads(line) for line in (out / "a.jsonl").read_text().splitlines()] == [found[1], found[3]]


def test_a_saved_dataset_comes_back_as_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([json.loads(LINES[i]) | {"n": i, "meta": "m"} for i in range(6)]).save_to_disk(
        str(tmp_path / "web")
    )
    run = tokenised(tmp_path, "unused", lower_data=[{"dataset": str(tmp_path / "web")}])
    out = records(run, [2, 4])
    assert [r["n"] for r in pq.ParquetFile(out / "web.parquet").read().to_pylist()] == [2, 4]


def test_what_has_changed_or_gone_is_one_line_and_writes_nothing(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(LINES))
    run = tokenised(tmp_path, file)
    folder, inputs = keep(run, [0, 1]), pool_inputs(run.root / "tokens")
    file.write_text("\n".join(LINES[:1]))
    with pytest.raises(BilectError, match=r"1 of 2 kept records are found in .*a\.jsonl"):
        write_records(folder, run.pool(), inputs)
    assert files(folder) == ["kept.parquet"]
    with pytest.raises(BilectError, match=r"a\.jsonl has changed since it was tokenised \(selection\.output=text"):
        pool_inputs(run.root / "tokens")
    file.unlink()
    with pytest.raises(BilectError, match=r"cannot read .*a\.jsonl.*selection\.output=text"):
        pool_inputs(run.root / "tokens")


LOOKALIKES = {
    "uuid": UUIDS[:6],
    "date": [f"2024-01-0{i}" for i in range(1, 7)],
    "time": [f"12:00:0{i}" for i in range(6)],
    "number": [f"00{i}" for i in range(6)],
    "timestamp": [f"2024-01-01T00:00:0{i}Z" for i in range(6)],
    "truth": ["true", "false", "null", "NaN", "1e5", "-0"],
}


@pytest.mark.parametrize("ids", LOOKALIKES.values(), ids=LOOKALIKES.keys())
@pytest.mark.parametrize("form", ["parquet", "jsonl.zst"])
def test_ids_stay_what_they_are_whatever_they_look_like(tmp_path, ids, form):
    """In a folder whose parents look like columns."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": i, "text": f"text of {i}"}) + "\n" for i in ids))
    run = tokenised(tmp_path, tmp_path / "a.jsonl")
    folder = keep(run, [4, 0, 2])
    attach_text(folder, run.pool(), form)
    assert kept_ids(folder) == [ids[4], ids[0], ids[2]]
    assert kept_rows(folder, run.pool()).tolist() == [0, 2, 4]
    if form == "parquet":
        (rows,) = [pq.ParquetFile(folder / "kept.parquet").read().to_pylist()]
    else:
        rows = [json.loads(x) for x in io.TextIOWrapper(zstandard.open(folder / "kept.jsonl.zst", "rb"), "utf-8")]
    assert all(f"text of {ids[i]}".startswith(r["text"]) and r["text"] for i, r in zip((4, 0, 2), rows, strict=True))
    assert [r["score"] for r in rows] == [1.0, 0.5, 0.0] and {r["source"] for r in rows} == {"a"}
    assert write_records(folder, run.pool(), pool_inputs(run.root / "tokens")) == 3


def test_documents_that_are_not_in_the_token_files_are_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(LINES))
    run = tokenised(tmp_path, tmp_path / "a.jsonl")
    folder = keep(run, [0, 1])
    pq.write_table(pq.ParquetFile(folder / "kept.parquet").read().set_column(0, "doc_id", [["x", UUIDS[0]]]),
                   folder / "kept.parquet")  # fmt: skip
    for act in (attach_text, kept_rows):
        with pytest.raises(BilectError, match="1 of the 2 kept documents are found"):
            act(folder, run.pool())
