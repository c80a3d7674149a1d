"""Quantizers of non-uniform levels: fixed codebooks, levels with zero between them, and levels that are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import codebooks
from ..ops.autograd import straight_through, transformed
from ..ops.codebook import fake_quantize_codebook
from .fake_quantize import FakeQuantize
from .ranges import per_element, whole, write

for _function in ("fake_quantize_codebook", "within"):
    torch.fx.wrap(_function)


class CodebookQuantizer(FakeQuantize, quantizers=("nf4", "apot", "po2")):
    """Rounds x/scale to the nearest of ``levels``, which reach from −1 to 1 (see ``qk.codebooks``).

    ``scale`` is the largest magnitude: of a weight's present values at each training step, of an input's in calibration
    or in its first batch. The gradient passes where |x| <= scale. A state_dict holds the levels, fp32.
    """

    integer_codes = False
    levels: Tensor
    _fixed: ClassVar[bool] = True  # whether the levels follow from name and width
    LEVELS: ClassVar[dict[str, Callable[[int], Tensor]]] = {
        "nf4": codebooks.normal_float,
        "apot": codebooks.apot,
        "po2": codebooks.powers_of_two,
    }

    def _levels_of(self, bits: int) -> Tensor:
        with torch.device("cpu"):  # the meta device, on which a model may be made, computes nothing
            return self.LEVELS[self.quantizer](bits)

    def _register(self, scale_shape: Sequence[int]) -> None:
        super()._register(scale_shape)
        self.register_buffer("levels", torch.empty_like(self._levels_of(self.bits), device=self._scale.device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.levels.copy_(self._levels_of(self.bits))

    def _set_width(self, bits: int) -> None:
        super()._set_width(bits)
        self.quant_min, self.quant_max, self.steps = -1, 1, 1  # so that the scale is the largest magnitude

    @torch.no_grad()
    def set_bits(self, bits: int, weight: Tensor | None = None) -> None:
        super().set_bits(bits, weight)
        self.levels = self._levels_of(bits).to(self.levels.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        levels, bits = state_dict.get(f"{prefix}levels"), state_dict.get(f"{prefix}bits", self.bits)
        own = self._levels_of(self.bits)
        if self._fixed and int(bits) == self.bits and levels is not None and not torch.equal(levels.cpu(), own):
            error_msgs: list[str] = args[-1]
            error_msgs.append(
                f"{prefix}levels: got {levels.numel()} levels of another quantizer; accepted: the {own.numel()} of "
                f'"{self.quantizer}" at {self.bits} bits'
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _with_qparams(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        if self._follows():  # nothing is clipped, and in fp64 the rounding of the scale must not count as clipping
            return within(x, scale, self.levels, None)
        return fake_quantize_codebook(x, scale, self.levels)


class MidriseQuantizer(CodebookQuantizer, quantizers=("midrise",)):
    """Uniform levels (k + 1/2)·step for k from −n to n − 1, with zero between two (ParetoQ's SEQ, arXiv 2502.02631).

    step = scale/n, n = 2**(bits−1). scale is the largest magnitude; the outer levels lie half a step within it. The
    gradient passes where |x| <= scale. A value in the middle between two levels, such as 0, goes to the lower one.
    """

    def _levels_of(self, bits: int) -> Tensor:
        n = 2 ** (bits - 1)
        return (torch.arange(-n, n, dtype=torch.float32, device="cpu") + 0.5) / n

    def _with_qparams(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        return within(x, scale, self.levels, None if self._follows() else scale)


class KMeansQuantizer(CodebookQuantizer, quantizers=("kmeans",)):
    """Rounds a weight to the nearest of ``levels`` times the largest magnitude that shares a scale.

    The levels, a Parameter, are fitted by k-means to the first weight over its scales, then trained: the gradient of a
    level is Σ dy·scale over the weights that are rounded to it. The gradient of the weight passes unchanged.
    """

    _fixed = False

    def _levels_of(self, bits: int) -> Tensor:
        return torch.linspace(-1, 1, 2**bits, dtype=torch.float32, device="cpu")

    def _register(self, scale_shape: Sequence[int]) -> None:
        super()._register(scale_shape)
        levels = self.levels
        del self.levels
        self.levels = nn.Parameter(levels)

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        super().start(x)
        values = whole(x).detach().float()
        fitted, scale = codebooks.kmeans(values / per_element(self._scale, values), 2**self.bits)
        write(self.levels, fitted * scale)

    def check_width(self, bits: int) -> None:
        """Refuses another width: levels that are trained have no counterpart among more or fewer."""
        if bits != self.bits:
            raise ValueError(
                f'bits: got {bits} with quantizer="kmeans", whose levels are trained; accepted: {self.bits}, the width '
                "of this quantizer (prepare the model again for another)"
            )

    def set_bits(self, bits: int, weight: Tensor | None = None) -> None:
        self.check_width(bits)

    def _with_qparams(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        return within(x, scale, self.levels, None)


def within(x: Tensor, scale: Tensor, levels: Tensor, bound: Tensor | None) -> Tensor:
    """The nearest levels times scale, with x's gradient where |x| <= bound; None: where x is finite."""
    y = fake_quantize_codebook(x.detach(), scale, levels)
    if not transformed():
        if not (torch.is_grad_enabled() and x.requires_grad):
            return y
        if bound is None and not y.requires_grad:
            return straight_through(x, y)  # type: ignore[no-any-return]
    inside = x.detach().isfinite() if bound is None else x.detach().abs() <= per_element(bound, x)
    passing = torch.where(inside, x, 0)
    return y - (passing.detach() - passing)  # subtracts +0, which keeps the sign of −0
