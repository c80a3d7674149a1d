"""What the host does for each call on a GPU, in microseconds: python bench/host_time.py [FILE.json]

Needs no GPU: Triton's launches go to a driver that does nothing (tests/stub_gpu), so that a real one's share of a
launch, about 2 µs, comes on top, and so does what CUDA's allocator takes beyond the CPU's. Calls go through torch's
dispatcher as a user's do, interleaved: remembered (see triton/common/replay.py), and the long way that the first two
of a kind take.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import stub_gpu  # noqa: E402

ROUNDS, CALLS = 15, 100
INT8 = (-128, 127)


def nothing(metadata: Any) -> None:
    pass


def cases() -> dict[str, Callable[[], Any]]:
    ops, bf16 = torch.ops.qkernels, torch.bfloat16
    n = k = 4096
    x, grad = torch.zeros(16, k, dtype=bf16), torch.zeros(16, k, dtype=bf16)
    scale, channels, columns = torch.ones(1), torch.ones(16, 1), torch.ones(n)
    w, sums = torch.zeros(n, k, dtype=torch.int8), torch.zeros(n, dtype=torch.int32)
    halves, groups = torch.zeros(n, k // 2, dtype=torch.uint8), torch.ones(k // 128, n)
    mask, codes, rows = torch.zeros(2 * k, dtype=torch.uint8), torch.zeros(16, k, dtype=torch.int8), torch.ones(16, 1)

    def linear8(m: int) -> Callable[[], Any]:
        a, op = torch.zeros(m, k, dtype=bf16), ops.int8_linear.default
        return lambda: op(a, w, sums, columns, None, None, None, *INT8, "none", bf16, None, None)

    def linear4(m: int, bits: int) -> Callable[[], Any]:
        a, op = torch.zeros(m, k, dtype=bf16), ops.int4_linear.default
        return lambda: op(a, halves, groups, None, None, columns, None, 128, bits, None, None, *INT8, bf16)

    forward, with_mask = ops.fake_quantize_forward.default, ops.fake_quantize_forward_mask.default
    backward, learnable = ops.fake_quantize_backward_mask.default, ops.fake_quantize_learnable_backward.default
    product = ops.int8_scaled_mm.default
    return {
        "fake-quant forward": lambda: forward(x, scale, None, *INT8),
        "fake-quant forward, per channel": lambda: forward(x, channels, None, *INT8),
        "fake-quant forward and mask": lambda: with_mask(x, scale, None, *INT8),
        "fake-quant backward from a mask": lambda: backward(grad, mask),
        "LSQ backward": lambda: learnable(grad, x, scale, None, *INT8, 1.0, True),
        "LSQ backward, per channel": lambda: learnable(grad, x, channels, None, *INT8, 1.0, True),
        **{f"int8_linear, M = {m}": linear8(m) for m in (1, 16, 2048)},
        "int4_linear, 16 bits, M = 1": linear4(1, 16),
        "int4_linear, 8 bits, M = 16": linear4(16, 8),
        "int8_scaled_mm, M = 16": lambda: product(
            codes, w.t(), rows, columns, None, None, None, "none", bf16, None, None
        ),
    }


def microseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return 1e6 * (time.perf_counter() - start) / CALLS


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    driver = stub_gpu.install()
    served = stub_gpu.serve()
    rows = []
    print(f"{'call':<34}{'launches':>9}{'remembered µs (p20–p80)':>28}{'long way µs':>13}{'ratio':>7}")
    for name, call in cases().items():
        times: dict[str, list[float]] = {"remembered": [], "long": []}
        for _ in range(3):
            call()
        before = stub_gpu.launches(driver)
        call()
        launches = stub_gpu.launches(driver) - before
        for _ in range(ROUNDS):
            times["remembered"].append(microseconds(call))
            knobs.runtime.launch_enter_hook.add(nothing)  # a profiler is told of every launch, the long way
            times["long"].append(microseconds(call))
            knobs.runtime.launch_enter_hook.remove(nothing)
        low, *_, high = statistics.quantiles(times["remembered"], n=5)
        middle, long = (statistics.median(times[way]) for way in ("remembered", "long"))
        figures = {"launches": launches, "remembered µs": round(middle, 1), "long way µs": round(long, 1)}
        rows.append({"op": "host_time", "case": name, "figures": figures, "microseconds": times})
        spread = f"{middle:.1f} ({low:.1f}–{high:.1f})"
        print(f"{name:<34}{launches:>9}{spread:>28}{long:>13.1f}{long / middle:>7.1f}", flush=True)
    if sys.argv[1:]:
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        machine = {"cpu": cpu[1] if cpu else "unknown", "cores": os.cpu_count(), "path": "stub driver"}
        machine |= {"torch": torch.__version__, "triton": triton.__version__, "date": date.today().isoformat()}
        Path(sys.argv[1]).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    del served


if __name__ == "__main__":
    main()
