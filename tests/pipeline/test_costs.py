"""What a plan foresees, against the formulas, and what it says of learning curves."""

import pytest

from bilect.cli.screens import _tell_curves
from bilect.config import parse_config
from bilect.models.flops import forward_flops
from bilect.pipeline.context import RunContext
from bilect.pipeline.costs import Corpus, Costs
from bilect.pipeline.plan import PlannedStage
from bilect.pipeline.stages import stages
from bilect.pipeline.texts import input_hashes
from bilect.runtime.progress import SilentProgress
from bilect.runtime.terminal import PlainConsole
from tests.corpus import tiny_settings, write_corpus

POOL, UPPER, HELDOUT = Corpus(48_000.0, 1000.0), [Corpus(3000.0, 100.0)], [Corpus(400.0, 10.0), Corpus(9000.0, 300.0)]


def costs_of(tmp_path, **changes):
    values = tiny_settings(tmp_path, **{"method": "excess", "controls": ["influence"], "fit": {}, **changes})
    config = parse_config(values)
    write_corpus(tmp_path, 12)
    context = RunContext(tmp_path / "run", config, SilentProgress())
    plan = stages(context, input_hashes(context))
    return Costs(config, 512, POOL, UPPER, HELDOUT), {stage.name: stage for stage in plan}


def test_the_default_method_is_foreseen(tmp_path):
    costs, plan = costs_of(tmp_path, warmup={"share": 0.25}, methods={"excess": {"steps": 30, "batch_size": 8}})
    tokens, flops, pace = costs.of(plan["round 1: score excess"])
    assert (tokens, pace) == (36_000.0, "proxy")
    assert flops == pytest.approx(2 * forward_flops(costs.proxy, 36_000.0, 48.0))
    tokens, flops, _ = costs.of(plan["round 1: fit excess"])
    learned, looked_at = 30 * 8 * 30.0, 10 * 0.2 * 3000.0
    assert tokens == learned + looked_at
    assert flops == pytest.approx(forward_flops(costs.proxy, 3 * learned + looked_at, 30.0))
    assert costs.of(plan["round 1: fit influence"])[1] > 0 < costs.of(plan["round 1: score influence"])[1]


def test_a_curve_has_a_point_before_training_and_one_at_its_end(tmp_path):
    costs, plan = costs_of(tmp_path, curve={"every": 4, "documents": 100}, training={"steps": 10, "batch_size": 4})
    point = forward_flops(costs.target, 400.0, 40.0) + forward_flops(costs.target, 100 * 30.0, 30.0)
    assert costs.curve(plan["round 1: train excess"]) == pytest.approx(4 * point)  # steps 0, 4, 8 and 10
    assert costs.curve(plan["round 1: score excess"]) == 0.0
    costs, plan = costs_of(tmp_path)
    assert costs.curve(plan["round 1: train excess"]) == 0.0


@pytest.mark.parametrize(("curve", "said"), [(9.0, False), (11.0, True)])
def test_curves_that_take_long_are_told(curve, said, capsys):
    lines = [PlannedStage("train", False, 0, 0.0, 100.0, curve_seconds=curve)]
    _tell_curves(PlainConsole(), lines)
    assert ("Learning curves take about 11 s of this; curve.every and" in capsys.readouterr().out) is said
