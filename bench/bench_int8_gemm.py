"""int8 linear and matmul against the libraries that users have.

pytest-benchmark tests time one call; run as a script, the file prints ratios measured in alternating blocks:
``python bench/bench_int8_gemm.py [--threads 1 2] [--peers ours torch_fp32 fbgemm onednn ort]``
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qkernels.ops.int8_gemm import PackedInt8, int8_linear

SHAPES = [(m, n, 4096) for n in (4096, 11008) for m in (1, 4, 16, 64, 256)]
Call = Callable[[], object]


def ours(x: Tensor, w: Tensor, threads: int) -> Call:
    packed = PackedInt8.from_float(w)
    return lambda: int8_linear(x, packed)


def torch_fp32(x: Tensor, w: Tensor, threads: int) -> Call:
    return lambda: torch.nn.functional.linear(x, w)


def _linear_dynamic(engine: str, x: Tensor, w: Tensor) -> Call:
    torch.backends.quantized.engine = engine
    q = torch.quantize_per_channel(w, w.abs().amax(1) / 127, torch.zeros(w.shape[0], dtype=torch.long), 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(q, None)
    return lambda: torch.ops.quantized.linear_dynamic(x, packed, engine == "fbgemm")


def fbgemm(x: Tensor, w: Tensor, threads: int) -> Call:
    return _linear_dynamic("fbgemm", x, w)  # reduce_range: its 8-bit kernels saturate otherwise


def onednn(x: Tensor, w: Tensor, threads: int) -> Call:
    return _linear_dynamic("onednn", x, w)


def ort(x: Tensor, w: Tensor, threads: int) -> Call:
    """onnxruntime's DynamicQuantizeMatMul; its thread pool has its own size."""
    import numpy
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    scale = w.abs().amax(1) / 127
    q = (w / scale[:, None]).round().clamp(-127, 127).to(torch.int8).t().contiguous()
    initializers = [
        numpy_helper.from_array(q.numpy(), "w"),
        numpy_helper.from_array(scale.numpy(), "s"),
        numpy_helper.from_array(numpy.zeros(w.shape[0], dtype=numpy.int8), "z"),
    ]
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s", "z"], ["y"], domain="com.microsoft")
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [x.shape[0], w.shape[0]])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)[0]


PEERS = {peer.__name__: peer for peer in (ours, torch_fp32, fbgemm, onednn, ort)}


def check(call: Call, x: Tensor, w: Tensor) -> None:
    """A wrong kernel is not timed. 3 %: 7-bit activations (FBGEMM's reduce_range) err by 1 % of the output's norm."""
    got, want = torch.as_tensor(call()), x @ w.t()
    error = (got - want).norm() / want.norm()
    assert error < 0.03, f"relative error {error:.3g}"


def alternate(calls: dict[str, Call], blocks: int = 5, seconds: float = 0.12) -> dict[str, float]:
    """Median seconds per call. Blocks of calls alternate, not calls: the peers' thread pools spin after each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(blocks):
        for name, call in calls.items():
            time.sleep(0.03)
            for _ in range(3):
                call()
            laps = []
            end = time.perf_counter() + seconds
            while not laps or time.perf_counter() < end:
                start = time.perf_counter()
                call()
                laps.append(time.perf_counter() - start)
            times[name].append(statistics.median(laps))
    return {name: statistics.median(laps) for name, laps in times.items()}


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("peer", PEERS)
def test_linear(benchmark: Callable[[Call], object], peer: str, m: int, n: int, k: int) -> None:
    if peer == "ort":
        pytest.importorskip("onnxruntime")
    x, w = torch.randn(m, k), torch.randn(n, k) / k**0.5
    call = PEERS[peer](x, w, torch.get_num_threads())
    check(call, x, w)
    benchmark(call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--m", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--n", type=int, nargs="+", default=[4096, 11008])
    parser.add_argument("--blocks", type=int, default=5)
    args = parser.parse_args()
    for threads in args.threads:
        torch.set_num_threads(threads)
        for m, n, k in [(m, n, k) for m, n, k in SHAPES if m in args.m and n in args.n]:
            x, w = torch.randn(m, k), torch.randn(n, k) / k**0.5
            calls = {name: PEERS[name](x, w, threads) for name in args.peers}
            for call in calls.values():
                check(call, x, w)
            seconds = alternate(calls, args.blocks)
            gops = 2e-9 * m * n * k
            cells = [f"{name} {1e3 * s:.3f} ms ({gops / s:.0f} GOPS)" for name, s in seconds.items()]
            int8 = [s for name, s in seconds.items() if name in ("fbgemm", "onednn", "ort")]
            if int8 and "ours" in seconds:
                cells.append(f"best int8 peer / ours {min(int8) / seconds['ours']:.2f}")
            print(f"{threads} thread{'s' * (threads > 1)} {m}x{n}x{k}: " + ", ".join(cells), flush=True)


if __name__ == "__main__":
    main()
