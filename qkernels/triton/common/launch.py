"""The one place that starts kernels."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """One kernel that a call started: what Triton compiled for it, and its arguments, constexprs included, in order."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


class _Local(threading.local):
    launches: list[Launch] | None = None  # of the call that is being recorded in this thread (see replay.py)


local = _Local()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, **constexprs: Any) -> None:
    """Starts ``kernel`` on the device of its first argument, a tensor or a descriptor, on that device's current stream.

    FMA contraction is off: it would round x·(1/scale) + zero_point once instead of twice.
    """
    device = getattr(args[0], "base", args[0]).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            compiled = kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=False, **constexprs)
    else:
        compiled = kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=False, **constexprs)
    if local.launches is not None:
        rest = [constexprs[name] for name in kernel.arg_names[len(args) :]]
        x, y, z = (*grid, 1, 1)[:3]
        local.launches.append(Launch(compiled, (x, y, z), (*args, *rest)))
