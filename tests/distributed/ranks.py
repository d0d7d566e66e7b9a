"""Work done by groups of gloo processes: started by a test as a script, so that forking meets no threads of pytest."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bilect.runtime import distributed

ROOT = Path(__file__).parents[2]


def run_script(script: str, out: Path, limit: int) -> None:
    """Run a script that calls ``main`` with 2 and with 3 ranks; whatever happens, no process is left after ``limit``.

    Rank r of w leaves its results in ``{out}.{w}.{r}``.
    """
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, script, str(out), "2", "3"], cwd=ROOT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    try:
        log, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the ranks did not end within {limit} s")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, log[-5000:]


def main(work: Callable[[], dict[str, Any]]) -> None:
    """The script's end: exit code 0 if all ranks of all groups ended well."""
    out, *worlds = sys.argv[1:]
    sys.exit(max(_group(work, out, int(world)) for world in worlds))


def _group(work: Callable[[], dict[str, Any]], out: str, world: int) -> int:
    """The first rank that fails ends the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(work, rank, world, port, out), daemon=True) for rank in range(world)]
    for process in ranks:
        process.start()
    while any(p.is_alive() for p in ranks) and not any(p.exitcode for p in ranks):
        time.sleep(0.05)
    for process in ranks:
        process.kill() if process.is_alive() else None
        process.join()
    return max(abs(p.exitcode or 0) for p in ranks)


def _rank(work: Callable[[], dict[str, Any]], rank: int, world: int, port: int, out: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    distributed.start()
    results = work()
    distributed.barrier()
    torch.save(results, f"{out}.{world}.{rank}")
    torch.distributed.destroy_process_group()
