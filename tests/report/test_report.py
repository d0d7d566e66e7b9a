"""The report: what it shows equals what the files say, whatever is in them or missing from them."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bilect.report import write_report

# By path: installed packages may ship a `tests` of their own.
_spec = importlib.util.spec_from_file_location("report_synthetic", Path(__file__).with_name("synthetic.py"))
assert _spec is not None and _spec.loader is not None
synthetic = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(synthetic)


class Page(HTMLParser):
    """The page as a reader meets it: text, the machine-readable numbers, tags and attributes, section by section."""

    VOID = ("meta", "link", "img", "br", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.section = ""
        self.text: dict[str, str] = {}
        self.data: dict[str, list[float]] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append((tag, named))
        if tag == "section":
            self.section = named["id"] or ""
        if tag == "data":
            self.data.setdefault(self.section, []).append(float(named["value"] or "nan"))

    def handle_endtag(self, tag: str) -> None:
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data


SECTIONS = ("result", "curves", "cost", "kept", "documents", "fit", "reproduce")


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = synthetic.write_run(tmp_path_factory.mktemp("runs") / "demo")
    write_report(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def page(complete: Path) -> Page:
    return Page((complete / "report.html").read_text(encoding="utf-8"))


def build(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def edit_summary(run_dir: Path, **changes: Any) -> None:
    (run_dir / "summary.json").write_text(json.dumps({**synthetic.summary(), **changes}))


def test_returns_the_path_and_leaves_nothing_else(complete: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(complete, tmp_path / "run")
    before = {p.name for p in run_dir.iterdir()}
    assert write_report(run_dir) == run_dir / "report.html"
    assert {p.name for p in run_dir.iterdir()} == before


def test_every_section_is_there_and_complete(page: Page) -> None:
    assert [named["id"] for tag, named in page.tags if tag == "section"] == list(SECTIONS)
    assert "Missing:" not in "".join(page.text.values())
    labels = [named["aria-label"] or "" for tag, named in page.tags if tag == "svg"]
    assert len(labels) == 10  # arms, curves, bought, cost, shares, histogram, length, two rounds of scores, learning
    assert all(len(text) > 30 for text in labels)
    tables = page.html.count("<table>")
    assert tables >= 6 and page.html.count('scope="col"') > 2 * tables


def test_numbers_are_the_summarys(page: Page) -> None:
    summary, run = synthetic.summary(), synthetic.run_json()
    losses = summary["heldout_loss"]
    assert {*losses.values()} <= {*page.data["result"]}
    assert pytest.approx(losses["bliss"] - losses["random"]) == page.data["result"][1]
    assert summary["tokens"]["bliss"] in page.data["result"]
    for sets in summary["heldout"].values():
        for row in sets.values():
            assert {row["loss"], row["perplexity"]} <= {*page.data["result"]}
    assert "5.1011" in page.text["result"] and "24.7%" in page.text["result"] and "1,234,567" in page.text["result"]
    for key in ("kept_share_by_source", "pool_share_by_source", "kept_fraction_by_source"):
        assert {*summary[key].values()} <= {*page.data["kept"]}
    assert "43.1%" in page.text["kept"] and "1,111" in page.text["kept"] and "0.5321" in page.text["kept"]
    for row in summary["fidelity"]:
        assert {row["loss_rank_correlation"], row["change_rank_correlation"]} <= {*page.data["fit"]}
    cost = summary["cost"]["flops"]
    assert pytest.approx((cost["selection"] + cost["bliss"]) / cost["random"]) in page.data["cost"]
    assert pytest.approx(losses["random"] - losses["bliss"]) in page.data["cost"]
    for key in ("seconds", "flops"):
        assert {*summary[key].values()} <= {*page.data["cost"]}
        assert any(value == pytest.approx(sum(summary[key].values())) for value in page.data["cost"])
    assert "2 min 22 s" in page.text["cost"] and "6.78 × 10¹³" in page.text["cost"]
    assert {400_000.0, 7_654_321.0} <= {*page.data["cost"]}
    for value in (run["bilect_version"], run["git_revision"], str(run["seed"]), "2.9.0", "2 cores", "seed: 17"):
        assert value in page.text["reproduce"]
    assert "3,500 documents" in page.text["kept"] and "0.5123" in page.text["kept"]


def test_hostile_text_is_escaped(page: Page) -> None:
    assert synthetic.HOSTILE in page.text["documents"]  # shown as text, character for character ...
    tags = [tag for tag, _ in page.tags]
    assert not {*tags} & {"img", "b", "i", "u", "iframe", "object", "link"}  # ... and never as markup
    assert tags.count("script") == 2 and "<script>alert" not in page.html  # our data and our script
    assert "&lt;script&gt;" in page.html and "\\u003cscript\\u003e" in page.html
    assert "code <b>bold</b>" in page.text["kept"]
    assert "<w0>" in page.text["documents"] and "<u>under</u>" in page.text["reproduce"]
    assert not [name for _, named in page.tags for name in named if name.startswith("on")]


def test_only_our_own_script_and_style_may_run(page: Page) -> None:
    policy = next(named["content"] or "" for tag, named in page.tags if named.get("http-equiv"))
    for tag, rule in (("script", "script-src"), ("style", "style-src-elem")):
        ours = re.findall(rf"<{tag}>(.*?)</{tag}>", page.html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(ours[0].encode()).digest()).decode()
        assert len(ours) == 1 and f"{rule} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';") and "connect-src" not in policy and "unsafe-eval" not in policy


def test_nothing_is_loaded(page: Page) -> None:
    for tag, named in page.tags:
        assert not {"src", "srcset", "data", "background", "poster"} & {*named}, tag
        for name, value in named.items():
            if name.endswith("href"):
                assert (value or "").startswith("#")
            assert "://" not in (value or "") and "url(h" not in (value or "")
    assert "@import" not in page.html and "xmlns" not in page.html and "<metadata" not in page.html
    assert set(re.findall(r"https?://[^\s&\"<\\\\]+", page.html)) == {
        "http://example.invalid/a.png"
    }  # a document's own words
    assert "default-src 'none'" in page.html


def test_ids_are_unique_and_every_reference_resolves(page: Page) -> None:
    ids = [named["id"] for _, named in page.tags if "id" in named]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page.html))
    assert {a or b for a, b in used} <= set(ids)


def test_two_builds_are_identical(complete: Path, tmp_path: Path) -> None:
    first = (complete / "report.html").read_bytes()
    assert write_report(complete).read_bytes() == first
    program = (
        "import sys; from pathlib import Path; from bilect.report import write_report; write_report(Path(sys.argv[1]))"
    )
    copy = shutil.copytree(complete, tmp_path / "elsewhere")
    (copy / "report.html").unlink()
    subprocess.run([sys.executable, "-c", program, str(copy)], check=True)  # a new process, a new hash seed
    assert (copy / "report.html").read_bytes() == first


def test_an_empty_run_directory(tmp_path: Path) -> None:
    page = build(tmp_path)
    assert [named["id"] for tag, named in page.tags if tag == "section"] == list(SECTIONS)
    for section in SECTIONS:
        assert "Missing:" in page.text[section], section
    assert "No verdict: bilect’s and random selection’s held-out loss is missing." in page.text[""]


@pytest.mark.parametrize(
    ("gone", "section"),
    [
        ("config.yaml", "reproduce"),
        ("run.json", "reproduce"),
        ("summary.json", "result"),
        ("round-1/metrics.jsonl", "fit"),
        ("round-1/scores", "kept"),
        ("round-1/selected", "kept"),
        ("round-1/extremes.json", "documents"),
    ],
)
def test_a_missing_file_is_named_in_its_section(tmp_path: Path, gone: str, section: str) -> None:
    run_dir = synthetic.write_run(tmp_path / "run", rounds=1)
    path = run_dir / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = build(run_dir)
    assert "not found" in page.text[section] and "Missing:" in page.text[section]
    others = [other for other in SECTIONS if other != section and gone != "summary.json"]
    assert not [other for other in others if "Missing:" in page.text[other]]


@pytest.mark.parametrize("key", sorted(synthetic.summary()))
def test_any_summary_key_may_be_missing(tmp_path: Path, key: str) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({k: v for k, v in synthetic.summary().items() if k != key}))
    assert [named["id"] for tag, named in build(tmp_path).tags if tag == "section"] == list(SECTIONS)


@pytest.mark.parametrize("value", [None, "text", [1, None, {}], {"bliss": None, "random": "x", "a": {"b": []}}, 1e400])
def test_any_value_may_be_odd(tmp_path: Path, value: Any) -> None:
    for path, content in (("summary.json", synthetic.summary()), ("run.json", synthetic.run_json())):
        (tmp_path / path).write_text(json.dumps(dict.fromkeys(content, value)))
    (tmp_path / "round-1").mkdir()
    document = dict.fromkeys(("doc_id", "source", "n_tokens", "score", "text"), value)
    (tmp_path / "round-1/extremes.json").write_text(json.dumps({"best": [document, value], "worst": value}))
    (tmp_path / "round-1/metrics.jsonl").write_text(json.dumps({"step": value, "lower_loss": value}) + "\n3\n")
    assert [named["id"] for tag, named in build(tmp_path).tags if tag == "section"] == list(SECTIONS)


def test_broken_files_are_told(complete: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(complete, tmp_path / "run")
    (run_dir / "run.json").write_text("{")
    with (run_dir / "round-1/metrics.jsonl").open("a") as file:
        file.write('{"step": 300, "lower_lo')
    next((run_dir / "round-2/scores").glob("*.parquet")).write_bytes(b"PAR1 not really")
    (run_dir / "round-2/extremes.json").write_text(
        '{"best": [{"text": null}, 3], "worst": [{"text": "\\ud800 \\u0000"}]}'
    )
    page = build(run_dir)
    assert "run.json is not valid JSON" in page.text["reproduce"]
    assert "1 unreadable line" in page.text["fit"]
    assert "round-2/scores/ could not be read" in page.text["kept"]
    assert "(no source)" in page.text["documents"] and "\x00" not in page.html


def test_metrics_with_nulls_and_nothing_but_nulls(tmp_path: Path) -> None:
    (tmp_path / "round-1").mkdir()
    path = tmp_path / "round-1/metrics.jsonl"
    path.write_text('{"step": 0, "lower_loss": null}\n{"step": null, "upper_loss": NaN}\n')
    assert "svg" not in {tag for tag, _ in build(tmp_path).tags}
    path.write_text('{"step": 0, "lower_loss": 3.5, "residual": 0.0}\n{"score_mean": 0.5}\n')
    page = build(tmp_path)
    (label,) = (named["aria-label"] for tag, named in page.tags if tag == "svg")
    assert label == "Curves over the score steps of 1 round: proxy lower loss, scores."
    assert page.text["fit"].count("not recorded") == 4


@pytest.mark.parametrize(
    ("bliss", "tokens", "kind", "said"),
    [
        (5.0, {"bliss": 10, "random": 10}, "better", "0.2500 lower (better)"),
        (
            5.5,
            {"train": {"bliss": 10, "random": 10}},
            "worse",
            "did not help: its held-out loss is 0.2500 higher (worse)",
        ),
        (5.25, {"bliss": 10, "random": 10}, "equal", "made no difference"),
        (5.0, {"bliss": 20, "random": 10}, "better", "but not at equal tokens: 20 against 10"),
        (5.0, {}, "better", "how many tokens each trained on was not recorded"),
    ],
)
def test_the_verdict_says_the_sign_and_the_terms(
    tmp_path: Path, bliss: float, tokens: dict[str, Any], kind: str, said: str
) -> None:
    edit_summary(tmp_path, heldout_loss={"bliss": bliss, "random": 5.25}, tokens=tokens)
    page = build(tmp_path)
    assert said in page.text[""]
    assert ("at equal training tokens" in page.text[""]) == (
        ("bliss" not in tokens and "train" in tokens) or tokens.get("bliss") == 10
    )
    assert ("p", {"class": f"verdict {kind}"}) in page.tags


def test_odd_source_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    shares = {"$x^2$ and $": 0.5, "a\x07b\nc": 0.3, 'q" id="x' + "y" * 200: 0.15, "源": 0.05, "": 0.0}
    edit_summary(tmp_path, kept_share_by_source=shares, pool_share_by_source=shares)
    page = build(tmp_path)
    assert "$x^2$ and $" in page.text["kept"] and "源" in page.text["kept"]
    assert [named["id"] for tag, named in page.tags if tag == "section"] == list(SECTIONS)


def test_the_callers_matplotlib_is_left_alone(complete: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 31.0}):
        write_report(complete)
        assert matplotlib.rcParams["font.size"] == 31.0
    assert "matplotlib.pyplot" not in sys.modules or matplotlib.pyplot.get_fignums() == []


def test_drawing_libraries_are_imported_late() -> None:
    program = "import sys, bilect.report; print(sorted({'matplotlib', 'jinja2', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
