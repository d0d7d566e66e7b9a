"""``bilect verify`` as a whole: the short form, its files, and that a wrong estimator fails it."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bilect.cli.commands import app
from bilect.verify import page, run, run_verify
from bilect.verify.claims import Claim


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command itself, as a user runs it."""
    out = tmp_path_factory.mktemp("verify") / "new" / "folder"
    done = CliRunner().invoke(app, ["verify", "--quick", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "What must hold" in done.output and "Reported without a verdict" in done.output
    return out


def read(out: Path) -> dict[str, Any]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads((out / "verify.json").read_text("utf-8"), parse_constant=no_constant)


def test_the_short_form_holds(quick: Path) -> None:
    result = read(quick)
    assert [c["text"] for c in result["claims"] if not c["passed"]] == []
    assert result["passed"] and result["quick"]


def test_the_tolerances_are_those_of_the_documentation(quick: Path) -> None:
    claims = read(quick)["claims"]

    def found(panel: str, text: str) -> list[dict[str, Any]]:
        return [c for c in claims if c["panel"] == panel and text in c["text"]]

    exact_cg = found("implicit", "cg with")
    assert len(exact_cg) == 2 and all(c["low"] == 0.999 for c in exact_cg)
    slopes = found("penalty", "slope")
    assert len(slopes) == 3 and all((c["low"], c["high"]) == (-1.2, -0.8) for c in slopes)
    regrets = found("selections", "its alpha")
    assert len(regrets) == 4 and all(c["high"] == 1e-3 for c in regrets)
    assert all(c["why"] and (c["low"] is not None or c["high"] is not None) for c in claims)
    reported = [r["text"] for r in read(quick)["reported"]]
    assert sum("sgd as published, true relative residual" in text for text in reported) == 3


def test_the_json_is_plain_and_complete(quick: Path) -> None:
    result = read(quick)
    assert set(result) == {"schema", "quick", "passed", "seconds", "versions", "claims", "reported", "figures"}
    assert set(result["figures"]) == set(run.PANELS) and all(result["figures"].values())
    solvers = {r["solver"] for r in result["figures"]["implicit"]}
    assert solvers == {
        "identity",
        "adam",
        "sgd, published",
        "neumann",
        "neumann, as in the fit",
        "cg",
        "cg, as in the fit",
    }


def test_the_page_has_a_plot_per_panel_and_loads_nothing(quick: Path) -> None:
    page = (quick / "verify.html").read_text("utf-8")
    drawings = [part[: part.index("</svg>") + 6] for part in page.split("<svg")[1:]]
    assert len(drawings) == 7
    for drawing in drawings:
        ET.fromstring("<svg" + drawing)
    assert page.count("<script") <= 1 and "script-src 'sha256-" in page  # the page's own script, and no other, may run
    assert " src=" not in page and "http://" not in page.replace("http://www.w3.org", "")


def test_a_missed_claim_fails_the_command(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Claim("implicit", "holds", 1.0, "theory", low=0.5), Claim("implicit", "<b>&", float("nan"), "t", low=0.5)]
    monkeypatch.setattr(run, "study", lambda sizes, console: (read(quick)["figures"], found))
    monkeypatch.setattr(page, "lines_figure", lambda *_: "<svg></svg>")
    assert run_verify(tmp_path, quick=True) == 1
    result = read(tmp_path)
    assert not result["passed"] and [c["passed"] for c in result["claims"]] == [True, False]
    assert result["claims"][1]["value"] is None
    assert "MISSED" in (shown := capsys.readouterr().out) and "1 of 2 claims hold" in shown
    html = (tmp_path / "verify.html").read_text("utf-8")
    assert "1 of 2 claims fail" in html and "&lt;b&gt;&amp;" in html and "<b>" not in html


def test_json_is_the_result_and_the_exit_code_the_verdict(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = [Claim("implicit", "holds", 1.0, "theory", low=0.5), Claim("implicit", "missed", 0.1, "theory", low=0.5)]
    for found, code in ((claims, 1), (claims[:1], 0)):
        monkeypatch.setattr(run, "study", lambda sizes, console, found=found: (read(quick)["figures"], found))
        done = CliRunner().invoke(app, ["verify", "--quick", "--out", str(tmp_path), "--json"])
        assert done.exit_code == code and done.stdout.count("\n") == 1
        result = json.loads(done.stdout)
        assert result == read(tmp_path) and result["passed"] is (code == 0)
        assert [c["value"] for c in result["claims"]] == [c.value for c in found]
        assert "What must hold" in done.stderr  # the tables, for people


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = CliRunner().invoke(app, ["verify", "--out", str(tmp_path / "file")])
    assert done.exit_code == 2 and "Error" in done.output
