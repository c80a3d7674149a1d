"""Throughput of an int8 and an int4 layer that you can trust: check first, then time, beside a ceiling.

Prints the time of each layer, what it reads and computes in that time, and its share of what the memory gives. The full
measurement, with all peers and the ceilings of arithmetic: python -m qkernels bench gemm.
At real size: python examples/measure_gemm.py --n 4096 --k 4096 --megabytes 256 --seconds 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from shared import at_least
from torch import Tensor

import qkernels as qk

Call = Callable[[int], Tensor]  # on the weights of this number


def check(name: str, got: Tensor, exact: Tensor) -> None:
    """A wrong kernel is never timed."""
    error = ((got.double() - exact).norm() / exact.norm()).item()
    assert error < 1e-6, f"{name}: off by {error:.2g} of the norm"


def medians(calls: dict[str, Call], copies: int, seconds: float) -> dict[str, float]:
    """Seconds of a call. Contestants take turns, so that what disturbs the machine disturbs all; weights rotate."""
    laps: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    at = 0
    while time.perf_counter() < end or at < 3:
        for name, call in calls.items():
            start = time.perf_counter()
            call(at % copies)
            laps[name].append(time.perf_counter() - start)
        at += 1
    return {name: statistics.median(values) for name, values in laps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=at_least(1), default=1024)
    parser.add_argument("--k", type=at_least(128, multiple_of=128), default=1024)
    parser.add_argument("--m", type=at_least(1), nargs="+", default=[1, 64])
    parser.add_argument(
        "--megabytes", type=at_least(1), default=16, help="of weights to rotate over: more than the cache"
    )
    parser.add_argument("--seconds", type=float, default=0.2, help="for each contestant")
    options = parser.parse_args()

    torch.manual_seed(0)
    n, k = options.n, options.k
    copies = max(1, options.megabytes * 2**20 // (n * k))
    codes8 = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    codes4 = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    scale8, scale4 = torch.full((n, 1), 0.01), torch.full((n, k // 128), 0.01)
    int8 = [qk.PackedInt8.from_quantized(codes8, scale8) for _ in range(copies)]
    int4 = [qk.PackedInt4.from_quantized(codes4, scale4) for _ in range(copies)]
    floats = [codes8.float() * scale8 for _ in range(copies)]
    bytes_of = {"int8_linear": n * k, "int4_linear": n * k // 2, "float linear": 4 * n * k}

    # The ceiling where a product is bound by memory: reading so many bytes and doing next to nothing with them.
    flat = [weight.view(-1) for weight in floats]
    read = medians({"read": lambda at: flat[at].sum()}, copies, options.seconds)["read"]
    bandwidth = 4 * n * k / read
    path = qk.library.host.active_isa() if qk.library.host is not None else "reference"
    print(f"{path}, {torch.get_num_threads()} threads; reading a tensor: {bandwidth / 1e9:.1f} GB/s")

    for m in options.m:
        q, scale, _ = qk.quantize_dynamic(torch.randn(m, k))  # int8 codes by token: the layers' input
        x = q.float() * scale
        calls: dict[str, Call] = {
            "int8_linear": lambda at, q=q, scale=scale: qk.int8_linear(
                q, int8[at], input_scale=scale, out_dtype=torch.float32
            ),
            "int4_linear": lambda at, q=q, scale=scale: qk.int4_linear(
                q, int4[at], input_scale=scale, out_dtype=torch.float32
            ),
            "float linear": lambda at, x=x: torch.nn.functional.linear(x, floats[at]),
        }
        exact8 = (q.double() @ codes8.double().t()) * 0.01 * scale
        exact4 = (q.double() @ codes4.double().t()) * 0.01 * scale
        check("int8_linear", calls["int8_linear"](0), exact8)
        check("int4_linear", calls["int4_linear"](0), exact4)
        for name, seconds in medians(calls, copies, options.seconds).items():
            share = bytes_of[name] / bandwidth / seconds
            print(
                f"M = {m:<4} {name:<13} {1e6 * seconds:8.1f} µs  {2e-9 * m * n * k / seconds:8.1f} GOPS  "
                f"{share:4.0%} of the time is what reading the weights takes"
            )


if __name__ == "__main__":
    main()
