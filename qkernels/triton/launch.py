"""The one place that starts kernels."""

from __future__ import annotations

from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, **constexprs: Any) -> None:
    """Starts ``kernel`` on the device of its first argument, a tensor or a descriptor, on that device's current stream.

    FMA contraction is off: it would round x·(1/scale) + zero_point once instead of twice.
    """
    device = getattr(args[0], "base", args[0]).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=False, **constexprs)
    else:
        kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=False, **constexprs)
