"""Reads nodes of a converted model's graph as operations that a program knows (see ``ops/int8_program.py``)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..nn.fake_quantize import FakeQuantize
from ..nn.functional import QATAdd
from ..nn.granularity import PerTensor
from ..nn.int8 import Int8Linear
from ..ops.int8_convolution import three
from .integer_convolution import CONVOLUTIONS
from .node_sizes import size_of, spatial_sizes_of

Inputs = list[fx.Node]

LAYERS: tuple[type[nn.Module], ...] = (Int8Linear, *CONVOLUTIONS)
POOL_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
PRODUCTS = ("conv", "conv_transpose", "linear")  # the steps of these layers


@dataclass
class Operation:
    """What a node computes.

    Attributes:
        kind: a step of a program; "quantizer"; or "alias": its input itself.
        inputs: the nodes of its tensors.
        options: numbers and texts of the step.
        module: the module whose tensors it uses.
        quantizer: what its result passes through.
        rank: the number of spatial dims that its inputs must have; None: any.
        out_rank: that of its result; None: as its inputs.
        has_like: whether its last input gives it nothing but a size.
    """

    kind: str
    inputs: Inputs
    options: dict[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None
    quantizer: FakeQuantize | None = None
    rank: int | None = None
    out_rank: int | None = None
    has_like: bool = False


def is_plain(quantizer: FakeQuantize) -> bool:
    """Whether the values of a quantizer are integers of a byte times one fixed scale."""
    return (
        type(quantizer).forward is FakeQuantize.forward
        and quantizer.quantizes
        and quantizer.integer_codes
        and quantizer.quantizer != "dynamic"
        and isinstance(quantizer.granularity, PerTensor)
        and quantizer.quant_min >= -128
        and quantizer.quant_max <= 127
    )


def module_operation(node: fx.Node, module: nn.Module) -> Operation | None:
    inputs = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if len(inputs) != len(node.args) or node.kwargs or "forward" in vars(module):
        return None
    kind = type(module)
    if kind in LAYERS:
        return _layer(inputs, module)
    if kind is QATAdd:
        quantizer: Any = module.quantizer_of("output")  # type: ignore[operator]
        if quantizer is not None and not is_plain(quantizer):
            return None
        return Operation("binary", inputs, {"kind": "add"}, quantizer=quantizer)
    if isinstance(module, FakeQuantize):
        return Operation("quantizer", inputs, quantizer=module) if is_plain(module) else None
    if kind in (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
        drops = kind is not nn.Identity and module.training
        return None if drops else Operation("alias", inputs)
    read = MODULES.get(kind)
    return None if read is None else read(inputs, module)


def _layer(inputs: Inputs, layer: Any) -> Operation | None:
    output = layer._modules.get("output_fake_quant")
    bias = layer._parameters.get("bias")
    fits = layer.act_bits == 8 and layer.input_scale is not None and layer.dtype == torch.float32
    fits = fits and (bias is None or bias.dtype == torch.float32) and layer.scale.device.type == "cpu"
    if not fits or (output is not None and not is_plain(output)):
        return None
    if isinstance(layer, Int8Linear):
        return Operation("linear", inputs, {}, layer, output)
    if layer.padding_mode != "zeros":
        return None
    rank = len(layer.kernel_size)
    kind = "conv_transpose" if layer.transposed else "conv"
    return Operation(kind, inputs, geometry_of(layer), layer, output, rank, rank)


def geometry_of(layer: Any) -> dict[str, Any]:
    """The options of a convolution in three spatial dims."""
    before, after = [], []
    for i, kernel in enumerate(layer.kernel_size):
        if layer.padding == "valid":
            sides = 0, 0
        elif layer.padding == "same":
            total = layer.dilation[i] * (kernel - 1)
            sides = total // 2, total - total // 2
        else:
            sides = layer.padding[i], layer.padding[i]
        before.append(sides[0])
        after.append(sides[1])
    last = {"output_padding": layer.output_padding} if layer.transposed else {"padding_after": after}
    return {
        "kernel": three(layer.kernel_size, 1),
        "stride": three(layer.stride, 1),
        "padding": three(before, 0),
        **{key: three(value, 0) for key, value in last.items()},
        "dilation": three(layer.dilation, 1),
        "groups": layer.groups,
    }


def _full(value: Any, rank: int, missing: int) -> tuple[int, ...]:
    return three([value] * rank if isinstance(value, int) else list(value), missing)


def _activation(text: str) -> Callable[[Inputs, Any], Operation]:
    return lambda inputs, _: Operation("activate", inputs, {"first": text})


def _gelu(x: fx.Node, approximate: str) -> Operation:
    return Operation("activate", [x], {"first": "gelu" if approximate == "none" else "gelu_tanh"})


def _window(rank: int, kernel: Any, stride: Any, padding: Any, ceil: bool) -> dict[str, Any]:
    return {
        "kernel": _full(kernel, rank, 1),
        "stride": _full(kernel if stride in (None, (), []) else stride, rank, 1),
        "padding": _full(padding, rank, 0),
        "ceil": int(ceil),
    }


def _max_pool(
    inputs: Inputs, rank: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool
) -> Operation:
    options = {**_window(rank, kernel, stride, padding, ceil), "dilation": _full(dilation, rank, 1)}
    return Operation("max_pool", inputs, options, rank=rank, out_rank=rank)


def _avg_pool(
    inputs: Inputs,
    rank: int,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil: bool,
    include: bool,
    divisor: int | None,
) -> Operation:
    options = {**_window(rank, kernel, stride, padding, ceil), "include_pad": int(include)}
    if divisor is not None:
        options["divisor"] = divisor
    return Operation("avg_pool", inputs, options, rank=rank, out_rank=rank)


def _adaptive(inputs: Inputs, rank: int, size: Any) -> Operation | None:
    if not isinstance(size, int) and any(s is None for s in size):
        return None
    return Operation("adaptive_avg_pool", inputs, {"size": _full(size, rank, 1)}, rank=rank, out_rank=rank)


def _module_max_pool(rank: int) -> Callable[[Inputs, Any], Operation | None]:
    def read(inputs: Inputs, m: Any) -> Operation | None:
        if m.return_indices:
            return None
        return _max_pool(inputs, rank, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)

    return read


def _module_avg_pool(rank: int) -> Callable[[Inputs, Any], Operation]:
    def read(inputs: Inputs, m: Any) -> Operation:
        window = m.kernel_size, m.stride, m.padding
        return _avg_pool(inputs, rank, *window, m.ceil_mode, m.count_include_pad, m.divisor_override)

    return read


def _batch_norm(*ranks: int) -> Callable[[Inputs, Any], Operation | None]:
    def read(inputs: Inputs, m: Any) -> Operation | None:
        if m.running_mean is None or m.running_mean.dtype != torch.float32 or m.training:
            return None
        rank = ranks[0] if len(ranks) == 1 else None
        return Operation("batch_norm", inputs, {"eps": m.eps}, m, rank=rank, out_rank=rank)

    return read


LINEAR = {"linear": 1, "bilinear": 2, "trilinear": 3}  # modes of interpolation, and for how many dims


def _upsample(
    inputs: Inputs, size: Any, scale: Any, mode: str, align_corners: Any, recompute: Any = None, antialias: bool = False
) -> Operation | None:
    if (size is None) == (scale is None) or recompute or antialias or mode not in ("nearest", *LINEAR):
        return None
    like, rank = spatial_sizes_of(size) or (None, None)
    given = scale if size is None else size
    # One number is for all dims. Nearest pixels of a 2-D image are what everybody wants; other ranks are refused.
    numbers = list(given) if isinstance(given, tuple | list) else [given] * LINEAR.get(mode, 2)
    options: dict[str, Any] = {}
    if like is None:
        if not all(isinstance(n, int | float) and n == int(n) and n >= 1 for n in numbers):
            return None
        rank = len(numbers)
        options["scale" if size is None else "size"] = three([int(n) for n in numbers], 1)
    if mode != "nearest":
        if rank not in (None, LINEAR[mode]):
            return None
        rank = LINEAR[mode]
        options.update(mode="linear", align_corners=int(bool(align_corners)))
    tensors = inputs if like is None else [*inputs, like]
    kind = "upsample" if mode == "nearest" else "resize"
    return Operation(kind, tensors, options, rank=rank, out_rank=rank, has_like=like is not None)


def _pixel_shuffle(kind: str) -> Callable[[Inputs, Any], Operation | None]:
    def read(inputs: Inputs, factor: Any) -> Operation | None:
        fits = isinstance(factor, int) and factor >= 1
        return Operation(kind, inputs, {"factor": factor}, rank=2, out_rank=2) if fits else None

    return read


def _flatten(inputs: Inputs, start: int, end: int) -> Operation | None:
    return Operation("flatten", inputs, out_rank=0) if (start, end) == (1, -1) else None


MODULES: dict[type[nn.Module], Callable[[Inputs, Any], Operation | None]] = {
    nn.ReLU: _activation("relu"),
    nn.ReLU6: _activation("clamp:0.0:6.0"),
    nn.Hardswish: _activation("hardswish"),
    nn.Hardsigmoid: _activation("hardsigmoid"),
    nn.SiLU: _activation("silu"),
    nn.Sigmoid: _activation("sigmoid"),
    nn.Tanh: _activation("tanh"),
    nn.Hardtanh: lambda inputs, m: Operation(
        "activate", inputs, {"first": f"clamp:{float(m.min_val)!r}:{float(m.max_val)!r}"}
    ),
    nn.LeakyReLU: lambda inputs, m: Operation("activate", inputs, {"first": f"leaky_relu:{float(m.negative_slope)!r}"}),
    nn.GELU: lambda inputs, m: _gelu(inputs[0], m.approximate),
    nn.MaxPool1d: _module_max_pool(1),
    nn.MaxPool2d: _module_max_pool(2),
    nn.MaxPool3d: _module_max_pool(3),
    nn.AvgPool2d: _module_avg_pool(2),
    nn.AvgPool3d: _module_avg_pool(3),
    nn.AdaptiveAvgPool2d: lambda inputs, m: _adaptive(inputs, 2, m.output_size),
    nn.AdaptiveAvgPool3d: lambda inputs, m: _adaptive(inputs, 3, m.output_size),
    nn.BatchNorm1d: _batch_norm(0, 1),
    nn.BatchNorm2d: _batch_norm(2),
    nn.BatchNorm3d: _batch_norm(3),
    nn.Flatten: lambda inputs, m: _flatten(inputs, m.start_dim, m.end_dim),
    nn.Upsample: lambda inputs, m: _upsample(
        inputs, m.size, m.scale_factor, m.mode, m.align_corners, m.recompute_scale_factor
    ),
    nn.PixelShuffle: lambda inputs, m: _pixel_shuffle("pixel_shuffle")(inputs, m.upscale_factor),
    nn.PixelUnshuffle: lambda inputs, m: _pixel_shuffle("pixel_unshuffle")(inputs, m.downscale_factor),
    nn.UpsamplingNearest2d: lambda inputs, m: _upsample(inputs, m.size, m.scale_factor, "nearest", None),
    nn.UpsamplingBilinear2d: lambda inputs, m: _upsample(inputs, m.size, m.scale_factor, "bilinear", True),
    nn.ChannelShuffle: lambda inputs, m: Operation("shuffle", inputs, {"groups": m.groups}),
}


def _read(*names: str, **defaults: Any) -> Callable[[Callable[..., Operation | None]], Any]:
    """Makes a reader of nodes from a function of the arguments with these names; the first are the tensors."""

    def decorate(make: Callable[..., Operation | None]) -> Callable[[fx.Node], Operation | None]:
        def read(node: fx.Node) -> Operation | None:
            given: dict[str, Any] = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
            if len(node.args) > len(names) or set(given) != set(names):
                return None
            values = [given[name] for name in names]
            if not isinstance(values[0], fx.Node) or any(isinstance(value, fx.Node) for value in values[1:]):
                return None
            return make(*values)

        return read

    return decorate


def _elementwise(text: str) -> Callable[[fx.Node], Operation | None]:
    return _read("input", "inplace", inplace=False)(  # type: ignore[no-any-return]
        lambda x, inplace: Operation("activate", [x], {"first": text})
    )


def _binary(kind: str) -> Callable[[fx.Node], Operation | None]:
    def read(node: fx.Node) -> Operation | None:
        both = all(isinstance(arg, fx.Node) for arg in node.args) and len(node.args) == 2
        return Operation("binary", list(node.args), {"kind": kind}) if both and not node.kwargs else None  # type: ignore[arg-type]

    return read


def _cat(node: fx.Node) -> Operation | None:
    given = {**dict(zip(("tensors", "dim"), node.args, strict=False)), **node.kwargs}
    tensors: Any = given.get("tensors")
    if set(given) != {"tensors", "dim"} or given["dim"] != 1 or not isinstance(tensors, tuple | list):
        return None
    return Operation("cat", list(tensors)) if all(isinstance(t, fx.Node) for t in tensors) else None


@_read("input", "dim", "keepdim", keepdim=False)
def _mean(x: fx.Node, dim: Any, keepdim: bool) -> Operation | None:
    if dim is None:
        return None
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    options = {"keep": int(keepdim), "dims": dims}
    return Operation("mean", [x], options, out_rank=None if keepdim else 0)


def _view(node: fx.Node) -> Operation | None:
    """``x.view(x.size(0), -1)``."""
    if node.kwargs:
        return None
    x, *sizes = node.args
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = list(sizes[0])
    if not isinstance(x, fx.Node) or len(sizes) != 2 or sizes[1] != -1 or size_of(sizes[0]) != (x, 0):
        return _shuffled(node)
    return Operation("flatten", [x], out_rank=0)


def _shuffled(node: fx.Node) -> Operation | None:
    """The channel shuffle: ``x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)``."""
    swapped: Any = node.args[0]
    if isinstance(swapped, fx.Node) and swapped.target == "contiguous":
        swapped = swapped.args[0]
    if not isinstance(swapped, fx.Node) or swapped.target not in ("transpose", torch.transpose):
        return None
    parted: Any = swapped.args[0]
    if sorted(map(str, swapped.args[1:])) != ["1", "2"] or not isinstance(parted, fx.Node):
        return None
    x, *sizes = list[Any](parted.args)
    if parted.target in ("unflatten", torch.unflatten):
        if len(sizes) != 2 or not isinstance(sizes[1], tuple | list) or not sizes[1]:
            return None
        dim, (groups, *_) = sizes
        whole = node.target in ("flatten", torch.flatten) and node.args[1:] == (1, 2)
        fits = dim == 1 and len(sizes[1]) == 2 and isinstance(groups, int) and groups > 0 and whole
        return Operation("shuffle", [x], {"groups": groups}) if fits else None
    if parted.target not in ("view", "reshape", torch.reshape):
        return None
    if not isinstance(x, fx.Node) or len(sizes) != 5 or not isinstance(sizes[1], int) or len(node.args) != 5:
        return None
    inner = [size_of(sizes[at]) for at in (0, 3, 4)] == [(x, 0), (x, 2), (x, 3)]
    n, c, h, w = node.args[1:]
    outer = [size_of(each) for each in (n, h, w)] == [(x, 0), (x, 2), (x, 3)] and (c == -1 or size_of(c) == (x, 1))
    return Operation("shuffle", [x], {"groups": sizes[1]}, rank=2, out_rank=2) if inner and outer else None


def _part(node: fx.Node) -> Operation | None:
    """``x.chunk(n, 1)[i]`` or ``x.split(size, 1)[i]``."""
    parts, at = node.args
    if not isinstance(parts, fx.Node) or not isinstance(at, int):
        return None
    given: dict[str, Any] = {**dict(zip(("x", "size", "dim"), parts.args, strict=False)), **parts.kwargs}
    x, dim = given.get("x"), given.get("dim", 0)
    size = given.get("size", given.get("chunks", given.get("split_size", given.get("split_size_or_sections"))))
    if not isinstance(x, fx.Node) or dim != 1 or isinstance(size, fx.Node) or size is None:
        return None
    if parts.target in ("chunk", torch.chunk):
        return Operation("slice", [x], {"chunks": size, "at": at})
    if parts.target in ("split", torch.split):
        return Operation(
            "slice", [x], {"each": size, "at": at} if isinstance(size, int) else {"sizes": list(size), "at": at}
        )
    return None


def _flat(node: fx.Node) -> Operation | None:
    given: dict[str, Any] = {"start_dim": 0, "end_dim": -1}
    given.update(dict(zip(("x", "start_dim", "end_dim"), node.args, strict=False)), **node.kwargs)
    if not isinstance(given.get("x"), fx.Node):
        return None
    return _flatten([given["x"]], given["start_dim"], given["end_dim"]) or _shuffled(node)


def _pooled(rank: int) -> Any:
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    defaults = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}

    @_read(*names, **defaults)
    def read(
        x: fx.Node, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool, indices: bool
    ) -> Operation | None:
        return None if indices else _max_pool([x], rank, kernel, stride, padding, dilation, ceil)

    return read


def _averaged(rank: int) -> Any:
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    defaults = {"stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
    return _read(*names, **defaults)(lambda x, *rest: _avg_pool([x], rank, *rest))


def _interpolate(node: fx.Node) -> Operation | None:
    names = "input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x, others = given.pop("input", None), {key: value for key, value in given.items() if key != "size"}
    if not isinstance(x, fx.Node) or any(isinstance(value, fx.Node) for value in others.values()):
        return None
    defaults: dict[str, Any] = {**dict.fromkeys(names[1:]), "mode": "nearest", "antialias": False}
    values = {**defaults, **given}
    return _upsample([x], *(values[name] for name in names[1:])) if set(values) == set(defaults) else None


@_read("input", "p", "training", "inplace", p=0.5, training=True, inplace=False)
def _dropout(x: fx.Node, p: float, training: bool, inplace: bool) -> Operation | None:
    return None if training else Operation("alias", [x])


_alias = _read("input")(lambda x: Operation("alias", [x]))

FUNCTIONS: dict[Any, Callable[[fx.Node], Operation | None]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu", "relu_", torch.relu_), _elementwise("relu")),
    F.relu6: _elementwise("clamp:0.0:6.0"),
    F.hardswish: _elementwise("hardswish"),
    F.hardsigmoid: _elementwise("hardsigmoid"),
    F.silu: _elementwise("silu"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid"), _elementwise("sigmoid")),
    **dict.fromkeys((F.tanh, torch.tanh, "tanh"), _elementwise("tanh")),
    F.gelu: _read("input", "approximate", approximate="none")(_gelu),
    F.leaky_relu: _read("input", "negative_slope", "inplace", negative_slope=0.01, inplace=False)(
        lambda x, slope, _: Operation("activate", [x], {"first": f"leaky_relu:{float(slope)!r}"})
    ),
    F.hardtanh: _read("input", "min_val", "max_val", "inplace", min_val=-1.0, max_val=1.0, inplace=False)(
        lambda x, low, high, _: Operation("activate", [x], {"first": f"clamp:{float(low)!r}:{float(high)!r}"})
    ),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _binary("add")),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), _binary("mul")),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), _binary("sub")),
    **dict.fromkeys((torch.cat, torch.concat), _cat),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys(("view", "reshape", torch.reshape), _view),
    **dict.fromkeys(("flatten", torch.flatten), _flat),
    operator.getitem: _part,
    F.max_pool1d: _pooled(1),
    F.max_pool2d: _pooled(2),
    F.max_pool3d: _pooled(3),
    F.avg_pool2d: _averaged(2),
    F.avg_pool3d: _averaged(3),
    F.adaptive_avg_pool2d: _read("input", "output_size")(lambda x, size: _adaptive([x], 2, size)),
    F.adaptive_avg_pool3d: _read("input", "output_size")(lambda x, size: _adaptive([x], 3, size)),
    F.interpolate: _interpolate,
    F.dropout: _dropout,
    F.pixel_shuffle: _read("input", "upscale_factor")(lambda x, r: _pixel_shuffle("pixel_shuffle")([x], r)),
    F.pixel_unshuffle: _read("input", "downscale_factor")(lambda x, r: _pixel_shuffle("pixel_unshuffle")([x], r)),
    **dict.fromkeys((torch.channel_shuffle, F.channel_shuffle), _read("input", "groups")(
        lambda x, groups: Operation("shuffle", [x], {"groups": groups})
    )),
    **dict.fromkeys(("contiguous", "clone", "detach"), _alias),
}  # fmt: skip
