"""How much of a device's arithmetic a measured time used (model FLOP utilisation, MFU), and of which peak."""

from typing import Any

import torch

__all__ = ["shown", "utilisation"]

# Dense bfloat16 products with float32 sums, in FLOP/s, as NVIDIA's data sheets of the SXM boards give them.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def utilisation(flops: float, seconds: float, device: torch.device) -> dict[str, Any]:
    """FLOPs that the method needs (``models/flops.py``), not those of what is computed again, over time and peak.

    Whatever dtype the work is done in, the peak is that of bfloat16: what float32 costs shows as a low share. ``mfu``
    and ``peak_tflops`` are None where the device's peak is not known, as on CPUs.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((value for key, value in PEAKS.items() if key in name), None)
    rate = flops / seconds
    return {
        "tflops_per_second": rate / 1e12,
        "mfu": None if peak is None else rate / peak,
        "peak_tflops": None if peak is None else peak / 1e12,
    }


def shown(use: dict[str, Any]) -> str:
    """For a table."""
    if use["mfu"] is None:
        return f"{use['tflops_per_second']:.3g} TFLOP/s"
    return f"{use['tflops_per_second']:.3g} TFLOP/s, {use['mfu']:.1%} of {use['peak_tflops']:.0f} (bf16, dense)"
