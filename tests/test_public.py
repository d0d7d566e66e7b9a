"""What users import and type."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bilect
from bilect.config import load_config
from bilect.models.loading import load_causal_lm
from bilect.models.score_model import ScoreModel
from tests.corpus import TINY

ROOT = Path(__file__).parents[1]


def python(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=200).stdout


def test_public_names_exist():
    assert all(getattr(bilect, name) is not None for name in bilect.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bilect.nothing


def test_auto_model_loads_a_saved_score_model(tmp_path):
    """bilect imported before transformers; the other order is tested with a finished run."""
    saved = ScoreModel.from_causal_lm(load_causal_lm(TINY, vocab_size=64), torch.Generator().manual_seed(0))
    saved.save_pretrained(tmp_path)
    script = (
        "import sys, torch, bilect; from transformers import AutoModel; m = AutoModel.from_pretrained(sys.argv[1]);"
        "print(type(m).__name__, repr(float(m.eval()(torch.arange(1, 9)[None]).scores)))"
    )
    name, score = python(script, str(tmp_path)).split()
    with torch.no_grad():
        expected = saved.eval()(torch.arange(1, 9)[None]).scores
    assert name == "ScoreModel" and float(score) == pytest.approx(float(expected), abs=1e-6)


def test_help_needs_no_heavy_import():
    script = (
        "import sys, bilect.cli.commands; from typer.testing import CliRunner;"
        "r = CliRunner().invoke(bilect.cli.commands.app, ['--help']); assert r.exit_code == 0 and 'demo' in r.output;"
        "print([m for m in ('torch', 'transformers', 'duckdb', 'matplotlib', 'pyarrow') if m in sys.modules])"
    )
    assert python(script).strip() == "[]"


def test_examples_are_valid_settings(tmp_path):
    from bilect.compare.cells import cells
    from bilect.methods import methods_of

    configs = {file.stem: load_config(file) for file in (ROOT / "examples").glob("*.yaml")}
    published = configs["bliss"]
    assert published.rounds == 4 and published.fit.steps == 3000 and published.selection.keep_ratio == 0.2
    assert {"random", "full", "dsir", "perplexity", "mates", "less"} < {*configs["compare"].controls}
    for config in configs.values():
        assert all(methods_of(cell.config) for cell in cells(config, tmp_path))


def test_ablations_change_one_thing_each():
    """Of every claim of the papers that has a setting."""
    config = load_config(ROOT / "examples" / "ablations.yaml")
    keys = {key for changes in config.compare.variants.values() for key in changes}
    assert keys >= {"fit.weighting", "fit.kl_coef", "fit.kl_direction", "fit.solver", "models.proxy", "fit.reset_proxy",
                    "fit.carry_score_model", "rounds", "selection.keep_ratio", "online.sync_every",
                    "online.reference_steps", "online.keep_ratio", "online.baseline"}  # fmt: skip
