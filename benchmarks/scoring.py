"""Scoring end to end, from text files to score files, against the bare forward passes it cannot do without.

Both parts work on the same padded batches of the same documents, with the same score model, and take turns in one
process. End to end is what ``bilect score RUN --data FILES`` does: read compressed JSONL, tokenise, build batches,
score, write Parquet. The bare part finds its batches in memory. Peak memory is that of fresh processes that score one
and four megabytes by a tiny model, which gets through more text in the time.

Then the scores that need no score model, influence and excess, in units of a bare forward pass of the proxy with its
losses over batches in memory; reading, padding and putting in order count on their side alone.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --model pythia-160m --megabytes 40 --context 1024 --bf16      # a GPU
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from _peak import shown, utilisation
from rich.console import Console
from rich.table import Table

from bilect.bilevel.objective import document_losses
from bilect.config import SourceConfig
from bilect.data.batch import Batch, make_batch
from bilect.data.loading import length_bucketed
from bilect.data.sources import inputs
from bilect.data.token_files import TokenFiles
from bilect.data.tokens import TokenStore
from bilect.methods.contract import Inputs
from bilect.methods.excess import Excess
from bilect.methods.influence import Influence, InfluenceConfig
from bilect.models.causal_lm import CausalLM
from bilect.models.flops import forward_flops
from bilect.models.loading import load_causal_lm, load_tokenizer, train_tokenizer
from bilect.models.score_model import ScoreModel
from bilect.runtime.device import autocast, pick_device
from bilect.runtime.memory import peak_gb, reset_peak
from bilect.selection.scoring import ROWS_AT_ONCE, score_rows, write_scores

FILES = 4


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        work = Path(args.work or name)
        os.environ["BILECT_CACHE"] = str(work / "cache")
        if args.work:  # one measurement of memory
            print(json.dumps(memory(args, work)))
            return
        make_corpus(work / "text", args.megabytes)
        texts = [json.loads(line)["text"] for line in lines(work / "text" / "0.jsonl.zst")[:500]]
        train_tokenizer(texts, args.vocabulary).save_pretrained(work / "tokenizer")
        seconds, tokens = in_turn(args, work)
        passes, rates = direct(args, work)
        peaks: dict[int, int] = {}
        for share in (1, 4) if args.memory else ():
            make_corpus(work / f"text-{share}", share)
            peaks[share] = memory_of(args, work, share)
    ratio = seconds["bare"] / seconds["end to end"]
    growth = (peaks[4] - peaks[1]) / 2**20 if peaks else None
    table = Table(title=f"{args.model}, {tokens:,} tokens, context {args.context}, {torch.get_num_threads()} threads")
    for column in ("", "seconds", "tokens/s"):
        table.add_column(column, justify="right" if column else "left")
    for part, value in seconds.items():
        table.add_row(part, f"{value:.2f}", f"{tokens / value:,.0f}")
    console = Console()
    console.print(table)
    console.print(f"throughput end to end: {ratio:.3f} of the bare forward passes")
    if growth is not None:
        console.print(f"peak memory: {peaks[1] / 2**20:.0f} MiB for one megabyte, {growth:+.0f} MiB for four")
    for name, value in passes.items():
        console.print(f"{name}: {value:.2f} forward passes of the proxy")
    for name, rate in rates.items():
        console.print(f"{name}: {rate['tokens_per_second']:,.0f} tokens/s, {shown(rate)}")
    rounded = {name: round(value, 3) for name, value in passes.items()}
    figures = {"throughput_ratio": round(ratio, 4), "memory_growth_mib": growth, "passes": rounded}
    speeds = {part: tokens / value for part, value in seconds.items()}
    print(json.dumps({**figures, "scoring_tokens_per_second": speeds, "rates": rates}))


def parse_args() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pythia-160m" if cuda else "pythia-14m", help="preset of the trunk")
    parser.add_argument("--megabytes", type=float, default=64.0 if cuda else 0.5, help="of text")
    parser.add_argument("--context", type=int, default=1024 if cuda else 256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch-tokens", type=int, default=65536 if cuda else 8192)
    parser.add_argument("--bf16", action="store_true", default=cuda)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="that of the process")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_corpus(folder: Path, megabytes: float) -> None:
    """Words by Zipf's law, documents of 20 to 400 words, in compressed JSONL files."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    syllables = [a + b for a in "bcdfghklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "in")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(8000)]
    weights = np.cumsum(1 / np.arange(1, len(words) + 1))
    for number in range(FILES):
        size = 0
        with zstandard.open(folder / f"{number}.jsonl.zst", "wt", encoding="utf-8") as file:
            while size < megabytes * 1e6 / FILES:
                text = " ".join(rng.choices(words, cum_weights=weights.tolist(), k=rng.randint(20, 400)))
                size += len(text)
                file.write(json.dumps({"id": f"{number}-{size}", "text": text, "source": f"s{size % 7}"}) + "\n")


def lines(path: Path) -> list[str]:
    with zstandard.open(path, "rt", encoding="utf-8") as file:
        return file.readlines()


def score_model(args: argparse.Namespace) -> ScoreModel:
    model = load_causal_lm(args.model, vocab_size=args.vocabulary, context=args.context)
    scorer = ScoreModel.from_causal_lm(model, torch.Generator().manual_seed(0))
    return scorer.to(pick_device(args.device)).eval()


