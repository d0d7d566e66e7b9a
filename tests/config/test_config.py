"""Settings: overrides, and one clear line for each mistake."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bilect.config import (
    Config,
    DataConfig,
    FitConfig,
    ModelsConfig,
    SelectionConfig,
    TrainConfig,
    WarmupConfig,
    load_config,
    parse_config,
)
from bilect.config.base import apply_overrides
from bilect.errors import BilectError
from tests.corpus import tiny_settings


def test_defaults_are_the_papers(tmp_path):
    config = parse_config({"data": tiny_settings(tmp_path)["data"]})
    assert (config.fit.steps, config.fit.proxy_learning_rate, config.fit.score_learning_rate) == (3000, 1e-5, 1e-5)
    assert (config.fit.l2_coef, config.fit.grad_clip, config.fit.warmup_ratio) == (1e-7, 1.0, 0.1)
    assert (config.selection.keep_ratio, config.training.steps, config.training.decay_steps) == (0.2, 10_000, 200)
    assert (config.models.proxy, config.models.score_head, config.fit.weighting) == ("pythia-31m", "sigmoid", "softmax")
    assert config.fit.reset_proxy and config.fit.carry_score_model


def test_overrides(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tiny_settings(tmp_path)))
    config = load_config(file, ["fit.solver=cg", "rounds=3", "controls=[full]", "selection.budget_tokens=1000"])
    assert (config.fit.solver, config.rounds, config.controls) == ("cg", 3, ("full",))
    assert (config.selection.budget_tokens, config.selection.keep_ratio) == (1000, None)
    assert config.fit.steps == 30


def test_round_trip_through_yaml(tmp_path):
    config = parse_config(tiny_settings(tmp_path))
    assert Config.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fit.sovler=cg", "unknown key 'fit.sovler'; did you mean 'solver'"),
        ("warmup.proxy.stps=3", "unknown key 'warmup.proxy.stps'; did you mean 'steps'"),
        ("data.lower_data=[{pth: x}]", "did you mean 'path'"),
        ("fit.steps=0", "fit.steps: Input should be greater than 0"),
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
        ("training.batch_size=6", None),
        ("training.gradient_accumulation=3", "not a multiple of 3"),
        ("models.score_head=linear", None),
        ("fit.steps", "expected key=value"),
        ("seed.x=1", "'seed' is not a group"),
        ("fit={weighting: naive}", None),
    ],
)
def test_mistakes(tmp_path, override, message):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({**tiny_settings(tmp_path), "seed": 1}))
    if message is None:
        load_config(file, [override])
        return
    with pytest.raises(BilectError) as caught:
        load_config(file, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_naive_weights_need_a_sigmoid(tmp_path):
    settings = {**tiny_settings(tmp_path), "fit": {"weighting": "naive"}, "models": {"score_head": "linear"}}
    with pytest.raises(BilectError, match="naive weighting needs positive scores"):
        parse_config(settings)


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(BilectError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
    for text, message in (
        ("a: [", "not valid YAML"),
        ("- 1", "must hold a mapping"),
        ("!!python/object:os.x {}", "YAML"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(BilectError, match=message):
            load_config(tmp_path / "c.yaml")


@given(st.dictionaries(st.sampled_from(["a", "b"]), st.integers()), st.text(max_size=20))
def test_any_override_is_taken_or_refused_clearly(values, text):
    key, sign, value = text.partition("=")
    try:
        changed = apply_overrides(dict(values), [text])
    except BilectError:
        return
    assert sign and key.strip() and (values.keys() | {key.strip().split(".")[0]}) == changed.keys()
    if "." not in key:
        assert changed[key.strip()] == yaml.safe_load(value) or value != value.strip()


GROUPS = [Config, DataConfig, FitConfig, ModelsConfig, SelectionConfig, TrainConfig, WarmupConfig]


@pytest.mark.parametrize("group", GROUPS)
def test_every_setting_is_documented(group):
    assert [n for n, f in group.model_fields.items() if not f.description] == []
