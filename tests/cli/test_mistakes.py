"""The likeliest mistakes: each is answered by one line that says what to type, and leaves nothing behind."""

import shlex
import sys
from pathlib import Path

import pytest
import yaml

from bilect.cli.commands import main
from tests.corpus import tiny_settings, write_corpus, write_jsonl

CHOOSE = "choose data/pool.jsonl --target data/upper.jsonl --method dsir --out o"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    write_corpus(folder / "data", pool=6)
    write_jsonl(folder / "data" / "body.jsonl", [{"n": 1, "body": "sun rain"}])
    (folder / "data" / "table.csv").write_text("text\nsun\n")
    (folder / "empty").mkdir()
    (folder / "file").touch()
    good = tiny_settings(Path("data"))

    def config(name, **changes):
        (folder / name).write_text(yaml.safe_dump({**good, **changes}))

    config("good.yaml")
    config("unknown.yaml", selecton={"keep_ratio": 0.2})
    config("text.yaml", data={**good["data"], "lower_data": "data/pool.jsonl"})
    (folder / "typo.yaml").write_text("data:\n  lower_data: [{path: data/pool.jsonl}\n  upper_data: []\n")
    (folder / "tab.yaml").write_text("data:\n\tcontext: 3\n")
    return folder


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("choose data/pol.jsonl --target data/upper.jsonl --out o", "no file or directory {here}/data/pol.jsonl"),
        ("choose data/pool.jsonl --target data/uper.jsonl --out o", "no file or directory {here}/data/uper.jsonl"),
        ("choose data/table.csv --target data/upper.jsonl --out o", ".parquet; convert it to one of them"),
        ("choose good.yaml --target data/upper.jsonl --out o", "a config is what `bilect run` takes"),
        ("choose empty --target data/upper.jsonl --out o", "files in {here}/empty"),
        ("choose data/pool.jsonl --out o", "Missing option '--target' (`"),
        (f"{CHOOSE} --keep 20", "--keep 20: expected a share of the tokens, more than 0 and at most 1, such as 0.2"),
        (f"{CHOOSE} --keep 20%", "--keep 20%: expected a share of the tokens"),
        (f"{CHOOSE} --keep 0", "--keep 0: expected a share of the tokens"),
        (f"{CHOOSE} --tokens 25X", "--tokens 25X: expected a number of tokens such as 25M, 1.5B"),
        (f"{CHOOSE} --keep 0.2 --tokens 25k", "give one of keep_ratio, budget_tokens and top_k"),
        (f"{CHOOSE} --kep 0.2", "No such option"),
        (f"{CHOOSE} --set fit.steps", "--set fit.steps: expected key=value"),
        (f"{CHOOSE} --set fitt.steps=3", "unknown key 'fitt'; did you mean 'fit'?"),
        (CHOOSE.replace("dsir", "dsri"), "there is no method 'dsri'; did you mean 'dsir'?"),
        (CHOOSE.replace("dsir", "blade"), "blade does not choose documents; to train with it, set online.method=blade"),
        (CHOOSE.replace("--out o", "--out file"), "{here}/file is no folder; choose another folder (--out)"),
        ("chose data/pool.jsonl", "No such command 'chose'. Did you mean 'choose'?"),
        ("run data/pool.jsonl --out o", "no config (YAML); `bilect init` writes one, and `bilect choose` takes a pool"),
        ("run gone --out o", "cannot read gone: No such file or directory; give a config, as `bilect init`"),
        ("select gone --keep 0.2", "cannot read gone: No such file"),
        ("run good.yaml", "run: --out DIR is missing"),
        ("run typo.yaml --out o", "typo.yaml, line 3, column 3: not valid YAML"),
        ("run tab.yaml --out o", "tab.yaml, line 2, column 1: not valid YAML"),
        ("run unknown.yaml --out o", "unknown key 'selecton'; did you mean 'selection'?"),
        ("run text.yaml --out o", "lower_data: expected a list of sources, such as [{path: data/pool.jsonl}]"),
        ("train good.yaml --out o --method bliss", "'bliss' is not one of 'blade', 'rho1'"),
        ("export empty --to parqet --out o", "there is no format 'parqet'; did you mean 'parquet'?"),
        ("inspect gone", "nothing is at gone; give a run directory"),
    ],
)
def test_one_line_says_what_to_type(corpus, monkeypatch, capsys, line, message):
    monkeypatch.chdir(corpus)
    before = sorted(corpus.rglob("*"))
    code, told = said(monkeypatch, capsys, line)
    assert code == 2 and told.startswith("bilect: ") and told.count("\n") == 1, told
    assert message.replace("{here}", str(corpus)) in told
    assert sorted(corpus.rglob("*")) == before


@pytest.mark.parametrize(("pool", "target"), [("body", "upper"), ("pool", "body")])
def test_a_field_that_is_missing_names_the_likely_one(corpus, monkeypatch, capsys, tmp_path, pool, target):
    monkeypatch.chdir(corpus)
    line = f"choose data/{pool}.jsonl --target data/{target}.jsonl --method dsir --out {tmp_path / 'o'}"
    code, told = said(monkeypatch, capsys, line)
    assert code == 2 and told.count("\n") == 1
    assert "body.jsonl, line 1: no field 'text'" in told and "rename with fields: {text: body}" in told


def test_an_extra_that_is_missing(corpus, monkeypatch, capsys):
    monkeypatch.chdir(corpus)
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, told = said(monkeypatch, capsys, "run good.yaml --out o --set data.upper_data=[{dataset: owner/name}]")
    assert code == 2 and told.count("\n") == 1 and told.endswith("pip install 'bilect[hub]'\n"), told
    monkeypatch.setitem(sys.modules, "ray", None)
    code, told = said(monkeypatch, capsys, "run good.yaml --out o --engine ray")
    assert (code, told) == (2, "bilect: engine: ray is not installed: pip install 'bilect[ray]'\n")
    assert not (corpus / "o").exists()


def said(monkeypatch, capsys, line):
    monkeypatch.setattr(sys, "argv", ["bilect", *shlex.split(line.replace("[{", "'[{").replace("}]", "}]'"))])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, capsys.readouterr().err
