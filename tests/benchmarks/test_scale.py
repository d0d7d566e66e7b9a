"""What choosing costs at scale: against sums by hand, and the page that shows it."""

import json
from pathlib import Path

import pytest

from benchmarks import scale

ROOT = Path(scale.__file__).parents[1]
# pythia-31m: 6 layers of width 256 (12 width^2 weights each), a head of 50304 x 256, half of 1024 positions seen
TRUNK = 2 * 6 * 12 * 256**2 + 2 * 6 * 256 * 1024
HEAD = 2 * 50304 * 256


@pytest.fixture(scope="module")
def costs():
    proxy, scorer = scale.model("pythia-31m"), scale.score_model("pythia-31m")
    return scale.choosing(proxy, scorer, scale.model("pythia-410m"))


def test_hours_of_scoring(costs):
    seconds = 1e11 * (TRUNK + HEAD) / (0.4 * 989e12)
    assert costs["perplexity"](1e11).hours(8) == pytest.approx(seconds / 8 / 3600, rel=1e-12)
    # 150 steps of 16 sequences, and two passes
    steps = 3 * 150 * 16 * 1024 * (TRUNK + HEAD)
    assert costs["excess"](1e11).bf16 == pytest.approx(steps + 2 * 1e11 * (TRUNK + HEAD), rel=1e-12)
    assert costs["influence"](1e11).float32 == 2 * 1e11 * (TRUNK + HEAD)
    assert costs["influence"](1e11).hours(1) > 2 * seconds * 989 / 67 / 3600
    # the fit is the same, a score needs no head
    more = costs["bliss"](3e11).bf16 - costs["bliss"](1e11).bf16
    assert more == pytest.approx(2e11 * (TRUNK + 2 * 256), rel=1e-5)


def test_training_with_chosen_tokens(costs):
    both = scale.training(scale.model("pythia-410m"))
    ratio = both["training with blade"](1e11).bf16 / both["training"](1e11).bf16
    assert ratio == pytest.approx(4 / 3 + 2 * 300 / 1000, rel=1e-9)


def test_the_page_shows_what_the_script_prints(capsys):
    scale.main()
    *lines, figures = capsys.readouterr().out.splitlines()
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert len(lines) > 12 and all(line in page for line in lines)
    assert json.loads(figures)["tokenising"]["1B"] == pytest.approx(1e9 / (181e6 / 198) / 3600)
