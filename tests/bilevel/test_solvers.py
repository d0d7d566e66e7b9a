"""Solvers by name: found by their modules, and a wrong name is one line."""

import pytest
import torch

from bilect.bilevel.offline import solvers
from bilect.bilevel.offline.solvers import System
from bilect.config import FitConfig, parse_config
from bilect.errors import BilectError
from bilect.methods import methods_of
from tests.corpus import tiny_settings


def test_every_module_is_a_solver_of_a_small_system():
    """H = diag(1, 4), v = H: adam and the others but sgd come to z = H^-1 b; identity does not try."""
    h, b = torch.tensor([1.0, 4.0]), {"x": torch.tensor([2.0, 4.0])}
    system = System(lambda v: {"x": h * v["x"]}, b, 0.0, 4.0, lambda: {"x": h.square()}, 0.0)
    config = FitConfig(solver_steps=60)
    found = {name: solvers.get(name).solve(system, config).z["x"] for name in solvers.names()}
    assert list(found) == ["adam", "cg", "identity", "neumann", "sgd"]
    for name in ("adam", "cg", "neumann"):
        assert torch.allclose(found[name], torch.tensor([2.0, 1.0]), atol=1e-5), name
    assert torch.equal(found["identity"], b["x"])


def test_damping_of_cg_follows_from_the_norm_unless_given():
    cg = solvers.get("cg")
    assert cg.measures_norm(FitConfig()) and cg.damping(FitConfig(), 5.0) == pytest.approx(0.5)
    assert not cg.measures_norm(FitConfig(damping=1.0)) and cg.damping(FitConfig(damping=1.0), None) == 1.0


def test_an_unknown_solver_is_one_line(tmp_path):
    with pytest.raises(BilectError, match="solver: there is no solver 'neuman'; did you mean 'neumann'"):
        methods_of(parse_config(tiny_settings(tmp_path, fit={"solver": "neuman"})))
