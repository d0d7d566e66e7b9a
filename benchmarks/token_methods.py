"""Does choosing tokens pay? full, random, RHO-1, BLADE and BLADE with the matched twin, at equal training tokens.

A model is warmed up on the pool, once per seed; every method continues from it on the same batches. Reported: the
held-out loss per token on the target (answers only where an example has a prompt), its mean over seeds with an
interval, and the cost in FLOPs and seconds, reference included. One file per run in --out: an interrupted grid
goes on where it stopped. Without --upper and --heldout the pool itself is the target: a thirtieth of its documents is
set apart for each.

    python benchmarks/token_methods.py --small --out runs/token_methods/gsm8k \
        --pool pool_small.jsonl.zst --upper upper/gsm8k.jsonl --heldout heldout/gsm8k.jsonl
"""

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from bilect.bilevel.online.selector import OnlineTokenSelector
from bilect.config import SourceConfig
from bilect.data.documents import Document, read_documents
from bilect.models.flops import forward_flops
from bilect.models.loading import load_causal_lm, load_tokenizer, train_tokenizer
from bilect.runtime.device import autocast, pick_device

Batch = dict[str, Any]
METHODS: dict[str, dict[str, Any]] = {
    "full": {"keep_ratio": lambda step: 1.0, "selection": "random"},  # by the same fused loss
    "random-token": {"selection": "random"},
    "rho1": {"sync_every": None, "penalty": 0.0},
    "blade": {},
    "blade-matched": {"baseline": "matched"},
}
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's, two-sided, by the number of seeds


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads) if args.threads else None
    device = pick_device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    data = Data(args, device)
    for seed in range(args.seeds):
        warm: PreTrainedModel | None = None
        for method in args.methods:
            for keep_ratio in args.keep_ratio if method != "full" else [1.0]:
                for sync_every in args.sync_every if method.startswith("blade") else [0]:
                    name = f"{method}-{keep_ratio}-{sync_every}-{seed}"
                    file = args.out / f"{name}.json"
                    if file.is_file():
                        continue
                    warm = warm_up(args, data, device, seed) if warm is None else warm
                    result = run(args, data, device, warm, method, keep_ratio, sync_every, seed)
                    part = file.with_suffix(".part")
                    part.write_text(json.dumps(result), encoding="utf-8")
                    part.replace(file)
                    losses = f"{result['heldout_loss']:.4f} (warm {result['warm_loss']:.4f})"
                    print(f"{name}: held-out loss {losses}", flush=True)
    report(args)


def parse_args(need_out: bool = True) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True, help="documents to train on")
    parser.add_argument("--upper", help="the target set")
    parser.add_argument("--heldout", help="for reporting only; disjoint from --upper")
    parser.add_argument("--tokenizer", help="directory, Hub name or file; default: the model's, or one trained here")
    parser.add_argument("--vocabulary", type=int, default=4096, help="of a tokenizer that is trained here")
    parser.add_argument("--model", default="pythia-70m", help="preset (then warmed up) or pretrained model (then not)")
    parser.add_argument("--out", type=Path, required=need_out)
    parser.add_argument("--figures", type=Path, help="folder for plots of what the selections did, first seed")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep-ratio", type=float, nargs="+", default=[0.6])
    parser.add_argument("--sync-every", type=int, nargs="+", default=[100])
    parser.add_argument("--reference-share", type=float, default=0.3, help="K/T")
    parser.add_argument("--reference-learning-rate", type=float, default=1e-4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--warm-steps", type=int, default=2000, help="0: take the model as it is")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--small", action="store_true", help="0.9M parameters, 500 + 300 steps of 16 x 128 tokens")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.small:
        small = {"warm_steps": 500, "steps": 300, "tokens": 128, "sync_every": [50],
                 "learning_rate": 1e-3, "reference_learning_rate": 1e-3}  # fmt: skip
        for name, value in small.items():
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)
    return args


