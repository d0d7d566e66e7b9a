"""A causal LM split into trunk and head gives the model's own logits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from bilect.errors import BilectError
from bilect.models.causal_lm import CausalLM
from bilect.models.presets import PRESETS, preset_config
from tests.helpers import KINDS, documents, random_like, tiny_lm

IDS = torch.stack([ids for ids, _ in documents((9, 9, 9))])


def logits(lm: CausalLM, params: dict[str, Tensor] | None = None) -> Tensor:
    return lm.head(params).logits(lm.hidden(IDS, params))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_split_equals_the_whole(kind: str, tied: bool) -> None:
    model = tiny_lm(kind, tie_word_embeddings=tied)
    lm = CausalLM(model)
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
        assert whole.std() > 0.5
        torch.testing.assert_close(logits(lm), whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logits(lm, lm.params()), whole, rtol=1e-12, atol=1e-12)
        own = {k: p.clone() for k, p in lm.params().items()}
        moved = {k: p + 0.1 * r for (k, p), r in zip(own.items(), random_like(own).values(), strict=True)}
        other = logits(lm, moved)
        assert all(torch.equal(p, own[k]) for k, p in lm.params().items())
        for k, p in lm.params().items():
            p.copy_(moved[k])
        torch.testing.assert_close(other, model(input_ids=IDS).logits, rtol=1e-12, atol=1e-12)
    embeddings = [k for k, p in lm.params().items() if p.shape == (64, 16)]
    assert len(embeddings) == (1 if tied else 2) and lm.vocabulary == 64
    assert set(lm.head_names) <= set(lm.params()) and len(lm.head_names) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_given_parameters(kind: str) -> None:
    """A tied embedding gets its part from both ends."""
    model = tiny_lm(kind, tie_word_embeddings=True)
    lm = CausalLM(model)
    leaf = {k: p.detach().clone().requires_grad_() for k, p in lm.params().items()}
    actual = torch.autograd.grad(logits(lm, leaf).log_softmax(-1)[..., 3].sum(), list(leaf.values()))
    expected = torch.autograd.grad(model(input_ids=IDS).logits.log_softmax(-1)[..., 3].sum(), list(model.parameters()))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("gptj", {"rotary_dim": 4}),  # a head with a bias
    ],
)
def test_known_transforms_of_logits(kind: str, more: dict[str, Any]) -> None:
    base = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = (
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
        if kind == "gptj"
        else {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
              "intermediate_size": 32, "max_position_embeddings": 32}
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **base, **sizes, **more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5) if p.ndim == 2 else p.add_(0.1 * torch.randn(p.shape))
        lm = CausalLM(model)
        whole = model(input_ids=IDS).logits
        torch.testing.assert_close(logits(lm), whole, rtol=1e-4, atol=1e-4)
        assert (lm.head().bias_V is not None) == (kind == "gptj") and len(lm.head_names) == 1 + (kind == "gptj")


class _Transformed(nn.Module):
    """Something a future architecture may do between its head and its logits."""

    def __init__(self, model: nn.Module, transform: Any) -> None:
        super().__init__()
        forward = model.forward

        def changed(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            out.logits = transform(out.logits)
            return out

        model.forward = changed


@pytest.mark.parametrize(
    "transform",
    [lambda x: 1.3 * x, lambda x: 30 * torch.tanh(x / 30), lambda x: x + 1, lambda x: x.clamp(max=5.0)],
    ids=["scale", "softcap", "shift", "clamp"],
)
@pytest.mark.parametrize("spread", [1.0, 0.02])
def test_an_unknown_transform_of_logits_is_refused(transform: Any, spread: float) -> None:
    """Also on a model at its initial weights, whose logits are small: the transform bites when it is trained."""
    model = tiny_lm("llama", dtype=torch.float32, spread=spread)
    CausalLM(model)
    _Transformed(model, transform)
    with pytest.raises(BilectError, match="LlamaForCausalLM transforms its logits"):
        CausalLM(model)


def test_refuses_what_is_no_causal_lm() -> None:
    config = AutoConfig.for_model("gpt_neox", hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                  intermediate_size=32, vocab_size=64)  # fmt: skip
    with pytest.raises(BilectError, match="not a causal LM"):
        CausalLM(AutoModel.from_config(config))


def test_is_in_evaluation_mode() -> None:
    model = tiny_lm("gpt2").train()
    lm = CausalLM(model)
    assert not model.training
    assert torch.equal(lm.hidden(IDS), lm.hidden(IDS))  # GPT-2 has dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_passes_in_low_precision(dtype: torch.dtype) -> None:
    for kind in KINDS:
        CausalLM(tiny_lm(kind, dtype=dtype))


def test_check_passes_where_a_trainer_has_put_autocast_around_a_deep_model() -> None:
    """In float32 its logits differ from its own in bfloat16 by more than rounding does: 30 layers of SmolLM2 do so."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=24,
                                  num_attention_heads=2, initializer_range=0.5)  # fmt: skip
    plain = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        float32 = plain(input_ids=IDS).logits
    forward = plain.forward

    def mixed(**inputs: Any) -> Any:  # as accelerate does
        with torch.autocast("cpu", torch.bfloat16):
            output = forward(**inputs)
        output.logits = output.logits.float()
        return output

    plain.forward = mixed
    with torch.no_grad():
        own = plain(input_ids=IDS).logits
    assert (own - float32).abs().max() > 0.05 * own.abs().max()
    lm = CausalLM(plain)
    assert torch.equal(logits(lm), float32)  # what wraps the call is no part of trunk and head
    _Transformed(plain, lambda x: 1.3 * x)
    with pytest.raises(BilectError, match="LlamaForCausalLM transforms its logits"):
        CausalLM(plain)


@pytest.mark.parametrize(("name", "millions"), [("pythia-14m", 14.1), ("pythia-31m", 30.5), ("pythia-70m", 70.4)])
def test_presets_have_the_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**preset_config(name)))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_presets_are_copies() -> None:
    assert preset_config("tiny-100k", 99)["vocab_size"] == 99
    assert PRESETS["tiny-100k"]["vocab_size"] != 99
    assert all(math.isclose(c["intermediate_size"], 4 * c["hidden_size"]) for c in PRESETS.values())
