"""The competitors. Each is found at run time; one that is not there is named in the report with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
missing: dict[str, str] = {}


def find(name: str, build: Callable[[], Call]) -> Call | None:
    """The peer's call, tried once; None where this machine does not have it."""
    try:
        call = build()
        call()
    except (ImportError, AttributeError, RuntimeError) as error:
        missing[name] = (str(error).splitlines() or [type(error).__name__])[0]
        return None
    return call


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


# Fake quantization as users write it in eager torch.


def round_straight_through(t: Tensor) -> Tensor:
    return t + (t.round() - t).detach()


def lsq(x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Learned step size (arXiv 1902.08153): gradients of x and scale by autograd."""
    return round_straight_through(x / scale).clamp(quant_min, quant_max) * scale


def dynamic(x: Tensor, bits: int, group_size: int) -> Tensor:
    """Symmetric, scale from each group of the last dim, as torchao's fake quantizers compute it."""
    quant_max = 2 ** (bits - 1) - 1
    groups = x.reshape(*x.shape[:-1], -1, group_size)
    with torch.no_grad():
        low, high = (
            groups.float().amin(-1, keepdim=True).clamp(max=0),
            groups.float().amax(-1, keepdim=True).clamp(min=0),
        )
        scale = (torch.maximum(-low, high) / (quant_max + 0.5)).clamp(min=torch.finfo(torch.float32).eps)
    q = round_straight_through(groups * (1 / scale)).clamp(-quant_max - 1, quant_max)
    return (q * scale).reshape(x.shape).to(x.dtype)


# Linear layers with int8 weights [N, K] and activations quantized on the way, fp32 in and out.


def linear_dynamic(engine: str, x: Tensor, w: Tensor) -> Call:
    torch.backends.quantized.engine = engine
    q = torch.quantize_per_channel(w, w.abs().amax(1) / 127, torch.zeros(w.shape[0], dtype=torch.long), 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(q, None)
    # Without reduce_range the 8-bit kernels of FBGEMM can saturate.
    return lambda: torch.ops.quantized.linear_dynamic(x, packed, engine == "fbgemm")


def onnxruntime_dynamic(x: Tensor, w: Tensor, threads: int) -> Call:
    """DynamicQuantizeMatMul; its thread pool has its own size."""
    import numpy
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    scale = w.abs().amax(1) / 127
    q = (w / scale[:, None]).round().clamp(-127, 127).to(torch.int8).t().contiguous()
    constants = {"w": q.numpy(), "s": scale.numpy(), "z": numpy.zeros(w.shape[0], dtype=numpy.int8)}
    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeMatMul", ["x", *constants], ["y"], domain="com.microsoft")],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [x.shape[0], w.shape[0]])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)[0]


def openvino_dynamic(x: Tensor, w: Tensor, threads: int) -> Call:
    """A product with int8 weights that OpenVINO computes on activations quantized in groups of 128 on the way."""
    import openvino
    from openvino import opset13 as nodes

    scale = w.abs().amax(1, keepdim=True) / 127
    q = (w / scale).round().clamp(-127, 127).to(torch.int8)
    weight = nodes.multiply(nodes.convert(nodes.constant(q.numpy()), "f32"), nodes.constant(scale.numpy()))
    entry = nodes.parameter(list(x.shape), openvino.Type.f32)
    model = openvino.Model([nodes.matmul(entry, weight, False, True)], [entry])
    options = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    feed = openvino.Tensor(x.numpy(), shared_memory=True)

    def call() -> Any:
        request.infer([feed], share_outputs=True)
        return request.get_output_tensor().data

    return call


def torchao_dynamic(x: Tensor, w: Tensor) -> Call:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
    model = torch.nn.Sequential(layer)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return torch.no_grad()(lambda: model(x))


def int8_linear(x: Tensor, w: Tensor, threads: int) -> dict[str, Call | None]:
    half, half_w = x.bfloat16(), w.bfloat16()
    return {
        "FBGEMM": find("FBGEMM", lambda: linear_dynamic("fbgemm", x, w)),
        "oneDNN": find("oneDNN", lambda: linear_dynamic("onednn", x, w)),
        "onnxruntime": find("onnxruntime", lambda: onnxruntime_dynamic(x, w, threads)),
        "OpenVINO": find("OpenVINO", lambda: openvino_dynamic(x, w, threads)),
        "torchao": find("torchao", lambda: torchao_dynamic(x, w)),
        "fp32": lambda: torch.nn.functional.linear(x, w),
        "bf16": lambda: torch.nn.functional.linear(half, half_w),
    }


# Non-uniform quantization as users write it, straight through, with scales of groups of the last dim.


def codebook_bucketize(x: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    """codebook is in ascending order."""
    v = x.reshape(*scale.shape, -1) / scale[..., None]
    midpoints = (codebook[:-1] + codebook[1:]).detach() / 2
    return _through_level(x, v, codebook[torch.bucketize(v.detach(), midpoints)], scale, codebook)


def codebook_argmin(x: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    v = x.reshape(*scale.shape, -1) / scale[..., None]
    nearest = (v.detach()[..., None] - codebook.detach()).abs().argmin(-1)
    return _through_level(x, v, codebook[nearest], scale, codebook)


def _through_level(x: Tensor, v: Tensor, level: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    clipped = v.clamp(codebook[0].detach(), codebook[-1].detach())
    y = (level + (clipped - clipped.detach())) * scale[..., None]
    return y.reshape(x.shape).to(x.dtype)
