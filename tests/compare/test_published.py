"""What a comparison says of itself to others, and the page that is made of such files."""

import copy
import html
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bilect.compare.cells import Cell
from bilect.compare.provenance import machine, nameless, setting
from bilect.compare.published import read_published, tables
from bilect.config import load_config
from bilect.data.store import TokenStore
from bilect.errors import BilectError
from tests.corpus import tiny_settings, write_corpus

ROOT = Path(__file__).parents[2]
FIGURES = ("loss", "minus_random", "minus_full")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of the cheapest method with the controls, over two seeds."""
    folder = tmp_path_factory.mktemp("published") / "somebodys-folder"
    write_corpus(folder, 90)
    values = tiny_settings(folder, method="dsir", controls=[])
    values["data"]["lower_data"][0]["source"] = "a *pool* | of <b>"
    for part in (*values["warmup"].values(), values["training"]):
        part |= {"steps": 2, "decay_steps": 0}
    values["compare"] = {"seeds": 2, "workers": 2}
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "bilect", "compare", "mine.yaml", "--out", "out", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    (folder / "said.json").write_text(done.stdout)
    (folder / "shown.txt").write_text(done.stderr)
    return folder / "out"


@pytest.fixture
def results(compared, tmp_path):
    """A folder of published files, with one of them."""
    (tmp_path / "public").mkdir()
    shutil.copy(compared / "comparison.json", tmp_path / "public" / "tiny.json")
    return tmp_path / "public"


def test_json_is_the_result_and_nothing_else(compared):
    said, shown = ((compared.parent / name).read_text() for name in ("said.json", "shown.txt"))
    result = json.loads(said)
    assert said.count("\n") == 1 and result.pop("out") == "out" and result.pop("page") == "out/comparison.html"
    assert result == json.loads((compared / "comparison.json").read_text())
    assert "held-out loss" in shown and "minus random" in shown  # the table, for people


def test_a_comparison_says_what_it_was_made_of_and_on(compared):
    found = json.loads((compared / "comparison.json").read_text())
    base = found["variants"]["base"]
    store = TokenStore(compared / "base" / "seed-0" / "tokens" / "upper")
    assert base["texts"]["upper"]["names"] == ["upper"] and base["texts"]["pool"]["documents"] == 90
    assert base["texts"]["upper"]["documents"] == len(store) == 20
    assert base["texts"]["upper"]["tokens"] == store.length_R.sum()
    assert len({base["texts"][role]["fingerprint"] for role in ("pool", "upper", "heldout")}) == 3
    assert set(base["methods"]) == {"dsir", "random", "full"} and base["methods"]["dsir"]["length"] == "sum"
    assert base["config"]["training"]["steps"] == 2
    assert base["config"]["data"]["upper_data"][0]["path"] == "upper.jsonl"
    assert found["machine"]["cores"] >= 1 and found["machine"]["gpus"] == []


def test_the_same_texts_elsewhere_have_the_same_fingerprints(compared, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(compared / "base" / "seed-0", moved)
    manifest = json.loads((moved / "run.json").read_text())
    manifest["inputs"] = {role: {f"/elsewhere/{n}": h for n, h in enumerate(i.values())} for role, i in
                          manifest["inputs"].items() if isinstance(i, dict)}  # fmt: skip
    (moved / "run.json").write_text(json.dumps(manifest))
    found = setting(Cell("base", load_config(moved / "config.yaml"), moved, None))["texts"]
    assert found == json.loads((compared / "comparison.json").read_text())["variants"]["base"]["texts"]


def test_nothing_tells_whose_it_is(compared):
    text = (compared / "comparison.json").read_text()
    assert "somebodys-folder" not in text and str(Path.home()) not in text and '"/' not in text
    assert f'"{platform.node()}"' not in text and f'"{os.environ.get("USER", "nobody at all")}"' not in text
    given = {"a": "/x/y.jsonl", "b": ["s3://bucket/key/part.parquet?secret=1", "~/me/z", "EleutherAI/pythia-31m", 3]}
    assert nameless(given) == {"a": "y.jsonl", "b": ["part.parquet", "z", "EleutherAI/pythia-31m", 3]}


def test_the_processor_by_its_name(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nmodel\t: 3\n")
    assert machine(False, tmp_path / "cpuinfo")["processor"] == "Some CPU @ 2 GHz"
    assert machine(False, tmp_path / "none")["processor"] != ""


def test_a_row_for_every_arm(results):
    values = json.loads((results / "tiny.json").read_text())
    other = {**values["variants"]["base"], "settings": {"training.steps": 9}}
    (results / "tiny.json").write_text(json.dumps({**values, "variants": {**values["variants"], "longer": other}}))
    page = tables(read_published(results), "results/public")
    for variant in values["variants"].values():
        for arm, figures in variant["arms"].items():
            assert f"| {arm} | {figures['loss']['mean']:.3f} |" in page
    assert "[All figures](results/public/tiny.json)" in page
    assert page.count("\n| dsir |") == 2 and "the one above in training.steps: 9" in page
    assert page.startswith("## ") and ", for upper: longer\n" in page


def _broken():
    def losses(values):
        values["variants"]["base"]["arms"]["dsir"]["loss"]["values"][0] -= 0.5

    def interval(values):
        values["variants"]["base"]["arms"]["dsir"]["loss"]["low"] += 0.01

    def fewer(values):
        for arm in values["variants"]["base"]["arms"].values():
            for key in FIGURES:
                arm[key]["values"] = arm[key]["values"][:1]

    def control(values):
        del values["variants"]["base"]["arms"]["full"]

    def place(values):
        values["variants"]["base"]["config"]["data"]["lower_data"][0]["path"] = "/home/me/pool.jsonl"

    def more(values):
        values["who"] = "me"

    def old(values):
        values["schema"] = 1

    return [(losses, "minus_random is not what the losses say"), (interval, "interval are not of its values"),
            (fewer, "a loss for each of 2 seeds"), (control, "full missing"), (place, "a path or an address"),
            (more, "unknown key 'who'"), (old, "schema: Input should be 2")]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), _broken(), ids=lambda v: getattr(v, "__name__", None))
def test_a_broken_file_is_one_line(results, change, message):
    values = json.loads((results / "tiny.json").read_text())
    changed = copy.deepcopy(values)
    change(changed)
    (results / "tiny.json").write_text(json.dumps(changed))
    with pytest.raises(BilectError) as error:
        read_published(results)
    assert message in str(error.value) and str(error.value).startswith("tiny.json is not the comparison.json")
    assert "\n" not in str(error.value)


def test_a_file_of_another_kind_is_one_line(results):
    (results / "note.txt").write_text("hello")
    with pytest.raises(BilectError, match=r"^note\.txt is not the comparison\.json .*Expecting value"):
        read_published(results)


def test_the_page_of_the_project_can_be_made():
    found = read_published(ROOT / "docs" / "results" / "public")
    assert "demo" in found and found["demo"].variants["base"].texts.pool.names == ["demo-pool"]
    assert len(found["demo"].seeds) >= 2


def site(results, folder):
    """`mkdocs build` of the page alone, with the site's own settings and hook."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    docs = folder / "docs"
    shutil.copytree(results, docs / "results" / "public")
    shutil.copy(ROOT / "docs" / "public.md", docs)
    settings |= {"docs_dir": str(docs), "site_dir": str(folder / "site"), "hooks": [str(ROOT / "docs" / "hooks.py")],
                 "plugins": [], "nav": ["public.md"], "strict": False}  # fmt: skip
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(folder / "mkdocs.yml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_site_shows_its_rows(results, tmp_path):
    for needed in ("mkdocs", "material", "latex2mathml"):
        pytest.importorskip(needed, reason="the site needs bilect[docs]")
    folder, hostile = tmp_path / "good", "<script>alert(1)</script> | [x](javascript:y) *z*"
    folder.mkdir()
    values = json.loads((results / "tiny.json").read_text())
    values["variants"]["base"]["texts"]["pool"]["names"] = [hostile]
    (results / "tiny.json").write_text(json.dumps(values))
    assert site(results, folder).returncode == 0
    page = (folder / "site" / "public.html").read_text()
    for variant in values["variants"].values():
        for arm, figures in variant["arms"].items():
            assert f"<td>{arm}</td>\n<td>{figures['loss']['mean']:.3f}</td>" in page
    assert (
        "<script>alert" not in page
        and 'href="javascript' not in page
        and f"{hostile}, for upper" in html.unescape(page)
    )
    assert 'href="results/public/tiny.json"' in page
    assert (folder / "site" / "results" / "public" / "tiny.json").is_file()
    (results / "tiny.json").write_text("{")
    folder = tmp_path / "bad"
    folder.mkdir()
    built = site(results, folder)
    assert built.returncode != 0 and "results/public: tiny.json is not the comparison.json" in built.stderr
    assert "Traceback" not in built.stderr
