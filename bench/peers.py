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
    except (ImportError, AttributeError, AssertionError, RuntimeError) as error:  # torchao asserts
        missing[name] = (str(error).splitlines() or [type(error).__name__])[0]
        return None
    return call


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


# Fake quantization as users write it in eager torch.


def round_straight_through(t: Tensor) -> Tensor:
    return t + (t.round() - t).detach()


def clamp(q: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """torch.clamp with a gradient of 1 on the bounds themselves, where torch's own is 0 or 0.5 from 2.14 on."""
    return torch.where(q < low, low, torch.where(q > high, high, q))


def lsq(x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Learned step size (arXiv 1902.08153): gradients of x and scale by autograd."""
    return clamp(round_straight_through(x / scale), quant_min, quant_max) * scale


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
    q = clamp(round_straight_through(groups * (1 / scale)), -quant_max - 1, quant_max)
    return (q * scale).reshape(x.shape).to(x.dtype)


def codes_of_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes of each row, and its scale."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (x * (1 / scale)).round().clamp(-128, 127).to(torch.int8), scale


# Linear layers with int8 weights [N, K] and activations quantized on the way, fp32 in and out.


def linear_dynamic(engine: str, x: Tensor, w: Tensor) -> Call:
    torch.backends.quantized.engine = engine
    q = torch.quantize_per_channel(w, w.abs().amax(1) / 127, torch.zeros(w.shape[0], dtype=torch.long), 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(q, None)
    # Without reduce_range the 8-bit kernels of FBGEMM can saturate.
    return lambda: torch.ops.quantized.linear_dynamic(x, packed, engine == "fbgemm")


def onnxruntime_linear(
    op: str,
    x: Tensor,
    n: int,
    constants: dict[str, Any],
    threads: int,
    copies: int,
    settings: tuple[str, ...] = (),
    **attributes: int,
) -> Call:
    """x and constants into one node with N outputs. Each session has a thread pool of its own; it turns settings on."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node(op, ["x", *constants], ["y"], domain="com.microsoft", **attributes)],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [x.shape[0], n])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if copies > 1:  # else their pools spin on each other's cores: 8 in turn took 2 to 8 times as long as one
        settings = (*settings, "session.force_spinning_stop")
    for name in settings:
        options.add_session_config_entry(name, "1")
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)[0]


def onnxruntime_dynamic(x: Tensor, w: Tensor, threads: int, copies: int) -> Call:
    import numpy

    scale = w.abs().amax(1) / 127
    q = (w / scale[:, None]).round().clamp(-127, 127).to(torch.int8).t().contiguous()
    constants = {"w": q.numpy(), "s": scale.numpy(), "z": numpy.zeros(w.shape[0], dtype=numpy.int8)}
    return onnxruntime_linear("DynamicQuantizeMatMul", x, w.shape[0], constants, threads, copies)


def openvino_linear(x: Tensor, weight: Any, threads: int, options: dict[str, Any]) -> Call:
    """The product with a node that stands for the float weight [N, K]."""
    import openvino
    from openvino import opset13 as nodes

    entry = nodes.parameter(list(x.shape), openvino.Type.f32)
    model = openvino.Model([nodes.matmul(entry, weight, False, True)], [entry])
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **options}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    feed = openvino.Tensor(x.numpy(), shared_memory=True)

    def call() -> Any:
        request.infer([feed], share_outputs=True)
        return request.get_output_tensor().data

    return call


def openvino_dynamic(x: Tensor, w: Tensor, threads: int) -> Call:
    """A product with int8 weights that OpenVINO computes on activations quantized in groups of 128 on the way."""
    from openvino import opset13 as nodes

    scale = w.abs().amax(1, keepdim=True) / 127
    q = (w / scale).round().clamp(-127, 127).to(torch.int8)
    weight = nodes.multiply(nodes.convert(nodes.constant(q.numpy()), "f32"), nodes.constant(scale.numpy()))
    return openvino_linear(x, weight, threads, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128})


def torchao_linear(x: Tensor, w: Tensor, config: Any) -> Call:
    from torchao.quantization import quantize_

    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device=w.device, dtype=w.dtype)
    layer.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
    model = torch.nn.Sequential(layer)
    quantize_(model, config)
    return torch.no_grad()(lambda: model(x))


def torchao_dynamic(x: Tensor, w: Tensor) -> Call:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return torchao_linear(x, w, Int8DynamicActivationInt8WeightConfig())


def int8_linear(x: Tensor, w: Tensor, threads: int, copies: int = 1) -> dict[str, Call | None]:
    """copies: how many of these will take turns."""
    half, half_w = x.bfloat16(), w.bfloat16()
    return {
        "FBGEMM": find("FBGEMM", lambda: linear_dynamic("fbgemm", x, w)),
        "oneDNN": find("oneDNN", lambda: linear_dynamic("onednn", x, w)),
        "onnxruntime": find("onnxruntime", lambda: onnxruntime_dynamic(x, w, threads, copies)),
        "OpenVINO": find("OpenVINO", lambda: openvino_dynamic(x, w, threads)),
        "torchao": find("torchao", lambda: torchao_dynamic(x, w)),
        "fp32": lambda: torch.nn.functional.linear(x, w),
        "bf16": lambda: torch.nn.functional.linear(half, half_w),
    }


