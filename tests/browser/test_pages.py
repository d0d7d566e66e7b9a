"""What the pages do in a real browser: they run nothing but their own script, load nothing, and serve everyone."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from threading import Thread

import pytest

from bilect.report.watch import WatchServer
from tests.browser.conftest import Opened
from tests.browser.pages import SCRIPT
from tests.report import synthetic

NAMES = ("report", "choice", "hostile", "several", "comparison", "verify")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_executes_and_no_request_leaves(name: str, written: dict[str, Path], browser: Opened) -> None:
    address = written[name].as_uri()
    page = browser.open(address)
    title = page.title()
    for summary in page.locator("summary").all():  # every fold open
        summary.evaluate("element => { element.parentElement.open = true }")
    for button in page.locator(".open").all()[:40]:
        button.evaluate("element => element.click()")
    page.wait_for_timeout(100)
    assert browser.complaints == [] and browser.requests == [address] and page.title() == title != "taken"
    assert page.locator("main img, main iframe, main script:not([type])").count() == 0
    assert written[name].stat().st_size < 5_000_000


def test_an_injected_script_would_be_stopped(written: dict[str, Path], browser: Opened, tmp_path: Path) -> None:
    """The second line of defence: were a text ever to become markup, the policy would still not let it act."""
    html = written["report"].read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(html.replace("<main", f"{SCRIPT}<style>body {{ color: red }}</style><main"), encoding="utf-8")
    page = browser.open(broken.as_uri())
    assert page.title() != "taken" and not any(c.startswith("dialog") for c in browser.complaints)
    assert browser.requests == [broken.as_uri()] or not any(u.startswith("http") for u in browser.requests)
    assert page.evaluate("getComputedStyle(document.body).color") != "rgb(255, 0, 0)"
    assert sum("Content Security Policy" in c for c in browser.complaints) >= 3  # script, handler, style


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_no_serious_fault_for_a_screen_reader(
    name: str, width: int, scheme: str, written: dict[str, Path], browser: Opened
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="browser tests: axe is not installed")
    page = browser.open(written[name].as_uri(), width, scheme)
    found = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    serious = [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]
    assert serious == []


@pytest.mark.parametrize("name", NAMES)
def test_a_phone_shows_every_column(name: str, written: dict[str, Path], browser: Opened) -> None:
    page = browser.open(written[name].as_uri(), 390)
    for summary in page.locator("summary").all():
        summary.evaluate("element => { element.parentElement.open = true }")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    beyond = page.evaluate(
        """() => [...document.querySelectorAll("table td, table tbody th")]
            .filter((cell) => cell.offsetParent && cell.getBoundingClientRect().right > innerWidth + 1)
            .map((cell) => cell.textContent)"""
    )
    assert beyond == []
    titles = page.evaluate(
        """() => [...document.querySelectorAll("main > section:first-of-type table tbody tr:first-child td")]
            .map((cell) => getComputedStyle(cell, "::before").content)"""
    )
    assert titles and all(title not in ("none", '""') for title in titles)  # each value says what it is


@pytest.mark.parametrize("name", [name for name in NAMES if name != "hostile"])
def test_a_wide_screen_shows_every_column_and_no_name_in_pieces(
    name: str, written: dict[str, Path], browser: Opened
) -> None:
    page = browser.open(written[name].as_uri(), 1280)
    for summary in page.locator("summary").all():
        summary.evaluate("element => { element.parentElement.open = true }")
    cut = page.evaluate(
        """() => [...document.querySelectorAll(".scroll > table")]
            .filter((table) => table.scrollWidth > table.parentElement.clientWidth + 1)
            .map((table) => table.textContent)"""
    )
    assert cut == []
    broken = page.evaluate(
        """() => [...document.querySelectorAll("table :is(thead th, tbody th:first-child), dt")].filter((cell) => {
            const lines = new Set(), texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
            for (const range = document.createRange(); texts.nextNode();) {
                range.selectNodeContents(texts.currentNode);
                for (const box of range.getClientRects()) lines.add(Math.round(box.bottom / 8));
            }
            return cell.offsetParent && lines.size > cell.textContent.trim().split(/[\\s-]+/).length;
        }).map((cell) => cell.textContent)"""
    )
    assert broken == []


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_paper_shows_every_column(name: str, written: dict[str, Path], browser: Opened) -> None:
    page = browser.open(written[name].as_uri(), 672, "dark")  # A4 without the page's margins
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 672
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 254)"  # ink on paper
    assert not page.locator("nav").is_visible() and page.locator("table").first.is_visible()


def test_the_explorer_by_keyboard(written: dict[str, Path], browser: Opened) -> None:
    page = browser.open(written["report"].as_uri())
    data = json.loads(page.locator("[data-documents]").inner_text() or page.locator("[data-documents]").text_content())
    documents, press = data["documents"], page.keyboard.press
    count = page.locator(".count")
    assert count.inner_text() == f"{len(documents)} of {len(documents)} documents."

    page.locator("[data-by=search]").focus()
    page.keyboard.type("alert")
    hits = [d for d in documents if "alert" in (d["id"] + d["text"]).lower()]
    assert 0 < len(hits) < len(documents) and count.inner_text().startswith(f"{len(hits)} of ")
    press("Tab")
    page.keyboard.type("speeches")  # a select takes letters
    hits = [d for d in hits if data["sources"][d["source"]] == "speeches"]
    assert count.inner_text().startswith(f"{len(hits)} of ") and hits

    press("Tab"), press("Tab"), press("Tab"), press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Show all"
    press("Enter")
    assert count.inner_text().startswith(f"{len(documents)} of ")

    def scores() -> list[float]:
        cells = page.locator(".lists tbody tr:not(.text) td:first-child").all_inner_texts()
        return [float(text.replace("−", "-")) for text in cells]

    page.locator(".lists thead button", has_text="Score").focus()
    assert scores() == sorted(scores(), reverse=True) and len(scores()) == 25
    press("Enter")
    lowest = sorted(d["score"] for d in documents)[:25]
    assert scores() == pytest.approx(lowest, rel=1e-4)
    assert page.locator("th[aria-sort=ascending]").inner_text() == "Score"

    page.locator(".open").first.focus()
    press("Enter")
    first = min(documents, key=lambda d: d["score"])
    assert page.locator(".open").first.get_attribute("aria-expanded") == "true"
    assert page.locator("tr.text pre").text_content() == first["text"]
    press("Enter")
    assert page.locator("tr.text").count() == 0 and browser.complaints == []


def test_two_selections_side_by_side(written: dict[str, Path], browser: Opened) -> None:
    page = browser.open(written["report"].as_uri())
    data = json.loads(page.locator("[data-documents]").text_content())
    (pair,) = data["pairs"]
    assert data["arms"] == ["bilect (BLISS)", "dsir"] and pair["other"] == 0 and pair["first"] > 0  # 0.6 is above 0.5
    page.locator("[data-by=pair]").select_option("0")
    left, right = page.locator(".lists > div").all()
    assert f"Only bilect (BLISS) kept ({pair['first']:,} documents)" in left.inner_text()
    assert left.locator("tbody tr").count() == 24 and right.locator("tbody tr").count() == 0
    scores = [float(t) for t in left.locator("tbody td:first-child").all_inner_texts()]
    assert all(0.5 <= s < 0.6 for s in scores)
    assert f"both selections kept {pair['both']:,} documents" in page.locator(".count").inner_text()


def test_tokens_say_their_delta_when_tapped(written: dict[str, Path], browser: Opened) -> None:
    page = browser.open(written["report"].as_uri())
    token = page.locator(".tokens [title]").first
    token.click()
    assert re.fullmatch(r"“.*”: Δ [+−]\d\.\d{3} nats", page.locator("[data-token]").inner_text())


def test_it_prints_in_black_on_white(written: dict[str, Path], browser: Opened) -> None:
    page = browser.open(written["report"].as_uri(), scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 254)"
    assert not page.locator("nav").is_visible() and not page.locator(".controls").is_visible()
    assert page.pdf()[:5] == b"%PDF-"


def test_a_watched_run_is_shown_as_it_goes_on(browser: Opened, tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path / "run", rounds=1)
    with WatchServer(run) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        page = browser.open(server.url)
        assert "0.1544 lower" in page.locator(".verdict").inner_text()
        (run / "summary.json").write_text(
            json.dumps({**synthetic.summary(), "heldout_loss": {"bliss": 5.0, "random": 5.5}})
        )
        page.locator(".verdict").filter(has_text="0.5000 lower").wait_for()  # the page forbids evaluated strings
        assert browser.complaints == [] and {url.split("/")[2] for url in browser.requests} == {
            server.url.split("/")[2]
        }
        server.shutdown()


def _get(server: WatchServer, path: str, host: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(server.url + path, headers={} if host is None else {"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_server_answers_this_machine_alone(tmp_path: Path) -> None:
    synthetic.write_run(tmp_path, rounds=1)
    with WatchServer(tmp_path) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        assert server.server_address[0] == "127.0.0.1"
        assert _get(server, "version", f"localhost:{server.server_port}") == (200, server.version())
        assert _get(server, "version", "evil.example")[0] == 403
        assert _get(server, "version", f"evil.example:{server.server_port}")[0] == 403
        for path in ("run.json", "../run.json", "%2e%2e/run.json", "/etc/passwd"):
            assert _get(server, path)[0] == 404
        server.shutdown()
