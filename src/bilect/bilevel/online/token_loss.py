"""Token losses of any causal LM, computed inside its own forward call.

The output head is replaced, for the length of one call, by a function that takes the last hidden states and gives
losses. So whatever is wrapped around the model - DDP, FSDP2, ``torch.compile``, PEFT - sees an ordinary forward pass
that returns a loss, and logits never exist for more than a chunk of tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bilect.bilevel.online.kernel import Kernel, agreeing_kernel, applies
from bilect.bilevel.online.wrappers import computing, is_linear, unwrap
from bilect.data.batch import IGNORE
from bilect.errors import BilectError
from bilect.functional.losses import Head, token_losses, weighted_token_loss
from bilect.models.causal_lm import instead
from bilect.models.output_head import check_output, scale_and_cap
from bilect.runtime import distributed

__all__ = ["TokenBatch", "TokenForward", "evaluating"]

NOT_FOR_THE_MODEL = ("labels", "source", "num_items_in_batch")


@dataclass(frozen=True)
class TokenBatch:
    """A batch in the convention of transformers, with its N learned tokens listed once.

    Attributes:
        inputs: what the model is called with.
        at_N: flat position (row * T + column) that predicts each learned token.
        labels_N: the learned tokens: label not -100, attention mask, where there is one, not 0.
        shape: (B, T).
        source_B: label of each sequence's source, or None.
    """

    inputs: dict[str, Any]
    at_N: Tensor
    labels_N: Tensor
    shape: tuple[int, int]
    source_B: tuple[str, ...] | None = None

    @staticmethod
    def of(batch: Mapping[str, Any]) -> "TokenBatch":
        """Read a batch with ``input_ids`` and ``labels``, which are shifted here as transformers does.

        Raises:
            BilectError: one of them is missing, or they differ in shape.
        """
        if "labels" not in batch or "input_ids" not in batch:
            raise BilectError(f"a batch needs input_ids and labels, this one has: {', '.join(sorted(batch))}")
        labels_BT = batch["labels"]
        if labels_BT.shape != batch["input_ids"].shape or labels_BT.ndim != 2:
            raise BilectError(f"input_ids {tuple(batch['input_ids'].shape)} and labels {tuple(labels_BT.shape)} differ")
        n_rows, width = labels_BT.shape
        learned_BT = labels_BT[:, 1:] != IGNORE
        attention_mask = batch.get("attention_mask")
        if attention_mask is not None and attention_mask.shape == labels_BT.shape:
            learned_BT = learned_BT & (attention_mask[:, 1:] != 0)
        row_N, column_N = torch.nonzero(learned_BT, as_tuple=True)
        source = batch.get("source")
        return TokenBatch(
            {k: v for k, v in batch.items() if k not in NOT_FOR_THE_MODEL},
            row_N * width + column_N,
            labels_BT[:, 1:][row_N, column_N],
            (n_rows, width),
            None if source is None else tuple(str(s.item() if isinstance(s, Tensor) else s) for s in source),
        )

    @property
    def n(self) -> int:
        """N."""
        return int(self.labels_N.shape[0])

    @property
    def row_N(self) -> Tensor:
        """The sequence of each learned token."""
        return self.at_N // self.shape[1]

    def grid(self, value_N: Tensor, fill: float | bool) -> Tensor:
        """Values (B, T) at the places of the learned tokens themselves, one to the right of what predicts them."""
        grid = torch.full((self.shape[0] * self.shape[1],), fill, dtype=value_N.dtype, device=value_N.device)
        grid[self.at_N + 1] = value_N
        return grid.view(self.shape)

    def map(self, change: Callable[[Tensor], Tensor]) -> "TokenBatch":
        """The same with every tensor changed, for instance cloned or moved."""
        inputs = {k: change(v) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        return TokenBatch(inputs, change(self.at_N), change(self.labels_N), self.shape, self.source_B)

    def state_dict(self) -> dict[str, Any]:
        """Its parts, in plain types."""
        return dict(vars(self))

    @staticmethod
    def from_state(state: dict[str, Any]) -> "TokenBatch":
        """From ``state_dict``."""
        return TokenBatch(**state)


class TokenForward:
    """One causal LM, called for token losses.

    Args:
        model: the causal LM, wrapped or not.

    Attributes:
        base: what is inside the wrappers.
        vocabulary: ids that the logits are of.

    Raises:
        BilectError: it has no trunk or head of the usual form.
    """

    def __init__(self, model: nn.Module) -> None:
        base = unwrap(model)
        self.base = base
        head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        trunk = getattr(base, getattr(base, "base_model_prefix", "") or "", None)
        if not isinstance(trunk, nn.Module) or not isinstance(head, nn.Module):
            raise BilectError(f"{type(base).__name__} is not a causal LM with a trunk and an output head")
        self.trunk = trunk
        self._form = scale_and_cap(base.config)
        self._work: Callable[[Tensor, Head | None], Tensor] | None = None
        self._own_head: Callable[[Tensor], Tensor] = head.forward  # what ``instead`` has put aside
        self._kernel: Kernel | None = None
        self._kernel_known = False
        self.vocabulary = self._check()

    @property
    def head(self) -> nn.Module:
        """The output head, asked for anew: adapters come and go."""
        found: nn.Module = computing(self.base.get_output_embeddings())
        return found

    @torch.no_grad()
    def losses(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Cross-entropy of every learned token (N,), without gradient."""
        loss_N = self._run(model, batch, lambda hidden, head: self._all_losses(hidden, head, batch))
        distributed.reshard(self.base)
        torch.clear_autocast_cache()  # it now holds copies of the weights that no gradient would reach
        return loss_N

    def loss(self, model: nn.Module, batch: TokenBatch, weight: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
        """``sum_n a_n l_n``, a scalar whose backward pass goes through the head for the tokens with a_n != 0 only.

        Args:
            model: what to call: ``base``, or a wrapper of it.
            batch: tokens.
            weight: a (N,), or a function that gives it from the losses (N,) of this same forward pass; both constant.
        """

        def work(hidden_PD: Tensor, head: Head | None) -> Tensor:
            if callable(weight):
                with torch.no_grad():
                    weight_N = weight(self._all_losses(hidden_PD, head, batch))
                    torch.clear_autocast_cache()  # as in ``losses``
            else:
                weight_N = weight
            kept = torch.nonzero(weight_N)[:, 0]
            hidden_KD, labels_K = hidden_PD.index_select(0, batch.at_N[kept]), batch.labels_N[kept]
            if head is None:
                loss_K = self._losses_by_logits(hidden_KD, labels_K)
                return torch.dot(weight_N[kept].to(loss_K.dtype), loss_K)
            if (kernel := self._gpu_kernel(hidden_KD, head, labels_K)) is not None:
                return torch.dot(weight_N[kept].float(), kernel(hidden_KD, head, labels_K))
            return weighted_token_loss(hidden_KD, head, labels_K, weight_N[kept])[0]

        return self._run(model, batch, work)

    def _all_losses(self, hidden_PD: Tensor, head: Head | None, batch: TokenBatch) -> Tensor:
        hidden_ND = hidden_PD.index_select(0, batch.at_N)
        if head is None:
            return self._losses_by_logits(hidden_ND, batch.labels_N)
        if (kernel := self._gpu_kernel(hidden_ND, head, batch.labels_N)) is not None:
            return kernel(hidden_ND, head, batch.labels_N)
        return token_losses(hidden_ND, head, batch.labels_N).ce_N

    def _losses_by_logits(self, hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
        """By a head that is more than one matrix, in chunks whose logits the backward pass computes again."""
        own_head, plain = self._own_head, Head(hidden_ND[:0], None, *self._form)

        def part(hidden_MD: Tensor, labels_M: Tensor) -> Tensor:
            logits_MV = plain.transform(own_head(hidden_MD))
            return nn.functional.cross_entropy(logits_MV, labels_M, reduction="none")

        size = max(128, (1 << 24) // self.vocabulary)
        pieces = zip(hidden_ND.split(size), labels_N.split(size), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([part(h, y) for h, y in pieces])
        return torch.cat([checkpoint(part, h, y, use_reentrant=False) for h, y in pieces])

    def _gpu_kernel(self, hidden_ND: Tensor, head: Head, labels_N: Tensor) -> Kernel | None:
        if not applies(hidden_ND, head):
            return None
        if not self._kernel_known:
            self._kernel, self._kernel_known = agreeing_kernel(hidden_ND, head, labels_N), True
        return self._kernel

    def _run(self, model: nn.Module, batch: TokenBatch, work: Callable[[Tensor, Head | None], Tensor]) -> Tensor:
        head = self.head
        self._work, self._own_head = work, head.forward
        try:
            with instead(self.base, self._forward), instead(head, self._forward_head):
                result: Tensor = model(**batch.inputs)["loss"]
                return result
        finally:
            self._work = None

    def _forward(self, **inputs: Any) -> Any:
        given = {k: v for k, v in inputs.items() if v is not None}
        return self.base.get_output_embeddings()(self.trunk(**given, use_cache=False).last_hidden_state)

    @torch.compiler.disable
    def _forward_head(self, hidden_BTD: Tensor) -> dict[str, Tensor]:
        assert self._work is not None
        module: Any = self.head
        head = Head(module.weight, module.bias, *self._form) if is_linear(module) else None
        return {"loss": self._work(hidden_BTD.flatten(0, 1), head)}

    def _check(self) -> int:
        head: Any = self.head
        n_ids = int(self.base.config.get_text_config().vocab_size)

        def product(hidden_BTD: Tensor) -> Tensor:
            return nn.functional.linear(hidden_BTD, head.weight, head.bias)

        linear = product if is_linear(head) else None
        try:
            with evaluating(self.base):
                return check_output(self.base, self.trunk, head, n_ids, form=self._form, product=linear)
        finally:
            distributed.reshard(self.base)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, every module's own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
