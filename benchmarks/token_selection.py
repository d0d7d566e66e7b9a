"""Time and memory of a training step with online token selection, against plain training steps of the same model.

    plain      mean loss of all tokens by the same fused loss (no logits beyond a chunk)
    full       transformers' own loss, with full logits
    blade      selection of 60% of the tokens, reference in place; a synchronisation excluded
    sync       what the reference steps add per training step, for K/T = 0.3

The steps run in turn within one process, so that a busy machine slows all; ratios are medians of the ratios of
neighbouring steps. Floor: 4/3, one more forward pass; with synchronisations 4/3 + 2 K/T. Peak memory comes from a fresh
process for each. The share of gathering and top-k is measured with two gloo processes where there is no GPU.

    python benchmarks/token_selection.py
    python benchmarks/token_selection.py --model pythia-160m --rows 8 --tokens 1024 --bf16
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from _peak import shown, utilisation
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bilect.bilevel.online import choice
from bilect.bilevel.online.selector import OnlineTokenSelector
from bilect.bilevel.online.wrappers import unwrap
from bilect.models.flops import forward_flops
from bilect.models.loading import load_causal_lm
from bilect.runtime import distributed
from bilect.runtime.device import autocast, pick_device
from bilect.runtime.memory import peak_gb

Batch = dict[str, Tensor]
K_OVER_T = 0.3
FLOOR = 4 / 3
PASSES = {"plain": 3, "full": 3, "blade": 4}  # forward passes a step is worth


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    fill_defaults(args, device)
    memory = {name: apart(device, (peak_memory, (args, device, name)))[0] for name in ("plain", "full", "blade")}
    share = None
    if device.type != "cuda":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        share = max(apart(device, *((share_of_choosing, (args, device, rank, port)) for rank in range(2))))
    seconds, forward = time_in_turn(args, device)
    report(args, device, seconds, memory, share, forward)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="preset or directory (default: pythia-14m; on a GPU pythia-160m)")
    parser.add_argument("--rows", type=int, help="sequences in a batch (default: 4; on a GPU 8)")
    parser.add_argument("--tokens", type=int, help="in a sequence (default: 256; on a GPU 1024)")
    parser.add_argument("--vocab", type=int, help="size of the vocabulary (default: 8192; on a GPU 50304)")
    parser.add_argument("--keep-ratio", type=float, default=0.6)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="mixed precision (default: on a GPU)")
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile the model")
    parser.add_argument("--seconds", type=float, default=10.0, help="time to spend on repeats (at least three)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU (default: its own choice)")
    return parser.parse_args()


def fill_defaults(args: argparse.Namespace, device: torch.device) -> None:
    on_gpu = {"model": "pythia-160m", "rows": 8, "tokens": 1024, "vocab": 50304, "bf16": True}
    on_cpu = {"model": "pythia-14m", "rows": 4, "tokens": 256, "vocab": 8192, "bf16": False}
    for name, value in (on_gpu if device.type == "cuda" else on_cpu).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.threads:
        torch.set_num_threads(args.threads)


class Step:
    """One kind of training step, with a model and an optimiser of its own."""

    def __init__(self, args: argparse.Namespace, device: torch.device, kind: str) -> None:
        self.args, self.device, self.kind = args, device, kind
        self.model = load_causal_lm(args.model, vocab_size=args.vocab, context=args.tokens).to(device).train()
        if args.compile:
            self.model = torch.compile(self.model, backend=args.compile)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device.type == "cuda")
        self.batches = [batch(args, device, seed) for seed in range(2)]
        self.made = 0
        keep_ratio: Any = args.keep_ratio if kind == "blade" else (lambda step: 1.0)
        self.selector = OnlineTokenSelector(
            self.model, self.batches, keep_ratio=keep_ratio, sync_every=10**9, reference_steps=1,
            lower_loader=self.batches, warmup_steps=0 if kind == "blade" else 10**9,
        )  # fmt: skip

    def __call__(self) -> None:
        self.made += 1
        inputs = self.batches[self.made % 2]
        with autocast(self.device, self.args.bf16):
            loss = self.model(**inputs).loss if self.kind == "full" else self.selector.loss(self.model, inputs)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.selector.step()

    def synchronisation(self) -> float:
        """Seconds of one further reference step: the difference of two synchronisations, of one step and of three."""
        synchroniser = self.selector._synchroniser
        assert synchroniser is not None
        spent = []
        for steps in (1, 3):
            synchroniser.steps = steps
            with autocast(self.device, self.args.bf16):
                spent.append(timed(lambda: synchroniser.run(self.model, 0, lambda: None), self.device))
            synchroniser.recent.append(self._lower())
        return (spent[1] - spent[0]) / 2

    def _lower(self) -> Any:
        assert self.selector._last is not None
        return self.selector._last[0], self.selector._last[2]


def batch(args: argparse.Namespace, device: torch.device, seed: int) -> Batch:
    """Sequences of full length; tokens follow Zipf's law."""
    generator = torch.Generator().manual_seed(seed)
    frequency_V = 1.0 / torch.arange(1, args.vocab + 1)
    ids = torch.multinomial(frequency_V, args.rows * args.tokens, replacement=True, generator=generator)
    ids_BT = ids.view(args.rows, args.tokens).to(device)
    return {"input_ids": ids_BT, "labels": ids_BT.clone()}


def time_in_turn(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, list[float]], float]:
    """Seconds of every step, and the FLOPs of a forward pass."""
    steps = {name: Step(args, device, name) for name in ("plain", "full", "blade")}
    for step in steps.values():  # warms up
        for _ in range(3 if args.compile else 2):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in [*steps, "sync"]}
    begin = time.perf_counter()
    while len(seconds["plain"]) < 3 or time.perf_counter() - begin < args.seconds:
        for name, step in steps.items():
            seconds[name].append(timed(step, device))
    seconds["sync"] = [steps["blade"].synchronisation() for _ in range(3)]
    return seconds, forward_flops(unwrap(steps["blade"].model), args.rows * args.tokens, args.tokens)


