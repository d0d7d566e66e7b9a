"""Each format, read back by its own library where that is there, else by a reader written from its description."""

import io
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from bilect.errors import BilectError
from bilect.integrations import exporters
from bilect.integrations.exporters import mds
from bilect.pipeline import exporting
from bilect.pipeline.exporting import export, push_to_hub

DOCUMENTS = [  # doc_id, source, tokens, score, text; in order of rank
    ("w2", "web", [0, 5, 6, 7], 2.5, "five six seven"),
    ("b1", "books | old", [0, 9], 1.25, "Zeile\n„neun“ 九"),
    ("w1", "web", [0, 300, 5], -0.5, ""),
]
OTHERS = [("w2", [0, 8]), ("x", [0, 1])]  # the first repeats an id and is excluded


def write_run(root: Path, form: str = "parquet", text: bool = True) -> Path:
    """A run as an exporter sees it; returns the selection's folder."""
    (root / "tokens" / "pool").mkdir(parents=True)
    rows = [(d, ids) for d, _, ids, _, _ in reversed(DOCUMENTS)] + OTHERS
    table = pa.table(
        {
            "doc_id": [r[0] for r in rows],
            "n_given": pa.array([1] * len(rows), pa.int32()),
            "input_ids": pa.array([r[1] for r in rows], pa.list_(pa.int32())),
        }
    )
    with pa.ipc.new_stream(str(root / "tokens" / "pool" / "0.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    note = {"files": [{"file": "0.arrow", "weight": 1.0}], "excluded": {"duplicate doc_id": [3]}}
    (root / "tokens" / "pool.json").write_text(json.dumps(note))
    (root / "config.yaml").write_text(
        "seed: 7\nrounds: 1\ndata: {lower_data: [/home/me/pool.jsonl], upper_data: [{path: target.jsonl}]}\n"
    )
    folder = root / "source=c4" / "score=0"  # names that a reader may take for columns
    folder.mkdir(parents=True)
    records = [
        {"doc_id": d, "source": s, "n_tokens": len(ids), "score": x, "rank": i + 1, **({"text": t} if text else {})}
        for i, (d, s, ids, x, t) in enumerate(DOCUMENTS)
    ]
    if form == "parquet":
        types = {"n_tokens": pa.int32(), "score": pa.float32()}
        columns = {n: pa.array([r[n] for r in records], types.get(n)) for n in records[0]}
        pq.write_table(pa.table(columns), folder / "kept.parquet")
    else:
        with zstandard.open(folder / "kept.jsonl.zst", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(r) + "\n" for r in records)
    return folder


@pytest.fixture
def selection(tmp_path):
    return write_run(tmp_path / "run")


RECORDS = [
    {"doc_id": d, "source": s, "n_tokens": len(ids), "score": x, "rank": i + 1, "text": t}
    for i, (d, s, ids, x, t) in enumerate(DOCUMENTS)
]


def test_every_module_is_an_exporter():
    assert exporters.names() == ["doc-ids", "hf-datasets", "jsonl-zst", "litdata", "mds", "megatron", "parquet"]
    assert all(callable(exporters.get(name)) and exporters.summary(name) for name in exporters.names())


@pytest.mark.parametrize("form", ["parquet", "jsonl.zst"])
def test_parquet_jsonl_and_doc_ids(tmp_path, form, monkeypatch):
    monkeypatch.setattr("bilect.integrations.exporters._kept.BATCH", 2)
    monkeypatch.setattr("bilect.integrations.exporters.parquet.FILE_ROWS", 2)
    selection = write_run(tmp_path / "run", form)
    assert export(selection, "parquet", tmp_path / "p") == {"documents": 3, "tokens": 9}
    files = sorted(p.name for p in (tmp_path / "p").iterdir())
    assert files[0] == "README.md" and files[1] == "part-00000.parquet"
    assert [r for p in sorted((tmp_path / "p").glob("*.parquet")) for r in pq.read_table(p).to_pylist()] == RECORDS
    export(selection, "jsonl-zst", tmp_path / "j")
    with zstandard.open(tmp_path / "j" / "kept.jsonl.zst", "rb") as file:
        assert [json.loads(line) for line in io.TextIOWrapper(file, "utf-8")] == RECORDS
    export(selection, "doc-ids", tmp_path / "i")
    assert (tmp_path / "i" / "doc_ids.txt").read_text() == "w2\nb1\nw1\n"


def test_of_a_run_the_newest_round_is_written(selection, tmp_path):
    for name in ("round-2", "round-10", "round-1"):
        folder = tmp_path / "run" / name / "selected"
        folder.mkdir(parents=True)
        part = pq.read_table(selection / "kept.parquet").slice(0, 1 if name == "round-10" else 2)
        pq.write_table(part, folder / "kept.parquet")
    assert export(tmp_path / "run", "doc-ids", tmp_path / "out") == {"documents": 1, "tokens": 4}
    assert export(tmp_path / "run" / "round-2" / "selected", "doc-ids", tmp_path / "two")["documents"] == 2


def test_hugging_face_datasets_reads_it(selection, tmp_path):
    datasets = pytest.importorskip("datasets", reason="bilect[hub] is not installed")
    export(selection, "hf-datasets", tmp_path / "out")
    found = datasets.load_from_disk(str(tmp_path / "out"))
    assert list(found) == RECORDS and found.features["score"].dtype == "float32"
    assert (tmp_path / "out" / "README.md").is_file()


def read_megatron(prefix: Path) -> list[list[int]]:
    """From the description of the format: header, version, type, counts, lengths, pointers, documents."""
    index = prefix.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack_from("<QBQQ", index, 9)
    dtype = {4: np.int32, 8: np.uint16}[code]
    lengths = np.frombuffer(index, np.int32, sequences, 34)
    pointers = np.frombuffer(index, np.int64, sequences, 34 + 4 * sequences)
    marks = np.frombuffer(index, np.int64, documents, 34 + 12 * sequences)
    assert version == 1 and marks.tolist() == list(range(sequences + 1))
    data = prefix.with_suffix(".bin").read_bytes()
    return [np.frombuffer(data, dtype, n, p).tolist() for n, p in zip(lengths, pointers, strict=True)]


def test_megatron_reads_it(selection, tmp_path):
    pytest.importorskip("megatron.core", reason="bilect[megatron] is not installed")
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    export(selection, "megatron", tmp_path / "out")
    tokens = [ids for _, _, ids, _, _ in DOCUMENTS]
    assert read_megatron(tmp_path / "out" / "kept") == tokens
    found = indexed.IndexedDataset(str(tmp_path / "out" / "kept"))
    assert [found[i].tolist() for i in range(len(found))] == tokens and found.document_indices.tolist() == [0, 1, 2, 3]


def read_mds(folder: Path) -> list[dict]:
    """From the description of the format."""
    samples = []
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        data = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert len(data) == shard["raw_data"]["bytes"]
        count = struct.unpack_from("<I", data)[0]
        offsets = struct.unpack_from(f"<{count + 1}I", data, 4)
        head = json.loads(data[8 + 4 * count : offsets[0]])
        assert count == shard["samples"] and offsets[-1] == len(data)
        assert head["column_names"] == shard["column_names"]
        for at in offsets[:-1]:
            sizes = list(struct.unpack_from(f"<{shard['column_sizes'].count(None)}I", data, at))
            at, sample = at + 4 * len(sizes), {}
            for name, kind, size in zip(*(shard[f"column_{k}"] for k in ("names", "encodings", "sizes")), strict=True):
                size = size or sizes.pop(0)
                raw = data[at : at + size]
                sample[name] = raw.decode() if kind == "str" else struct.unpack("<f", raw)[0]
                at += size
            samples.append(sample)
    return samples


def test_mds_by_its_description(selection, tmp_path, monkeypatch):
    wanted = [{n: r[n] for n in ("doc_id", "score", "source", "text")} for r in RECORDS]
    export(selection, "mds", tmp_path / "one")
    assert read_mds(tmp_path / "one") == wanted
    monkeypatch.setattr(mds, "SHARD_BYTES", 320)
    export(selection, "mds", tmp_path / "many")
    shards = sorted((tmp_path / "many").glob("*.mds"))
    assert len(shards) > 1 and all(s.stat().st_size <= 320 for s in shards)
    assert read_mds(tmp_path / "many") == wanted


def test_mosaicml_streaming_reads_it(selection, tmp_path):
    streaming = pytest.importorskip("streaming", reason="mosaicml-streaming is not installed")
    export(selection, "mds", tmp_path / "out")
    found = streaming.LocalDataset(str(tmp_path / "out"))
    wanted = [{n: r[n] for n in ("doc_id", "score", "source", "text")} for r in RECORDS]
    assert [dict(found[i]) for i in range(len(found))] == wanted


def test_litdata_reads_it(selection, tmp_path, monkeypatch):
    litdata = pytest.importorskip("litdata", reason="litdata is not installed")
    monkeypatch.setattr("bilect.integrations.exporters.litdata.CHUNK_BYTES", 64)
    export(selection, "litdata", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.bin"))) > 1
    found = litdata.StreamingDataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    wanted = [{n: r[n] for n in ("doc_id", "source", "score", "text")} for r in RECORDS]
    assert [dict(found[i]) for i in range(len(found))] == wanted


def test_a_missing_library_is_named_with_its_extra(selection, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BilectError, match=r"needs bilect\[hub\]; pip install 'bilect\[hub\]'"):
        export(selection, "hf-datasets", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_what_is_there_stays_and_nothing_is_half_written(selection, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export(selection, "doc-ids", out)
    before = {p: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(BilectError, match="is there already"):
        export(selection, "parquet", out)
    assert before == {p: p.read_bytes() for p in out.iterdir()}

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_batch", full)
    with pytest.raises(OSError, match="No space"):
        export(selection, "parquet", tmp_path / "new")
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_bad_input_is_one_line(selection, tmp_path):
    for call, message in (
        ((selection, "megatrom", tmp_path / "o"), "no format 'megatrom'; did you mean 'megatron'"),
        ((tmp_path, "parquet", tmp_path / "o"), "holds no selection"),
        ((write_run(tmp_path / "other", text=False), "mds", tmp_path / "o"), "holds no text"),
    ):
        with pytest.raises(BilectError, match=message) as caught:
            export(*call)
        assert "\n" not in str(caught.value)
    (tmp_path / "run" / "tokens" / "pool.json").unlink()
    with pytest.raises(BilectError, match="no token files beside"):
        list(exporting._kept(selection, None)[0].tokens())
    elsewhere = write_run(tmp_path / "elsewhere").parents[1]
    note = json.loads((elsewhere / "tokens" / "pool.json").read_text())
    (elsewhere / "tokens" / "pool.json").write_text(json.dumps({**note, "excluded": {"held out": [0, 3]}}))
    with pytest.raises(BilectError, match="1 of the kept documents, 'w1' for one, are not in the token files"):
        list(exporting._kept(selection, elsewhere / "tokens")[0].tokens())
    assert not (tmp_path / "o").exists()


def test_the_data_card_has_the_facts(selection, tmp_path):
    export(selection, "doc-ids", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: other # fill in\n---\n\n# out\n")
    assert "| books \\| old | 1 | 2 | 22.2% | fill in |" in card and "| web | 2 | 7 | 77.8% | fill in |" in card
    assert "| seed | 7 |" in card and "| chosen from | pool.jsonl |" in card and "| chosen for | target.jsonl |" in card


def test_the_score_model_goes_to_the_hub_with_its_card(selection, tmp_path, monkeypatch):
    import huggingface_hub

    run, seen = tmp_path / "run", {}
    with pytest.raises(BilectError, match="no score model yet"):
        push_to_hub(run, "me/scores")
    for part, name in (("score_model", "model.safetensors"), ("tokenizer", "tokenizer.json")):
        (run / part).mkdir()
        (run / part / name).write_text(part)

    class Api:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, **options):
            seen["create"] = (repo_id, options)
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            if repo_id == "me/closed":
                raise OSError("no network")
            seen["files"] = {p.name: p.read_text() for p in Path(folder_path).iterdir()}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    push_to_hub(run, "me/scores", token="t")
    assert seen["token"] == "t"
    assert seen["create"] == ("me/scores", {"private": True, "exist_ok": True, "repo_type": "model"})
    assert seen["files"]["model.safetensors"] == "score_model" and seen["files"]["tokenizer.json"] == "tokenizer"
    assert "# Score model of run" in seen["files"]["README.md"] and "| seed | 7 |" in seen["files"]["README.md"]
    with pytest.raises(BilectError, match="the Hub refuses 'me/closed'"):
        push_to_hub(run, "me/closed")
