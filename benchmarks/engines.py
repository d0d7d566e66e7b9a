"""What two workers are worth: the same work by one process, by two of this machine, and by two actors of Ray.

One process is timed twice: on one core, and with all threads, which its tokenizer uses.

The pool is that of ``choose.py``, in eight files. Workers are started and have done a small pool before anything is
timed; the time of that is shown apart. The engines take turns, and the best of the rounds counts. The ceiling is what
two independent processes of the same work (hashing for DSIR) do together, over what one does alone: two hardware
threads of one core are less than two cores.

    python benchmarks/engines.py                # 60,000 documents, two rounds
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from choose import write_pool

from bilect.config import SelectionConfig, SourceConfig
from bilect.data.sources import Input, inputs
from bilect.data.token_files import TokenFiles
from bilect.data.tokens import TokenStore
from bilect.engines import Engine, Here, names, open_engine
from bilect.errors import BilectError
from bilect.methods.contract import Inputs
from bilect.methods.dsir import Dsir, DsirConfig
from bilect.models.loading import train_tokenizer
from bilect.runtime.progress import SilentProgress
from bilect.selection.near_duplicates import cluster_file
from bilect.selection.originals import write_records
from bilect.selection.scoring import write_scores
from bilect.selection.select import select

FILES, WORDS = 8, 60
PARTS = ("tokenise", "fit dsir", "score by dsir", "near-duplicates", "records")
ALONE = """
import sys, time
from pathlib import Path
import numpy as np
from bilect.data.tokens import TokenStore
from bilect.methods.dsir import DsirConfig, _Total
store = TokenStore(Path(sys.argv[1]))
work, rows = _Total(DsirConfig(), store), np.arange(min(len(store), 20000))
work(rows[:500])
print(flush=True)
input()
begin = time.perf_counter()
work(rows)
print(time.perf_counter() - begin, flush=True)
"""


def parts(sources: list[Input], tokenizer: Any, folder: Path, engine: Engine) -> Iterator[tuple[str, float]]:
    """Do everything once, in a new folder; gives the seconds of each part."""
    folder.mkdir()
    entries: list[Any] = []
    method = Dsir(DsirConfig())

    def tokenise() -> None:
        files = TokenFiles(tokenizer, context=256, chunk=False, skip=False, engine=engine, scratch=folder / "blocks")
        entries.extend(files.all(sources))

    def fit() -> None:
        given = Inputs(store, rows, [("target", 1.0, TokenStore(entries[0].path))], folder, folder, pad_id=0, seed=0,
                       device=torch.device("cpu"), engine=engine)  # fmt: skip
        with SilentProgress().task("fit") as task:
            method.fit(given, task)

    def keep() -> None:
        write_records(folder / "kept", store, sources, engine=engine)

    def timed(work: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    yield PARTS[0], timed(tokenise)
    store = TokenStore([entry.path for entry in entries])
    rows = np.arange(len(store))
    yield PARTS[1], timed(fit)
    fitted = Dsir(DsirConfig())  # without the inputs of the fit, which know of the engine
    fitted.log_ratio_H, scores = method.log_ratio_H, folder / "scores"
    yield PARTS[2], timed(lambda: write_scores(partial(fitted.score, store), store, rows, scores, engine=engine))
    yield PARTS[3], timed(lambda: cluster_file(store, folder / "near.parquet", 0.8, engine=engine))
    select(scores, folder / "kept", SelectionConfig(keep_ratio=0.5))
    yield PARTS[4], timed(keep)


def ceiling(store: Path) -> float:
    """Work per second of two processes at once, over that of one."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for count in (1, 2) * 3:
        with ExitStack() as stack:
            command = [sys.executable, "-c", ALONE, str(store)]
            running = [stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                            text=True)) for _ in range(count)]  # fmt: skip
            for process in running:
                process.stdout.readline()  # type: ignore[union-attr]
            for process in running:
                process.stdin.write("\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
            seconds[count].append(np.mean([float(process.stdout.readline()) for process in running]))  # type: ignore[union-attr]
    return float(2 * min(seconds[1]) / min(seconds[2]))


def pool(folder: Path, rows: int) -> list[Input]:
    """The inputs of a pool of some documents."""
    folder.mkdir()
    whole = folder.with_suffix(".jsonl")
    write_pool(whole, rows, WORDS)
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    for number in range(FILES):
        (folder / f"{number}.jsonl").write_text("".join(lines[number::FILES]), encoding="utf-8")
    return inputs(SourceConfig(path=str(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    best: dict[str, dict[str, float]] = {}
    started: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        small, large = pool(folder / "small", 400), pool(folder / "large", options.rows)
        texts = [json.loads(line)["text"] for line in (folder / "small.jsonl").read_text("utf-8").splitlines()]
        tokenizer = train_tokenizer(texts, 4096)
        engines: dict[str, Engine] = {"one core": Here(), "one process": Here()}
        for name in names():
            try:
                engines[f"{name}, 2"] = stack.enter_context(open_engine(name, 2))
            except BilectError as error:
                print(error)
        number = 0
        for count in range(options.rounds + 1):
            for name, engine in engines.items():
                number += 1
                os.environ["TOKENIZERS_PARALLELISM"] = str(name != "one core").lower()  # of this process
                os.environ["BILECT_CACHE"] = str(folder / f"cache-{number}")
                sources = large if count else small
                figures = dict(parts(sources, tokenizer, folder / f"out-{number}", engine))
                if count == 0:
                    started[name] = sum(figures.values())
                else:
                    known = best.setdefault(name, figures)
                    best[name] = {part: min(known[part], figures[part]) for part in PARTS}
        highest = ceiling(next((folder / f"cache-{number}").rglob("*.arrow")))
    print(f"{options.rows:,} documents of about {WORDS} words in {FILES} files; seconds, best of {options.rounds}")
    print(f"{'':<18}" + "".join(f"{name:>16}" for name in engines))
    for part in PARTS:
        alone = best["one core"][part]
        print(f"{part:<18}" + "".join(f"{best[n][part]:>9.2f} {alone / best[n][part]:>5.2f}x" for n in engines))
    print(f"{'started, in s':<18}" + "".join(f"{started[name]:>9.2f}       " for name in engines))
    print(f"two independent processes do {highest:.2f} times the work of one: the ceiling")
    speed = {name: {p: round(best["one core"][p] / best[name][p], 2) for p in PARTS} for name in engines}
    result: dict[str, Any] = {"rows": options.rows, "ceiling": round(highest, 2), "speed": speed}
    if "ray, 2" in best:
        whole = {name: sum(best[name].values()) for name in best}
        result["ray_over_local"] = round(whole["ray, 2"] / whole["local, 2"], 3)
        print(f"Ray takes {result['ray_over_local']:.2f} times as long as two processes, all in all")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