def timed(action: Callable[[], Any], device: torch.device) -> float:
    """Seconds; on a CPU those of this process, so that whatever else the machine does is not counted."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    synchronize(device)
    begin = clock()
    action()
    synchronize(device)
    return clock() - begin


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------------ fresh processes


def apart(device: torch.device, *calls: tuple[Callable[..., Any], tuple[Any, ...]]) -> list[Any]:
    """What each call gives in a process of its own, all at once; forked on CPUs, because importing takes longest."""
    context = multiprocessing.get_context("spawn" if device.type == "cuda" else "fork")
    running = []
    for function, arguments in calls:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(send, function, arguments), daemon=True)
        process.start()
        running.append((process, receive))
    try:
        return [receive.recv() for _, receive in running if receive.poll(600)]
    finally:
        for process, _ in running:
            process.kill()
            process.join()


def _send(send: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    send.send(function(*arguments))


def peak_memory(args: argparse.Namespace, device: torch.device, kind: str) -> dict[str, float]:
    """Gigabytes at the highest point of three steps after the first, and the weights of one model."""
    start = peak_gb(device)
    step = Step(args, device, kind)
    weights = sum(p.numel() * p.element_size() for p in step.model.parameters()) / 1e9
    step()  # the synchronisation is in here
    synchronised = peak_gb(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # starts the count anew
    for _ in range(2):
        step()
    return {"peak_gb": peak_gb(device) - start, "with_sync_gb": synchronised - start, "weights_gb": weights}


def share_of_choosing(args: argparse.Namespace, device: torch.device, rank: int, port: int) -> float:
    """Share of gathering and top-k in a step of two gloo processes."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    distributed.start()
    step = Step(args, device, "blade")
    step()
    step()
    assert step.selector._last is not None
    tokens, delta_N, _ = step.selector._last
    assert delta_N is not None

    def choose() -> None:
        distributed.barrier()
        begin = time.perf_counter()
        choice.token_mean(choice.choose(delta_N, tokens, args.keep_ratio, "token", "global"))
        spent.append(time.perf_counter() - begin)

    spent: list[float] = []
    whole = []
    for _ in range(5):
        distributed.barrier()
        begin = time.perf_counter()
        step()
        whole.append(time.perf_counter() - begin)
        choose()
    torch.distributed.destroy_process_group()
    return statistics.median(spent) / statistics.median(whole)


# ------------------------------------------------------------------------------------------------------------ figures


def report(
    args: argparse.Namespace,
    device: torch.device,
    seconds: dict[str, list[float]],
    memory: dict[str, dict[str, float]],
    share: float | None,
    forward: float,
) -> None:
    def ratio(name: str, to: str = "plain") -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))

    median = {name: statistics.median(values) for name, values in seconds.items()}
    step_ratio, sync_ratio = ratio("blade"), median["sync"] / median["plain"]
    with_sync, floor_with_sync = step_ratio + K_OVER_T * sync_ratio, FLOOR + 2 * K_OVER_T
    weights = memory["plain"]["weights_gb"]
    memory_ratio = memory["blade"]["peak_gb"] / (memory["plain"]["peak_gb"] + weights)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"one training step, {args.rows} x {args.tokens} tokens, {args.model}, vocabulary {args.vocab}"
                        f"{', bf16' if args.bf16 else ''}{', compiled' if args.compile else ''}\n{name}")  # fmt: skip
    for column in ("", "seconds", "over plain", "peak GB"):
        table.add_column(column, justify="right" if column else "left")
    labels = {"plain": "plain, fused loss", "full": "plain, full logits", "blade": f"keep {args.keep_ratio}"}
    for kind, label in labels.items():
        table.add_row(label, f"{median[kind]:.4f}", f"{ratio(kind):.3f}", f"{memory[kind]['peak_gb']:.3f}")
    table.add_row("one reference step", f"{median['sync']:.4f}", f"{sync_ratio:.3f}", "")
    table.add_row(f"with K/T = {K_OVER_T}", "", f"{with_sync:.3f}", f"{memory['blade']['with_sync_gb']:.3f}")
    Console(width=110).print(table)
    # a chosen token saves the backward pass of the head alone, which is not taken off
    use = {kind: utilisation(passes * forward, median[kind], device) for kind, passes in PASSES.items()}
    for kind, value in use.items():
        print(f"{kind}: {args.rows * args.tokens / median[kind]:,.0f} tokens/s, {shown(value)}")
    print(
        f"floors: {FLOOR:.3f} and, with K/T = {K_OVER_T}, {floor_with_sync:.3f}; one model's weights: {weights:.3f} GB"
    )
    figures = {
        "step_ratio": step_ratio,
        "memory_ratio": memory_ratio,  # over plain training and one more model's weights
        "floor": FLOOR,
        "step_ratio_full_logits": ratio("blade", "full"),
        "memory_ratio_full_logits": memory["blade"]["peak_gb"] / memory["full"]["peak_gb"],
        "with_sync": with_sync,
        "floor_with_sync": floor_with_sync,
        "with_sync_over_floor": with_sync / floor_with_sync,
        "share_of_choosing_two_ranks": share,
        "utilisation": use,
        "seconds": median,
        "memory": memory,
        "repeats": len(seconds["plain"]),
        "device": name,
        "torch": torch.__version__,
        **{k: getattr(args, k) for k in ("model", "rows", "tokens", "vocab", "keep_ratio", "bf16", "compile")},
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
