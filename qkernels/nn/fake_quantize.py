"""FakeQuantize: the state that a quantizer keeps, around the fake-quantize ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.fake_quantize import (
    fake_quantize,
    fake_quantize_dynamic,
    observe_fake_quantize,
    range_of_bits,
    transformed,
)
from ..ops.quantize import choose_qparams, quantize, quantize_dynamic
from ..reference.fake_quantize import check_dense
from ..reference.straight_through import VARIANTS
from .granularity import Granularity, PerChannel, PerGroup, PerTensor

QUANTIZERS = ("lsq", "minmax", "ema", "dynamic")
SCALE_FLOOR = 1e-9  # a learned scale is kept at or above it: an optimizer step must not make it zero or negative
AVERAGING_CONST = 0.01  # torch.ao's default: the statistics remember about the last hundred batches


class FakeQuantize(nn.Module):
    """Quantizes a tensor to ``bits`` bits and back, with gradients, and keeps the scale.

    Args:
        bits: 2 to 8.
        granularity: what one scale speaks for; all but ``PerTensor`` need ``shape`` unless quantizer is "dynamic".
        symmetric: codes −(2**(bits−1)−1) … 2**(bits−1)−1 without a zero point (2 bits are ternary): the range is its
            own mirror image, so a sign flip of a channel is exact. Else all 2**bits codes, with a zero point.
        quantizer: where the scale comes from.
            "lsq": a Parameter, learned (LSQ, arXiv 1902.08153), and so is the zero point (LSQ+, arXiv 2004.09576).
            "minmax": a buffer that ``calibrate`` sets and nothing changes afterwards.
            "ema": moving averages of the minimum and maximum, updated by every forward pass in training mode.
            "dynamic": the tensor's own range at every call.
        shape: shape of the tensor, where it is always the same (a weight).
        straight_through: how gradients pass, as in ``fake_quantize``; "ema" and "dynamic" accept "clip" alone.
        feature_dims: for a tensor whose shape varies, how many trailing dims make up one sample. LSQ's gradient
            factor counts them alone, so that the learning rate of the scale does not depend on the batch size.

    "lsq" and "minmax" raise RuntimeError when called before they were calibrated; "ema" gives NaN in eval mode before
    it saw its first batch, and under activation checkpointing counts a batch twice, as BatchNorm does.
    Scales and statistics stay fp32 when the module is cast (``model.bfloat16()``): a bf16 average cannot move by less
    than 1/256 of itself. Nothing in the forward pass waits for the device.
    """

    scale: Tensor
    zero_point: Tensor | None
    running_min: Tensor
    running_max: Tensor
    observer_on: Tensor
    fake_quant_on: Tensor
    calibrated: Tensor

    def __init__(
        self,
        *,
        bits: int = 8,
        granularity: Granularity | None = None,
        symmetric: bool = True,
        quantizer: str = "lsq",
        shape: Sequence[int] | None = None,
        feature_dims: int = 1,
        straight_through: str = "clip",
    ) -> None:
        super().__init__()
        quant_min, self.quant_max = range_of_bits(bits)
        self.quant_min = -self.quant_max if symmetric else quant_min
        self.bits = bits
        self.granularity = granularity = PerTensor() if granularity is None else granularity
        self.symmetric = symmetric
        self.quantizer = quantizer
        self.feature_dims = feature_dims
        self.straight_through = straight_through
        self._ready = True
        if quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer: got {quantizer!r}; accepted: {', '.join(QUANTIZERS)}")
        if straight_through not in ("clip", *VARIANTS):
            raise ValueError(f"straight_through: got {straight_through!r}; accepted: clip, {', '.join(VARIANTS)}")
        if straight_through != "clip" and quantizer in ("ema", "dynamic"):
            raise ValueError(
                f"straight_through: got {straight_through!r} with quantizer=\"{quantizer}\"; accepted: 'clip'"
            )
        if quantizer == "dynamic":
            if isinstance(granularity, PerChannel) and granularity.axis != 0:
                raise ValueError(
                    f'granularity: got {granularity} with quantizer="dynamic"; accepted: PerChannel(0), PerTensor(), '
                    "PerToken(), PerGroup(size)"
                )
            return
        scale_shape = granularity.scale_shape(shape)
        # LSQ: 1/sqrt(elements per scale × steps on the longer side of zero) brings the relative updates of scale and
        # weights to one size.
        self.steps = self.quant_max if symmetric else self.quant_max - self.quant_min
        self._numel = None if shape is None else math.prod(shape) // max(math.prod(scale_shape), 1)
        unknown = torch.full(scale_shape, torch.nan)
        if quantizer == "lsq":
            self.scale = nn.Parameter(unknown)
            self.zero_point = None if symmetric else nn.Parameter(torch.zeros(scale_shape))
        else:
            self.register_buffer("scale", unknown)
            zero_point = torch.zeros(scale_shape, dtype=torch.int32)
            self.register_buffer("zero_point", None if symmetric and quantizer == "minmax" else zero_point)
        if quantizer == "ema":
            self.register_buffer("running_min", torch.full(scale_shape, torch.inf))
            self.register_buffer("running_max", torch.full(scale_shape, -torch.inf))
            self.register_buffer("observer_on", torch.ones(1, dtype=torch.uint8))
            self.register_buffer("fake_quant_on", torch.ones(1, dtype=torch.uint8))
        else:
            self.register_buffer("calibrated", torch.zeros(1, dtype=torch.bool))
            self._ready = False

    @property
    def is_calibrated(self) -> bool:
        """Whether the scale is known (reads the device)."""
        if self.quantizer == "ema":
            return not bool(self.running_min.isinf().any())
        return self._ready

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor, mean_abs: Tensor | None = None) -> None:
        """Sets scale and zero point from the minimum, maximum and mean magnitude of the tensor, in scale's shape.

        A learned scale starts from LSQ's own 2·mean|x|/sqrt(steps) where that is below the min-max scale, unless
        mean_abs is None: then the range is the one to take. Of those two neither wins at every width. SQNR in dB at 8,
        4, 3, 2 bits: Gaussian weights, 144 per channel: min-max 43.7, 18.5, 11.1, 2.2; LSQ's formula 27.8, 15.2, 11.4,
        6.4; the smaller of the two 43.7, 18.5, 11.8, 6.4. ReLU of Gaussian activations: min-max 46.0, 21.4, 14.8, 7.4;
        LSQ 36.8, 24.2, 18.1, 11.2; the smaller 46.0, 24.2, 18.1, 11.2.
        """
        eps = torch.finfo(torch.float32).eps if self.quantizer == "ema" else SCALE_FLOOR
        scale, zero_point = choose_qparams(
            low.float(),
            high.float(),
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            symmetric=self.symmetric,
            eps=eps,
        )
        if self.quantizer == "lsq" and mean_abs is not None:
            scale = torch.minimum(scale, 2 * mean_abs.float() / math.sqrt(self.steps)).clamp(min=SCALE_FLOOR)
        self.scale.copy_(scale)
        if self.zero_point is not None:
            self.zero_point.copy_(zero_point)
        if self.quantizer == "ema":
            self.running_min.copy_(low)
            self.running_max.copy_(high)
        else:
            self.calibrated.fill_(True)
            self._ready = True

    def qparams(self) -> tuple[Tensor, Tensor | None]:
        """Scale (positive) and int32 zero point (None where symmetric), as the next forward uses them."""
        scale, zero_point = self.scale.detach(), self.zero_point
        if self.quantizer == "lsq":
            scale = scale.clamp(min=SCALE_FLOOR)
        if self.symmetric or zero_point is None:
            return scale, None
        return scale, zero_point.detach().round().clamp(self.quant_min, self.quant_max).to(torch.int32)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The integers behind forward's result in eval mode: codes (int8, x's shape), scale, zero point (None: 0)."""
        if self.quantizer == "dynamic":
            rows = self._rows(x)
            q, scale, zero_point = quantize_dynamic(
                rows, bits=self.bits, group_size=self._group_size(), symmetric=self.symmetric
            )
            if isinstance(self.granularity, PerChannel):
                scale, zero_point = (t.reshape(-1, *[1] * (x.dim() - 1)) for t in (scale, zero_point))
            return q.view(x.shape), scale, None if self.symmetric else zero_point
        s, z = self.qparams()
        return quantize(x, s, z, quant_min=self.quant_min, quant_max=self.quant_max), s, z

    def forward(self, x: Tensor) -> Tensor:
        check_dense("x", x)
        if self.quantizer == "dynamic":
            y = fake_quantize_dynamic(
                self._rows(x), bits=self.bits, group_size=self._group_size(), symmetric=self.symmetric
            )
            return y.view(x.shape) if isinstance(self.granularity, PerChannel) else y
        if not self._ready:
            raise RuntimeError(
                f'quantizer: "{self.quantizer}" has no scale yet; call qk.calibrate(model, batches) before the first '
                "forward pass, or load a state_dict of a calibrated model"
            )
        if self.quantizer == "ema" and self.training:
            return observe_fake_quantize(
                x,
                self.observer_on,
                self.fake_quant_on,
                self.running_min,
                self.running_max,
                self.scale,
                self.zero_point,  # type: ignore[arg-type]  # a buffer here
                averaging_const=AVERAGING_CONST,
                quant_min=self.quant_min,
                quant_max=self.quant_max,
                symmetric=self.symmetric,
            )
        scale: Tensor = self.scale
        zero_point, factor = self.zero_point, 1.0
        if self.quantizer == "lsq":
            if self.training and not transformed():
                # In place, where a clamp in the graph would stop the gradient of a scale that once fell below; through
                # .data, because another call of this module in the same step may have saved the scale for backward.
                scale.data.clamp_(min=SCALE_FLOOR)
                if zero_point is not None:
                    zero_point.data.clamp_(self.quant_min, self.quant_max)
            else:
                scale = scale.clamp(min=SCALE_FLOOR)
            numel = x.shape[-self.feature_dims :].numel() if self._numel is None else self._numel
            factor = (numel * self.steps) ** -0.5 if numel else 1.0
        return fake_quantize(
            x,
            scale,
            zero_point,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            grad_factor=factor,
            straight_through=self.straight_through,
        )

    def extra_repr(self) -> str:
        parts = (f"{name}={getattr(self, name)!r}" for name in ("bits", "granularity", "symmetric", "quantizer"))
        return ", ".join(parts)

    def _rows(self, x: Tensor) -> Tensor:
        return x.flatten(1) if isinstance(self.granularity, PerChannel) and x.dim() > 2 else x

    def _group_size(self) -> int | None:
        if isinstance(self.granularity, PerGroup):
            return self.granularity.size
        return None if isinstance(self.granularity, PerTensor) else -1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantize:
        return super()._apply(lambda t: apply_keeping_dtype(fn, t), recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.quantizer in ("lsq", "minmax") and not self.calibrated.is_meta:
            self._ready = bool(self.calibrated)


def apply_keeping_dtype(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """What ``fn`` (of Module._apply) does to t, less a change of dtype."""
    moved = fn(t)
    return moved if moved.dtype == t.dtype else t.to(moved.device)


def block_statistics(x: Tensor, scale_shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Minimum, maximum and mean magnitude (fp32) of each block of x that one element of scale speaks for."""
    x = x.detach().float()
    inner: tuple[int, ...]
    if math.prod(scale_shape) == 1:
        blocks, inner = x.reshape(-1), (0,)
    else:
        split = [n for p, size in zip(scale_shape, x.shape, strict=True) for n in (p, size // p)]
        blocks, inner = x.reshape(split), tuple(range(1, len(split), 2))
    stats = blocks.amin(inner), blocks.amax(inner), blocks.abs().mean(inner)
    return tuple(stat.reshape(tuple(scale_shape)) for stat in stats)  # type: ignore[return-value]
