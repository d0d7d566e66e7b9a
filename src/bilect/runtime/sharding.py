"""Models whose weights, gradients and optimiser states are spread over the ranks (FSDP2), and what is saved of them.

Each layer is gathered for its own forward and backward pass alone. Results of a stage are whole, as those of one
process are; checkpoints in between are written by all ranks (``torch.distributed.checkpoint``) and read by any number
of them, with models that are sharded or not.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from bilect.errors import BilectError, reason
from bilect.runtime import distributed

__all__ = [
    "has_shards",
    "load_optimizer_shards",
    "load_shards",
    "save_pretrained",
    "save_shards",
    "shard",
    "spread_moments",
    "take_weights",
    "whole",
]


def shard(model: nn.Module, device: torch.device) -> None:
    """Spread the weights of a transformers model over all ranks, in place; they go to ``device`` layer by layer.

    Raises:
        BilectError: FSDP2 of this PyTorch needs a GPU.
    """
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise BilectError(f"models.shard: PyTorch {torch.__version__} shards models on GPUs only; install a newer one, "
                          "or set it to false")  # fmt: skip
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in [m for m in model.modules() if type(m).__name__ in layers]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def has_shards(model: nn.Module) -> bool:
    """Whether its weights are spread over the ranks."""
    return any(distributed.is_sharded(p) for p in model.parameters())


def whole(state: Any) -> Any:
    """A state with all its tensors whole: on the CPU of the main rank; the others, which take part, get empty ones.

    Args:
        state: tensors, sharded or not, in mappings and sequences.
    """
    if isinstance(state, Mapping):
        return {k: whole(v) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole(v) for v in state)
    if isinstance(state, Tensor) and distributed.is_sharded(state):
        gathered: Tensor = state.detach().full_tensor()  # type: ignore[attr-defined]
        return gathered.cpu() if distributed.is_main() else gathered.new_empty(0)
    return state


def save_pretrained(model: Any, folder: Path) -> None:
    """Save a transformers model on the main rank; all call this, as each may have a part of it."""
    if not has_shards(model):
        if distributed.is_main():
            model.save_pretrained(folder)
        return
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # tied weights once
    weights = whole({k: v for k, v in model.state_dict().items() if k in names})
    if distributed.is_main():
        own = type(model)
        model.__class__ = own.__mro__[2]  # before fully_shard; transformers goes by the name for those of the weights
        try:
            model.save_pretrained(folder, state_dict=weights)
        finally:
            model.__class__ = own


def take_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Bring whole weights, the same on every rank, into a sharded model; tied ones may be named once."""
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True, strict=False))


def spread_moments(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's whole state, spread like its parameters, which are sharded or not; one tensor after the other."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    names = [i for group in state["param_groups"] for i in group["params"]]
    spread = {
        i: {name: _like(p, value) for name, value in state["state"][i].items()}
        for i, p in zip(names, params, strict=True)
        if i in state["state"]
    }
    return {**state, "state": spread}


def _like(p: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor) or not distributed.is_sharded(p) or value.shape != p.shape:
        return value
    return distribute_tensor(value, p.device_mesh, p.placements)  # type: ignore[attr-defined]


def save_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write weights and optimiser state; every rank writes its own."""
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder)


def load_shards(folder: Path, model: nn.Module, remedy: str) -> None:
    """Read the weights that ``save_shards`` has written, on any number of ranks, into a model that is sharded or not.

    Raises:
        BilectError: they cannot be read; ends with ``remedy``.
    """
    with _read(folder, remedy):
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])


def load_optimizer_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, remedy: str) -> None:
    """The same of the optimiser's state."""
    with _read(folder, remedy):
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])


@contextmanager
def _read(folder: Path, remedy: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)  # one process alone reads too
            yield
    except Exception as error:  # a broken file makes torch raise anything
        raise BilectError(f"checkpoint: cannot read {folder} ({reason(error)}); {remedy}") from error
