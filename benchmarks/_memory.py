"""Peak memory, for the scripts beside."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["high_water"]


def high_water(device: torch.device | None = None) -> float:
    """Peak memory so far in gigabytes: of the GPU's allocator, or of the process."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with suppress(OSError):  # unlike ru_maxrss, this is not inherited from the process that started this one
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
