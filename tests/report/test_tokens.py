"""Token selection in the report: what is drawn and written equals what the online.json says, whatever is in it."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bilect.report import tokens
from bilect.report.inputs import read_run
from bilect.report.page import render
from bilect.report.svg import COLOURS
from tests.report import synthetic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Json = dict[str, Any]
FIGURES = (tokens.delta_figure, tokens.distance_figure, tokens.choice_figure)
HOSTILE = '</span><script>alert("x")</script><img src=x onerror="y">'


class Section(HTMLParser):
    """The section on tokens: tags with attributes, the numbers of its tables, and its documents as marked pieces."""

    def __init__(self, html: str) -> None:
        super().__init__()
        found = re.search(r'<section id="tokens".*?</section>', html, re.DOTALL)
        self.html = found[0] if found else ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[float] = []
        self.text = ""
        self.documents: list[list[tuple[str, str | None, str | None, str]]] = []  # tag, class, title, text
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.open = True
        self.tags.append((tag, named))
        if tag == "data":
            self.data.append(float(named["value"] or "nan"))
        if named.get("class") == "tokens":
            self.documents.append([])

    def handle_data(self, data: str) -> None:
        self.text += data
        tag, named = self.tags[-1]
        if self.documents and self.open and tag in ("span", "mark"):
            self.documents[-1].append((tag, named.get("class"), named.get("title"), data))

    def handle_endtag(self, tag: str) -> None:
        self.open = False


def section(run_dir: Path) -> Section:
    return Section(render(read_run(run_dir)))


def put(run_dir: Path, content: object, arm: str = "blade") -> Path:
    folder = run_dir / f"controls/{arm}/round-1/target"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "online.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return run_dir


Drawn = Callable[[Callable[..., str | None], Mapping[str, object]], "tuple[Figure, str]"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """The matplotlib figure a function makes, and its description; not laid out, which is what takes the time."""
    kept: list[Figure] = []

    def keep(figure: Figure, name: str, description: str) -> str:
        kept.append(figure)
        return description

    monkeypatch.setattr(tokens, "to_svg", keep)

    def draw(function: Callable[..., str | None], runs: Mapping[str, object]) -> tuple[Figure, str]:
        description = function(runs)
        assert description is not None
        return kept[-1], description

    return draw


def lines(figure: Figure) -> dict[str, list[tuple[str, list[float], list[float]]]]:
    """Title of a panel: colour, x and y of each of its lines."""
    return {
        axes.get_title(loc="left"): [
            (str(line.get_color()), [*map(float, line.get_xdata())], [*map(float, line.get_ydata())])  # type: ignore
            for line in axes.lines
        ]
        for axes in figure.axes
    }


def column(run: Json, *path: str) -> list[float]:
    found: list[Any] = run["entries"]
    for key in path:
        found = [entry[key] for entry in found]
    return [x for x in found if x is not None]


def test_delta_is_drawn_as_recorded(drawn: Drawn) -> None:
    runs = {"rho1": synthetic.online("rho1"), "blade": synthetic.online("blade")}
    figure, label = drawn(tokens.delta_figure, runs)
    panels, step = lines(figure), [30.0 * i for i in range(10)]
    for title, name in (("RHO-1", "rho1"), ("BLADE tokens", "blade")):
        median, zero = panels[title]
        assert median == (COLOURS[name], step, column(runs[name], "delta", "0.5"))
        assert zero[2] == [0, 0]
    shares = [(COLOURS[name], step, column(run, "share_positive")) for name, run in runs.items()]
    assert panels["Tokens with Δ > 0"] == shares
    bands = figure.axes[1].collections
    for band, (low, high) in zip(bands, (("0.01", "0.99"), ("0.05", "0.95"), ("0.25", "0.75")), strict=True):
        corners = {(x, y) for x, y in band.get_paths()[0].vertices.tolist()}
        for q in (low, high):
            assert {*zip(step, column(runs["blade"], "delta", q), strict=True)} <= corners
    assert "RHO-1 −0.050 at step 0 to −0.410 at step 270; BLADE tokens −0.050 at step 0 to −0.050 at step 270" in label
    assert "RHO-1 48.0% at step 0 to 12.0% at step 270" in label


def test_the_path_in_the_svg_is_the_curve_in_the_file() -> None:
    run = synthetic.online("blade")
    svg = tokens.distance_figure({"blade": run}) or ""
    paths = [re.findall(r"[ML] (\S+) (\S+)", d) for d in re.findall(r'<path d="([^"]+)"', svg)]
    curves = [np.array(p, dtype=float) for p in paths if len(p) == 10]
    expected = np.array(column(run, "distance_reference"))
    fits = [np.polyfit(expected, curve[:, 1], 1) for curve in curves]  # SVG's y is a line in the value, downwards
    errors = [np.abs(np.polyval(f, expected) - c[:, 1]).max() for f, c in zip(fits, curves, strict=True)]
    assert len(curves) == 2 and max(errors) < 0.02 and all(f[0] < -5 for f in fits)
    assert "distance last sync: BLADE tokens 0.300 at step 0 to 0.300 at step 270" in svg


def test_distance_and_choice_are_drawn_as_recorded(drawn: Drawn) -> None:
    run = synthetic.online("rho1")
    panels = lines(drawn(tokens.distance_figure, {"rho1": run})[0])
    assert panels["To the reference, ‖u − w‖"][0][2] == column(run, "distance_reference")
    assert panels["To the last synchronisation"][0][2] == column(run, "distance_last_sync")
    panels = lines(drawn(tokens.choice_figure, {"rho1": run})[0])
    (agreement,) = panels["Agreement with the selection before"]
    assert agreement[1:] == ([30.0 * i for i in range(1, 10)], column(run, "agreement"))
    losses = [y for _, _, y in panels["Loss of the oracle, nats"]]
    assert losses == [column(run, "oracle_loss", "selected"), column(run, "oracle_loss", "all")]


def test_what_is_not_recorded_is_not_drawn(drawn: Drawn) -> None:
    assert all(figure(runs) is None for figure in FIGURES for runs in ({}, {"blade": {}}, {"a": {"entries": []}}))
    run = synthetic.online("blade")
    for i, entry in enumerate(run["entries"]):
        del entry["oracle_loss"], entry["distance_last_sync"]
        if i < 4:  # no reference yet
            del entry["distance_reference"]
    assert [*lines(drawn(tokens.choice_figure, {"blade": run})[0])] == ["Agreement with the selection before"]
    panels = lines(drawn(tokens.distance_figure, {"blade": run})[0])
    assert [*panels] == ["To the reference, ‖u − w‖"]
    assert panels["To the reference, ‖u − w‖"][0][1] == [30.0 * i for i in range(4, 10)]


def test_random_numbers_are_not_shown_as_delta(drawn: Drawn) -> None:
    runs = {"random-token": synthetic.online("random-token"), "rho1": synthetic.online("rho1")}
    panels = lines(drawn(tokens.delta_figure, runs)[0])
    assert [*panels] == ["RHO-1", "Tokens with Δ > 0"] and len(panels["Tokens with Δ > 0"]) == 1
    assert all(figure({"random-token": runs["random-token"]}) is None for figure in FIGURES)
    pieces = tokens.token_views(runs)[0]["entries"][0]["documents"][0]["pieces"]
    assert {(p["delta"], p["level"]) for p in pieces if p["chosen"]} == {(None, 0)}
    assert any(p["chosen"] for p in pieces)


def test_seeds_of_a_method_share_its_colour_and_differ_in_style(drawn: Drawn) -> None:
    runs = {f"{m}, seed {s}": synthetic.online(m) for m in ("blade", "rho1") for s in (0, 1)}
    figure, _ = drawn(tokens.distance_figure, runs)
    found = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines]
    blade, rho1 = COLOURS["blade"], COLOURS["rho1"]
    assert found == [(blade, "-"), (blade, "--"), (rho1, "-"), (rho1, "--")]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*runs]


def test_entries_are_put_in_the_order_of_their_steps(drawn: Drawn) -> None:
    run = synthetic.online("rho1")
    run["entries"].reverse()
    panels = lines(drawn(tokens.distance_figure, {"x": run})[0])
    assert panels["To the reference, ‖u − w‖"][0][2] == pytest.approx([1.2 + 0.3 * i for i in range(10)])


def test_selected_share_by_source() -> None:
    entries = [
        {"step": 0, "sources": {"a": {"tokens": 100, "kept": 0.2}, "b": {"tokens": 10, "kept": 1.0}}},
        {"step": 5, "sources": {"a": {"tokens": 300, "kept": 0.6}, "b": {"tokens": 0, "kept": 0.5}, "c": {"kept": 1}}},
    ]
    rows = tokens.source_rows({"rho1": {"entries": entries}, "blade": {"entries": entries[:1]}})
    assert [(r["source"], r["arm"], r["tokens"], r["last"]) for r in rows] == [
        ("a", "rho1", 400, 0.6),
        ("a", "blade", 100, 0.2),
        ("b", "rho1", 10, None),
        ("b", "blade", 10, 1.0),
    ]
    assert [r["mean"] for r in rows] == pytest.approx([(100 * 0.2 + 300 * 0.6) / 400, 0.2, 1.0, 1.0])
    many = {f"s{i:02}": {"tokens": 1 + i, "kept": 0.5} for i in range(40)}
    rows = tokens.source_rows({"x": {"entries": [{"sources": many}]}})
    assert [r["source"] for r in rows] == [f"s{i:02}" for i in range(39, 15, -1)]


def test_the_level_grows_with_delta_either_way_up_to_the_95th_percentile() -> None:
    delta = [None, -0.4, *(i / 100 for i in range(1, 101)), "x"]
    document = {"text": ["w"] * 103, "delta": delta, "mask": [False, *[True] * 101]}
    (view,) = tokens.token_views({"x": {"entries": [{"step": 3, "documents": [document]}]}})
    (entry,) = view["entries"]
    pieces = entry["documents"][0]["pieces"]
    top = float(np.quantile([0.4, *np.arange(1, 101) / 100], 0.95))
    expected = [math.ceil(5 * min(i / 100 / top, 1)) for i in range(1, 101)]
    assert [p["level"] for p in pieces] == [0, -math.ceil(5 * 0.4 / top), *expected, 0]
    assert [p["delta"] for p in pieces] == [*delta[:-1], None]
    assert sorted(set(expected)) == [1, 2, 3, 4, 5] and entry["step"] == 3


def test_the_section_shows_every_arm(tmp_path: Path) -> None:
    run_dir = synthetic.write_online(tmp_path, rounds=2)
    newest = synthetic.online("rho1", keep_ratio=0.25, sync_every=12345)
    (run_dir / "controls/rho1/round-2/target/online.json").write_text(json.dumps(newest))
    html = render(read_run(run_dir))
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert {a or b for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)} <= {*ids}
    found = Section(html)
    body = [" ".join(re.sub("<[^>]+>", " ", row).split()) for row in re.findall(r"<tr>.*?</tr>", found.html)]
    assert "bilect (BLISS) BLADE tokens 2 60.0% 60.0% 100 30 3 10" in body
    assert "BLADE tokens BLADE tokens 2 60.0% 60.0% 100 30 3 10" in body
    assert "RHO-1 RHO-1 2 25.0% 60.0% 12,345 90 1 10" in body
    assert "random tokens random tokens 2 60.0% 60.0% – 0 0 10" in body
    assert sum(tag == "svg" for tag, _ in found.tags) == 3
    assert pytest.approx(0.545) in found.data and 0.59 in found.data and 5120 in found.data  # source "books"
    assert len(found.documents) == 4 * 4 * 2  # arms, entries 0, 3, 6 and 9 of ten, documents
    dots = {named["class"] for tag, named in found.tags if (named.get("class") or "").startswith("dot")}
    assert dots == {"dot main", "dot blade", "dot rho1", "dot random-token"}
    first, last = (synthetic.online("blade")["entries"][i]["documents"][0] for i in (0, -1))
    for shown, recorded in ((found.documents[8], first), (found.documents[14], last)):  # after bliss
        assert [text for *_, text in shown] == recorded["text"]
        assert [tag == "mark" for tag, *_ in shown] == recorded["mask"]
        titles = [title and float(title.removeprefix("Δ ").replace("−", "-")) for _, _, title, _ in shown]
        assert titles == [d if d is None else pytest.approx(d, abs=5.1e-4) for d in recorded["delta"]]


def test_no_section_without_a_file_and_two_calls_are_equal(tmp_path: Path) -> None:
    html = render(read_run(tmp_path))
    assert 'id="tokens"' not in html and 'href="#tokens"' not in html
    few = [{"step": i, "distance_reference": 1.0 + i, "sources": {"a": {"tokens": 1, "kept": 0.5}}} for i in range(2)]
    put(tmp_path, {"method": "blade", "entries": few})
    html = render(read_run(tmp_path))
    assert render(read_run(tmp_path)) == html and 'href="#tokens"' in html


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    run = synthetic.online(HOSTILE)
    text = [HOSTILE, "\x00\x1b\ud800\u202e", "  \n", "x" * 1000, *["y"] * 600]
    documents = [{"text": text, "delta": [0.5] * 9, "mask": [True] * 9}] * 50
    sources = {HOSTILE: {"tokens": 9, "kept": 0.5}}
    run["entries"] = [{"step": 0, "share_positive": 0.5, "documents": documents, "sources": sources}]
    put(tmp_path, run)
    put(tmp_path, run, "<b>'\"&")
    found = section(tmp_path)
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "img", "b"})
    assert not [name for _, named in found.tags for name in named if name.startswith("on")]
    assert found.text.count(HOSTILE) == 2 * 2 + 2 and "<b>'\"&" in found.text  # documents, sources
    assert len(found.documents) == 4
    shown = [text for *_, text in found.documents[0]]
    assert shown[:4] == [HOSTILE, "\ufffd" * 4, "  \n", "x" * 200] and len(shown) == 512
    assert "92 further tokens" in found.html


def test_any_value_may_be_odd(tmp_path: Path) -> None:
    run = synthetic.online("blade")
    sound = run["entries"][0]
    for n, value in enumerate((None, "text", 10**400, 1e308, 1.1e308, -1e308, [1, None], {"a": None, "0.5": []}, True)):
        document = dict.fromkeys(("text", "delta", "mask"), value)
        nested = {key: dict.fromkeys(sound[key], value) for key in ("delta", "oracle_loss", "sources")}
        nested["sources"] |= {"a": {"tokens": value, "kept": value}}
        run["entries"] += [dict.fromkeys(sound, value), value, {**sound, **nested, "documents": [document, value]}]
        put(tmp_path, dict.fromkeys(run, value), f"odd {n}")
    put(tmp_path, run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = section(tmp_path)
    labels = [named["aria-label"] or "" for tag, named in found.tags if tag == "svg"]
    assert len(labels) == 3 and not any("nan" in label or "inf" in label for label in labels)
    assert "BLADE tokens −0.050 at step 0 to −0.050 at step 270" in labels[0]
    assert len(found.documents) == 8 and 5120 in found.data  # the sound ones, and no more tokens than theirs


def test_a_broken_file_is_told_and_the_round_before_is_shown(tmp_path: Path) -> None:
    path = "controls/blade/round-1/target/online.json"
    for content, problem in (
        ("{", "is not valid JSON"),
        ("[1]", "holds nothing"),
        ("[" * 100_000, "is not valid JSON"),
    ):
        put(tmp_path, content)
        found = section(tmp_path)
        assert f"Missing: {path} {problem}." in found.text and "svg" not in {tag for tag, _ in found.tags}
    earlier = tmp_path / "controls/blade/round-0/target"
    earlier.mkdir(parents=True)
    (earlier / "online.json").write_text('{"method": "blade"}')
    run = read_run(tmp_path)
    assert run.online["blade"].round == 0 and run.missing[path] == "is not valid JSON"
