"""Time and memory of one bilevel step, ours against the published one (``_published_step.py``).

Same models, batches and solver settings (3 clipped gradient steps of 1e-2), one inner step, divergence on. The two run
in turn within one process, so that a busy machine slows both; the figures are medians. Peak memory comes from a fresh
process for each: models, optimisers and activations; the interpreter and its libraries are not counted.

    python benchmarks/bilevel_step.py
    python benchmarks/bilevel_step.py --proxy pythia-31m --target pythia-410m --documents 2 --tokens 256
"""

import argparse
import copy
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from _peak import shown, utilisation
from _published_step import PublishedStep
from rich.console import Console
from rich.table import Table

from bilect.bilevel.cost import fit_flops
from bilect.bilevel.offline.fit import BilevelFit
from bilect.config import FitConfig
from bilect.data.batch import Batch, make_batch
from bilect.models.loading import load_causal_lm
from bilect.models.score_model import ScoreModel
from bilect.runtime.device import pick_device
from bilect.runtime.memory import peak_gb

Step = PublishedStep | BilevelFit


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    fill_defaults(args, device)
    if args.memory_of:
        print(json.dumps(peak_memory(args, device, args.memory_of)))
        return

    names = ["plain", "ours"] + (["ours, float32"] if args.bf16 and args.float32 else [])
    memory = {name: memory_in_fresh_process(args, name) for name in names[:2]}
    while any("error" in m for m in memory.values()) and args.documents > 2:
        args.documents //= 2
        print(f"out of memory; both again with {args.documents} documents")
        memory = {name: memory_in_fresh_process(args, name) for name in names[:2]}

    make = builder(args, device)
    steps = {name: make(name) for name in names}
    seconds, d_B = time_in_turn(steps, device, args)
    parts = breakdown(steps["ours"], device)
    report(args, device, seconds, memory, parts, d_B, step_flops(steps["ours"], args))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxy", help="preset or directory (default: pythia-14m; on a GPU pythia-31m)")
    parser.add_argument("--target", help="preset or directory (default: pythia-160m; on a GPU pythia-410m)")
    parser.add_argument("--documents", type=int, help="in a batch (default: 8; on a GPU 16)")
    parser.add_argument("--tokens", type=int, help="in a document (default: 128; on a GPU 1024)")
    parser.add_argument("--vocab", type=int, help="size of the vocabulary (default: 8192; on a GPU 50304)")
    parser.add_argument("--hvp", choices=["exact", "finite_difference", "forward_difference"],
                        default="forward_difference", help="our Hessian products")  # fmt: skip
    parser.add_argument("--directional", choices=["jvp", "finite_difference", "ghost"], default="finite_difference")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                        help="ours in mixed precision (default: where the device has bfloat16 products)")  # fmt: skip
    parser.add_argument(
        "--float32", action=argparse.BooleanOptionalAction, default=False, help="time ours without bfloat16 too"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="time to spend on repeats (at least two)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU (default: its own choice)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # what the fresh processes are asked for
    return parser.parse_args()


def fill_defaults(args: argparse.Namespace, device: torch.device) -> None:
    on_gpu = {"proxy": "pythia-31m", "target": "pythia-410m", "documents": 16, "tokens": 1024, "vocab": 50304}
    on_cpu = {"proxy": "pythia-14m", "target": "pythia-160m", "documents": 8, "tokens": 128, "vocab": 8192}
    for name, value in (on_gpu if device.type == "cuda" else on_cpu).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.bf16 is None:
        args.bf16 = native_bf16(device)


def native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones: GPUs since Ampere, CPUs with tile instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    with suppress(OSError):
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    return False


def builder(args: argparse.Namespace, device: torch.device) -> Callable[[str], Step]:
    """Makes either step; all start from equal weights and see equal batches."""
    proxy = load_causal_lm(args.proxy, vocab_size=args.vocab, context=args.tokens)
    target = load_causal_lm(args.target, vocab_size=args.vocab, seed=1, context=args.tokens).to(device)
    score_model = ScoreModel.from_causal_lm(proxy, torch.Generator().manual_seed(0))

    def make(name: str) -> Step:
        config = FitConfig(
            steps=1000,
            warmup_ratio=0.0,
            solver="sgd",
            standardise=False,
            hvp=args.hvp,
            directional=args.directional,
            bf16=args.bf16 and name == "ours",
            log_every=10**9,  # the residual is a diagnostic, not part of the step
        )
        step = PublishedStep if name == "plain" else BilevelFit
        # the fit casts its target in place: beside others in one process it gets its own
        own = copy.deepcopy(target) if config.bf16 and not args.memory_of else target
        models = copy.deepcopy(proxy).to(device), copy.deepcopy(score_model).to(device), own
        return step(*models, batches(args, device, seed=2), batches(args, device, seed=3), config)

    return make


def batches(args: argparse.Namespace, device: torch.device, seed: int) -> Iterator[Batch]:
    """Two batches of documents of full length, over and over; tokens follow Zipf's law."""
    generator = torch.Generator().manual_seed(seed)
    frequency_V = 1.0 / torch.arange(1, args.vocab + 1)

    def document() -> tuple[torch.Tensor, int]:
        return torch.multinomial(frequency_V, args.tokens, replacement=True, generator=generator), 1

    made = [make_batch([document() for _ in range(args.documents)], pad_id=0).to(device) for _ in range(2)]
    return itertools.cycle(made)


def step_flops(fit: Step, args: argparse.Namespace) -> float:
    """Of one of our steps."""
    assert isinstance(fit, BilevelFit)
    config = fit.config.model_copy(
        update={"steps": 1, "lower_batch_size": args.documents, "upper_batch_size": args.documents}
    )
    target = None if fit.target is None else fit.target.model
    length = float(args.tokens)
    return fit_flops(config, fit.proxy.model, fit.score_model, target, lower_length=length, upper_length=length)


def time_in_turn(
    steps: dict[str, Step], device: torch.device, args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Seconds of every step, and the directional derivatives of each rendition's first step."""
    d_B = {}
    for name, step in steps.items():  # warms up
        if isinstance(step, BilevelFit):
            kept: list[torch.Tensor] = []
            implicit = step._implicit
            step._implicit = lambda *a, f=implicit, kept=kept: _keep_first(f(*a), kept)  # type: ignore[method-assign]
            step.step()
            step._implicit = implicit  # type: ignore[method-assign]
            d_B[name] = kept[0].double().cpu()
        else:
            step.step()
            d_B[name] = step.d_B.double().cpu()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    while len(seconds["plain"]) < 2 or time.perf_counter() - begin < args.seconds:
        for name, step in steps.items():
            seconds[name].append(timed(step.step, device)[0])
    return seconds, d_B


def _keep_first(result: tuple[torch.Tensor, Any], kept: list[torch.Tensor]) -> tuple[torch.Tensor, Any]:
    kept.append(result[0])
    return result


def timed(action: Callable[..., Any], device: torch.device, *args: Any) -> tuple[float, Any]:
    synchronize(device)
    begin = time.perf_counter()
    result = action(*args)
    synchronize(device)
    return time.perf_counter() - begin, result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def breakdown(fit: Step, device: torch.device) -> dict[str, float]:
    """Seconds of the parts of one of our steps, from one further step."""
    parts: dict[str, float] = {}

    def watch(owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def watched(*args: Any) -> Any:
            spent, result = timed(inner, device, *args)
            parts[name] = parts.get(name, 0.0) + spent
            return result

        setattr(owner, method, watched)

    assert isinstance(fit, BilevelFit)
    watch(fit, "_scores", "scores")
    watch(fit, "_target_on", "target forward")
    watch(fit, "_inner_step", "inner step")
    watch(fit.solver, "solve", "solve")
    watch(fit, "_implicit", "implicit")
    watch(fit, "_score_step", "score step")
    whole, _ = timed(fit.step, device)
    parts["upper gradient, directional"] = parts.pop("implicit") - parts["solve"]
    parts["rest"] = whole - sum(parts.values())
    return parts


def memory_in_fresh_process(args: argparse.Namespace, name: str) -> dict[str, Any]:
    options = {k: v for k, v in vars(args).items() if k not in ("memory_of", "bf16", "float32") and v is not None}
    command = [sys.executable, __file__, "--memory-of", name, "--bf16" if args.bf16 else "--no-bf16"]
    command += [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        if "out of memory" in done.stderr.lower() or done.returncode == -9:
            return {"error": "out of memory"}
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def peak_memory(args: argparse.Namespace, device: torch.device, name: str) -> dict[str, float]:
    """Gigabytes after the models are loaded, and at the highest point of two steps."""
    start = peak_gb(device)
    step = builder(args, device)(name)
    loaded = peak_gb(device) - start
    for _ in range(2 if device.type == "cuda" else 1):
        step.step()
    return {"models_gb": loaded, "peak_gb": peak_gb(device) - start}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def report(
    args: argparse.Namespace,
    device: torch.device,
    seconds: dict[str, list[float]],
    memory: dict[str, dict[str, Any]],
    parts: dict[str, float],
    d_B: dict[str, torch.Tensor],
    flops: float,
) -> None:
    plain = statistics.median(seconds["plain"])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    peak = {name: m.get("peak_gb") for name, m in memory.items()}
    agreement = {k: float(torch.corrcoef(torch.stack([d, d_B["plain"]]))[0, 1]) for k, d in d_B.items()}

    title = f"{args.documents} x {args.tokens} tokens, {args.proxy}, target {args.target}, vocabulary {args.vocab}"
    table = Table(title=f"one bilevel step, {title}\n{device_name(device)}")
    for column in ("", "seconds", "ratio", "peak GB", "ratio", "d: correlation with plain"):
        table.add_column(column, justify="right" if column else "left")
    for name in seconds:
        gb = peak.get(name)
        table.add_row(
            name + (" (bf16)" if name == "ours" and args.bf16 else ""),
            f"{median[name]:.3f}",
            f"{median[name] / plain:.3f}",
            "" if gb is None else f"{gb:.2f}",
            "" if gb is None or not peak["plain"] else f"{gb / peak['plain']:.3f}",
            f"{agreement[name]:.6f}",
        )
    console = Console(width=110)
    console.print(table)
    use = utilisation(flops, median["ours"], device)
    console.print(f"ours: {flops / 1e12:.3g} TFLOPs a step, {shown(use)}")
    whole = sum(parts.values())
    console.print("ours: " + ", ".join(f"{name} {value / whole:.0%}" for name, value in parts.items()))
    figures = {
        "time_ratio": median["ours"] / plain,
        "time_ratio_float32": median["ours, float32"] / plain if "ours, float32" in median else None,
        "seconds": median,
        "repeats": len(seconds["plain"]),
        "memory": memory,
        "d_correlation": agreement,
        "flops": flops,
        **use,
        "breakdown_seconds": parts,
        "device": device_name(device),
        "torch": torch.__version__,
        **{k: getattr(args, k) for k in ("proxy", "target", "documents", "tokens", "vocab")},
        **{k: getattr(args, k) for k in ("hvp", "directional", "bf16")},
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
