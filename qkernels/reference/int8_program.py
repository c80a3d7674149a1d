"""int8_program in plain torch: runs a plan (see ``ops/int8_program.py``) step by step.

A value is a tensor [N, C, D, H, W], floats or codes (int64), with the number of its spatial dims: 0 to 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import conv_checks, layouts
from ..checks import require
from .activation import FUNCTIONS, gelu_tanh, sigmoid, tanh
from .int8_gemm import static_qparams

Step = dict[str, str]
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
DTYPES: dict[str, tuple[torch.dtype, ...]] = {  # of constants, as errors call them
    "torch.float32": (torch.float32,),
    "torch.int8": (torch.int8,),
    "torch.int32": (torch.int32,),
    "an integer dtype": INTEGERS,
    "torch.float32 or an integer dtype": (torch.float32, *INTEGERS),
}


@dataclass(frozen=True)
class Quantizer:
    scale: Tensor
    zero_point: Tensor
    low: int
    high: int

    def codes(self, x: Tensor) -> Tensor:
        """A NaN becomes the zero point, as no code is NaN."""
        q = ((x * (1 / self.scale)).round() + self.zero_point).clamp(self.low, self.high)
        return torch.where(q.isnan(), self.zero_point, q).long()

    def values(self, codes: Tensor) -> Tensor:
        return (codes - self.zero_point).float() * self.scale


@dataclass(frozen=True)
class Value:
    data: Tensor
    rank: int
    quantizer: Quantizer | None = None  # None: floats

    def floats(self) -> Tensor:
        return self.data if self.quantizer is None else self.quantizer.values(self.data)


def parse(plan: str) -> list[tuple[int, str, Step]]:
    """The steps of a plan: each one's line and name, and its values by their keys."""
    steps = []
    for number, line in enumerate(plan.splitlines(), 1):
        name, *pairs = line.split(" ")
        require(name in STEPS, f"plan: line {number}: got the step '{name}'; accepted: {', '.join(sorted(STEPS))}")
        steps.append((number, name, dict(pair.split("=", 1) for pair in pairs)))
    return steps


def int8_program(
    inputs: Sequence[Tensor], constants: Sequence[Tensor], plan: str, shapes_only: bool = False
) -> list[Tensor]:
    """shapes_only: looks at no values, for tracing: tensors may then be fake."""
    steps = parse(plan)
    conv_checks.int8_program(inputs)
    machine = Machine(inputs, constants, shapes_only)
    for number, name, step in steps:
        machine.where = f"plan: line {number} ({name})"
        STEPS[name](machine, step)
    return [machine.finished(output) for _, output in sorted(machine.outputs.items())]


class Machine:
    """What a running plan has computed so far."""

    def __init__(self, inputs: Sequence[Tensor], constants: Sequence[Tensor], shapes_only: bool) -> None:
        self.inputs, self.constants, self.shapes_only = inputs, constants, shapes_only
        self.quantizers: dict[str, Quantizer] = {}
        self.values: dict[str, Value] = {}
        self.outputs: dict[int, Tensor] = {}
        self.where = ""  # the line that runs, for errors
        self.broken = False  # a scale or a bias is not finite
        self.nan = torch.zeros(inputs[0].shape[0], dtype=torch.bool, device=inputs[0].device)  # images with a NaN

    def finished(self, output: Tensor) -> Tensor:
        if self.shapes_only:
            return output
        nan = torch.ones_like(self.nan) if self.broken else self.nan
        if bool(nan.any()):
            output[nan] = torch.nan
        return output

    def refuse(self, text: str) -> NoReturn:
        raise RuntimeError(f"{self.where}: {text}")

    def constant(self, step: Step, key: str, count: int, what: str = "torch.float32") -> Tensor:
        i = int(step[key])
        if i >= len(self.constants):
            self.refuse(f"{key}: got constant {i}; accepted: below {len(self.constants)}")
        t, device = self.constants[i].detach(), self.inputs[0].device
        if t.device != device:
            raise RuntimeError(f"Tensor on device {t.device} is not on the expected device {device}!")
        if t.dtype not in DTYPES[what] or t.numel() != count or not t.is_contiguous():
            got = f"{'' if t.is_contiguous() else 'strided '}{t.dtype} of shape {list(t.shape)}"
            self.refuse(f"{key}: got constant {i}, {got}; accepted: contiguous {what} with {count} elements")
        return t

    def finite(self, step: Step, key: str, count: int) -> Tensor | None:
        """Floats that a step may do without."""
        if key not in step:
            return None
        t = self.constant(step, key, count)
        if not self.shapes_only:
            self.broken |= not bool(t.isfinite().all())
        return t

    def with_channels(self, x: Value, channels: int) -> None:
        if x.data.shape[1] != channels:
            self.refuse(f"x: got {x.data.shape[1]} channels; accepted: {channels}")

    def keep(self, step: Step, y: Tensor, rank: int) -> None:
        """Keeps a result as floats, as codes, or both."""
        if "out" in step:
            self.values[step["out"]] = Value(y, rank)
        if "codes" in step:
            quantizer = self.quantizers[step["q"]]
            self.values[step["codes"]] = Value(quantizer.codes(y), rank, quantizer)

    def move(self, step: Step, change: Callable[[Tensor], Tensor], rank: int | None = None) -> None:
        """Keeps a result whose elements are those of x."""
        x = self.values[step["x"]]
        self.values[step["out"]] = Value(change(x.data), x.rank if rank is None else rank, x.quantizer)


