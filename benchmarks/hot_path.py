"""What a GPU waits for in each step, and how many kernels the host has to launch for it; countable without a GPU.

A host that asks for a value on the device (``float(x)``, ``bool(x)``, ``x.cpu()``, a shape that depends on values)
waits until all work so far is done, and the device then waits for the next launch. Here such questions are counted by
where in the package they are asked, and operations that are not views stand for launches, a ``_foreach`` operation for
one. What fused attention or a compiler makes of them only a GPU shows: there the profiler's counts come along.

    python benchmarks/hot_path.py
"""

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bilect.bilevel.objective import directional, document_losses
from bilect.bilevel.offline.fit import BilevelFit
from bilect.bilevel.online.selector import OnlineTokenSelector
from bilect.config import FitConfig
from bilect.data.batch import Batch, make_batch
from bilect.models.causal_lm import CausalLM
from bilect.models.loading import load_causal_lm
from bilect.models.score_model import ScoreModel
from bilect.runtime.device import pick_device
from bilect.training.trainer import FusedLoss

aten = torch.ops.aten
# the result's shape, or what the host is told, depends on values
ASKS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten.unique_consecutive,
        aten._unique2, aten.equal}  # fmt: skip
VOCABULARY, LENGTHS = 512, (40, 33, 40, 25)


class Waits(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        at: questions to the device, by the package's function that asks; "" where none of its functions does.
        launches: operations that are not views; an optimiser's are left out, which a GPU takes in a few.
    """

    def __init__(self) -> None:
        super().__init__()
        self.at: Counter[str] = Counter()
        self.launches = 0
        self._calls = _Calls(self)

    def __enter__(self) -> "Waits":
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches += not func.is_view and not _of_optimiser()
        packet = func.overloadpacket
        masked = packet in (aten.index, aten.index_put_) and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        # a mask that is filled with one value needs no positions
        filled = packet is aten.index_put_ and args[2].dim() == 0
        if packet in ASKS or (masked and not filled):
            self.asked()
        return func(*args, **(kwargs or {}))

    def asked(self) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module.startswith("torch.optim"):
                return  # its steps are counted on the host
            if module.startswith("bilect."):
                self.at[f"{module.rpartition('.')[2]}.{frame.f_code.co_name}"] += 1
                return
            frame = frame.f_back
        self.at[""] += 1


def _of_optimiser() -> bool:
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch.optim"):
            return True
        frame = frame.f_back
    return False


class _Calls(TorchFunctionMode):
    """Copies to the host: on a CPU they are no operation."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.cpu, torch.Tensor.tolist):
            self.waits.asked()
        return func(*args, **(kwargs or {}))


def steps(device: torch.device, model: str = "tiny-100k") -> dict[str, Callable[[], Any]]:
    """A function per hot path that takes one step of it; the first call warms up."""
    made: dict[str, Callable[[], Any]] = {}
    for name, choice in {
        "fit": {},
        "fit, ghost": {"directional": "ghost"},
        "fit, cg": {"solver": "cg", "hvp": "forward_difference"},
        "fit, sgd as published": {"solver": "sgd", "hvp": "forward_difference", "standardise": False},
        "fit, penalty": {"hypergradient": "penalty", "sync_every": 1, "reference_steps": 2},
    }.items():
        made[name] = _fit(device, model, choice).step
    lm, batch = CausalLM(load_causal_lm(model, vocab_size=VOCABULARY).to(device)), _batch(0)
    params = {k: p.detach() for k, p in lm.params().items()}
    for way in ("finite_difference", "jvp", "ghost"):
        made[f"influence of a batch, {way}"] = lambda way=way: directional(
            lm, batch.to(device), params, params, way
        ).cpu()
    made["losses of a batch (excess)"] = torch.no_grad()(lambda: document_losses(lm, batch.to(device))(params).cpu())
    for name, keep in {"BLADE": 0.6, "BLADE, all tokens": 1.0}.items():
        made[name] = _blade(device, model, lambda step, keep=keep: keep)
    made["training"] = _training(device, model)
    return made


def _batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return make_batch([(torch.randint(VOCABULARY, (n,), generator=generator), 1) for n in LENGTHS], pad_id=0)


def _fit(device: torch.device, model: str, choice: dict[str, Any]) -> BilevelFit:
    proxy, target = (load_causal_lm(model, vocab_size=VOCABULARY, seed=seed).to(device) for seed in (0, 1))
    score_model = ScoreModel.from_causal_lm(proxy, torch.Generator().manual_seed(0))
    lower, upper = (map(lambda b: b.to(device), itertools.cycle([_batch(seed)])) for seed in (0, 1))
    # the first step measures what later ones do not
    config = FitConfig(**{"steps": 1000, "warmup_ratio": 0.0, "log_every": 10**9, **choice})
    return BilevelFit(proxy, score_model, target, lower, upper, config)


def _blade(device: torch.device, name: str, keep_ratio: Callable[[int], float]) -> Callable[[], Any]:
    model = load_causal_lm(name, vocab_size=VOCABULARY).to(device).train()
    ids_BT = torch.randint(VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"input_ids": ids_BT, "labels": ids_BT.clone()}
    selector = OnlineTokenSelector(model, [batch], keep_ratio=keep_ratio, sync_every=10**9, reference_steps=1,
                                   lower_loader=[batch])  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        selector.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        selector.step()

    return step


def _training(device: torch.device, name: str) -> Callable[[], Any]:
    model = FusedLoss(load_causal_lm(name, vocab_size=VOCABULARY).to(device)).train()
    ids_BT = torch.randint(VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(0)).to(device)
    optimizer, n_items = torch.optim.AdamW(model.parameters()), torch.tensor(4 * 39, device=device)

    def step() -> None:
        model(ids_BT, ids_BT, num_items_in_batch=n_items)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def count(step: Callable[[], Any]) -> Waits:
    """Of one step after the first."""
    step()
    with Waits() as waits:
        step()
    return waits


def on_gpu(step: Callable[[], Any]) -> dict[str, int]:
    """Kernels launched and waits of one step, by the profiler."""
    with torch.profiler.profile() as profiler:
        step()
        torch.cuda.synchronize()
    calls = {e.key: e.count for e in profiler.key_averages()}
    waits = sum(n for k, n in calls.items() if k in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy"))
    return {"kernels": sum(n for k, n in calls.items() if k.startswith(("cudaLaunchKernel", "cuLaunchKernel"))),
            "waits_of_the_driver": waits - 1}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-100k", help="preset; on a GPU pythia-31m tells more")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device, results = pick_device(args.device), dict[str, Any]()
    table = Table(title=f"one step of each hot path, {args.model}, {device.type}")
    for column in ("", "waits", "launches", "where it waits"):
        table.add_column(column, justify="right" if column in ("waits", "launches") else "left")
    for name, step in steps(device, args.model).items():
        waits = count(step)
        results[name] = {"waits": waits.at.total(), "launches": waits.launches, "at": dict(waits.at)}
        if device.type == "cuda":
            results[name] |= on_gpu(step)
        where = ", ".join(f"{k} {n}" for k, n in waits.at.most_common())
        table.add_row(name, str(waits.at.total()), str(waits.launches), where)
    Console(width=160).print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
