"""PACT: the quantizer of an input from 0 up to a learned bound."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fake_quantize import FakeQuantize


class PactQuantizer(FakeQuantize, quantizers=("pact",)):
    """Clips an input to [0, alpha] with a learned alpha = scale·(2**bits − 1) (PACT, arXiv 1805.06085).

    alpha starts as the largest value of calibration or of the first batch, at 4 bits or less where the squared error is
    smallest. From there its gradient alone moves it: growth with the input's range would undo what it learned to clip.
    The zero point is quant_min, so that code quant_min is 0.
    """

    def _register(self, scale_shape: Sequence[int]) -> None:
        super()._register(scale_shape)
        del self.zero_point  # a learned one
        self.register_buffer("zero_point", torch.empty(scale_shape, dtype=torch.int32))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._lower_end_is_zero()

    def _lower_end_is_zero(self) -> None:
        assert self.zero_point is not None
        self.zero_point.fill_(self.quant_min)

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        super().start(x.clamp(min=0))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor, mean_abs: Tensor | None = None) -> None:
        super().set_range(torch.zeros_like(low), high, mean_abs)
        self._lower_end_is_zero()  # also where nothing is above zero

    def _paces(self) -> bool:
        return False

    def _grows(self) -> bool:
        return False