class Data:
    """Token ids of the three sets, and their batches."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        documents = list(read_documents([SourceConfig(path=args.pool)]))
        if args.upper:
            upper, heldout = ([*read_documents([SourceConfig(path=p)])] for p in (args.upper, args.heldout))
        else:
            random.Random(0).shuffle(documents)
            share = len(documents) // 30
            upper, heldout, documents = documents[:share], documents[share : 2 * share], documents[2 * share :]
        if args.tokenizer or (args.warm_steps == 0 and not args.small):
            self.tokenizer = load_tokenizer(args.tokenizer or args.model)
        else:
            self.tokenizer = train_tokenizer((d.text for d in documents), args.vocabulary)
        end = self.tokenizer.eos_token_id
        stream: list[int] = []
        source: list[str] = []
        for document in documents:
            ids = [*self.tokenizer(document.text)["input_ids"], end]
            stream += ids
            source += [document.source] * len(ids)
        n = len(stream) // args.tokens
        self.pool_RT = torch.tensor(stream[: n * args.tokens]).view(n, args.tokens)
        self.source_R = [source[i * args.tokens + args.tokens // 2] for i in range(n)]
        self.upper, self.heldout = ([self._example(d) for d in part] for part in (upper, heldout))

    def _example(self, document: Document) -> tuple[list[int], int]:
        prompt = self.tokenizer(document.prompt)["input_ids"] if document.prompt else []
        answer = self.tokenizer(document.text[len(document.prompt) :])["input_ids"]
        ids = [*prompt, *answer, self.tokenizer.eos_token_id]
        return ids[-self.args.tokens :], max(len(prompt) - max(len(ids) - self.args.tokens, 0), 0)

    def windows(self, seed: int, steps: int) -> Iterator[Batch]:
        """Windows of the pool in random order, pass after pass."""
        generator = torch.Generator().manual_seed(seed)
        rows: list[int] = []
        for _ in range(steps):
            while len(rows) < self.args.rows:
                rows += torch.randperm(len(self.pool_RT), generator=generator).tolist()
            own, rows = rows[: self.args.rows], rows[self.args.rows :]
            ids_BT = self.pool_RT[own].to(self.device)
            yield {"input_ids": ids_BT, "labels": ids_BT, "source": [self.source_R[i] for i in own]}

    def examples(self, which: list[tuple[list[int], int]]) -> list[Batch]:
        """Padded batches of prompts and answers."""
        batches = []
        for start in range(0, len(which), self.args.rows):
            part = which[start : start + self.args.rows]
            width = max(len(ids) for ids, _ in part)
            ids_BT = torch.zeros(len(part), width, dtype=torch.long)
            labels_BT, mask_BT = torch.full_like(ids_BT, -100), torch.zeros_like(ids_BT)
            for row, (ids, given) in enumerate(part):
                ids_BT[row, : len(ids)] = torch.tensor(ids)
                labels_BT[row, given : len(ids)] = torch.tensor(ids[given:])
                mask_BT[row, : len(ids)] = 1
            batch = {"input_ids": ids_BT, "labels": labels_BT, "attention_mask": mask_BT}
            batches.append({k: v.to(self.device) for k, v in batch.items()})
        return batches


def build(args: argparse.Namespace, data: Data, seed: int) -> PreTrainedModel:
    if not args.small:
        return load_causal_lm(args.model, vocab_size=len(data.tokenizer), seed=seed, context=args.tokens)
    config = {"model_type": "gpt_neox", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 512, "tie_word_embeddings": True}  # fmt: skip
    return load_causal_lm(config, vocab_size=len(data.tokenizer), seed=seed, context=args.tokens)


def train(
    args: argparse.Namespace, model: PreTrainedModel, selector: OnlineTokenSelector, batches: Iterator[Batch], lr: float
) -> float:
    """Seconds spent."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    begin = time.perf_counter()
    for batch in batches:
        with autocast(model.device, args.bf16):
            loss = selector.loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        selector.step()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def warm_up(args: argparse.Namespace, data: Data, device: torch.device, seed: int) -> PreTrainedModel:
    model = build(args, data, seed).to(device).train()
    selector = OnlineTokenSelector(model, **METHODS["full"])
    train(args, model, selector, data.windows(1000 + seed, args.warm_steps), args.learning_rate)
    return model


