"""`bilect choose` on a pool of any size: seconds and memory of every stage.

The pool is made here: documents of words drawn from twenty vocabularies, one of which is the target's. Stages run one
after another in one process, so a stage's peak is at least what the process holds when it begins.

    python benchmarks/choose.py                              # 20,000 documents
    python benchmarks/choose.py --rows 1000000 --method dsir
"""

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from bilect.pipeline.choose import choose
from bilect.pipeline.directory import read_manifest
from bilect.runtime.files import write_text

SOURCES, WORDS, SHARED = 20, 400, 2000


def write_pool(path: Path, rows: int, words: int) -> None:
    """Documents of about so many words, half of them their source's own."""
    rng = random.Random(0)
    own = [[f"s{s}w{i}" for i in range(WORDS)] for s in range(SOURCES)]
    common = [f"c{i}" for i in range(SHARED)]
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            source, n = row % SOURCES, rng.randint(words // 2, words + words // 2)
            text = " ".join(rng.choice(own[source] if rng.random() < 0.5 else common) for _ in range(n))
            record = {"id": f"d{row}", "text": text, "source": f"s{source}", "meta": {"row": row}}
            file.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--words", type=int, default=60, help="of a document, on average")
    parser.add_argument("--method", default="dsir")
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--folder", type=Path, help="kept afterwards; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        pool, target = folder / "pool.jsonl", folder / "target.jsonl"
        start = time.perf_counter()
        if not pool.is_file():
            write_pool(pool, options.rows, options.words)
            rng = random.Random(1)
            texts = [" ".join(f"s0w{rng.randrange(WORDS)}" for _ in range(options.words)) for _ in range(500)]
            write_text(target, "".join(json.dumps({"text": text}) + "\n" for text in texts))
        made = time.perf_counter() - start
        start = time.perf_counter()
        chosen = choose(pool, target, folder / "kept", keep=options.keep, method=options.method)
        seconds = time.perf_counter() - start
        stages = read_manifest(folder / "kept")["stages"]
        with next(p for p in chosen.records.rglob("*") if p.is_file()).open("rb") as file:
            right = sum(1 for _ in file)
    print(f"pool of {options.rows:,} documents, {chosen.pool_tokens:,} tokens, made in {made:.0f} s; {options.method}")
    print(f"{'stage':<28}{'seconds':>10}{'peak GB':>10}")
    for name, record in stages.items():
        print(f"{name:<28}{record['seconds']:>10.1f}{record['peak_gb']:>10.2f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{'all':<28}{seconds:>10.1f}{peak:>10.2f}")
    print(f"kept {chosen.documents:,} documents, {right:,} records written; "
          f"{chosen.sources['s0']['kept_fraction']:.3f} of the target's own source")  # fmt: skip
    print(json.dumps({"rows": options.rows, "seconds": round(seconds, 1), "peak_gb": round(peak, 2),
                      "documents": chosen.documents, "records": right,
                      "target_source_kept": chosen.sources["s0"]["kept_fraction"]}))  # fmt: skip


if __name__ == "__main__":
    main()
