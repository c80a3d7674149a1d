"""The quantized weights of a prepared model, each once, and the grid that a quantizer rounds one to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn.codebook_quantizers import CodebookQuantizer
from ..nn.fake_quantize import FakeQuantize
from ..nn.qat_layer import QATLayer, effective_weight
from ..nn.ranges import is_sharded, per_element
from ..ops.codebook import dequantize_codebook, fake_quantize_codebook, quantize_codebook
from ..ops.fake_quantize import fake_quantize
from ..ops.quantize import dequantize, quantize
from .calibrate import check_shapes, quantizers_of


class QuantizedWeight(NamedTuple):
    """A weight and its quantizer, which has to be in eval mode when it is called, so that it moves no range."""

    name: str
    layer: QATLayer
    parameter: str
    quantizer: FakeQuantize

    @property
    def value(self) -> Tensor:
        """What goes to the quantizer, with its gradient: the Parameter itself, or what is computed from others."""
        return effective_weight(self.layer, self.parameter)


def quantized_weights(model: nn.Module) -> Iterator[QuantizedWeight]:
    """The quantized weights; one that several layers share comes once for each quantizer that it has.

    Raises:
        ValueError: the model has no quantizers, or lazy layers that have not run yet.
        RuntimeError: a weight is sharded by ``fully_shard``: a process holds only a part of what shares a scale.
    """
    check_shapes(model)
    quantizers_of(model)
    seen = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, QATLayer):
            continue
        for parameter, quantizer in layer.quantized_weights():
            held = layer._parameters.get(parameter)
            full = f"{name}.{parameter}".removeprefix(".")
            if held is not None and is_sharded(held):
                raise RuntimeError(f"{full}: got a weight under fully_shard; accepted: whole weights, as under DDP")
            key = id(layer if held is None else held), parameter if held is None else "", id(quantizer)
            if key not in seen:
                seen.add(key)
                yield QuantizedWeight(full, layer, parameter, quantizer)


Scales = tuple[Tensor, Tensor | None]  # scale and zero point


@torch.no_grad()
def scales_of(quantizer: FakeQuantize, x: Tensor) -> Scales:
    """What the quantizer, in eval mode, rounds the weight x with: a pass over x, so the functions below take it."""
    return quantizer.quantize(x)[1:] if quantizer.quantizer == "dynamic" else quantizer.qparams(x)


@torch.no_grad()
def rounded(quantizer: FakeQuantize, x: Tensor, scales: Scales) -> Tensor:
    """What the quantizer makes of the weight x in eval mode."""
    if isinstance(quantizer, CodebookQuantizer):
        return fake_quantize_codebook(x, scales[0], quantizer.levels.detach())
    return fake_quantize(x, *scales, quant_min=quantizer.quant_min, quant_max=quantizer.quant_max)


@torch.no_grad()
def codes_of(quantizer: FakeQuantize, x: Tensor, scales: Scales) -> tuple[Tensor, int]:
    """The level of each element of the weight x, uint8 from 0 on, and how many levels there are.

    Levels that are not trained ascend with their number.
    """
    if isinstance(quantizer, CodebookQuantizer):
        levels = quantizer.levels.detach()
        return quantize_codebook(x, scales[0], levels), levels.numel()
    low, high = quantizer.quant_min, quantizer.quant_max
    codes = quantize(x, *scales, quant_min=low, quant_max=high)
    return codes.view(torch.uint8).sub_(low % 256), high - low + 1  # modulo 256


@torch.no_grad()
def values_of(quantizer: FakeQuantize, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
    """The levels that codes, as ``codes_of`` counts them, stand for."""
    if isinstance(quantizer, CodebookQuantizer):
        return dequantize_codebook(codes, scales[0], quantizer.levels.detach(), dtype=dtype)
    return dequantize((codes + quantizer.quant_min % 256).view(torch.int8), *scales, dtype=dtype)


@torch.no_grad()
def ends_of(quantizer: FakeQuantize, x: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
    """The lowest and the highest level for the weight x, in a shape that broadcasts with x."""
    scale = per_element(scales[0], x)
    if isinstance(quantizer, CodebookQuantizer):
        levels = quantizer.levels.detach()
        return levels.amin() * scale, levels.amax() * scale
    zero = 0 if scales[1] is None else per_element(scales[1], x)
    return (quantizer.quant_min - zero) * scale, (quantizer.quant_max - zero) * scale
