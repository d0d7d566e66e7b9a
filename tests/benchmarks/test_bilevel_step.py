"""The plain rendition of the published step and ours take the same step, to rounding."""

import copy
import itertools
from typing import Any

import pytest
import torch

from benchmarks._published_step import PublishedStep
from bilect.bilevel.offline.fit import BilevelFit
from bilect.config import FitConfig
from bilect.data.batch import Batch, make_batch
from bilect.models.loading import load_causal_lm
from bilect.models.score_model import ScoreModel

VOCABULARY = 61
MODEL = {
    "model_type": "gpt_neox",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _batch(seed: int, lengths: tuple[int, ...]) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return make_batch([(torch.randint(1, VOCABULARY, (n,), generator=generator), 1) for n in lengths], pad_id=0)


def _config(**more: Any) -> FitConfig:
    return FitConfig(
        solver="sgd",
        standardise=False,
        l2_coef=1e-3,
        proxy_learning_rate=1e-3,
        score_learning_rate=1e-3,
        warmup_ratio=0.0,
        **more,
    )


def _run(kind: type, config: FitConfig) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of the score model at two steps, and the proxy afterwards."""
    proxy = load_causal_lm(MODEL, vocab_size=VOCABULARY).double()
    target = load_causal_lm(MODEL, vocab_size=VOCABULARY, seed=1).double()
    score_model = ScoreModel.from_causal_lm(copy.deepcopy(proxy), torch.Generator().manual_seed(2)).double()
    lower = itertools.cycle([_batch(3, (9, 17, 12)), _batch(4, (20, 5, 8))])
    fit = kind(proxy, score_model, target, lower, itertools.cycle([_batch(5, (11, 6))]), config)
    gradients: list[torch.Tensor] = []

    def record(*_: Any) -> None:
        gradients.append(torch.cat([p.grad.flatten() for p in score_model.parameters() if p.grad is not None]))

    fit.score_optimizer.register_step_pre_hook(record)
    for _ in range(2):
        fit.step()
    return gradients, {k: v.detach() for k, v in proxy.named_parameters()}


@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        ({"hvp": "exact", "directional": "jvp"}, 1e-6),
        ({"hvp": "exact", "directional": "ghost", "inner_steps": 2}, 1e-6),
        ({"hvp": "finite_difference", "directional": "finite_difference"}, 1e-5),
        ({"hvp": "forward_difference", "directional": "finite_difference"}, 1e-4),
    ],
)
def test_same_score_gradient_as_published(more: dict[str, Any], tolerance: float) -> None:
    plain, plain_proxy = _run(PublishedStep, _config(grad_clip=1e6, **more))
    ours, our_proxy = _run(BilevelFit, _config(grad_clip=1e6, **more))
    for a, b in zip(ours, plain, strict=True):
        assert float(b.norm()) > 0
        assert float((a - b).norm() / b.norm()) <= tolerance
    for name, value in plain_proxy.items():  # key biases have no gradient but rounding, which AdamW scales up to 1e-6
        torch.testing.assert_close(our_proxy[name], value, rtol=0, atol=1e-5)
