"""The score model: scores do not depend on padding or company, and it is a Hugging Face model."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModel

from bilect.models.score_model import ScoreModel, ScoreModelConfig
from tests.helpers import KINDS, documents, tiny_lm

SCORERS: dict[tuple[str, str], ScoreModel] = {}


def scorer(kind: str, head: str = "linear") -> ScoreModel:
    if (kind, head) not in SCORERS:
        model = tiny_lm(kind, dtype=torch.float32, context=64)
        made = ScoreModel.from_causal_lm(model, torch.Generator().manual_seed(0), head).eval()  # type: ignore[arg-type]
        with torch.no_grad():
            made.linear.weight *= 30  # scores spread over about one unit
            made.linear.bias += 0.3
        SCORERS[kind, head] = made
    return SCORERS[kind, head]


def padded(rows: list[Tensor], side: str, width: int, pad: int) -> tuple[Tensor, Tensor]:
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        part = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, part], mask[i, part] = row, 1
    return ids, mask


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    extra=st.integers(0, 12),
    side=st.sampled_from(["left", "right"]),
    pad=st.sampled_from([0, 63]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["linear", "sigmoid"])
def test_padding_and_company_never_change_a_score(
    kind: str, head: str, lengths: list[int], extra: int, side: str, pad: int, seed: int
) -> None:
    model = scorer(kind, head)
    rows = [ids for ids, _ in documents(lengths, seed=seed)]
    ids, mask = padded(rows, side, max(lengths) + extra, pad)
    with torch.no_grad():
        alone = torch.stack([model(row[None]).scores[0] for row in rows])
        together = model(input_ids=ids, attention_mask=mask).scores
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
        shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(model(ids[shuffled], mask[shuffled]).scores, alone[shuffled], rtol=0, atol=1e-5)
        torch.testing.assert_close(model(ids, mask.bool()).scores, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_changes_a_gradient(side: str) -> None:
    model = scorer("gpt_neox")
    rows = [ids for ids, _ in documents((5, 9, 1))]
    ids, mask = padded(rows, side, 16, 0)
    params = [p for p in model.parameters() if p.requires_grad]
    weights = torch.tensor([1.0, -2.0, 0.5])
    together = torch.autograd.grad((weights * model(ids, mask).scores).sum(), params)
    alone = torch.autograd.grad((weights * torch.stack([model(r[None]).scores[0] for r in rows])).sum(), params)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    """``s = w' mean_t trunk(x)_t + b`` with the causal LM's own last hidden states; the sigmoid of it."""
    lm = tiny_lm(kind, dtype=torch.float32, context=64)
    ids, mask = padded([ids for ids, _ in documents((5, 9, 3))], "right", 12, 0)
    with torch.no_grad():
        hidden = getattr(lm, lm.base_model_prefix)(input_ids=ids).last_hidden_state
        linear, sigmoid = scorer(kind, "linear"), scorer(kind, "sigmoid")
        means = torch.stack([hidden[i, : int(n)].mean(0) for i, n in enumerate(mask.sum(1))])
        expected = means @ linear.linear.weight[0] + linear.linear.bias[0]
        torch.testing.assert_close(linear(ids, mask).scores, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sigmoid(ids, mask).scores, 1 / (1 + (-expected).exp()), rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.05 and not ((expected > 0) & (expected < 1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_trunk_starts_from_the_proxy_and_is_its_own(kind: str) -> None:
    lm = tiny_lm(kind, dtype=torch.float32)
    trunk = getattr(lm, lm.base_model_prefix)
    model = ScoreModel.from_causal_lm(lm, torch.Generator().manual_seed(0))
    assert model.config.head == "sigmoid"
    theirs = dict(trunk.named_parameters())
    assert dict(model.trunk.named_parameters()).keys() == theirs.keys()
    for k, p in model.trunk.named_parameters():
        assert torch.equal(p, theirs[k]) and p.data_ptr() != theirs[k].data_ptr()
    same, other = (ScoreModel.from_causal_lm(lm, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert torch.equal(same.linear.weight, model.linear.weight)
    assert not torch.equal(other.linear.weight, model.linear.weight)
    assert model.linear.weight.shape == (1, 16) and 0 < model.linear.weight.std() < 0.05
    assert not model.linear.bias.any()
    names = [k for k, _ in model.named_parameters()]
    assert not any("lm_head" in k or "embed_out" in k for k in names)
    score = model(documents([5])[0][0][None]).scores
    gradients = torch.autograd.grad(score.sum(), list(model.parameters()))
    assert len(gradients) == len(names)  # every parameter takes part


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["linear", "sigmoid"])
def test_saved_and_loaded_with_auto_model(kind: str, head: str, tmp_path: Path) -> None:
    model = scorer(kind, head)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is ScoreModel and loaded.config.head == head and not loaded.training
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ScoreModelConfig)
    for (k, p), (name, q) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert k == name and torch.equal(p, q)
        assert q.data_ptr() % 64 == 0  # not in the file's map, where products of matrix and vector round otherwise
    ids, mask = padded([ids for ids, _ in documents((5, 9, 3))], "right", 12, 0)
    with torch.no_grad():
        assert torch.equal(loaded(ids, mask).scores, model(ids, mask).scores)


def test_a_config_without_trunk_is_refused() -> None:
    with pytest.raises(ValueError, match="trunk"):
        ScoreModel(ScoreModelConfig())
