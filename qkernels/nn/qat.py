"""QATLinear and QATConv2d: the float layers with fake quantization of weight and input."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from .fake_quantize import FakeQuantize
from .replacing import take_hooks
from .tracing import call_as_leaf

Layer = TypeVar("Layer", bound=nn.Module)


class _StartsAnew(nn.Module):
    """A layer whose weight quantizer starts anew where a state_dict holds the weight and no scale for it."""

    weight_fake_quant: FakeQuantize | None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        quantizer, scale = self.weight_fake_quant, f"{prefix}weight_fake_quant.scale"
        if quantizer is not None and f"{prefix}weight" in state_dict and scale not in state_dict:
            quantizer.forget()


class QATLinear(_StartsAnew, nn.Linear):
    """nn.Linear whose weight and input pass through ``weight_fake_quant`` and ``input_fake_quant``; either may be None.

    Parameters keep their names, so a float state_dict loads; a prepared one adds the quantizers' keys.
    """

    weight_fake_quant: FakeQuantize | None
    input_fake_quant: FakeQuantize | None
    __call__ = call_as_leaf

    @classmethod
    def from_float(
        cls, linear: nn.Linear, *, weight: FakeQuantize | None = None, input: FakeQuantize | None = None
    ) -> QATLinear:
        """A QAT layer that shares the parameters, hooks and training mode of ``linear``."""
        return _with_quantizers(cls, linear, weight, input)

    def forward(self, input: Tensor) -> Tensor:
        if self.input_fake_quant is not None:
            input = self.input_fake_quant(input)
        weight = self.weight if self.weight_fake_quant is None else self.weight_fake_quant(self.weight)
        return F.linear(input, weight, self.bias)


class QATConv2d(_StartsAnew, nn.Conv2d):
    """nn.Conv2d with fake quantization, as ``QATLinear``.

    A BatchNorm2d behind it stays an ordinary layer during training. Folding it into the weight before quantizing, as
    is usual elsewhere, needs the folded weight at every step and, for batch statistics, a second convolution or a
    division of the output. With one scale per output channel that is wasted work: quantization commutes with a factor
    per channel, clamp(round(f·w / (|f|·s))) = sign(f)·clamp(round(w/s)), so quantizing w with scale s and multiplying
    by f afterwards, as the BatchNorm does, *is* quantizing the folded weight with scale |f|·s. ``convert`` folds
    exactly: the integer codes stay (with flipped sign where f = gamma/sqrt(var + eps) is negative, for which symmetric
    code ranges are their own mirror image), scale becomes |f|·s, bias becomes beta + (bias − mean)·f.
    """

    weight_fake_quant: FakeQuantize | None
    input_fake_quant: FakeQuantize | None
    __call__ = call_as_leaf

    @classmethod
    def from_float(
        cls, conv: nn.Conv2d, *, weight: FakeQuantize | None = None, input: FakeQuantize | None = None
    ) -> QATConv2d:
        """A QAT layer that shares the parameters, hooks and training mode of ``conv``."""
        return _with_quantizers(cls, conv, weight, input)

    def forward(self, input: Tensor) -> Tensor:
        if self.input_fake_quant is not None:
            input = self.input_fake_quant(input)
        weight = self.weight if self.weight_fake_quant is None else self.weight_fake_quant(self.weight)
        return self._conv_forward(input, weight, self.bias)


def _with_quantizers(
    cls: type[Layer], module: nn.Module, weight: FakeQuantize | None, input: FakeQuantize | None
) -> Layer:
    float_class = cls.__mro__[2]
    if type(module) is not float_class:
        raise TypeError(f"{cls.__name__}.from_float: got {type(module).__name__}; accepted: {float_class.__name__}")
    layer: Any = cls.__new__(cls)
    layer.__dict__ = {key: value.copy() if isinstance(value, dict) else value for key, value in vars(module).items()}
    take_hooks(layer, module)
    layer.weight_fake_quant = weight
    layer.input_fake_quant = input
    for child in (weight, input):
        if child is not None:
            child.to(layer.weight.device).train(module.training)
    return layer