# Convolutions with int8 weights and a scale for the input, fp32 in and out.


def int8_conv2d(
    x: Tensor, q: Tensor, scale: Tensor, input_scale: float, zero_point: int, padding: int, groups: int
) -> dict[str, Call | None]:
    """The same codes for all, zero_point that of a uint8 input; torch's quantize the output too, and are told 0.1."""

    def quantized(engine: str) -> Call:
        torch.backends.quantized.engine = engine
        step = 2 if engine == "fbgemm" else 1  # 7 bits of input: its depthwise kernels saturate on 8
        zeros = torch.zeros(q.shape[0], dtype=torch.long)
        w = torch._make_per_channel_quantized_tensor(q, scale.double(), zeros, 0)
        packed = torch.ops.quantized.conv2d_prepack(w, None, [1, 1], [padding, padding], [1, 1], groups)

        def call() -> Tensor:
            codes = torch.quantize_per_tensor(x, input_scale * step, zero_point // step, torch.quint8)
            return torch.ops.quantized.conv2d(codes, packed, 0.1, 128).dequantize()

        return call

    w = q * scale.reshape(-1, 1, 1, 1)
    return {
        "FBGEMM": find("FBGEMM", lambda: quantized("fbgemm")),
        "oneDNN": find("oneDNN", lambda: quantized("onednn")),
        "fp32": lambda: torch.nn.functional.conv2d(x, w, padding=padding, groups=groups),
    }


def lstm(layer: torch.nn.LSTM, x: Tensor) -> dict[str, Call | None]:
    """torch's dynamic LSTM, which quantizes inputs and hidden states by the range of the tensor, and fp32."""

    def dynamic() -> Call:
        torch.backends.quantized.engine = "fbgemm"
        quantized = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.LSTM})
        return lambda: quantized(x)[0]

    return {"torch dynamic": find("torch dynamic", dynamic), "fp32": lambda: layer(x)[0]}


# Linear layers with int4 weights: codes −8…7 [N, K] and their scales [N, K / group size]. Everyone is given the same
# ones, and their product where it quantizes for itself: int4_weight makes codes that quantizing by the range recovers.


