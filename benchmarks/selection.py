"""Time and peak memory of a selection: from files of scores to kept.parquet and dropped.parquet.

Each selection runs in a fresh process of its own; its peak memory counts the interpreter and its libraries. The scores
are drawn before, with doc_ids of 20 to 22 characters in no order of score; that is not part of the time. A tenth of the
documents is selected from plainly, within shares of the sources, and at a temperature.

    python benchmarks/selection.py
    python benchmarks/selection.py --rows 2000000
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from bilect.runtime.memory import peak_gb

FILES = 8
SOURCES, SHARES = ["web", "books", "wiki", "code", "arxiv", "forum"], [0.5, 0.1, 0.05, 0.15, 0.1, 0.1]
TOP: dict[str, Any] = {"keep_ratio": 0.2}
WITHIN_SHARES = {**TOP, "min_share": {"wiki": 0.1}, "max_share": {"web": 0.3, "*": 0.4}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000, help="documents (default: 20 million)")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)  # what the fresh processes are asked for
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(Path(args.only[0]), json.loads(args.only[1]))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        large, small = Path(temporary) / "large", Path(temporary) / "small"
        write_scores(large, args.rows)
        write_scores(small, max(args.rows // 10, 1))
        results = {
            "a fifth": in_fresh_process(large, TOP),
            "a fifth of a tenth": in_fresh_process(small, TOP),
            "the same within shares": in_fresh_process(small, WITHIN_SHARES),
            "the same at temperature 1": in_fresh_process(small, {**TOP, "temperature": 1.0}),
        }
    table = Table(title=f"selection, {os.cpu_count()} CPUs")
    for column in ("", "documents", "seconds", "CPU seconds", "peak GB", "kept"):
        table.add_column(column, justify="right" if column else "left")
    for name, r in results.items():
        figures = f"{r['seconds']:.1f}", f"{r['cpu_seconds']:.1f}", f"{r['peak_gb']:.2f}", f"{r['kept']:,}"
        table.add_row(name, f"{r['rows']:,}", *figures)
    Console(width=110).print(table)
    print(json.dumps({**results["a fifth"], "others": results}))


def write_scores(folder: Path, rows: int) -> None:
    """Score files of equal length; doc_ids are a source and 16 random hexadecimal digits."""
    folder.mkdir()
    two_digits = np.frombuffer("".join(f"{b:02x}" for b in range(256)).encode(), np.uint16)
    for number in range(FILES):
        count = rows * (number + 1) // FILES - rows * number // FILES
        rng = np.random.default_rng([0, number])
        digits = pa.py_buffer(two_digits[np.frombuffer(rng.bytes(8 * count), np.uint8)])
        digits = pa.Array.from_buffers(pa.binary(16), count, [None, digits]).cast(pa.binary()).cast(pa.string())
        source = pa.array(SOURCES).take(pa.array(rng.choice(len(SOURCES), count, p=SHARES)))
        columns = {
            "doc_id": pc.binary_join_element_wise(source, digits, "-"),
            "source": source,
            "n_tokens": np.minimum(rng.lognormal(6.5, 1.0, count) + 8, 32768).astype(np.int32),
            "score": rng.standard_normal(count, np.float32),
        }
        pq.write_table(pa.table(columns), folder / f"part-{number:05d}.parquet", use_dictionary=["source"])


def in_fresh_process(scores: Path, settings: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", str(scores), json.dumps(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(scores: Path, settings: dict[str, Any]) -> dict[str, Any]:
    from bilect.config import SelectionConfig
    from bilect.selection.select import select

    begin, cpu = time.perf_counter(), time.process_time()
    chosen = select(scores, scores.parent / "selected", SelectionConfig(**settings))
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gb": peak_gb(),
        "rows": chosen.pool_documents,
        "kept": chosen.documents,
    }


if __name__ == "__main__":
    main()
