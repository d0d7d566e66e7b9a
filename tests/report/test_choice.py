"""A choice counted and sampled from its files, exported, set beside another, and shown where nothing was trained."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bilect.errors import BilectError
from bilect.report import write_comparison, write_report
from bilect.report.choice import read_selection
from bilect.report.explore import explorer, fitting
from bilect.report.export import export_plots
from bilect.report.inputs import read_run
from bilect.report.page import json_data
from bilect.report.verdict import of_run, paired_interval
from tests.report import synthetic


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_run(tmp_path_factory.mktemp("choice") / "run", rounds=1)


def scored(run_dir: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted((run_dir / "round-1/scores").glob("*.parquet"))])


def test_the_counts_are_numpys(run_dir: Path) -> None:
    table, found = scored(run_dir), read_selection(run_dir / "round-1/selected")
    score, tokens, source = (table[name].to_numpy() for name in ("score", "n_tokens", "source"))
    kept = score >= 0.5
    assert found is not None and (found.documents, found.kept) == (len(score), kept.sum())
    assert (found.tokens, found.kept_tokens) == (tokens.sum(), tokens[kept].sum())
    assert found.threshold == score[kept].min()
    by_source = {s.name: s for s in found.sources}
    for name in synthetic.SOURCES:
        own = source == name
        expected = (own.sum(), (own & kept).sum(), tokens[own].sum(), tokens[own & kept].sum())
        assert (by_source[name].documents, by_source[name].kept, by_source[name].tokens,
                by_source[name].kept_tokens) == expected  # fmt: skip
    assert sum(k for *_, k, _ in found.histogram) == kept.sum()
    assert sum(d for *_, d in found.histogram) == (~kept).sum() == sum(found.reasons.values())
    assert sum(b.documents for b in found.lengths) == len(score)
    assert found.deciles == pytest.approx(np.quantile(score, np.arange(1, 10) / 10), abs=2e-3)
    assert {*found.reasons} == {"below the cut", "near-duplicate"}


def test_the_sample_has_every_stratum_the_ends_and_the_cut(run_dir: Path) -> None:
    shown = explorer(read_run(run_dir))
    assert shown is not None
    documents = shown["documents"]
    strata = {(d["tenth"], d["source"], bool(d["arms"]), d["reason"]) for d in documents}
    table = scored(run_dir)
    order = np.argsort(-table["score"].to_numpy())
    ids = [table["doc_id"][int(i)].as_py() for i in order]
    cut = int((table["score"].to_numpy() >= 0.5).sum())
    names = {d["id"] for d in documents}
    assert {*ids[:8], *ids[-8:], *ids[cut - 10 : cut + 10]} <= names and 320 <= len(documents) <= 360
    assert {d["tenth"] for d in documents} == {*range(1, 11)} and len(strata) > 60
    assert all(d["text"].endswith(f"document {d['id']}") for d in documents)  # kept or not, from the token files
    assert all((d["reason"] is None) == bool(d["arms"]) == (d["score"] >= 0.5) for d in documents)


def test_text_takes_its_room_however_it_is_escaped() -> None:
    assert fitting("short", 100) == "short"
    for text in ("<&>" * 10_000, "\u20ac" * 10_000, '\\"\n' * 10_000, "\u0000" * 10_000):
        cut = fitting(text, 1000)
        assert len(cut) > 100 and len(str(json_data(cut)).encode()) <= 1000
        assert json.loads(str(json_data(cut))) == cut


def test_a_run_that_only_chose(tmp_path: Path) -> None:
    run_dir = synthetic.write_choice(tmp_path / "run")
    run = read_run(run_dir)
    assert run.only_chose and run.main == "dsir"
    table = scored(run_dir)
    kept, tokens = table["score"].to_numpy() >= 0.5, table["n_tokens"].to_numpy()
    found = of_run(run)
    share = tokens[kept].sum() / tokens.sum()
    assert found.sentence == f"dsir chose {kept.sum():,} of {len(kept):,} documents, {share:.1%} of the tokens."
    html = write_report(run_dir).read_text(encoding="utf-8")
    sections = re.findall(r'<section id="([^"]+)"', html)
    assert sections == ["cost", "kept", "documents", "reproduce"] and "heldout_loss" not in html
    assert "bilect select config.yaml --out" in html


def test_the_files_of_an_export_hold_the_figures_numbers(run_dir: Path, tmp_path: Path) -> None:
    files = export_plots(run_dir, tmp_path / "csv", "csv")
    assert {"curves.csv", "shares.csv", "histogram.csv", "length.csv", "learning.csv"} <= {f.name for f in files}
    rows = list(csv.DictReader((tmp_path / "csv/shares.csv").open(encoding="utf-8")))
    summary = synthetic.summary()["kept_share_by_source"]
    assert {row["source"]: float(row["kept"]) for row in rows} == summary
    for form, start in (("svg", b"<?xml"), ("png", b"\x89PNG")):
        pictures = export_plots(run_dir, tmp_path / form, form)
        assert len(pictures) == 9 and all(picture.read_bytes().startswith(start) for picture in pictures)
    with pytest.raises(BilectError, match="csv, png, svg, not 'pdf'"):
        export_plots(run_dir, tmp_path, "pdf")


def test_runs_beside_each_other(run_dir: Path, tmp_path: Path) -> None:
    other = synthetic.write_run(tmp_path / "other", rounds=1)
    (other / "config.yaml").write_text("name: demo\nseed: 18\nnote: <u>under</u>\n")
    html = write_comparison([run_dir, other], tmp_path / "out/several.html").read_text(encoding="utf-8")
    assert '<th scope="row">seed</th><td>17</td><td>18</td>' in html and 'scope="row">note' not in html
    assert '<data value="1.0">1.00</data>' in html  # the same documents
    with pytest.raises(BilectError, match="two different run directories"):
        write_comparison([run_dir, run_dir], tmp_path / "no.html")


def test_the_paired_interval_is_that_of_the_mean() -> None:
    difference = np.random.default_rng(1).normal(-0.3, 1.0, 4000)
    low, high = paired_interval(difference)
    error = difference.std() / np.sqrt(4000)
    assert (low, high) == pytest.approx((difference.mean() - 1.96 * error, difference.mean() + 1.96 * error), abs=0.005)
    weight = np.where(np.arange(4000) % 2, 3.0, 1.0)
    low, high = paired_interval(np.where(np.arange(4000) % 2, 1.0, 0.0), weight)
    assert low < 0.75 < high and high - low < 0.05  # a token counts, not a document
    assert paired_interval(np.array([0.5, 0.5, -0.1]), None, np.array([0, 0, 1])) == pytest.approx((0.2, 0.2))
