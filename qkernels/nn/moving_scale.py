"""MovingScale: which scale and zero point a quantizer has for a tensor, what moves them, and rounding with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.autograd import recomputing, transformed
from ..ops.fake_quantize import fake_quantize
from ..ops.relu_fake_quantize import relu_fake_quantize, relu_fake_quantize_learned
from .granularity import PerTensor
from .learned_scale import keep_inside, learned, learned_scale, learns_now, pace, slope, trained_scale, unmoved
from .quantizer_state import QuantizerState
from .ranges import follow

GROWTH = 0.1  # the share of the way that each training step goes to a larger range or mean magnitude of an input

# These functions branch on their arguments, so torch.fx must not trace into them.
for _function in ("fake_quantize", "learned", "follow", "pace"):
    torch.fx.wrap(_function)


class MovingScale(QuantizerState):
    """The scale of ``FakeQuantize``, whose docstring says what moves it."""

    def _with_qparams(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """x quantized and back with what ``_range`` gave for it."""
        if self.learns:
            return self._with_learned(x, scale, zero_point, self._found("log_scale"))
        return fake_quantize(
            x,
            scale,
            zero_point,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            straight_through=self.straight_through,
            ewgs_delta=self.ewgs_delta,
        )

    def _with_learned(self, x: Tensor, start: Tensor, zero_point: Tensor | None, log_scale: Tensor) -> Tensor:
        return learned(
            x,
            start,
            log_scale,
            self._log_limits(),
            zero_point,
            self.quant_min,
            self.quant_max,
            self.steps,
            self.feature_dims if self._numel is None else None,
            self._numel,
            # A followed weight is never clipped, but LSQ's mask would take its largest value for a clipped one.
            "clip" if self._follows() and self.straight_through == "lsq" else self.straight_through,
            self.ewgs_delta,
        )

    def _range(self, x: Tensor, in_place: bool) -> tuple[Tensor, Tensor | None]:
        """The scale (for a learned scale its start) and the zero point to quantize x with.

        A backward pass may save them, and another call in the same step may move the quantizer's own. So what was moved
        is copied, except for a learned scale: there ``learned`` and ``of_relu`` compute the scale that is saved, and
        copy the zero point.
        """
        scale: Any = self._buffers["_scale"]
        zero_point = None if self.symmetric else self._found("zero_point")
        if in_place and recomputing():  # a batch moves a range once; copies, for the next forward pass changes these
            return scale.clone(), None if zero_point is None else zero_point.clone()
        if self._paces():
            share = 1.0 if self.is_weight else GROWTH
            in_place = in_place and not transformed()
            return pace(x, scale, self.magnitude, share, 2 * self.steps**-0.5, in_place), zero_point
        if self._follows():
            up, down = 1.0, 1.0
        elif self._grows():
            up, down = GROWTH, 0.0
        else:
            return scale, zero_point
        rule = self.quant_min, self.quant_max, self.symmetric, up, down
        scale, zero_point = follow(x, scale, zero_point, *rule, in_place)
        if not in_place or self.learns:
            return scale, zero_point
        return scale.clone(), None if zero_point is None else zero_point.clone()

    def _found(self, name: str) -> Any:
        """A parameter, or what stands for it; Module.__getattr__ alone would take a microsecond.

        nn.DataParallel and FSDP's flat parameters put a tensor in the place of a parameter, as a plain attribute.
        """
        parameter = self._parameters.get(name)
        return getattr(self, name) if parameter is None else parameter

    def _follows(self) -> bool:
        """Whether the range is always the weight's present one."""
        moves = self.quantizer not in ("ema", "dynamic") and not self.learns_at_few_bits
        return moves and self.is_weight and self._observes

    def _paces(self) -> bool:
        """Whether the start of a scale learned at few bits moves with the mean magnitude of its tensor."""
        moves = self.is_weight or (self.training and not transformed())
        return self.learns_at_few_bits and self._observes and moves

    def _grows(self) -> bool:
        """Whether the range of an input with a learned scale grows with the values that it gets."""
        wide = self.learns and not self.is_weight and not self.learns_at_few_bits
        return wide and self.training and self._observes and not transformed()

    @property
    def takes_relu(self) -> bool:
        """Whether there is a kernel for a ReLU and this quantizer in one, which ``of_relu`` calls."""
        alike = self.quantizer in ("lsq", "lsq+", "minmax") and self.straight_through in ("clip", "lsq")
        return alike and not self.is_weight and isinstance(self.granularity, PerTensor)

    def of_relu(self, x: Tensor) -> Tensor | None:
        """self(relu(x)) in one pass over x, with the same bits and the same effect on the range; None: it takes two.

        x: dense, not empty; not in compiled code nor under torch.func.
        """
        # A scale that moves with the mean magnitude would have to read relu(x) itself.
        if not (self.takes_relu and self._ready and self._quantizes) or self._paces():
            return None
        scale, zero_point = self._range(_ends_of_relu(x) if self._grows() else x, in_place=self.training)
        factor = 1.0
        if self.learns:
            keep_inside(zero_point, self.quant_min, self.quant_max)
            factor = self._grad_factor(x)
            limits = self._log_limits()
            if learns_now(self.log_scale):
                return relu_fake_quantize_learned(
                    x,
                    learned_scale(scale, self.log_scale, limits, self.steps),
                    zero_point,
                    (self.log_scale, slope(scale, self.steps)),
                    quant_min=self.quant_min,
                    quant_max=self.quant_max,
                    grad_factor=factor,
                    lsq=self.straight_through == "lsq",
                )
            scale, zero_point = trained_scale(scale, self.log_scale, limits, self.steps), unmoved(zero_point)
        return relu_fake_quantize(
            x,
            scale,
            zero_point,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            grad_factor=factor,
            straight_through=self.straight_through,
        )

    def _grad_factor(self, x: Tensor) -> float:
        """LSQ's factor of the gradient of a learned scale, for an input."""
        return (max(x.shape[-self.feature_dims :].numel(), 1) * self.steps) ** -0.5  # type: ignore[no-any-return]


@torch.no_grad()
def _ends_of_relu(x: Tensor) -> Tensor:
    """Two values that have the range of relu(x) and zero, which every range covers."""
    top = x.detach().amax().clamp(min=0)
    return torch.stack([torch.zeros_like(top), top])