def _ints(step: Step, key: str, missing: str = "0,0,0") -> list[int]:
    return [int(part) for part in step.get(key, missing).split(",")]


def _activated(step: Step, key: str, x: Tensor) -> Tensor:
    if key not in step:
        return x
    name, *parameters = step[key].split(":")
    return ACTIVATIONS[name](x, *map(float, parameters))


def _clamp(x: Tensor, low: float, high: float) -> Tensor:
    return torch.clamp(x, low, high)


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    **{name: FUNCTIONS[name] for name in ("relu", "gelu", "silu")},
    "gelu_tanh": gelu_tanh,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "clamp": _clamp,
    "leaky_relu": lambda x, slope: torch.where(x > 0, x, x * slope),
    "hardswish": lambda x: x * _clamp(x + 3, 0, 6) / 6,
    "hardsigmoid": lambda x: _clamp(x + 3, 0, 6) / 6,
}


def _quantizer(m: Machine, step: Step) -> None:
    low, high = int(step["low"]), int(step["high"])
    scale = m.finite(step, "scale", 1)
    zero_point = m.constant(step, "zero_point", 1, "an integer dtype") if "zero_point" in step else None
    assert scale is not None
    if m.shapes_only:
        scale, zero_point = scale.reshape(()), torch.zeros((), dtype=torch.int64, device=scale.device)
    else:
        scale, zero_point = static_qparams("input", scale, zero_point, low, high)
        m.broken |= not bool(scale.isfinite())
    m.quantizers[step["id"]] = Quantizer(scale, zero_point, low, high)


def _equal(m: Machine, step: Step) -> None:
    a, b = (m.constant(step, key, 1, "torch.float32 or an integer dtype") for key in ("a", "b"))
    if not m.shapes_only and a.item() != b.item():
        accepted = "equal ones, as the plan takes them for one quantizer"
        m.refuse(f"constants {step['a']} and {step['b']} differ; accepted: {accepted}")


def _input(m: Machine, step: Step) -> None:
    x = m.inputs[int(step["index"])].detach()
    rank = x.dim() - 2
    if not m.shapes_only:
        m.nan |= x.isnan().flatten(1).any(1)
    x = x.reshape(*x.shape[:2], *[1] * (3 - rank), *x.shape[2:])
    m.values[step["out"]] = Value(x, rank)


def _quantize(m: Machine, step: Step) -> None:
    x, quantizer = m.values[step["x"]], m.quantizers[step["q"]]
    m.values[step["out"]] = Value(quantizer.codes(x.floats()), x.rank, quantizer)


def _dequantize(m: Machine, step: Step) -> None:
    x = m.values[step["x"]]
    m.values[step["out"]] = Value(x.floats(), x.rank)


def _requantize(m: Machine, step: Step) -> None:
    x = m.values[step["x"]]
    m.keep(step, x.floats(), x.rank)


def _finish_product(m: Machine, step: Step, acc: Tensor, x: Value) -> None:
    assert x.quantizer is not None

    def by_channel(t: Tensor) -> Tensor:
        return t.float().reshape(-1, 1, 1, 1)

    scale, bias = (m.finite(step, key, int(step["out_channels"])) for key in ("scale", "bias"))
    assert scale is not None
    y = acc.float() * by_channel(scale) * x.quantizer.scale
    if bias is not None:
        y = y + by_channel(bias)
    y = _activated(step, "first", y)
    if "residual" in step:
        y = y + m.values[step["residual"]].floats()
    m.keep(step, _activated(step, "second", y), x.rank)


def _conv(m: Machine, step: Step) -> None:
    x, kernel, groups = m.values[step["x"]], _ints(step, "kernel"), int(step.get("groups", "1"))
    assert x.quantizer is not None
    n, c = int(step["out_channels"]), int(step["in"])
    m.with_channels(x, c)
    shape = n, c // groups, *kernel
    data = m.constant(step, "data", layouts.conv_bytes(shape, groups), "torch.int8")
    m.constant(step, "colsum", n, "torch.int32")
    weight = layouts.conv_unpack(data, shape, groups)
    before, after = _ints(step, "padding"), _ints(step, "padding_after", step.get("padding", "0,0,0"))
    sides = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
    # (q - zero_point) is zero in the padding, because the zero point is the code of an exact 0.
    padded = F.pad((x.data - x.quantizer.zero_point).double(), sides)
    stride, dilation = _ints(step, "stride"), _ints(step, "dilation")
    acc = F.conv3d(padded, weight.double(), None, stride, 0, dilation, groups)
    _finish_product(m, step, acc.long(), x)


