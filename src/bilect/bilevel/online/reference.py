"""The reference w of BLADE: a second model of the same form, with an optimiser of its own.

Every ``sync_every`` training steps (BLADE, arXiv 2606.18650, section 3)

    w <- u;   K steps of a fresh AdamW on   H(w) = L_val(w) + lambda * L_tr(alpha, w);   then w is frozen

u in half precision would hardly move: its weights are further apart than a step is long. So w takes its steps in
float32, with matrix products in bfloat16, and is brought to the dtype of u when it is frozen.

L_val is the mean loss of an upper batch's learned tokens, L_tr that of a lower batch's selected tokens, both over all
ranks. The matched twin m takes the same steps without L_val.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bilect.bilevel.online.token_loss import TokenBatch, TokenForward
from bilect.bilevel.online.wrappers import unwrap
from bilect.errors import BilectError
from bilect.runtime import distributed

__all__ = ["Reference", "copy_of", "distance"]


def copy_of(model: nn.Module) -> nn.Module:
    """A copy for the reference. Frozen parameters are shared: with LoRA only the adapter exists twice.

    Raises:
        BilectError: the model cannot be copied (FSDP2).
    """
    base = unwrap(model)
    # buffers are small and may be written to: those are copied
    memo: dict[int, Any] = {id(p): p for p in base.parameters() if not p.requires_grad}
    try:
        twin = copy.deepcopy(base, memo)
    except AssertionError as error:
        raise BilectError(
            "a sharded model cannot be copied: pass reference=FUNCTION that builds and shards another one like it"
        ) from error
    vars(twin).pop("forward", None)  # what others (TRL) have put in its place may still call the model itself
    compiler: Any = getattr(model, "dynamo_ctx", None)
    return twin if compiler is None else compiler(twin)  # compiled as the model is


class Reference:
    """A model that follows another one.

    Args:
        model: what the losses are asked of; in evaluation mode from here on, so no step draws random numbers.
        learning_rate: of its AdamW.
        grad_clip: greatest gradient norm.
        dtype: of its parameters while it is frozen; None for its own. Its steps are taken in float32 or better.
        offload: keep its parameters in the CPU's memory while it is not used.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float = 1e-4,
        grad_clip: float = 1.0,
        dtype: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:
        self.model = model.eval()
        self.forward = TokenForward(model)
        self.learning_rate, self.grad_clip, self.dtype = learning_rate, grad_clip, dtype
        self.own = {k: p for k, p in self.forward.base.named_parameters() if p.requires_grad}
        self._given_dtype = {k: p.dtype for k, p in self.own.items()}
        self._full_dtype = {k: torch.promote_types(p.dtype, torch.float32) for k, p in self.own.items()}
        self._half = self._full_dtype != self._given_dtype
        self._device = next(iter(self.forward.base.parameters())).device
        self.offload = offload and self._device.type != "cpu"
        self.sharded = any(distributed.is_sharded(p) for p in self.own.values())
        if self.sharded and (self.offload or dtype is not None):
            raise BilectError(
                "a sharded reference takes its dtype and its place from its own fully_shard, not from here"
            )
        self.optimizer: torch.optim.AdamW | None = None

    @torch.no_grad()
    def follow(self, base: nn.Module) -> None:
        """``w <- u`` and a fresh AdamW; then ``step``, then ``freeze``.

        Raises:
            BilectError: a sharded reference in half precision.
        """
        if self.sharded and self._half:
            raise BilectError("a sharded reference needs float32 parameters to learn: build it in float32, with "
                              "MixedPrecisionPolicy(param_dtype=torch.bfloat16) in fully_shard")  # fmt: skip
        self._place(self._full_dtype, self._device)
        distributed.reshard(base)
        source = dict(base.named_parameters())
        for k, p in self.own.items():
            distributed.local_part(p).copy_(distributed.local_part(source[k]))
        self._start()

    def _start(self) -> None:
        self.optimizer = torch.optim.AdamW(self.own.values(), lr=self.learning_rate, weight_decay=0.0)

    def step(self, terms: list[tuple[TokenBatch, Tensor]]) -> None:
        """One AdamW step on a sum of weighted token losses.

        Args:
            terms: batches and weights as ``choice.token_mean`` gives them.
        """
        assert self.optimizer is not None, "follow() comes first"
        for batch, weight_N in terms:
            mixed = torch.autocast(self._device.type, torch.bfloat16) if self._half else nullcontext()
            with torch.enable_grad(), mixed:
                loss = self.forward.loss(self.model, batch, weight_N)
                with torch.autocast(loss.device.type, enabled=False):
                    loss.backward()
        if not self.sharded and distributed.world_size() > 1:
            world = distributed.world_size()
            gradients = {k: torch.zeros_like(p) if p.grad is None else p.grad / world for k, p in self.own.items()}
            for k, gradient in distributed.sum_tree(gradients).items():
                self.own[k].grad = gradient
        torch.nn.utils.clip_grad_norm_(self.own.values(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()  # else the next step of the caller's autocast region reads the old weights

    def freeze(self) -> None:
        """No optimiser any more; in the dtype and the place of a frozen reference."""
        self.optimizer = None
        self._place(self.dtype or self._given_dtype, torch.device("cpu") if self.offload else self._device)

    def losses(self, batch: TokenBatch) -> Tensor:
        """Loss of every learned token under w, (N,) without gradient."""
        with self._present():
            return self.forward.losses(self.model, batch)

    def _place(self, dtype: torch.dtype | dict[str, torch.dtype] | None, device: torch.device) -> None:
        for k, p in self.own.items():
            wanted = dtype[k] if isinstance(dtype, dict) else dtype
            if not self.sharded and ((wanted or p.dtype) != p.dtype or p.device != device):
                p.data = p.data.to(device=device, dtype=wanted or p.dtype)

    @contextmanager
    def _present(self) -> Iterator[None]:
        if not self.offload or self.optimizer is not None:
            yield
            return
        kept = {k: p.data for k, p in self.own.items()}
        self._place(None, self._device)
        try:
            yield
        finally:  # w did not change: what came is dropped, nothing is copied back
            for k, p in self.own.items():
                p.data = kept[k]

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of w and, between two of the K steps, of its optimiser."""
        return {
            "own": {k: distributed.local_part(p).detach().clone() for k, p in self.own.items()},
            "optimizer": None if self.optimizer is None else _local(self.optimizer.state_dict()),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Back to where the state was taken; its tensors may be whole where those here are sharded."""
        self._place(self._full_dtype, self._device)
        for k, p in self.own.items():
            distributed.local_part(p).copy_(distributed.rows_of(p, state["own"][k]))
        if state["optimizer"] is None:
            self.freeze()
            return
        self._start()
        assert self.optimizer is not None
        if self.sharded and state["optimizer"]["state"]:  # gives the moments their sharded form
            for p in self.own.values():
                p.grad = torch.zeros_like(p)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            for k, p in self.own.items():
                distributed.local_part(p).copy_(distributed.rows_of(p, state["own"][k]))
            for i, p in enumerate(self.own.values()):
                for name, value in state["optimizer"]["state"][i].items():
                    slot = self.optimizer.state[p][name]
                    distributed.local_part(slot).copy_(distributed.rows_of(slot, value))
        else:
            self.optimizer.load_state_dict(state["optimizer"])


def _local(state: dict[str, Any]) -> dict[str, Any]:
    parts = {
        i: {k: distributed.local_part(v).detach().clone() if isinstance(v, Tensor) else v for k, v in own.items()}
        for i, own in state["state"].items()
    }
    return {**state, "state": parts}


@torch.no_grad()
def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """``||a - b||`` over the parameters of both, over all ranks where they are sharded."""
    total, sharded = 0.0, False
    for k in a:
        x, y = distributed.local_part(a[k]), distributed.local_part(b[k])
        total += float((x.float() - y.to(x.device).float()).square().sum())
        sharded = sharded or distributed.is_sharded(a[k])
    return float(distributed.sum_scalar(total) if sharded else total) ** 0.5
