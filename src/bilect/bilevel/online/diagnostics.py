"""What an online selection does, seen every so many steps: one plain dict each, for the report.

    step, kept                     share of the learned tokens that is selected
    delta                          quantiles of Delta; share_positive: share of tokens with Delta > 0 (not of a random
                                   selection)
    distance_reference             ||u - w||
    distance_last_sync             ||u - u at the last synchronisation||
    sources                        per source: its learned tokens and the share of them that is selected
    agreement                      overlap |A and B| / |A or B| of this and the previous selection of one probe batch
    oracle_loss                    mean loss of the oracle on selected and on all tokens
    documents                      token ids, Delta and mask of a few sequences

Figures are of the batch of all ranks, documents of this rank's. BLADE, arXiv 2606.18650, figures 2 to 4.
"""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from bilect.bilevel.online.reference import Reference, distance
from bilect.bilevel.online.token_loss import TokenBatch, TokenForward
from bilect.runtime import distributed

__all__ = ["QUANTILES", "Watcher"]

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
DOCUMENTS, TOKENS_SHOWN = 2, 256


class Selecting(Protocol):
    """What is watched."""

    steps: int
    selection: Literal["excess", "random"]

    @property
    def reference(self) -> Reference | None: ...

    def select(self, tokens: TokenBatch) -> Tensor: ...


class Watcher:
    """Keeps the entries, the probe batch and the model as it was at the last synchronisation.

    Args:
        forward: of the model in training.
        every: steps between entries.
        oracle: a strong model, or None.
    """

    def __init__(self, forward: TokenForward, every: int, oracle: nn.Module | None) -> None:
        self.forward, self.every = forward, every
        self.oracle = None if oracle is None else TokenForward(oracle.eval())
        self.seen: list[dict[str, Any]] = []
        self._probe: TokenBatch | None = None
        self._probe_mask_N: Tensor | None = None
        self._last_sync: dict[str, Tensor] | None = None

    @torch.no_grad()
    def synchronised(self) -> None:
        """Remember u, in the CPU's memory."""
        distributed.reshard(self.forward.base)
        self._last_sync = {
            k: distributed.local_part(p).detach().to("cpu", copy=True)
            for k, p in self.forward.base.named_parameters()
            if p.requires_grad
        }

    @torch.no_grad()
    def look(self, selector: Selecting, tokens: TokenBatch, delta_N: Tensor | None, mask_N: Tensor) -> None:
        """Add an entry, if one is due and the batch was selected from."""
        if selector.steps % self.every or delta_N is None:
            return
        delta_M, mask_M = distributed.gather_rows(delta_N)[0].float(), distributed.gather_rows(mask_N)[0]
        entry: dict[str, Any] = {"step": selector.steps, "kept": _mean(mask_M)}
        if selector.selection == "random":  # what it chose by are random numbers
            delta_N = torch.full_like(delta_N, float("nan"))
        elif len(delta_M):
            at = torch.tensor(QUANTILES, device=delta_M.device)
            values = torch.quantile(delta_M[:: 1 + len(delta_M) // 10_000_000], at)  # its limit is 16M values
            entry["delta"] = dict(zip(map(str, QUANTILES), values.tolist(), strict=True))
            entry["share_positive"] = _mean(delta_M > 0)
        distributed.reshard(self.forward.base)  # its backward pass gathers them again
        own = {k: p for k, p in self.forward.base.named_parameters() if p.requires_grad}
        reference = selector.reference
        if reference is not None and reference.own.keys() == own.keys():
            entry["distance_reference"] = distance(own, reference.own)
        if self._last_sync is not None:
            entry["distance_last_sync"] = distance(own, self._last_sync)
        entry["sources"] = _sources(tokens, mask_N)
        entry["agreement"] = self._agreement(selector, tokens)
        if self.oracle is not None:
            loss_M = distributed.gather_rows(self.oracle.losses(self.oracle.base, tokens))[0]
            entry["oracle_loss"] = {"selected": _mean(loss_M[mask_M]), "all": _mean(loss_M)}
        entry["documents"] = _documents(tokens, delta_N, mask_N)
        self.seen.append(entry)

    def _agreement(self, selector: Selecting, tokens: TokenBatch) -> float | None:
        if selector.selection == "random":
            return None
        if self._probe is None:
            self._probe = tokens.map(torch.clone)
        mask_N = selector.select(self._probe)
        before, self._probe_mask_N = self._probe_mask_N, mask_N
        if before is None:
            return None
        both, either = float((before & mask_N).sum()), float((before | mask_N).sum())
        return distributed.sum_scalar(both) / max(distributed.sum_scalar(either), 1.0)

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain types and tensors."""
        return {
            "seen": list(self.seen),
            "probe": None if self._probe is None else self._probe.state_dict(),
            "probe_mask": self._probe_mask_N,
            "last_sync": self._last_sync,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken."""
        device = next(self.forward.base.parameters()).device
        self.seen = list(state["seen"])
        probe = state["probe"]
        self._probe = None if probe is None else TokenBatch.from_state(probe).map(lambda x: x.to(device))
        self._probe_mask_N = None if state["probe_mask"] is None else state["probe_mask"].to(device)
        self._last_sync = state["last_sync"]
        if self._last_sync is not None:  # of other ranks: whole
            own = dict(self.forward.base.named_parameters())
            self._last_sync = {k: distributed.rows_of(own[k], value) for k, value in self._last_sync.items()}


def _mean(x: Tensor) -> float:
    return float(x.float().mean()) if x.numel() else 0.0


def _sources(tokens: TokenBatch, mask_N: Tensor) -> dict[str, dict[str, float]]:
    """Learned tokens of each source, and the share of them that is selected, over all ranks."""
    own: dict[str, list[int]] = {}
    if tokens.source_B is not None:
        learned_B = torch.bincount(tokens.row_N, minlength=tokens.shape[0]).tolist()
        selected_B = torch.bincount(tokens.row_N[mask_N], minlength=tokens.shape[0]).tolist()
        for source, learned, selected in zip(tokens.source_B, learned_B, selected_B, strict=True):
            count = own.setdefault(source, [0, 0])
            count[0] += learned
            count[1] += selected
    total: dict[str, list[int]] = {}
    for part in distributed.gather_objects(own):
        for source, (learned, selected) in part.items():
            count = total.setdefault(source, [0, 0])
            count[0] += learned
            count[1] += selected
    return {s: {"tokens": n, "kept": k / max(n, 1)} for s, (n, k) in sorted(total.items())}


def _documents(tokens: TokenBatch, delta_N: Tensor, mask_N: Tensor) -> list[dict[str, Any]]:
    few = tokens.shape[0] if tokens.shape[0] < DOCUMENTS else DOCUMENTS
    delta_BT = tokens.grid(delta_N, float("nan"))[:few, :TOKENS_SHOWN].tolist()
    mask_BT = tokens.grid(mask_N, False)[:few, :TOKENS_SHOWN].tolist()
    ids_BT = tokens.inputs["input_ids"][:few, :TOKENS_SHOWN].tolist()
    return [
        {"tokens": ids, "delta": [None if d != d else round(d, 4) for d in delta], "mask": mask}
        for ids, delta, mask in zip(ids_BT, delta_BT, mask_BT, strict=True)
    ]
