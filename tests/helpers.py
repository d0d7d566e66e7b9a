"""Tiny models and batches, and the quantities of docs/notation.md computed the long way round.

The references here use plain Hugging Face forward passes, one document at a time and without padding, and
``torch.nn.functional``: nothing of ``bilect`` but ``make_batch``.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bilect.data.batch import Batch, make_batch

Tree = dict[str, Tensor]
Documents = list[tuple[Tensor, int]]  # token ids; leading tokens that are given

KINDS = ("gpt_neox", "llama", "gpt2")

_CONFIGS: dict[str, Callable[[int, int, int, int], dict[str, Any]]] = {
    "gpt_neox": lambda width, layers, heads, context: {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 2 * width, "max_position_embeddings": context, "rotary_pct": 0.5,
        "tie_word_embeddings": False,
    },
    "llama": lambda width, layers, heads, context: {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 1,
        "intermediate_size": 2 * width, "max_position_embeddings": context, "tie_word_embeddings": True,
    },
    "gpt2": lambda width, layers, heads, context: {
        "n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": 2 * width, "n_positions": context,
    },
}  # fmt: skip


class _ExactRMSNorm(LlamaRMSNorm):
    """Hugging Face computes it in float32 whatever the input, which hides errors below 1e-7; same equation."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


def tiny_lm(
    kind: str = "gpt_neox", *, vocab: int = 64, width: int = 16, layers: int = 2, heads: int = 2, context: int = 32,
    seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 1.0, **more: Any,
) -> PreTrainedModel:  # fmt: skip
    """A causal LM all of whose parameters, biases and norms too, are away from their special initial values."""
    config = {
        "vocab_size": vocab,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **_CONFIGS[kind](width, layers, heads, context),
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**config, **more}), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            if p.ndim == 2:
                p.copy_(noise * (spread * (0.5 if p.shape[0] == vocab else p.shape[1] ** -0.5)))
            else:
                p.copy_(noise * 0.1 + (1.0 if name.endswith("weight") else 0.0))
    if dtype == torch.float64:
        for module in model.modules():
            if isinstance(module, LlamaRMSNorm):
                module.__class__ = _ExactRMSNorm
    return model.eval()


def documents(
    lengths: Sequence[int], given: Sequence[int] | None = None, *, vocab: int = 64, seed: int = 0
) -> Documents:
    generator = torch.Generator().manual_seed(seed)
    given = [1] * len(lengths) if given is None else given
    return [
        (torch.randint(1, vocab, (n,), generator=generator), g) for n, g in zip(lengths, given, strict=True)
    ]  # fmt: skip


def batch_of(docs: Documents, multiple: int = 8) -> Batch:
    return make_batch(docs, pad_id=0, multiple=multiple)


def math_kernel() -> AbstractContextManager[None]:
    """The attention kernel that can be differentiated twice."""
    return sdpa_kernel(SDPBackend.MATH)


def leaves(model: nn.Module) -> Tree:
    return {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}


def document_loss(model: PreTrainedModel, params: Tree, ids: Tensor, n_given: int) -> Tensor:
    """Mean of ``-log p(x_t | x_<t)`` over ``t = max(n_given, 1) ..``; zero where there is nothing to predict."""
    logits_TV = functional_call(model, params, (), {"input_ids": ids[None], "use_cache": False}).logits[0]
    first = max(n_given, 1)
    if first >= len(ids):
        return logits_TV.sum() * 0
    return nn.functional.cross_entropy(logits_TV[first - 1 : -1], ids[first:])


def reference_losses(model: PreTrainedModel, params: Tree, docs: Documents) -> Tensor:
    return torch.stack([document_loss(model, params, ids, given) for ids, given in docs])


def reference_kl(
    model: PreTrainedModel, params: Tree, target: PreTrainedModel, docs: Documents, reverse: bool
) -> Tensor:
    """Mean over all predicted tokens of all documents."""
    values = []
    for ids, given in docs:
        at = slice(max(given, 1) - 1, len(ids) - 1)
        call = {"input_ids": ids[None], "use_cache": False}
        p = functional_call(model, params, (), call).logits[0, at].log_softmax(-1)
        with torch.no_grad():
            q = target(**call).logits[0, at].log_softmax(-1)
        first, second = (p, q) if reverse else (q, p)
        values.append((first.exp() * (first - second)).sum(-1))
    return torch.cat(values).mean()


def reference_lower(
    model: PreTrainedModel, params: Tree, docs: Documents, weights: Tensor, *, target: PreTrainedModel | None = None,
    kl_coef: float = 0.0, l2_coef: float = 0.0, reverse: bool = False,
) -> Tensor:  # fmt: skip
    """g(theta), written out."""
    loss = (weights * reference_losses(model, params, docs)).sum()
    if target is not None:
        loss = loss + kl_coef * reference_kl(model, params, target, docs, reverse)
    return loss + l2_coef * sum(p.square().sum() for p in params.values())


def reference_upper(model: PreTrainedModel, params: Tree, docs: Documents) -> Tensor:
    """f(theta): the mean over tokens, not over documents."""
    counts = torch.tensor([len(ids) - max(given, 1) for ids, given in docs])
    return (reference_losses(model, params, docs) * counts).sum() / counts.sum()


def gradient_of(loss: Callable[[Tree], Tensor], params: Tree) -> Tree:
    leaf = {k: p.detach().clone().requires_grad_() for k, p in params.items()}
    return dict(zip(leaf, torch.autograd.grad(loss(leaf), list(leaf.values())), strict=True))


def flatten(tree: Tree) -> Tensor:
    return torch.cat([v.detach().reshape(-1) for v in tree.values()])


def unflatten(flat: Tensor, like: Tree) -> Tree:
    pieces = flat.split([v.numel() for v in like.values()])
    return {k: p.view_as(v) for (k, v), p in zip(like.items(), pieces, strict=True)}


def dense_hessian(loss: Callable[[Tree], Tensor], params: Tree) -> Tensor:
    """Row by row, by two backward passes each."""
    flat = flatten(params).requires_grad_()
    with math_kernel():
        (gradient,) = torch.autograd.grad(loss(unflatten(flat, params)), flat, create_graph=True)
        rows = [
            torch.autograd.grad(gradient, flat, part, retain_graph=True, is_grads_batched=True)[0]
            for part in torch.eye(len(flat), dtype=flat.dtype).split(64)
        ]
    return torch.cat(rows)


def random_like(params: Tree, seed: int = 1) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for k, p in params.items()}


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


class TableScores(nn.Module):
    """One free score per document, told apart by the document's first token."""

    def __init__(self, first_tokens: Sequence[int], scores: Tensor | None = None, vocab: int = 64) -> None:
        super().__init__()
        place = torch.full((vocab,), -1)
        place[torch.tensor(first_tokens)] = torch.arange(len(first_tokens))
        self.place = place
        self.free = nn.Parameter(
            torch.zeros(len(first_tokens), dtype=torch.float64) if scores is None else scores.clone()
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **promised: bool) -> Any:
        from bilect.models.score_model import ScoreOutput

        return ScoreOutput(scores=self.free[self.place[input_ids[:, 0]]])
