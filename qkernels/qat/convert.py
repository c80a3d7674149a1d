"""convert: QAT layers become int8 and int4 layers that compute the same numbers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..nn.fake_quantize import FakeQuantize
from ..nn.granularity import PerGroup
from ..nn.int4 import Int4Linear
from ..nn.int8 import Int8Conv2d, Int8Linear
from ..nn.qat import QATConv2d, QATLinear
from ..reference.int4_gemm import check_group_size
from ..reference.packing import BITS
from .calibrate import quantizers_of
from .fold import factor_and_bias, find_folds
from .prepare import replace_modules


def convert(model: nn.Module) -> nn.Module:
    """A copy of a prepared model, in eval mode, whose QAT layers run on the int8 and int4 kernels.

    It computes what ``model`` computes in eval mode, to the rounding of the final float sum.

    A Linear layer whose weight has 4 bits or less becomes an ``Int4Linear`` of every granularity, with zero points or
    without; where its input is not quantized it stays in float (act_bits 16). Other layers hold int8 codes: Linear of
    5 to 8 bits and Conv2d of 2 to 8. Of these, one whose input is not quantized becomes a float layer that holds the
    dequantized weight. A layer whose weight is not quantized stays as it is; ``report`` says so. A BatchNorm2d that
    alone follows a convolution is folded into its scale and bias (see ``QATConv2d``). ``model`` itself is never
    changed.

    Raises:
        ValueError: not a prepared model, not calibrated (names the quantizer), or a weight that the kernels do not
            take: with int8 codes per group or with a zero point; of 4 bits or less in groups other than multiples of
            8, from 16 on, or of a whole row.
    """
    for name, quantizer in quantizers_of(model).items():
        if not quantizer.is_calibrated:
            raise ValueError(
                f"model: {name!r} is not calibrated; call qk.calibrate(model, batches) with batches that reach it, "
                "before convert"
            )
    converted = copy.deepcopy(model).eval()
    folds = find_folds(converted)
    made: dict[nn.Module, nn.Module] = {}
    for name, layer in list(converted.named_modules()):
        if not isinstance(layer, QATLinear | QATConv2d) or layer.weight_fake_quant is None:
            continue
        if to_int4(layer):
            made[layer] = _int4_layer(name, layer)  # type: ignore[arg-type]
            continue
        if layer.input_fake_quant is None:
            made[layer] = _dequantized(layer)
            continue
        _check_weight(name, layer.weight_fake_quant)
        norm = None
        if name in folds.batch_norm_of:
            norm = converted.get_submodule(folds.batch_norm_of[name])
            made[norm] = nn.Identity()
        made[layer] = _int8_layer(layer, norm)  # type: ignore[arg-type]
    return replace_modules(converted, made.get)


def to_int4(layer: nn.Module) -> bool:
    """Whether ``convert`` makes an Int4Linear of the layer."""
    if not isinstance(layer, QATLinear) or layer.weight_fake_quant is None:
        return False
    return layer.weight_fake_quant.bits in BITS


@torch.no_grad()
def _int4_layer(name: str, layer: QATLinear) -> Int4Linear:
    weight, input = layer.weight_fake_quant, layer.input_fake_quant
    assert weight is not None
    granularity = weight.granularity
    group_size = granularity.size if isinstance(granularity, PerGroup) else layer.in_features
    try:
        check_group_size(group_size, layer.in_features)
    except RuntimeError as error:
        raise ValueError(f"model: the weight of {name!r} has {granularity}; {error}") from None
    codes, scale, zero_point = weight.quantize(layer.weight)
    new = Int4Linear(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        weight_bits=weight.bits,
        group_size=group_size,
        symmetric=weight.symmetric,
        act_bits=16 if input is None else 8,
        input=input,
    ).to(layer.weight.device)
    new.set_weight(codes, scale.float(), layer.bias, zero_point)
    if input is not None:
        new.set_input(input)
    return new.eval()


def _check_weight(name: str, quantizer: FakeQuantize) -> None:
    if isinstance(quantizer.granularity, PerGroup):
        raise ValueError(
            f"model: the weight of {name!r} has {quantizer.granularity}; accepted by the int8 layers: PerChannel(0), "
            "PerTensor()"
        )
    if not quantizer.symmetric:
        raise ValueError(
            f"model: the weight of {name!r} is quantized with a zero point; accepted by the int8 layers: symmetric=True"
        )


@torch.no_grad()
def _int8_layer(layer: QATLinear | QATConv2d, norm: nn.BatchNorm2d | None) -> Int8Linear | Int8Conv2d:
    weight, input = layer.weight_fake_quant, layer.input_fake_quant
    assert weight is not None
    assert input is not None
    codes, scale, _ = weight.quantize(layer.weight)
    scale = scale.reshape(-1).float()
    bias: Tensor | None = layer.bias
    if norm is not None:
        factor, bias = factor_and_bias(norm, layer.bias)
        codes = torch.where(factor.reshape(-1, 1, 1, 1) < 0, -codes, codes)
        scale = scale * factor.abs()
    new: Int8Linear | Int8Conv2d
    if isinstance(layer, QATLinear):
        new = Int8Linear(
            layer.in_features, layer.out_features, bias is not None, weight_bits=weight.bits, input=input
        )  # fmt: skip
    else:
        new = Int8Conv2d.like(layer, bias=bias is not None, weight_bits=weight.bits, input=input)
    new.to(layer.weight.device).set_weight(codes, scale, bias)
    new.set_input(input)
    return new.eval()


@torch.no_grad()
def _dequantized(layer: QATLinear | QATConv2d) -> nn.Module:
    quantizer = layer.weight_fake_quant
    assert quantizer is not None
    layer.weight = nn.Parameter(quantizer(layer.weight), requires_grad=layer.weight.requires_grad)  # may be tied
    del layer.weight_fake_quant, layer.input_fake_quant
    layer.__class__ = type(layer).__mro__[2]  # type: ignore[assignment]
    layer.weight_bits = quantizer.bits  # type: ignore[assignment]  # for the report
    return layer