def _conv_transpose(m: Machine, step: Step) -> None:
    x, kernel, groups = m.values[step["x"]], _ints(step, "kernel"), int(step.get("groups", "1"))
    assert x.quantizer is not None
    stride, dilation = _ints(step, "stride"), _ints(step, "dilation")
    shape = int(step["in"]), int(step["out_channels"]) // groups, *kernel
    m.with_channels(x, shape[0])
    data = m.constant(step, "data", layouts.conv_transpose_bytes(shape, groups, stride, dilation), "torch.int8")
    m.constant(step, "colsum", math.prod(stride) * int(step["out_channels"]), "torch.int32")
    weight = layouts.conv_transpose_unpack(data, shape, groups, stride, dilation).double()
    values = (x.data - x.quantizer.zero_point).double()
    padding = _ints(step, "padding"), _ints(step, "output_padding")
    acc = F.conv_transpose3d(values, weight, None, stride, *padding, groups, dilation)
    _finish_product(m, step, acc.long(), x)


def _linear(m: Machine, step: Step) -> None:
    _conv(m, {**step, "kernel": "1,1,1", "stride": "1,1,1", "dilation": "1,1,1"})


def _max_pool(m: Machine, step: Step) -> None:
    x = m.values[step["x"]]
    options = _ints(step, "kernel"), _ints(step, "stride"), _ints(step, "padding"), _ints(step, "dilation", "1,1,1")
    m.move(step, lambda t: F.max_pool3d(t.double(), *options, step.get("ceil") == "1").to(x.data.dtype))


def _avg_pool(m: Machine, step: Step) -> None:
    x, kernel, stride = m.values[step["x"]], _ints(step, "kernel"), _ints(step, "stride")
    padding = _ints(step, "padding")
    options = (
        step.get("ceil") == "1",
        step.get("include_pad") == "1",
        int(step["divisor"]) if "divisor" in step else None,
    )
    if x.rank == 3:
        y = F.avg_pool3d(x.floats(), kernel, stride, padding, *options)
    else:
        y = F.avg_pool2d(x.floats().squeeze(2), kernel[1:], stride[1:], padding[1:], *options).unsqueeze(2)
    m.keep(step, y, x.rank)


def _adaptive_avg_pool(m: Machine, step: Step) -> None:
    x, size = m.values[step["x"]], _ints(step, "size")
    if x.rank == 3:
        y = F.adaptive_avg_pool3d(x.floats(), size)  # type: ignore[arg-type]
    else:
        y = F.adaptive_avg_pool2d(x.floats().squeeze(2), size[1:]).unsqueeze(2)  # type: ignore[arg-type]
    m.keep(step, y, x.rank)


def _mean(m: Machine, step: Step) -> None:
    x = m.values[step["x"]]
    m.keep(step, x.floats().mean((2, 3, 4), keepdim=True), x.rank if step.get("keep") == "1" else 0)


def _activate(m: Machine, step: Step) -> None:
    x = m.values[step["x"]]
    m.keep(step, _activated(step, "first", x.floats()), x.rank)


def _binary(m: Machine, step: Step) -> None:
    a, b = m.values[step["a"]], m.values[step["b"]]
    y: Tensor = getattr(torch, step["kind"])(a.floats(), b.floats())
    m.keep(step, _activated(step, "first", y), max(a.rank, b.rank))


def _batch_norm(m: Machine, step: Step) -> None:
    x = m.values[step["x"]]
    mean, var, weight, bias = (m.finite(step, key, x.data.shape[1]) for key in ("mean", "var", "weight", "bias"))
    assert mean is not None
    assert var is not None
    alpha = torch.rsqrt(var + float(step["eps"]))
    alpha = alpha if weight is None else alpha * weight
    shift = -mean * alpha if bias is None else bias - mean * alpha
    y = x.floats() * alpha.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)
    m.keep(step, _activated(step, "first", y), x.rank)