def int4_weight(n: int, k: int, group_size: int, device: str = "cpu", bits: int = 4) -> tuple[Tensor, Tensor]:
    """Random codes that reach the lowest and the highest in every group, and scales that bf16 holds."""
    size = k if group_size == -1 else group_size
    end = 1 << bits - 1
    q = torch.randint(-end, end, (n, k), dtype=torch.int8, device=device)
    q[:, ::size], q[:, 1::size] = -end, end - 1
    scale = (torch.rand(n, k // size, device=device) + 0.5) / (4.6 * k**0.5)  # 4.6: the codes' standard deviation
    return q, scale.bfloat16().float()


def dequantized(q: Tensor, scale: Tensor) -> Tensor:
    return (q.reshape(*scale.shape, -1) * scale[..., None]).reshape(q.shape)


def in_blocks(q: Tensor, scale: Tensor, sizes: tuple[int, ...]) -> tuple[int, Tensor]:
    """For who takes groups of few sizes: the largest that divides ours, and as many scales, ours repeated."""
    group_size = q.shape[1] // scale.shape[1]
    size = next((size for size in sorted(sizes, reverse=True) if group_size % size == 0), None)
    if size is None:
        raise RuntimeError(f"takes groups of {', '.join(map(str, sizes))}, got {group_size}")
    return size, scale.repeat_interleave(group_size // size, 1)


def torch_int4pack(x: Tensor, q: Tensor, scale: Tensor) -> Call:
    """bf16 x and out, sums in float; on other dtypes its loop is scalar."""
    size, scale = in_blocks(q, scale, (32, 64, 128, 256))
    packed = torch._convert_weight_to_int4pack_for_cpu((q + 8).int(), 1)
    # A weight is (code − 8)·scale + zero.
    scale_and_zero = torch.stack((scale, torch.zeros_like(scale)), 2).transpose(0, 1).bfloat16().contiguous()
    return lambda: torch._weight_int4pack_mm_for_cpu(x, packed, size, scale_and_zero)


def onnxruntime_bits(
    x: Tensor, q: Tensor, scale: Tensor, threads: int, copies: int, act_bits: int, bits: int = 4, *settings: str
) -> Call:
    """MatMulNBits; accuracy_level 4: on int8 activations, quantized in groups as the weight is; 1: in fp32."""
    n, k = q.shape
    size, scale = in_blocks(q, scale, (16, 32, 64, 128, 256))
    codes = (q + (1 << bits - 1)).to(torch.uint8).view(n, k // size, size * bits // 8, 8 // bits)
    packed = (codes << torch.arange(0, 8, bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    constants = {"w": packed.numpy(), "s": scale.numpy()}
    attributes = {"K": k, "N": n, "bits": bits, "block_size": size, "accuracy_level": 4 if act_bits == 8 else 1}
    return onnxruntime_linear("MatMulNBits", x, n, constants, threads, copies, settings, **attributes)


def two_bit_linear(x: Tensor, q: Tensor, scale: Tensor, threads: int) -> dict[str, Call | None]:
    """onnxruntime's two ways to multiply int8 activations with codes −2…1: in dot products, and by tables of sums."""

    def way(*settings: str) -> Callable[[], Call]:
        return lambda: onnxruntime_bits(x, q, scale, threads, 1, 8, 2, *settings)

    return {
        "onnxruntime": find("onnxruntime, 2 bits", way()),
        "onnxruntime tables": find("onnxruntime tables, 2 bits", way("mlas.use_lut_gemm")),
    }


def openvino_int4(x: Tensor, q: Tensor, scale: Tensor, threads: int, options: dict[str, Any]) -> Call:
    import numpy
    import openvino
    from openvino import opset13 as nodes

    n, k = q.shape
    groups = scale.shape[1]
    if k % 2:
        raise RuntimeError(f"takes an even K here, got {k}")
    packed = (q[:, ::2] & 15 | q[:, 1::2] << 4).view(torch.uint8).numpy()
    # Groups are a dim of their own, where there are several.
    shape, scale = ([n, k], scale) if groups == 1 else ([n, groups, k // groups], scale[..., None])
    codes = nodes.convert(nodes.constant(openvino.Tensor(packed, shape, openvino.Type.i4)), "f32")
    weight = nodes.multiply(codes, nodes.constant(scale.numpy()))
    if groups > 1:
        weight = nodes.reshape(weight, nodes.constant(numpy.array([n, k])), False)
    return openvino_linear(x, weight, threads, options)


def torchao_int4(x: Tensor, w: Tensor, group_size: int, act_bits: int) -> Call:
    """Weight-only: bf16 x and out, by torch's int4pack; with int8 activations: by a kernel that wheels may lack."""
    from torchao.prototype.quantization.int4 import (
        Int8DynamicActivationInt4WeightConfig,
        PrototypeInt4WeightOnlyConfig,
    )

    if act_bits == 8:
        return torchao_linear(x, w, Int8DynamicActivationInt4WeightConfig(group_size, set_inductor_config=False))
    config = PrototypeInt4WeightOnlyConfig(group_size, set_inductor_config=False)
    return torchao_linear(x.bfloat16(), w.bfloat16(), config)


def int4_linear(
    x: Tensor, q: Tensor, scale: Tensor, threads: int, act_bits: int, copies: int = 1
) -> dict[str, Call | None]:
    """act_bits 8: with activations quantized to int8 on the way, where the library can; 16: in floats.

    copies: how many of these will take turns.
    """
    w = dequantized(q, scale)
    half, half_w = x.bfloat16(), w.bfloat16()
    group_size = q.shape[1] // scale.shape[1]

    def openvino(**options: Any) -> Callable[[], Call]:
        return lambda: openvino_int4(x, q, scale, threads, options)

    if act_bits == 8:
        by_openvino = {"OpenVINO": openvino(DYNAMIC_QUANTIZATION_GROUP_SIZE=group_size)}
    else:  # by default it computes in bf16 where the CPU has that
        by_openvino = {
            "OpenVINO fp32": openvino(DYNAMIC_QUANTIZATION_GROUP_SIZE=0, INFERENCE_PRECISION_HINT="f32"),
            "OpenVINO bf16": openvino(DYNAMIC_QUANTIZATION_GROUP_SIZE=0, INFERENCE_PRECISION_HINT="bf16"),
        }
    builders = {
        "onnxruntime": lambda: onnxruntime_bits(x, q, scale, threads, copies, act_bits),
        **by_openvino,
        "torch int4pack": lambda: torch_int4pack(half, q, scale),
        "torchao": lambda: torchao_int4(x, w, group_size, act_bits),
    }
    return {
        **{name: find(f"{name}, w4a{act_bits}", build) for name, build in builders.items()},
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
    clipped = clamp(v, codebook[0].detach(), codebook[-1].detach())
    y = (level + (clipped - clipped.detach())) * scale[..., None]
    return y.reshape(x.shape).to(x.dtype)


# Codes of 2, 3 and 4 bits in dense bytes: 8 codes become one integer of as many bytes as a code has bits.


def pack(q: Tensor, bits: int) -> Tensor:
    at = torch.arange(0, 8 * bits, bits, dtype=torch.int32)
    stream = ((q.unflatten(-1, (-1, 8)).int() & (1 << bits) - 1) << at).sum(-1, dtype=torch.int32)
    octets = stream[..., None] >> torch.arange(0, 8 * bits, 8, dtype=torch.int32) & 255
    return octets.to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    octets = packed.unflatten(-1, (-1, bits)).int() << torch.arange(0, 8 * bits, 8, dtype=torch.int32)
    stream, sign = octets.sum(-1, dtype=torch.int32), 1 << bits - 1
    codes = stream[..., None] >> torch.arange(0, 8 * bits, bits, dtype=torch.int32) & (1 << bits) - 1
    return ((codes ^ sign) - sign).to(torch.int8).flatten(-2)
