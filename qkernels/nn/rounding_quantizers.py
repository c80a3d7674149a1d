"""Quantizers of uniform levels with a rounding or a range of their own: stochastic, DoReFa, ternary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.autograd import recomputing, transformed
from ..ops.fake_quantize import fake_quantize
from ..ops.stochastic import fake_quantize_stochastic
from .fake_quantize import FakeQuantize
from .ranges import block_magnitude, per_element

# One seed for all, because each seed would be compiled anew; quantizers differ by where their offsets start.
SEED = 0

for _function in ("draw", "squashed", "dorefa", "follow_magnitude"):
    torch.fx.wrap(_function)


class StochasticQuantizer(FakeQuantize, quantizers=("stochastic",)):
    """ "minmax" that in training mode rounds up with the fraction as probability, in eval mode to the nearest.

    The buffer ``offset`` holds where in the random stream the next forward pass in training mode draws. It starts at a
    number from torch's generator (``torch.manual_seed``), each pass adds one to it on the device, and a state_dict
    holds it: a resumed run draws as one that was not stopped. What activation checkpointing computes a second time
    draws as the last forward pass did. Under torch.func's transforms, which forbid the change of a buffer, the offset
    stays and every pass draws the same.
    """

    offset: Tensor

    def _register(self, scale_shape: Sequence[int]) -> None:
        super()._register(scale_shape)
        self.register_buffer("offset", torch.empty(1, dtype=torch.int64))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.offset.random_(2**62)

    def _with_qparams(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        if not self.training:
            return super()._with_qparams(x, scale, zero_point)
        return draw(x, scale, zero_point, self.quant_min, self.quant_max, self.offset)


def draw(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, offset: Tensor) -> Tensor:
    again = recomputing()
    y = fake_quantize_stochastic(
        x,
        scale,
        zero_point,
        quant_min=quant_min,
        quant_max=quant_max,
        seed=SEED,
        offset=offset - 1 if again else offset,
    )
    if not again and not transformed():
        offset.add_(1)  # the backward pass has kept a mask, so it does not read the offset
    return y


class DoReFaQuantizer(FakeQuantize, quantizers=("dorefa",)):
    """Weights as DoReFa quantizes them (arXiv 1606.06160, equation 9), times M, which keeps the size of the output.

    t = tanh(w)/M, where M is the largest |tanh(w)| that shares a scale, without a gradient; t is rounded to the nearest
    of the levels (2·k − n)/n for k from 0 to n = 2**bits − 1, of which none is 0. The gradient passes the rounding
    unchanged and tanh by its derivative. The paper leaves out the factor M, because its layers stand before BatchNorms,
    which take it out again. ``scale`` is M.
    """

    integer_codes = False

    def _set_width(self, bits: int) -> None:
        super()._set_width(bits)
        self.quant_min, self.quant_max, self.steps = -1, 1, 1  # so that the scale is the largest magnitude

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor, mean_abs: Tensor | None = None) -> None:
        super().set_range(low.tanh(), high.tanh())

    def _range(self, x: Tensor, in_place: bool) -> tuple[Tensor, Tensor | None]:
        return super()._range(squashed(x.detach()), in_place)

    def _fake_quantized(self, x: Tensor) -> Tensor:
        t = squashed(x)
        scale, _ = super()._range(t, in_place=self.training)
        return dorefa(t, scale, 2**self.bits - 1).to(x.dtype)


def squashed(x: Tensor) -> Tensor:
    """tanh(x), in fp32 at least: of 256 levels bf16 does not tell all apart."""
    return (x if x.dtype == torch.float64 else x.float()).tanh()


def dorefa(t: Tensor, scale: Tensor, n: int) -> Tensor:
    m = per_element(scale, t)
    return (fake_quantize(t / m + 1, 2 / n, quant_min=0, quant_max=n) - 1) * m


class TernaryQuantizer(FakeQuantize, quantizers=("ternary",)):
    """Weights as −1, 0 or 1 times the mean magnitude of those that share a scale (BitNet b1.58, arXiv 2402.17764).

    The gradient passes all weights, clipped or not, as the paper's does. No range decides the scale, so a method of
    ``calibrate`` changes nothing. ``quantizer.scale = t`` sets another and stops the following: the best scale for
    Gaussian weights is one and a half times the mean magnitude.
    """

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor, mean_abs: Tensor | None = None) -> None:
        super().set_range(low, high, mean_abs)
        self.enable_observer()

    @torch.no_grad()
    def observe_from(self, mean_abs: Tensor) -> None:
        self._scale.copy_(torch.where(mean_abs > 0, mean_abs, self._scale))
        super().observe_from(mean_abs)

    def _range(self, x: Tensor, in_place: bool) -> tuple[Tensor, Tensor | None]:
        return (follow_magnitude(x, self._scale, in_place) if self._follows() else self._scale), None


@torch.no_grad()
def follow_magnitude(x: Tensor, scale: Tensor, in_place: bool) -> Tensor:
    """The mean magnitude of each block of x; one of zeros alone, or with a NaN or infinity, keeps its scale."""
    if x.numel() == 0:
        return scale
    now = block_magnitude(x, scale.shape)
    now = torch.where(now.isfinite() & (now > 0), now, scale)
    if in_place and not transformed():
        scale.copy_(now)
    return now