def row_sum(x: Tensor) -> Tensor:
    """Sums over the last dim in fp64, [..., 1]: 16 lanes, each added up in fp32 over up to 64 values before."""
    vectors = F.pad(x, (0, -x.shape[-1] % 16)).reshape(*x.shape[:-1], -(-x.shape[-1] // 16), 16)
    total = torch.zeros(*x.shape[:-1], 16, dtype=torch.float64, device=x.device)
    for block in vectors.split(64, -2):
        held = torch.zeros_like(total, dtype=torch.float32)
        for vector in block.unbind(-2):
            held = held + vector
        total = total + held.double()
    while total.shape[-1] > 1:
        total = total[..., : total.shape[-1] // 2] + total[..., total.shape[-1] // 2 :]
    return total


def _norm(m: Machine, step: Step, centered: bool) -> None:
    source = m.values[step["x"]]
    count = int(step["channels"])
    m.with_channels(source, count)
    x = source.floats().movedim(1, -1)
    weight, bias = m.finite(step, "weight", count), m.finite(step, "bias", count)
    if centered:
        x = x - (row_sum(x) / count).float()
    square = (row_sum(x * x) / count).float() + float(step["eps"])
    y = x * (1 / square.double().sqrt().float())  # torch's root of fp32 is not always the nearest number
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    if not m.shapes_only:
        m.nan |= y.isnan().flatten(1).any(1)
    m.keep(step, y.movedim(-1, 1), source.rank)


def _cat(m: Machine, step: Step) -> None:
    xs = [m.values[name] for name in step["xs"].split(",")]
    m.values[step["out"]] = Value(torch.cat([x.data for x in xs], 1), xs[0].rank, xs[0].quantizer)


def _slice(m: Machine, step: Step) -> None:
    m.move(step, lambda t: t[:, int(step["begin"]) : int(step["end"])])


def _shuffle(m: Machine, step: Step) -> None:
    m.move(step, lambda t: t.unflatten(1, (int(step["groups"]), -1)).transpose(1, 2).flatten(1, 2))


def _pixel_shuffle(m: Machine, step: Step) -> None:
    m.move(step, lambda t: F.pixel_shuffle(t.squeeze(2), int(step["factor"])).unsqueeze(2))


def _pixel_unshuffle(m: Machine, step: Step) -> None:
    m.move(step, lambda t: F.pixel_unshuffle(t.squeeze(2), int(step["factor"])).unsqueeze(2))


def _new_sizes(m: Machine, step: Step) -> list[int]:
    if "like" in step:
        return list(m.values[step["like"]].data.shape[2:])
    if "size" in step:
        return _ints(step, "size")
    return [size * times for size, times in zip(m.values[step["x"]].data.shape[2:], _ints(step, "scale"), strict=True)]


def _upsample(m: Machine, step: Step) -> None:
    def nearest(t: Tensor) -> Tensor:
        if m.shapes_only:
            return t.new_empty(*t.shape[:2], *_new_sizes(m, step))
        for dim, (size, out) in enumerate(zip(t.shape[2:], _new_sizes(m, step), strict=True), 2):
            ratio = torch.tensor(float(size)) / float(out)
            at = (torch.arange(out, dtype=torch.float32) * ratio).long().clamp(max=size - 1)
            t = t.index_select(dim, at.to(t.device))
        return t

    m.move(step, nearest)


def _resize(m: Machine, step: Step) -> None:
    x, sizes = m.values[step["x"]], _new_sizes(m, step)
    options = {"mode": "trilinear", "align_corners": step.get("align_corners") == "1"}
    m.keep(step, F.interpolate(x.floats(), size=sizes, **options), x.rank)  # type: ignore[arg-type]


def _flatten(m: Machine, step: Step) -> None:
    m.move(step, lambda t: t.flatten(1)[:, :, None, None, None], rank=0)


def _output(m: Machine, step: Step) -> None:
    x = m.values[step["x"]]
    y = x.floats().flatten(2) if x.rank == 0 else x.floats()
    y = y.reshape(y.shape[0], y.shape[1], *y.shape[5 - x.rank :]) if x.rank else y[:, :, 0]
    first = m.inputs[0]
    last = step.get("channels_last") == "input" and first.dim() == x.rank + 2 and _is_channels_last(first)
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    m.outputs[int(step["index"])] = y.clone(memory_format=formats[x.rank] if last else torch.contiguous_format)


def _is_channels_last(x: Tensor) -> bool:
    if x.dim() not in (4, 5):
        return False
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=last) and not x.is_contiguous()


STEPS: dict[str, Callable[[Machine, Step], Any]] = {
    "quantizer": _quantizer,
    "equal": _equal,
    "input": _input,
    "quantize": _quantize,
    "dequantize": _dequantize,
    "requantize": _requantize,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": _linear,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "adaptive_avg_pool": _adaptive_avg_pool,
    "mean": _mean,
    "activate": _activate,
    "binary": _binary,
    "batch_norm": _batch_norm,
    "layer_norm": lambda m, step: _norm(m, step, centered=True),
    "rms_norm": lambda m, step: _norm(m, step, centered=False),
    "cat": _cat,
    "slice": _slice,
    "shuffle": _shuffle,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "upsample": _upsample,
    "resize": _resize,
    "flatten": _flatten,
    "output": _output,
}
