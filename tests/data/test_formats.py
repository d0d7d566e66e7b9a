"""A format is one file: what a module of the package says is all that reading, cutting and writing need."""

import gzip
from textwrap import dedent

import pytest

from bilect.config import SourceConfig
from bilect.data import formats
from bilect.data.documents import read_documents
from bilect.data.sources import find, inputs
from bilect.errors import BilectError
from tests.field.test_records_out import files, records, tokenised

MODULE = '''
"""``.tsv``: a document a line, its name before the tab."""

from bilect.data.formats.contract import ALL, Format
from bilect.data.packing import blocks, create


class Tsv(Format):
    suffixes, unit, packable = (".tsv",), "entry", True

    def records(self, source, columns, part=ALL):
        for line in b"".join(blocks(source.files[0])).decode().splitlines():
            name, text = line.split("\\t")
            yield {"id": name, "text": text}

    def copy(self, source, wanted, out):
        count = 0
        with create(out, source.packing) as file:
            for number, line in enumerate(b"".join(blocks(source.files[0])).splitlines(True), start=1):
                for _ in wanted.at(number):
                    file.write(line)
                    count += 1
        return count


FORMAT = Tsv()
'''


@pytest.fixture
def tsv(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "tsv.py").write_text(dedent(MODULE))
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path / "package")])
    formats._formats.cache_clear()
    yield
    formats._formats.cache_clear()


@pytest.mark.usefixtures("tsv")
def test_another_format_is_one_module(tmp_path):
    lines = [f"n{i}\ttext number {i}\n" for i in range(6)]
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "a.tsv").write_text("".join(lines))
    with gzip.open(tmp_path / "pool" / "b.TSV.gz", "wb") as file:
        file.write("".join(lines).replace("n", "m").encode())
    first, second = inputs(SourceConfig(path=str(tmp_path / "pool")))
    assert (first.format, first.label, first.at(3)) == ("tsv", "a", f"{tmp_path}/pool/a.tsv, entry 3")
    assert (second.format, second.packing) == ("tsv", ".gz")
    assert [d.doc_id for d in read_documents([first.source])] == [f"{n}{i}" for n in "nm" for i in range(6)]
    out = records(tokenised(tmp_path, tmp_path / "pool"), [8, 0, 3])
    assert files(out) == ["a.tsv", "b.TSV.gz"]
    assert (out / "a.tsv").read_text() == lines[0] + lines[3]
    assert gzip.decompress((out / "b.TSV.gz").read_bytes()).decode() == "m2\ttext mumber 2\n"


def test_without_it_the_file_is_of_another_kind(tmp_path):
    (tmp_path / "a.tsv").write_text("n0\ttext\n")
    with pytest.raises(BilectError, match=r"a\.tsv is none of \.json, \.jsonl, \.ndjson, \.txt \(each also "):
        find(SourceConfig(path=str(tmp_path / "a.tsv")))


def test_ends_of_names():
    told = {
        "x.jsonl": "jsonl",
        "X.JSON.GZ": "json_",
        "a/b.ndjson.zst": "jsonl",
        "x.txt.xz": "text",
        "x.parquet": "parquet",
    }
    assert {name: formats.name_of(name) for name in told} == told
    assert [formats.name_of(name) for name in ("x.parquet.gz", "x.csv", "jsonl", "x.gz")] == [None] * 4
    assert [formats.stem(name) for name in ("a.b.json.gz", "x.Parquet", ".txt", "x.csv")] == ["a.b", "x", "", None]
