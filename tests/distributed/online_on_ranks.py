"""Training with online selection on this rank's part of fixed global batches; run by test_online_ranks.py.

    python online_on_ranks.py OUT WORLD ...    forks WORLD gloo processes, each of which writes OUT.WORLD.RANK

Forked from here, before any computation, because importing takes longer than all the steps.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bilect.bilevel.online.selector import OnlineTokenSelector
from bilect.bilevel.online.selector_files import load_selector, save_selector
from bilect.runtime import distributed
from tests.bilevel.online_helpers import Batch, make_batch
from tests.distributed.ranks import main
from tests.helpers import tiny_lm

STEPS = 5
LENGTHS = (9, 5, 12, 7, 3)  # five documents do not divide among two or three ranks; token counts differ

# wrapper, model family, settings
SCENARIOS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "global": ("ddp", "llama", {"baseline": "matched"}),
    "sequence": ("ddp", "llama", {"granularity": "sequence", "keep_ratio": 0.5}),
    "accumulated": ("ddp", "llama", {"micro_batches": 2}),
    "fsdp": ("fsdp", "gpt_neox", {}),
    "fsdp, resumed": ("fsdp", "gpt_neox", {"baseline": "matched", "resume": True}),
    "fsdp, handed on": ("fsdp", "gpt_neox", {"baseline": "matched", "resume": True}),
}


def part(batch: Batch) -> Batch:
    """This rank's rows, cut to its own width."""
    rows = distributed.own_part(range(len(batch["input_ids"])))
    own = {k: v[rows[0] : rows[-1] + 1] for k, v in batch.items()}
    width = int(own["attention_mask"].sum(1).max())
    return {k: v[:, :width] for k, v in own.items()}


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if distributed.world_size() == 1:
        return model
    if how == "ddp":
        return DistributedDataParallel(model)
    for module in (model.gpt_neox.layers[0], model.get_output_embeddings(), model):  # type: ignore[union-attr,index,operator]
        fully_shard(module)  # type: ignore[arg-type]
    return model


def full(p: Tensor) -> Tensor:
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()


def run(scenario: str, written: Path | None = None, read: Path | None = None) -> dict[str, Any]:
    """Steps of a scenario.

    Args:
        scenario: its name.
        written: where the selection's state is left, in the middle of a synchronisation.
        read: what the selection goes on from there: what other ranks have left.
    """
    how, kind, choice = SCENARIOS[scenario]
    choice = dict(choice)
    resume, micro_batches = choice.pop("resume", False), choice.pop("micro_batches", 1)

    def make() -> nn.Module:
        return tiny_lm(kind, layers=1)

    def selector_for(model: nn.Module) -> OnlineTokenSelector:
        upper = [part(make_batch(100 + i, (6, 12, 9), given=3)) for i in range(2)]
        options: dict[str, Any] = {
            "sync_every": 2, "reference_steps": 3, "reference_learning_rate": 1e-2,
            "lower_loader": [part(make_batch(200 + i, LENGTHS)) for i in range(2)],
        }  # fmt: skip
        if how == "fsdp":
            options["reference"] = lambda: wrapped(make(), how)
        return OnlineTokenSelector(model, upper, **{**options, **choice}, diagnose_every=2)

    model = make()
    outer = wrapped(model, how)
    selector = selector_for(outer)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses, masks = [], []
    for step in range(STEPS):
        if resume and step == 3:  # in the middle of the reference steps that the loss of step 4 begins with
            state: list[Any] = []
            selector.on_reference_step = partial(keep, state, written)
        whole = [make_batch(10 * step + i, LENGTHS) for i in range(micro_batches)]
        items = None if micro_batches == 1 else sum(int((b["labels"][:, 1:] != -100).sum()) for b in whole)
        total = 0.0
        if resume and step == 4:
            selector.loss(outer, part(whole[0]))  # synchronises, and leaves its states
            selector = selector_for(outer)
            selector.load_state_dict(state[1]) if read is None else load_selector(read, selector, "no remedy")
            assert selector._synchroniser is not None and selector._synchroniser.made == 2
        for batch in whole:
            loss = selector.loss(outer, part(batch), items)
            loss.backward()
            total += distributed.sum_scalar(loss.item()) / distributed.world_size()
            assert selector._last is not None
            masks.append(distributed.gather_rows(selector._last[2])[0])
        optimizer.step()
        optimizer.zero_grad()
        selector.step()
        losses.append(total)
    assert selector.reference is not None
    return {
        "losses": losses,
        "masks": masks,
        "diagnostics": [{k: v for k, v in e.items() if k != "documents"} for e in selector.diagnostics],
        "model": {k: full(p) for k, p in model.named_parameters()},
        "reference": {k: full(p) for k, p in selector.reference.forward.base.named_parameters()},
        "sharded": selector.reference.sharded,
    }


def keep(states: list[Any], folder: Path | None, selector: OnlineTokenSelector) -> None:
    states.append(selector.state_dict())
    if folder is not None and len(states) == 2:
        folder.mkdir(exist_ok=True)
        save_selector(folder, selector)


def handed_on(out: str, world: int) -> Path:
    """Where the ranks of a group leave the state of the scenario that is handed on."""
    return Path(f"{out}.{world}.state")


def local(world: int) -> list[Tensor]:
    """Scope "local" with a given reference: with several ranks by DDP, alone by a loop over the parts."""
    model = tiny_lm("llama", layers=1)
    outer = wrapped(model, "ddp")
    reference = tiny_lm("llama", layers=1, seed=3)
    selector = OnlineTokenSelector(outer, sync_every=None, reference=reference, scope="local", keep_ratio=0.5)
    whole = make_batch(0, LENGTHS)
    if distributed.world_size() > 1:
        selector.loss(outer, part(whole)).backward()
    else:
        base, extra = divmod(len(LENGTHS), world)
        first = 0
        for rank in range(world):
            last = first + base + (rank < extra)
            (selector.loss(outer, {k: v[first:last] for k, v in whole.items()}) / world).backward()
            first = last
    return [p.grad for p in model.parameters() if p.grad is not None]


def ties_and_empty() -> dict[str, Any]:
    """Equal Delta everywhere: the lower ranks' tokens; a rank without learned tokens takes part."""
    model = tiny_lm("llama", layers=1)
    outer = wrapped(model, "ddp")
    selector = OnlineTokenSelector(outer, sync_every=None, reference=tiny_lm("llama", layers=1), keep_ratio=0.5)
    batch = part(make_batch(0, LENGTHS))
    if distributed.rank() == distributed.world_size() - 1:
        batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = selector.loss(outer, batch)
    loss.backward()
    assert selector._last is not None
    return {
        "mask": distributed.gather_rows(selector._last[2])[0], "loss": loss.item(),
        "gradient": sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None),
    }  # fmt: skip


def work() -> dict[str, Any]:
    world = distributed.world_size()
    places = {"written": handed_on(sys.argv[1], world), "read": handed_on(sys.argv[1], 2)}  # three ranks from two
    results = {name: run(name, **places if name == "fsdp, handed on" else {}) for name in SCENARIOS}
    return {**results, "local": local(world), "ties": ties_and_empty()}


if __name__ == "__main__":
    main(work)
