"""The state of a selection on disk, one file per rank, for any number of ranks to go on from.

What is a rank's own in it is its part of batches and, of a sharded model (FSDP2), its rows of every weight. So the
states of all ranks hold the global batches and the whole weights, and other ranks take their parts of these.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilect.bilevel.online.selector import OnlineTokenSelector
from bilect.bilevel.online.token_loss import TokenBatch
from bilect.errors import BilectError, reason
from bilect.runtime import distributed
from bilect.runtime.checkpoints import load_state

__all__ = ["load_selector", "read_selector", "save_selector", "selector_file"]


def selector_file(folder: Path, rank: int | None = None) -> Path:
    """Where the state of a rank lies; by default of this one."""
    return folder / f"selector-{distributed.rank() if rank is None else rank}.pt"


def save_selector(folder: Path, selector: OnlineTokenSelector) -> None:
    """Write this rank's state; all ranks do."""
    content = {"ranks": distributed.world_size(), "sharded": selector.sharded, "state": selector.state_dict()}
    torch.save(content, selector_file(folder))


def load_selector(folder: Path, selector: OnlineTokenSelector, remedy: str) -> None:
    """Go on where ``save_selector`` was called, by these or by other ranks; see ``read_selector``."""
    selector.load_state_dict(read_selector(folder, selector, remedy))


def read_selector(folder: Path, selector: OnlineTokenSelector, remedy: str) -> dict[str, Any]:
    """The state that this rank goes on from.

    Args:
        folder: where ``save_selector`` has left it.
        selector: what is to go on.
        remedy: what to do if that cannot be, the end of the message.

    Raises:
        BilectError: a file is missing or broken.
    """
    first = load_state(selector_file(folder, 0), remedy)
    try:
        ranks, sharded = int(first["ranks"]), bool(first["sharded"])
        if (ranks, sharded) == (distributed.world_size(), selector.sharded):
            return dict(load_state(selector_file(folder), remedy)["state"])
        states = [load_state(selector_file(folder, r), remedy)["state"] for r in range(ranks)]
        return _of_other_ranks(states, sharded)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        file = selector_file(folder)
        raise BilectError(f"checkpoint: {file} does not fit ({reason(error)}); {remedy}") from error


def _of_other_ranks(states: Sequence[dict[str, Any]], sharded: bool) -> dict[str, Any]:
    """The state of this rank, with whole weights, from those of all ranks that there were."""
    state, rank = dict(states[0]), distributed.rank()
    if "generator" in state and rank < len(states):
        state["generator"] = states[rank]["generator"]
    elif "generator" in state:  # draws of its own, which one rank's past says nothing about
        seed = int(state["generator"].double().sum()) + 7919 * rank
        state["generator"] = torch.Generator().manual_seed(seed).get_state()
    if "watcher" in state:
        own = [s["watcher"] for s in states]
        probe, mask_N = _part([(w["probe"], w["probe_mask"]) for w in own])
        last_sync = own[0]["last_sync"] if not sharded else _whole([w["last_sync"] for w in own])
        state["watcher"] = {**own[0], "probe": probe, "probe_mask": mask_N, "last_sync": last_sync}
    if "synchroniser" in state:
        parts = [s["synchroniser"] for s in states]
        recent = [_part(batches) for batches in zip(*(p["recent"] for p in parts), strict=True)]
        followers = parts[0]["followers"] if not sharded else _whole([p["followers"] for p in parts])
        state["synchroniser"] = {**parts[0], "recent": recent, "followers": followers}
    return state


def _whole(parts: Sequence[Any]) -> Any:
    """Equal structures of the ranks' rows, in one: FSDP2 cuts weights by their first axis."""
    first = parts[0]
    if isinstance(first, dict):
        return {k: _whole([p[k] for p in parts]) for k in first}
    if isinstance(first, list):
        return [_whole(own) for own in zip(*parts, strict=True)]
    return torch.cat(list(parts)) if isinstance(first, Tensor) and first.ndim else first


def _part(own: Sequence[tuple[dict[str, Any] | None, Tensor | None]]) -> tuple[Any, Any]:
    """This rank's part of the batch that others had their parts of, and of what goes with its learned tokens."""
    batches = [TokenBatch.from_state(state) for state, _ in own if state is not None]
    if not batches:
        return None, None
    width = max(b.shape[1] for b in batches)
    rows = sum(b.shape[0] for b in batches)
    names = batches[0].inputs
    inputs = {k: _joined([b.inputs[k] for b in batches], [b.shape for b in batches], width) for k in names}
    before, at = 0, list[Tensor]()
    for batch in batches:
        at.append((before + batch.row_N) * width + batch.at_N % batch.shape[1])
        before += batch.shape[0]
    at_N, labels_N = torch.cat(at), torch.cat([b.labels_N for b in batches])
    masks = [mask_N for _, mask_N in own if mask_N is not None]
    sources = [s for b in batches for s in b.source_B or ()]

    mine = distributed.own_part(range(rows))
    start, end = mine[0] if mine else 0, mine[-1] + 1 if mine else 0
    mine_N = (at_N >= start * width) & (at_N < end * width)
    part = TokenBatch(
        {k: v[start:end] if isinstance(v, Tensor) and v.ndim and len(v) == rows else v for k, v in inputs.items()},
        at_N[mine_N] - start * width,
        labels_N[mine_N],
        (end - start, width),
        tuple(sources[start:end]) if sources else None,
    )
    return part.state_dict(), torch.cat(masks)[mine_N] if masks else None


def _joined(values: Sequence[Any], shapes: Sequence[tuple[int, int]], width: int) -> Any:
    """Rows below one another, padded on the right with what is not attended to."""
    if not isinstance(values[0], Tensor) or not values[0].ndim:
        return values[0]
    padded = [
        torch.nn.functional.pad(v, (0, width - v.shape[1])) if v.shape == shape else v
        for v, shape in zip(values, shapes, strict=True)
    ]
    return torch.cat(padded)
