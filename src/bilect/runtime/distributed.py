"""Data parallelism over ``torch.distributed``; every function is the identity on a single rank.

Only this module and ``sharding`` talk to ``torch.distributed``. Launch with ``torchrun``; ``start`` joins the group.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from bilect.functional.trees import Tree

__all__ = [
    "barrier",
    "from_main",
    "gather_objects",
    "gather_rows",
    "is_main",
    "is_sharded",
    "local_part",
    "own_part",
    "rank",
    "reshard",
    "rows_of",
    "spread",
    "start",
    "sum_scalar",
    "sum_tree",
    "world_size",
]

Item = TypeVar("Item")
Result = TypeVar("Result")


def start() -> None:
    """Join the process group if launched by ``torchrun``: gloo on CPUs, NCCL on GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Index of this rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this rank writes shared files."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def own_part(items: Sequence[Item]) -> Sequence[Item]:
    """This rank's contiguous part of a global batch; parts differ by at most one item."""
    base, extra = divmod(len(items), world_size())
    first = rank() * base + min(rank(), extra)
    return items[first : first + base + (rank() < extra)]


def is_sharded(x: Tensor) -> bool:
    """Whether a parameter's values are spread over the ranks (FSDP2)."""
    return hasattr(x, "to_local")


def local_part(x: Tensor) -> Tensor:
    """This rank's values of a sharded parameter, sharing memory with it; any other tensor itself."""
    part: Tensor = x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]
    return part


def rows_of(x: Tensor, value: Tensor) -> Tensor:
    """This rank's part of a value like a sharded parameter; the value itself where it is that part already."""
    if local_part(x).shape == value.shape:
        return value
    rows = -(-value.shape[0] // world_size())  # FSDP2 cuts the first axis so: the last parts have less, or nothing
    return value[rank() * rows : (rank() + 1) * rows]


def reshard(model: nn.Module) -> None:
    """Give back the gathered weights that FSDP2 keeps after a forward pass in expectation of a backward pass.

    Until then the model's parameters are not the sharded ones.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_rows(x_B: Tensor) -> tuple[Tensor, slice]:
    """All ranks' rows in rank order, parts of any sizes, and the place of the own ones.

    Args:
        x_B: (B,) of this rank, constant.

    Returns:
        (M,) and the slice of it that is ``x_B``.
    """
    x_B = x_B.detach().contiguous()
    if world_size() == 1:
        return x_B, slice(0, len(x_B))
    sizes = [torch.zeros(1, dtype=torch.long, device=x_B.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(x_B)], device=x_B.device))
    lengths = [int(s) for s in sizes]
    padded = torch.zeros(max(lengths), dtype=x_B.dtype, device=x_B.device)
    padded[: len(x_B)] = x_B
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    first = sum(lengths[: rank()])
    return torch.cat([p[:n] for p, n in zip(parts, lengths, strict=True)]), slice(first, first + len(x_B))


def sum_tree(tree: Tree) -> Tree:
    """Sum over the ranks, one all-reduce per dtype."""
    if world_size() == 1:
        return tree
    flat = torch.cat([v.reshape(-1) for v in tree.values()])
    dist.all_reduce(flat)
    pieces = flat.split([v.numel() for v in tree.values()])
    return {k: p.view_as(v).to(v.dtype) for (k, v), p in zip(tree.items(), pieces, strict=True)}


def sum_scalar(value: float) -> float:
    """Sum of a number over the ranks."""
    if world_size() == 1:
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def gather_objects(item: Item) -> list[Item]:
    """Every rank's small object, in rank order."""
    if world_size() == 1:
        return [item]
    items: list[Item | None] = [None] * world_size()
    dist.all_gather_object(items, item, group=_objects())
    return items  # type: ignore[return-value]


def from_main(message: Any) -> Any:
    """What the main rank calls this with, on every rank; anything that can be pickled."""
    if world_size() == 1:
        return message
    box = [message]
    dist.broadcast_object_list(box, src=0, group=_objects())
    return box[0]


def spread(function: Callable[[Item], Result], items: Sequence[Item], *, in_step: bool = False) -> list[Result]:
    """``function`` of every item, in order, on every rank; each item is done by one of them.

    All ranks call this with the same items. Neighbours go to different ranks, so that items in the order of their size
    are shared out evenly.

    Args:
        function: what is done.
        items: the same on every rank.
        in_step: let every rank call ``function`` as often, as a sharded model needs it: some repeat the last item.
    """
    world = world_size()
    own = list(items[rank() :: world])
    if in_step and len(own) < -(-len(items) // world):
        own.append(items[-1])
    found = gather_objects([function(item) for item in own])
    return [found[i % world][i // world] for i in range(len(items))]


@cache
def _objects() -> Any:
    """The ranks as a group that hands on objects through the CPU's memory; NCCL's would take the GPU's."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timedelta(hours=12))
