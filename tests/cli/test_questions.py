"""``bilect init --interactive``, with typed answers."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bilect.cli.commands import app
from bilect.config import load_config
from bilect.models.loading import load_causal_lm
from tests.corpus import TINY, write_corpus, write_jsonl


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a corpus, one part of which has fields of other names."""
    write_corpus(tmp_path / "data", pool=6)
    write_jsonl(tmp_path / "data" / "other.jsonl", [{"n": 3, "title": "t", "body": "sun \x1b[2J rain " * 9}])
    (tmp_path / "data" / "bad.jsonl").write_text("{no json\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(*lines, file="c.yaml", options=()):
    return CliRunner().invoke(app, ["init", file, "--interactive", *options], input="".join(f"{x}\n" for x in lines))


def written(file="c.yaml"):
    return yaml.safe_load(Path(file).read_text(encoding="utf-8"))


def test_five_answers(here):
    result = answer("data/pool.jsonl", "data/upper.jsonl", "data/heldout.jsonl", "3k", "paper", file="conf/c.yaml")
    assert result.exit_code == 0, result.output
    values = written("conf/c.yaml")
    roles = ("lower_data", "upper_data", "heldout_data")
    names = ("pool", "upper", "heldout")
    assert [values["data"][role] for role in roles] == [[{"path": f"../data/{name}.jsonl"}] for name in names]
    assert values["selection"] == {"budget_tokens": 3000} and values["models"]["proxy"] == "pythia-31m"
    assert "1 file; the first record has 'id', 'text', 'source'" in result.output
    assert result.output.splitlines()[-1].endswith("`bilect run conf/c.yaml --out runs/c --dry-run`")
    first = json.loads(Path("data/pool.jsonl").read_text().splitlines()[0])["text"]
    assert f"Its text: {first[:60]}..." in result.output
    load_config(Path("conf/c.yaml"))


def test_enter_takes_what_stands_in_brackets(here):
    options = ("--pool", "data/pool.jsonl", "--upper", "data/upper.jsonl", "--heldout", "data/heldout.jsonl")
    assert answer("", "", "", "", "", options=options).exit_code == 0
    values = written()
    assert values["data"]["lower_data"] == [{"path": "data/pool.jsonl"}]
    assert values["selection"] == {"keep_ratio": 0.2} and values["models"]["proxy"] == "tiny-100k"


def test_an_answer_that_cannot_be_used_is_asked_for_again(here):
    result = answer(
        "gone/", "data/bad.jsonl", "data/pool.jsonl", "data/upper.jsonl", "data/upper.jsonl", "data/heldout.jsonl",
        "20X", "-1", "0.3", "./no-model", "tiny",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for message in (f"no file or directory {here}/gone/", "bad.jsonl, line 1: not valid JSON", "that is the target",
                    "--tokens 20X: expected a number of tokens", "keep_ratio: Input should be greater than 0",
                    "no directory ./no-model"):  # fmt: skip
        assert result.output.count(message) == 1, message
    assert written()["selection"] == {"keep_ratio": 0.3}


@pytest.mark.parametrize(("fields", "taken"), [(["title"], "title"), (["n", "nothing", ""], "body")])
def test_a_field_of_another_name_is_asked_for(here, fields, taken):
    result = answer("data/other.jsonl", *fields, "data/upper.jsonl", "data/heldout.jsonl", "", "")
    assert result.exit_code == 0, result.output
    assert written()["data"]["lower_data"] == [{"path": "data/other.jsonl", "fields": {"text": taken}}]
    assert "\x1b" not in result.output and ("\\x1b[2J" in result.output) == (taken == "body")
    assert result.output.count("Error") == len(fields) - 1


def test_a_model_brings_its_tokenizer_and_is_trained_on_gently(here):
    load_causal_lm(TINY, vocab_size=64).save_pretrained("lm")
    assert (
        answer("data/pool.jsonl", "data/upper.jsonl", "data/heldout.jsonl", "", "lm", file="sub/c.yaml").exit_code == 0
    )
    values = written("sub/c.yaml")
    assert values["models"] == {"proxy": str(here / "lm"), "target": str(here / "lm")}
    assert "vocab_size" not in values["data"] and values["training"]["learning_rate"] == 2e-5
    load_config(Path("sub/c.yaml"))


def test_the_end_of_the_input_leaves_nothing_behind(here):
    before = sorted(here.iterdir())
    result = answer("data/pool.jsonl", "data/upper.jsonl", file="new/c.yaml")
    assert result.exit_code == 1 and "Aborted" in result.output and sorted(here.iterdir()) == before


def test_nothing_is_asked_where_the_file_is_there(here):
    Path("c.yaml").write_text("seed: 0\n")
    result = answer("data/pool.jsonl")
    assert "c.yaml exists" in str(result.exception) and "pool" not in result.output
    assert written() == {"seed": 0}