def run(
    args: argparse.Namespace,
    data: Data,
    device: torch.device,
    warm: PreTrainedModel,
    method: str,
    keep_ratio: float,
    sync_every: int,
    seed: int,
) -> dict[str, Any]:
    model = build(args, data, seed).to(device).train()
    model.load_state_dict(warm.state_dict())
    upper = torch.utils.data.DataLoader(data.examples(data.upper), batch_size=None, shuffle=True)
    every = sync_every or args.sync_every[0]
    reference_steps = max(round(args.reference_share * every), 1)
    if method == "rho1":  # as many reference steps as BLADE takes in all
        reference_steps *= math.ceil(args.steps / every)
    options = {
        "keep_ratio": keep_ratio, "sync_every": sync_every or None, "reference_steps": reference_steps,
        "reference_learning_rate": args.reference_learning_rate, "diagnose_every": max(args.steps // 10, 1),
        "lower_loader": list(data.windows(3000 + seed, reference_steps)), "seed": seed, **METHODS[method],
    }  # fmt: skip
    selector = OnlineTokenSelector(model, upper, **options)
    warm_loss = heldout_loss(args, model, data)
    seconds = train(args, model, selector, data.windows(2000 + seed, args.steps), args.learning_rate)
    tokens = args.steps * args.rows * args.tokens
    # in forward passes: a training step 3, the losses of w and of m one each, a reference step 3 per batch and model
    followers = {"full": 0, "random-token": 0, "blade-matched": 2}.get(method, 1)
    batches = {"rho1": 1, "blade": 2, "blade-matched": 3}.get(method, 0)
    synced = selector.synchronisations * reference_steps * args.rows * args.tokens
    passes = tokens * (3 + followers) + synced * 3 * batches
    return {
        "method": method, "keep_ratio": keep_ratio, "sync_every": sync_every, "seed": seed,
        "warm_loss": warm_loss, "heldout_loss": heldout_loss(args, model, data), "seconds": seconds,
        "flops": forward_flops(model, passes, args.tokens), "tokens": tokens, "device": str(device),
        "synchronisations": selector.synchronisations,
        "diagnostics": [{k: v for k, v in e.items() if k != "documents"} for e in selector.diagnostics],
    }  # fmt: skip


@torch.no_grad()
def heldout_loss(args: argparse.Namespace, model: PreTrainedModel, data: Data) -> float:
    """Per learned token."""
    total, count = 0.0, 0
    model.eval()
    for batch in data.examples(data.heldout):
        with autocast(model.device, args.bf16):
            logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        total += float(
            torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
            )
        )
        count += int((labels != -100).sum())
    model.train()
    return total / max(count, 1)


def report(args: argparse.Namespace) -> None:
    runs = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(args.out.glob("*.json"))]
    full = {r["seed"]: r for r in runs if r["method"] == "full"}
    groups: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for r in runs:
        groups.setdefault((r["method"], r["keep_ratio"], r["sync_every"]), []).append(r)
    target = Path(args.upper).stem if args.upper else "the pool itself"
    table = Table(title=f"held-out loss after {args.steps} steps, {target}")
    for column in ("method", "keep", "T", "seeds", "loss", "minus full (95%)", "FLOPs / full", "seconds / full"):
        table.add_column(column)
    figures = []
    for (method, keep_ratio, sync_every), group in groups.items():
        pairs = [(r, full[r["seed"]]) for r in group if r["seed"] in full]
        gains = [r["heldout_loss"] - f["heldout_loss"] for r, f in pairs]
        half = T_95.get(len(gains), 1.96) * statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else math.nan
        row = {
            "method": method, "keep_ratio": keep_ratio, "sync_every": sync_every, "seeds": len(group),
            "loss": statistics.mean(r["heldout_loss"] for r in group),
            "minus_full": statistics.mean(gains) if gains else None, "interval": None if math.isnan(half) else half,
            "flops_ratio": statistics.mean(r["flops"] / f["flops"] for r, f in pairs) if pairs else None,
            "seconds_ratio": statistics.mean(r["seconds"] / f["seconds"] for r, f in pairs) if pairs else None,
        }  # fmt: skip
        figures.append(row)
        cells = [row["minus_full"], row["flops_ratio"], row["seconds_ratio"]]
        gain, flops, seconds = ("" if c is None else f"{c:.3f}" for c in cells)
        table.add_row(method, f"{keep_ratio}", f"{sync_every or ''}", f"{len(group)}", f"{row['loss']:.4f}",
                      f"{gain} ± {half:.3f}", flops, seconds)  # fmt: skip
    Console(width=120).print(table)
    if args.figures:
        draw(args.figures, [r for r in runs if r["seed"] == 0])
    print(json.dumps({"runs": figures}))


def draw(folder: Path, runs: list[dict[str, Any]]) -> None:
    """What the selections did over the steps: the figures of a run's report, for all methods at once."""
    from bilect.report import tokens

    shown = {}
    for r in runs:
        name = f"{r['method']} {r['keep_ratio']} {r['sync_every'] or ''}".strip()
        shown[name] = {"method": r["method"].removesuffix("-matched"), "entries": r["diagnostics"]}
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("delta", "distance", "choice"):
        figure = getattr(tokens, f"{name}_figure")(shown)
        if figure:
            (folder / f"{name}.svg").write_text(figure.file)


if __name__ == "__main__":
    main()
