"""How often each step makes the host wait for the device, and how many launches it takes: no more than here."""

from collections import Counter

import pytest
import torch

from benchmarks.hot_path import Waits, count, steps

HIDDEN = "causal_lm.hidden"  # transformers looks whether documents are packed, once in each forward pass
SCORE = "score_model.forward"  # the same
# Adam's count of steps is on the host
WAITS: dict[str, Counter[str]] = {
    "fit": Counter({HIDDEN: 5, SCORE: 1, "fit._fetched": 1, "linear_solve.second_moment_of": 1}),
    "fit, ghost": Counter({HIDDEN: 4, SCORE: 1, "fit._fetched": 1, "linear_solve.second_moment_of": 1}),
    "fit, cg": Counter({HIDDEN: 8, SCORE: 1, "fit._fetched": 1, "linear_solve.cg": 3}),
    "fit, sgd as published": Counter({HIDDEN: 9, SCORE: 1, "fit._fetched": 1}),
    "fit, penalty": Counter({HIDDEN: 12, SCORE: 3, "fit._fetched": 1}),
    "influence of a batch, finite_difference": Counter({HIDDEN: 2, "": 1}),
    "influence of a batch, jvp": Counter({HIDDEN: 1, "": 1}),
    "influence of a batch, ghost": Counter({HIDDEN: 1, "": 1}),
    "losses of a batch (excess)": Counter({HIDDEN: 1, "": 1}),
    # the learned tokens and the chosen ones are found by value
    "BLADE": Counter({"token_loss._forward": 2, "token_loss.of": 1, "token_loss.work": 1}),
    "BLADE, all tokens": Counter({"token_loss._forward": 1, "token_loss.of": 1, "token_loss.work": 1}),
    "training": Counter({HIDDEN: 1, "trainer.forward": 1}),
}
LAUNCHES = {"fit": 1000, "BLADE": 300, "training": 200}  # at most


@pytest.fixture(scope="module")
def made():
    return steps(torch.device("cpu"))


def test_every_hot_path_is_counted(made):
    assert made.keys() == WAITS.keys()


@pytest.mark.parametrize("name", WAITS)
def test_a_step_waits_no_more_than_it_must(made, name):
    found = count(made[name])
    assert found.at == WAITS[name]
    assert found.launches <= LAUNCHES.get(name, found.launches)


def test_what_counts_as_waiting():
    x = torch.arange(4.0)
    with Waits() as waits:
        y = x * 2 + x
        y.view(2, 2)
        y.masked_fill_(x > 2, 0.0)
        torch._foreach_mul([x, y], 2.0)
    assert waits.at.total() == 0 and waits.launches == 5  # two, none, two, one
    for ask in (float, lambda x: bool(x.sum() > 0), lambda x: x[x > 2], torch.nonzero, torch.Tensor.tolist,
                torch.Tensor.cpu, lambda x: torch.bincount(x.long())):  # fmt: skip
        with Waits() as waits:
            ask(x[:1])
        assert waits.at == {"": 1}, ask


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [name for name in WAITS if name.startswith(("fit", "influence", "losses"))])
def test_a_gpu_gives_what_a_cpu_does(made, name):
    ours, theirs = (s[name]() for s in (steps(torch.device("cpu")), steps(torch.device("cuda"))))
    if isinstance(ours, dict):
        ours, theirs = ([figures[k] for k in ("lower_loss", "upper_loss", "score_mean", "d_std")]
                        for figures in (ours, theirs))  # fmt: skip
    assert theirs == pytest.approx(ours, rel=1e-2, abs=1e-4)
