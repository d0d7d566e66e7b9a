"""Processes that end with the one that started them, however it ended."""

import os
import threading
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path

__all__ = ["cores", "end_with_parent", "gpu_names"]

_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))  # control groups of version 2, of version 1


def cores(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: those it is bound to, or the share of time that its container is allowed."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in _QUOTAS:
        try:
            quota, period = (int(n) for file in files for n in (groups / file).read_text(encoding="utf-8").split())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if quota > 0 and period > 0:
            return max(1, min(bound, -(-quota // period)))
    return bound


def gpu_names() -> list[str]:
    """As ``CUDA_VISIBLE_DEVICES`` has them."""
    import torch  # asks for no device before one is used

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]


def end_with_parent() -> None:
    """Called in a worker: a killed parent must not leave it at work, with its locks and its GPU."""
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
