"""QATLinear, QATBilinear and QATConv1d, 2d and 3d: layers that fake-quantize their weight, input and output."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .fake_quantize import FakeQuantize
from .own_forward import QATForward, own_forward_class, product_weight
from .qat_layer import QATLayer, Role
from .tracing import call_as_leaf


class QATProductLayer(QATLayer):
    """A layer that computes one product with its ``weight``.

    A subclass of its float class keeps its own forward, in which that product is quantized (see own_forward.py).
    """

    weight_fake_quant: FakeQuantize | None
    input_fake_quant: FakeQuantize | None
    output_fake_quant: FakeQuantize | None
    __call__ = call_as_leaf

    @classmethod
    def class_for(cls, kind: type[nn.Module]) -> type[nn.Module]:
        return own_forward_class(QATForward, kind, cls)

    @classmethod
    def float_reason(cls, kind: type[nn.Module]) -> str | None:
        return None  # a trial of the forward decides

    def unquantized(self, parameter: str) -> Tensor:
        if isinstance(self, QATForward) and self.trial.derives_weight:
            return product_weight(self)
        return super().unquantized(parameter)


class QATLinear(QATProductLayer, nn.Linear):
    """nn.Linear whose weight, input and output pass through quantizers (see ``QATLayer``); each may be None."""

    float_class = nn.Linear

    @classmethod
    def roles(cls, layer: nn.Module) -> dict[str, Role]:
        return {
            "weight": Role("weight", "weight"),
            "input": Role("input", per_token=True),
            "output": Role("output", per_token=True),
        }

    def forward(self, input: Tensor) -> Tensor:
        quantizer = self.input_fake_quant
        if quantizer is not None and not quantizer.at_source:
            input = quantizer(input)
        quantizer, weight = self.weight_fake_quant, self.weight
        if quantizer is not None:
            weight = quantizer(weight)
        y = F.linear(input, weight, self.bias)
        quantizer = self.output_fake_quant
        return y if quantizer is None else quantizer(y)


class QATBilinear(QATLayer, nn.Bilinear):
    """nn.Bilinear whose weight, output and two inputs pass through quantizers (see ``QATLayer``).

    A rule's "input" is for both inputs.
    """

    float_class = nn.Bilinear
    __call__ = call_as_leaf

    @classmethod
    def roles(cls, layer: nn.Module) -> dict[str, Role]:
        return {
            "weight": Role("weight", "weight"),
            "input": Role("input", per_token=True),
            "input2": Role("input", per_token=True),
            "output": Role("output", per_token=True),
        }

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        input1, input2 = self.passed("input", input1), self.passed("input2", input2)
        return self.passed("output", F.bilinear(input1, input2, self.passed("weight", self.weight), self.bias))


class QATConvolution(QATProductLayer):
    """What QATConv1d, QATConv2d and QATConv3d share.

    A BatchNorm behind it stays an ordinary layer during training. Other libraries fold it into the weight before they
    quantize, which needs the folded weight at every step and, for batch statistics, a second convolution or a division
    of the output. With one scale per output channel that work is not needed, because quantization commutes with a
    factor per channel: clamp(round(f·w / (|f|·s))) = sign(f)·clamp(round(w/s)). To quantize w with scale s and then
    multiply by f, as the BatchNorm does, *is* to quantize the folded weight with scale |f|·s. ``convert`` folds
    exactly: codes keep their magnitude and change their sign where f = gamma/sqrt(var + eps) is negative, which a
    symmetric code range allows; scale becomes |f|·s, bias becomes beta + (bias − mean)·f.
    """

    @classmethod
    def roles(cls, layer: nn.Module) -> dict[str, Role]:
        sample = 1 + len(layer.kernel_size)  # type: ignore[arg-type]
        return {
            "weight": Role("weight", "weight"),
            "input": Role("input", feature_dims=sample),
            "output": Role("output", feature_dims=sample),
        }

    def forward(self, input: Tensor) -> Tensor:
        quantizer = self.input_fake_quant
        if quantizer is not None and not quantizer.at_source:
            input = quantizer(input)
        quantizer, weight = self.weight_fake_quant, self.weight
        if quantizer is not None:
            weight = quantizer(weight)  # type: ignore[arg-type]
        y: Tensor = self._conv_forward(input, weight, self.bias)  # type: ignore[operator]
        quantizer = self.output_fake_quant
        return y if quantizer is None else quantizer(y)


class QATConv1d(QATConvolution, nn.Conv1d):
    """nn.Conv1d with fake quantization (see ``QATLayer`` and ``QATConvolution``)."""

    float_class = nn.Conv1d


class QATConv2d(QATConvolution, nn.Conv2d):
    """nn.Conv2d with fake quantization (see ``QATLayer`` and ``QATConvolution``)."""

    float_class = nn.Conv2d


class QATConv3d(QATConvolution, nn.Conv3d):
    """nn.Conv3d with fake quantization (see ``QATLayer`` and ``QATConvolution``)."""

    float_class = nn.Conv3d
