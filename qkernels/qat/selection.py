"""Which layers can be quantized, why others cannot, and which weights ``convert`` takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from .. import gemm_checks, layouts
from ..nn.fake_quantize import FakeQuantize
from ..nn.granularity import PerChannel, PerGroup
from ..nn.int4 import Int4Linear
from ..nn.int8 import Int8Conv2d, Int8Linear
from ..nn.int8_conv1d import Int8Conv1d
from ..nn.int8_conv3d import Int8Conv3d
from ..nn.int8_conv_transpose import Int8ConvTranspose1d, Int8ConvTranspose2d, Int8ConvTranspose3d
from ..nn.own_forward import Trial, has_own_forward, try_forward
from ..nn.qat import QATConv1d, QATConv2d, QATConv3d, QATConvolution, QATLinear, QATProductLayer
from ..nn.qat_attention import QATMultiheadAttention, projection_weights
from ..nn.qat_cells import QATCell
from ..nn.qat_classes import qat_class_of
from ..nn.qat_conv_transpose import QATConvTranspose, QATConvTranspose1d, QATConvTranspose2d, QATConvTranspose3d
from ..nn.qat_embedding import QATEmbedding, QATEmbeddingBag, QATTable
from ..nn.qat_layer import SUFFIX, QATLayer, bake_weight, class_without_parametrizations
from ..nn.qat_lazy import QATLazy
from ..nn.qat_lora import QATAdapted
from ..nn.qat_recurrent import QATRecurrent, QATStateful
from ..nn.quantized_parameters import QATParameters
from .integer_layers import projection_inputs
from .weight_readers import WeightReaders


def to_int4(layer: nn.Module) -> bool:
    """Whether ``convert`` turns the layer into an Int4Linear, if its weight is one that the kernels take."""
    if not isinstance(layer, QATLinear) or layer.weight_fake_quant is None:
        return False
    return layer.weight_fake_quant.bits in layouts.BITS


def no_integers(layer: QATLayer) -> str | None:
    """Why no integer layer computes what a QAT layer with a quantized weight does; None: one does."""
    if isinstance(layer, QATAdapted):
        layer = layer.as_sum()
    if isinstance(layer, QATMultiheadAttention):
        return _no_integer_attention(layer)
    if isinstance(layer, QATStateful):
        return _no_integer_recurrent(layer)
    if isinstance(layer, QATTable):
        return _no_integer_embedding(layer)
    if isinstance(layer, QATParameters) and qat_class_of(layer) is not None:
        return "a rule names its parameter and not the layer"
    if isinstance(layer, QATConvTranspose):
        return _no_integer_transposed(layer)
    if not isinstance(layer, QATLinear | QATConvolution):
        return f"there is no integer kernel for {type(layer).float_type.__name__}"
    parameter: Any = layer.weight
    weight = layer.weight_fake_quant
    assert weight is not None
    return _no_integer_product("weight", parameter, weight, layer.input_fake_quant, to_int4(layer))


def _no_integer_transposed(layer: Any) -> str | None:
    if type(layer).forward is not QATConvTranspose.forward:
        return "its forward is its own"
    weight: FakeQuantize = layer.weight_fake_quant
    granularity, groups = weight.granularity, layer.groups
    axis = granularity.axis if isinstance(granularity, PerChannel) else ()
    axes = {each % layer.weight.dim() for each in (axis if isinstance(axis, tuple) else (axis,))}
    # A scale of an input channel, which is dim 0, is one of output channels only if each group has one input.
    if isinstance(granularity, PerGroup) or not axes <= ({0, 1} if groups == layer.in_channels else {1}):
        return f"its weight has {granularity}; the kernels take PerTensor() or one scale for each output channel"
    rows = layouts.outputs_first(layer.weight, groups)
    return _no_integer_product("weight", rows, weight, layer.input_fake_quant, int4=False, by_output=True)


def _no_integer_attention(layer: QATMultiheadAttention) -> str | None:
    if type(layer).forward is not QATMultiheadAttention.forward:
        return "its forward is its own"
    names, inputs = projection_weights(layer), projection_inputs(layer)
    for name, input in zip(names * (3 // len(names)), inputs, strict=True):
        quantizer = layer.quantizer_of(name)
        if quantizer is None:
            return f"its {name} is not quantized"
        reason = _no_integer_product(name, getattr(layer, name), quantizer, input, quantizer.bits in layouts.BITS)
        if reason is not None:
            return reason
    return None


def _no_integer_recurrent(layer: QATStateful) -> str | None:
    if type(layer).forward not in (QATRecurrent.forward, QATCell.forward):
        return "its forward is its own"
    for name, input in layer.products():
        quantizer = layer.quantizer_of(name)
        if quantizer is None:
            return f"its {name} is not quantized"
        reason = _no_integer_product(name, getattr(layer, name), quantizer, input, int4=False)
        if reason is not None:
            return reason
    return None


def _no_integer_product(
    name: str,
    parameter: Tensor,
    weight: FakeQuantize,
    input: FakeQuantize | None,
    int4: bool,
    by_output: bool = False,
) -> str | None:
    """Why no kernel computes a product with the parameter of this name; None: one does.

    int4: with codes of 4 bits or less. by_output: it is known that no output has several scales.
    """
    granularity = weight.granularity
    if not weight.integer_codes:
        return f'the values of "{weight.quantizer}" are no integers times a scale'
    k = parameter[0].numel()
    if not by_output and isinstance(granularity, PerChannel) and granularity.axis not in (0, (0,)):
        return f"its {name} has {granularity}; the kernels take PerChannel(0), PerTensor() or PerGroup(size)"
    if input is None and not int4:
        return None  # the product is computed in float
    try:
        gemm_checks.max_k(name, k)
        if int4:
            gemm_checks.weight_group_size(granularity.size if isinstance(granularity, PerGroup) else k, k)
    except RuntimeError as error:
        return f"its {name} has {granularity}; {error}"
    if input is not None and not input.integer_codes:
        return f'the values of its input\'s quantizer "{input.quantizer}" are no integers times a scale'
    if int4:
        return None
    if isinstance(granularity, PerGroup):
        return f"its {name} has {granularity}; the int8 kernels take PerChannel(0) or PerTensor()"
    if not weight.symmetric:
        return f"its {name} is quantized with a zero point; the int8 kernels take symmetric=True"
    return None


def _no_integer_embedding(layer: QATTable) -> str | None:
    weight = layer.weight_fake_quant
    assert weight is not None
    granularity = weight.granularity
    if type(layer).forward not in (QATEmbedding.forward, QATEmbeddingBag.forward):
        return "its forward is its own"
    if not weight.integer_codes:
        return f'the values of "{weight.quantizer}" are no integers times a scale'
    if isinstance(granularity, PerChannel) and granularity.axis not in (0, (0,)):
        return f"its weight has {granularity}; the kernels take PerChannel(0), PerTensor() or PerGroup(size)"
    if weight.bits not in layouts.BITS or isinstance(layer, QATEmbeddingBag):
        return None
    try:
        k: Any = layer.embedding_dim
        gemm_checks.weight_group_size(granularity.size if isinstance(granularity, PerGroup) else k, k)
    except RuntimeError as error:
        return f"its weight has {granularity}; {error}"
    return None


def float_reason(name: str, layer: nn.Module, cls: type[QATLayer], readers: WeightReaders) -> tuple[str | None, Trial]:
    """Why a layer cannot become a ``cls`` (None: it can), and what the trial of its own forward showed."""
    reason, trial = _outer_reason(name, layer, cls, readers), Trial(returns_product=True)
    kind = class_without_parametrizations(layer)
    if reason is None and issubclass(cls, QATProductLayer) and has_own_forward(kind):
        trial = try_forward(_twin_on_meta(layer))
        reason = trial.reason
    return reason, trial


def _outer_reason(name: str, layer: nn.Module, cls: type[QATLayer], readers: WeightReaders) -> str | None:
    if name in readers.instead:
        return f"{readers.instead[name]} reads its weight instead of calling it"
    if isinstance(layer, NonDynamicallyQuantizableLinear) and name not in readers.used:
        return "its weight is read by the module that holds it"
    if any(is_lazy(parameter) for parameter in layer.parameters()) and not issubclass(cls, QATLazy):
        return "its shape is not known before the first batch; call the model once, then prepare it"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    for role in cls.roles(layer).values():
        weight = getattr(layer, role.parameter, None) if role.parameter else None
        if weight is not None and (not weight.is_floating_point() or weight.layout != torch.strided):
            return f"its {role.parameter} is {weight.dtype}, {weight.layout}; accepted: a dense tensor of floats"
        if weight is not None and not is_lazy(weight) and not weight.numel():
            return f"its {role.parameter} has no elements"
    kind = class_without_parametrizations(layer)
    if kind is not cls.float_class:
        taken = _taken_names(layer, kind, cls)
        if taken:
            return f"its attribute {taken[0]!r} is also one of the quantized layer's"
        return cls.float_reason(kind)
    return None


def _twin_on_meta(layer: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for t in (*layer.parameters(), *layer.buffers(), *(t for t in vars(layer).values() if isinstance(t, Tensor))):
        meta = torch.empty_like(t, device="meta")
        memo[id(t)] = nn.Parameter(meta, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else meta
    twin = copy.deepcopy(layer, memo).eval()
    bake_weight(twin)
    return twin


def unsupported(module: nn.Module) -> str:
    """Why ``prepare`` passes over a module that holds weights and is no layer that it knows."""
    held = {name: p for name, p in module._parameters.items() if p is not None}
    names = [name for name, p in held.items() if is_lazy(p) or (p.dim() > 1 and p.is_floating_point())]
    kind = type(module).__name__
    if qat_class_of(module) is not None:
        return "neither a rule nor a default of the config selects it"
    return f"{kind} is no layer that prepare knows; a rule can name its parameter {' or '.join(map(repr, names))}"


INTEGER_LAYERS: dict[type[QATLayer], Callable[[], tuple[nn.Module, ...]]] = {  # a float layer, and what it may become
    QATLinear: lambda: (nn.Linear(1, 1, device="meta"), Int8Linear(1, 1), Int4Linear(1, 1, group_size=-1)),
    QATConv1d: lambda: (nn.Conv1d(1, 1, 1, device="meta"), Int8Conv1d(1, 1, 1)),
    QATConv2d: lambda: (nn.Conv2d(1, 1, 1, device="meta"), Int8Conv2d(1, 1, 1)),
    QATConv3d: lambda: (nn.Conv3d(1, 1, 1, device="meta"), Int8Conv3d(1, 1, 1)),
    QATConvTranspose1d: lambda: (nn.ConvTranspose1d(1, 1, 1, device="meta"), Int8ConvTranspose1d(1, 1, 1)),
    QATConvTranspose2d: lambda: (nn.ConvTranspose2d(1, 1, 1, device="meta"), Int8ConvTranspose2d(1, 1, 1)),
    QATConvTranspose3d: lambda: (nn.ConvTranspose3d(1, 1, 1, device="meta"), Int8ConvTranspose3d(1, 1, 1)),
}


def _taken_names(layer: nn.Module, kind: type[nn.Module], cls: type[QATLayer]) -> list[str]:
    """Names to which both the subclass and the QAT or integer layers give a meaning."""
    own = {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules, *dir(kind)}
    own -= {*dir(cls.float_class), *cls.redefined_names, "from_float", "like"}
    given = {name for name in own if name.endswith(SUFFIX)} | (own & set(dir(cls)))
    if cls in INTEGER_LAYERS:
        plain, *made = INTEGER_LAYERS[cls]()
        own -= {*vars(plain), *plain._parameters, *plain._buffers, *plain._modules}
        given |= {name for name in own if any(hasattr(new, name) for new in made)}
    return sorted(given)
