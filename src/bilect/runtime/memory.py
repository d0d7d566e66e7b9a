"""Peak memory, in gigabytes: of the GPU's allocator, or of the process."""

import sys
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["peak_gb", "reset_peak"]


def reset_peak(device: torch.device | None = None) -> None:
    """Forget the peak so far. Without a GPU this needs Linux; elsewhere the peak stays that of the whole process."""
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_gb(device: torch.device | None = None) -> float:
    """Peak since ``reset_peak``, or since the process started; 0 where the system does not tell."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with suppress(OSError):  # unlike ru_maxrss, this is not inherited from the process that started this one
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    try:
        import resource
    except ImportError:  # Windows does not tell
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
