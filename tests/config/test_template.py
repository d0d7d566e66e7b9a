"""``bilect init``: what it writes is a config, says what every setting means, and shows the true defaults."""

import os
import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from bilect.config import Config, SourceConfig, load_config, parse_config
from bilect.config.template import config_template, starting_values, write_template
from bilect.errors import BilectError


@pytest.mark.parametrize("size", ["tiny", "paper"])
def test_the_template_is_the_config_it_was_made_from(size):
    values = starting_values(["pool: a, b/"], ["u*.jsonl", "v.jsonl"], ["h #1.jsonl"], size)
    assert yaml.safe_load(config_template(values)) == values
    config = parse_config(values)
    here = f"{Path.cwd()}/"
    assert [s.path for s in config.data.lower_data] == [f"{here}pool: a, b/"]
    assert [s.path for s in config.data.upper_data] == [f"{here}u*.jsonl", f"{here}v.jsonl"]


def test_uncommented_defaults_change_nothing():
    values = starting_values(["p"], ["u"], ["h"], "tiny")
    text = config_template(values)
    budgets = r"(budget_tokens|top_k): null"  # giving both, even as null, is no different
    shown = re.sub(r"^( *)# (\w+: \S.*)$", r"\1\2", text, flags=re.M)
    assert re.search(budgets, shown)
    assert parse_config(yaml.safe_load(shown)) == parse_config(values)
    assert shown.count("\n") == text.count("\n") and shown != text


def test_every_setting_is_there_with_its_meaning():
    text = config_template(starting_values(["p"], ["u"], ["h"], "tiny"))
    words = " ".join(text.replace("#", " ").split())

    def settings(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            assert re.search(rf"^ *(# *)?{name}:", text, flags=re.M), name
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                settings(inner)
            else:
                assert field.description and " ".join(field.description.split()) in words, name

    settings(Config)
    assert all(name in words for name in SourceConfig.model_fields)


def test_paths_typed_here_are_written_relative_to_the_new_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = starting_values(["pool/", "/abs/x.jsonl", "s3://b/x/*.jsonl", "~/y"], ["u.jsonl"], ["h.jsonl"], "tiny")
    write_template(Path("conf/sub/c.yaml"), values)
    written = [s["path"] for s in yaml.safe_load(Path("conf/sub/c.yaml").read_text())["data"]["lower_data"]]
    assert written == ["../../pool/", "/abs/x.jsonl", "s3://b/x/*.jsonl", "~/y"]
    config = load_config(Path("conf/sub/c.yaml"))
    assert [os.path.normpath(str(s.path)) for s in config.data.upper_data] == [f"{tmp_path}/u.jsonl"]


def test_an_existing_file_is_left_alone(tmp_path):
    file = tmp_path / "new" / "c.yaml"
    write_template(file, starting_values(["p"], ["u"], ["h"], "tiny"))
    before = file.read_text()
    with pytest.raises(BilectError, match=r"c\.yaml exists"):
        write_template(file, {})
    assert file.read_text() == before