def in_turn(args: argparse.Namespace, work: Path) -> tuple[dict[str, float], int]:
    """Median seconds of both parts, and the number of tokens."""
    scorer, seconds = score_model(args), {"bare": list[float](), "end to end": list[float]()}
    store = tokenise(args, work, "text", work / "first")
    pad = load_tokenizer(str(work / "tokenizer")).eos_token_id
    batches = [
        make_batch(store.rows(rows), pad).to(scorer.device)
        for part in store.parts
        for first in range(part.rows.start, part.rows.stop, ROWS_AT_ONCE)
        for rows in length_bucketed(
            store.length_R, np.arange(first, min(first + ROWS_AT_ONCE, part.rows.stop)), args.batch_tokens
        )
    ]
    forward(scorer, batches[:2], args.bf16)  # the first passes are slower
    for turn in range(args.repeats):
        seconds["bare"].append(clock(lambda: forward(scorer, batches, args.bf16)))
        out = work / f"turn-{turn}"
        seconds["end to end"].append(clock(lambda out=out: end_to_end(args, work, "text", scorer, out)))
    seconds["bare"].append(clock(lambda: forward(scorer, batches, args.bf16)))
    return {name: statistics.median(values) for name, values in seconds.items()}, int(store.length_R.sum())


def direct(args: argparse.Namespace, work: Path) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Cost of influence, each way, and of excess; medians of turns in one process, over that of a bare pass.

    Then tokens a second, and use of the device. The bare pass and influence are in float32, as differences want it;
    excess is in bfloat16 where the device has it.
    """
    store = tokenise(args, work, "text", work / "first")
    rows, pad = np.arange(len(store)), load_tokenizer(str(work / "tokenizer")).eos_token_id
    device = pick_device(args.device)
    model = load_causal_lm(args.model, vocab_size=args.vocabulary, context=args.context)
    model.save_pretrained(work / "proxy")
    given = {"proxy": work / "proxy", "scratch": work / "fit", "pad_id": pad, "seed": 0, "device": device}
    inputs = Inputs(store, rows, [], **given, batch_tokens=args.batch_tokens, bf16=args.bf16)
    lm, params = CausalLM(inputs.warm_proxy), {k: p.detach() for k, p in inputs.warm_proxy.named_parameters()}
    batches = [
        make_batch(store.rows(some), pad).to(device)
        for some in length_bucketed(store.length_R, rows, args.batch_tokens)
    ]

    @torch.no_grad()
    def bare() -> None:
        for batch in batches:
            document_losses(lm, batch)(params)

    actions: dict[str, Any] = {"bare": bare}
    for way in ("finite_difference", "jvp", "ghost"):
        influence = Influence(InfluenceConfig(directional=way))
        influence.inputs, influence.pairs = inputs, [(params, params)]
        actions[f"influence, {way}"] = partial(influence.score, store, rows)
    excess = Excess()
    excess.inputs, excess.base, excess.reference = inputs, inputs.warm_proxy, inputs.warm_proxy
    actions["excess"] = partial(excess.score, store, rows)
    bare()  # the first passes are slower
    seconds, peak = {name: list[float]() for name in actions}, dict[str, float]()
    for _ in range(max(args.repeats, 3)):
        for name, action in actions.items():
            reset_peak(device)
            seconds[name].append(clock(action))
            peak[name] = peak_gb(device)  # on a CPU of the whole process, with what came before
    median = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = float(store.length_R.sum())
    one = forward_flops(model, tokens, tokens / len(rows))
    rates = {
        name: {"tokens_per_second": tokens / value, "peak_gb": peak[name],
               **utilisation(one * (1 if name == "bare" else 2), value, device)}
        for name, value in median.items()
    }  # fmt: skip
    return {name: value / median["bare"] for name, value in median.items() if name != "bare"}, rates


def clock(action) -> float:
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def forward(scorer: ScoreModel, batches: list[Batch], bf16: bool) -> None:
    for batch in batches:
        with autocast(scorer.device, bf16):
            scorer(batch.input_ids_BT, batch.mask_BT)


def tokenise(args: argparse.Namespace, work: Path, text: str, cache: Path) -> TokenStore:
    """Token files in a cache of their own, so that nothing is found there."""
    os.environ["BILECT_CACHE"] = str(cache)
    tokenizer = load_tokenizer(str(work / "tokenizer"))
    files = TokenFiles(tokenizer, context=args.context, chunk=True, skip=False)
    return TokenStore([files.get(part).path for part in inputs(SourceConfig(path=str(work / text)))])


def end_to_end(args: argparse.Namespace, work: Path, text: str, scorer: ScoreModel, out: Path) -> None:
    store = tokenise(args, work, text, out / "cache")
    pad = load_tokenizer(str(work / "tokenizer")).eos_token_id
    rows = np.arange(len(store))
    score = partial(score_rows, scorer, store, pad_id=pad, batch_tokens=args.batch_tokens, bf16=args.bf16)
    write_scores(score, store, rows, out / "scores")


def memory_of(args: argparse.Namespace, work: Path, share: int) -> int:
    """Peak memory in bytes of a fresh process."""
    command = [sys.executable, __file__, "--work", str(work), "--share", str(share)]
    command += ["--model", "tiny-100k"]
    for name in ("context", "vocabulary", "batch_tokens", "device", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(result.stdout.splitlines()[-1])["peak"])


def memory(args: argparse.Namespace, work: Path) -> dict[str, int]:
    end_to_end(args, work, f"text-{args.share}", score_model(args), work / f"memory-{args.share}")
    return {"peak": int(peak_gb() * 1e9)}


if __name__ == "__main__":
    main()
