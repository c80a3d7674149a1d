"""FakeQuantize: the state that a quantizer keeps, around the fake-quantize ops."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..ops.autograd import transformed
from ..ops.dynamic import fake_quantize_dynamic, quantize_dynamic, range_of_bits
from ..ops.fake_quantize import fake_quantize
from ..ops.observe_fake_quantize import observe_fake_quantize
from ..ops.quantize import quantize
from ..ops.statistics import mse_range
from .granularity import Granularity, PerChannel, PerGroup, PerTensor
from .learned_scale import learned, learned_scale, pace
from .ranges import block_magnitude, block_range, follow, forget_zeros, is_sharded, set_qparams, whole, write

QUANTIZERS = ("lsq", "minmax", "ema", "dynamic")
AVERAGING_CONST = 0.01  # torch.ao's default: the statistics remember about the last hundred batches
GROWTH = 0.1  # of the way to a larger range or mean magnitude of an input, at each training step
MSE_BITS = 4  # up to here a learned scale starts from the smallest squared error, above from the range
LOG_LIMIT = math.log(1024)  # how far a learned scale gets from its start

# These take tensors and numbers and decide by them, so that torch.fx must not look inside.
for _function in (
    "fake_quantize",
    "observe_fake_quantize",
    "_dynamic",
    "learned",
    "follow",
    "pace",
    "forget_zeros",
):
    torch.fx.wrap(_function)


class FakeQuantize(nn.Module):
    """Quantizes a tensor to ``bits`` bits and back, with gradients, and keeps the scale.

    Args:
        bits: 2 to 8.
        granularity: what one scale speaks for; all but ``PerTensor`` need ``shape`` unless quantizer is "dynamic".
        symmetric: codes −(2**(bits−1)−1) … 2**(bits−1)−1 without a zero point (2 bits are ternary): the range is its
            own mirror image, so a sign flip of a channel is exact. Else all 2**bits codes, with a zero point.
        quantizer: where the scale comes from.
            - "lsq": it is learned (LSQ, arXiv 1902.08153), and so is the zero point (LSQ+, arXiv 2004.09576).
            - "minmax": the range of a weight as it is; of an input what ``calibrate`` saw.
            - "ema": moving averages of the minimum and maximum, updated by every forward pass in training mode.
            - "dynamic": the tensor's own range at every call.
        shape: shape of the tensor, where it is always the same (a weight).
        straight_through: how gradients pass, as in ``fake_quantize``; None: "lsq" where the scale is learned, else
            "clip". "ema" and "dynamic" accept "clip" alone.
        feature_dims: for a tensor whose shape varies, how many trailing dims make up one sample. LSQ's gradient
            factor counts them alone, so that the learning rate of the scale does not depend on the batch size.

    A learned scale is start·exp(log_scale/sqrt(steps)), with the Parameter ``log_scale`` at zero where it starts and
    steps the codes on the longer side of zero. An optimizer that moves every parameter by its learning rate (Adam) so
    changes it by lr/sqrt(steps) of itself: 0.01 % at 8 bits and lr 1e-3, where the same step on the scale itself, of
    1e-3, is all of it. Under SGD it moves as LSQ's own would from LSQ's start, 2·mean|x|/sqrt(steps), whatever its own
    start is, but sqrt(steps) times slower: the gradient of log_scale is 2·dscale/(start·sqrt(steps)). Weight decay
    pulls it towards its start, and it stays within 1/1024 to 1024 of that. The start of a weight of more than 4 bits
    is its range as it is, in eval mode too, and the scale once to twice that: nothing is clipped, since at these widths
    no clipping is worth its error (LSQ's gradient does ask for it). The start of an input of more than 4 bits grows
    with its range, a tenth of the way at each training step, unless it was set by hand or by a method of ``calibrate``
    that clips. At 4 bits or less the start of a weight moves as its mean magnitude does, and that of an input where a
    batch has more than one and a half times the magnitude so far, a tenth of the way beyond: learned alone it could not
    keep pace with a network that is trained from scratch. torch.func's transforms move none of these.

    ``scale`` and ``zero_point`` are what the next forward pass uses, of a weight whose range is followed what the last
    one in training mode used; ``quantizer.scale = t`` sets a new start. A state_dict holds them in fp32, beside what a
    learned scale needs to go on exactly (``log_scale``, ``start``, ``magnitude``), and ``bits``: one of another width
    is refused.

    "lsq" and "minmax" take a scale from the first tensor that they meet where ``calibrate`` has not set one: of a
    weight always, of an input in training mode only (one wait for the device), else they raise RuntimeError; "ema"
    gives NaN in eval mode before it saw its first batch, and under activation checkpointing counts a batch twice, as
    BatchNorm does. A range of zeros alone is taken for that of the other channels, or of a new layer's weight
    (1/sqrt(fan in)), or 1 for an input: it can be trained, and zeros stay zeros. Scales and statistics stay fp32 when
    the module is cast (``model.bfloat16()``): a bf16 average cannot move by less than 1/256 of itself. log_scale, which
    is a small change, is cast with the model, so that FSDP finds one dtype. From the second batch on nothing in the
    forward pass waits for the device.
    """

    log_scale: Tensor
    zero_point: Tensor | None
    running_min: Tensor
    running_max: Tensor
    observer_on: Tensor
    fake_quant_on: Tensor
    calibrated: Tensor
    _scale: Tensor  # of a learned scale its start
    _magnitude: Tensor  # what mean |x| the start of a learned scale is for; -1: not known

    def __init__(
        self,
        *,
        bits: int = 8,
        granularity: Granularity | None = None,
        symmetric: bool = True,
        quantizer: str = "lsq",
        shape: Sequence[int] | None = None,
        feature_dims: int = 1,
        straight_through: str | None = None,
    ) -> None:
        super().__init__()
        self.granularity = granularity = PerTensor() if granularity is None else granularity
        self.symmetric = symmetric
        self.quantizer = quantizer
        self.feature_dims = feature_dims
        if straight_through is None:
            straight_through = "lsq" if quantizer == "lsq" else "clip"
        self.straight_through = straight_through
        self.name = ""  # in the model, for errors
        self._set_width(bits)
        self._ready = True
        self._observes = self._quantizes = True
        if quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer: got {quantizer!r}; accepted: {', '.join(QUANTIZERS)}")
        if straight_through not in ("clip", *checks.VARIANTS):
            raise ValueError(
                f"straight_through: got {straight_through!r}; accepted: clip, {', '.join(checks.VARIANTS)}"
            )
        if straight_through != "clip" and quantizer in ("ema", "dynamic"):
            raise ValueError(
                f"straight_through: got {straight_through!r} with quantizer=\"{quantizer}\"; accepted: 'clip'"
            )
        self.is_weight = shape is not None
        self._numel: int | None = None
        if quantizer == "dynamic":
            if isinstance(granularity, PerChannel) and granularity.axis != 0:
                raise ValueError(
                    f'granularity: got {granularity} with quantizer="dynamic"; accepted: PerChannel(0), PerTensor(), '
                    "PerToken(), PerGroup(size)"
                )
            return
        scale_shape = granularity.scale_shape(shape)
        self._span = 1.0  # how far a tensor of zeros is taken to reach
        if shape is not None:
            self._numel = math.prod(shape) // max(math.prod(scale_shape), 1)
            self._span = 4 * max(math.prod(shape[1:]), 1) ** -0.5
        self.register_buffer("_scale", torch.empty(scale_shape), persistent=False)
        if quantizer == "lsq":
            self.register_buffer("_magnitude", torch.empty(scale_shape), persistent=False)
            self.log_scale = nn.Parameter(torch.empty(scale_shape))
            self.zero_point = None if symmetric else nn.Parameter(torch.empty(scale_shape))
        else:
            zero_point = torch.empty(scale_shape, dtype=torch.int32)
            self.register_buffer("zero_point", None if symmetric and quantizer == "minmax" else zero_point)
        if quantizer == "ema":
            self.register_buffer("running_min", torch.empty(scale_shape))
            self.register_buffer("running_max", torch.empty(scale_shape))
        else:
            self.register_buffer("calibrated", torch.empty(1, dtype=torch.bool))
        self.register_buffer("observer_on", torch.empty(1, dtype=torch.uint8))
        self.register_buffer("fake_quant_on", torch.empty(1, dtype=torch.uint8))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forgets all that was calibrated or learned; what torch calls after ``to_empty``."""
        if self.quantizer == "dynamic":
            return
        self._scale.fill_(torch.nan)
        if self.zero_point is not None:
            self.zero_point.zero_()
        if self.quantizer == "lsq":
            self.log_scale.zero_()
            self._magnitude.fill_(-1)
        if self.quantizer == "ema":
            self.running_min.fill_(torch.inf)
            self.running_max.fill_(-torch.inf)
        else:
            self.calibrated.fill_(False)
        self.observer_on.fill_(self._observes)
        self.fake_quant_on.fill_(self._quantizes)
        self._ready = self.quantizer == "ema" and not self._scale.is_meta

    def _set_width(self, bits: int) -> None:
        quant_min, self.quant_max = range_of_bits(bits)
        self.quant_min = -self.quant_max if self.symmetric else quant_min
        self.steps = self.quant_max - (0 if self.symmetric else self.quant_min)
        self._bits = bits

    @property
    def bits(self) -> int:
        """The width; ``set_bits`` changes it."""
        return self._bits

    @property
    def quantizes(self) -> bool:
        """Whether the forward pass quantizes; ``enable_fake_quant`` switches it."""
        return self._quantizes

    @property
    def scale(self) -> Tensor:
        """The scale, fp32, in the shape that the granularity says; NaN where there is none yet."""
        if self.quantizer == "lsq":
            return learned_scale(self._scale, whole(self.log_scale), self._log_limits(), self.steps)
        return self._scale

    @scale.setter
    @torch.no_grad()
    def scale(self, scale: Tensor | float) -> None:
        self._scale.copy_(torch.as_tensor(scale))
        self._started()

    @property
    def is_calibrated(self) -> bool:
        """Whether the scale is known, or can be had from the weight (reads the device)."""
        if self.quantizer == "ema":
            return self._ready and not bool(self.running_min.isinf().any())
        return self._ready or self.is_weight or self._was_calibrated()

    def _was_calibrated(self) -> bool:
        """Whether its tensors say so, into which another quantizer's may have been copied: averages of a model."""
        return self.quantizer != "ema" and not self.calibrated.is_meta and bool(self.calibrated)

    @torch.no_grad()
    def follow(self, x: Tensor) -> None:
        """Takes the range of a weight that is followed, as a forward pass in training mode does."""
        if self._ready and (self._follows() or (self.is_weight and self._paces())) and not x.is_meta:
            self._range(whole(x), in_place=True)

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Takes the scale from x: of a learned one of at most 4 bits the one that gives the smallest squared error, of
        any other the one of x's range. A weight whose range is followed is followed from here on.

        SQNR in dB at 8, 4, 3, 2 bits of Gaussian weights, 144 per channel: range 43.7, 18.5, 11.1, 2.2; LSQ's own
        2·mean|x|/sqrt(steps) 27.8, 15.2, 11.4, 6.4; smallest error 43.7, 19.4, 13.5, 7.3. In QAT the range wins at 8
        bits over LSQ's formula: its steps are six times finer.
        """
        checks.dense(self.name or "x", x)
        low, high = block_range(x, self._scale.shape)
        if not bool(low.isfinite().all() & high.isfinite().all()):
            raise RuntimeError(f"{self.name or 'x'}: got a tensor that holds NaN or infinity; accepted: finite values")
        if self.quantizer == "lsq" and self.bits <= MSE_BITS:
            values = x.detach().float() if x.dtype == torch.float64 else x.detach()
            low, high = mse_range(values, low, high, self.quant_min, self.quant_max, self.symmetric, 0.0)
        self.set_range(low, high)
        self.observe_from(block_magnitude(x, self._scale.shape))

    @torch.no_grad()
    def observe_from(self, mean_abs: Tensor) -> None:
        """Lets training move the range from where it was set on, for values of this mean magnitude."""
        if self.quantizer == "lsq":
            self._magnitude.copy_(mean_abs)
        self.enable_observer()

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor, mean_abs: Tensor | None = None) -> None:
        """Sets scale and zero point from the minimum and maximum to cover, in scale's shape. A weight whose range is
        followed is not from here on.

        With the mean magnitude a learned scale of at most 4 bits takes LSQ's own start, 2·mean_abs/sqrt(steps), where
        that covers less than the range.
        """
        self._materialize(low.device)
        if mean_abs is not None and self.quantizer == "lsq" and self.bits <= MSE_BITS:
            span = torch.maximum(-low, high) if self.symmetric else high.clamp(min=0) - low.clamp(max=0)
            part = (2 * math.sqrt(self.steps) * mean_abs / span).clamp(max=1).nan_to_num(1.0)
            low, high = low * part, high * part
        floor, zeros_span = (torch.finfo(torch.float32).eps, 0.0) if self.quantizer == "ema" else (0.0, self._span)
        set_qparams(
            self._scale, self.zero_point, low, high, self.quant_min, self.quant_max, self.symmetric, floor, zeros_span
        )
        if self.quantizer == "ema":
            self.running_min.copy_(low)
            self.running_max.copy_(high)
            self._ready = True
        else:
            self._started()

    def _started(self) -> None:
        if self.quantizer == "lsq":
            self.log_scale.zero_()
            self._magnitude.fill_(-1)
        if self.quantizer == "lsq" or (self.is_weight and self.quantizer == "minmax"):
            self.disable_observer()
        if self.quantizer != "ema":
            self.calibrated.fill_(True)
            self._ready = True

    @torch.no_grad()
    def set_bits(self, bits: int) -> None:
        """Changes the width and keeps the range: scale·steps stays, and so does what an optimizer knows of log_scale.

        Raises:
            ValueError: bits other than 2 to 8.
        """
        range_of_bits(bits)
        scale = None if self.quantizer == "dynamic" else self.scale.clone()
        before, lowest = self.steps, self.quant_min
        self._set_width(bits)
        if scale is None or not self.is_calibrated:
            return
        if self.quantizer == "ema":
            self.set_range(self.running_min, self.running_max)
            return
        scale *= before / self.steps
        if self.quantizer == "lsq":
            scale /= learned_scale(torch.ones_like(scale), whole(self.log_scale), self._log_limits(), self.steps)
            self._magnitude.fill_(-1)
        self._scale.copy_(scale)
        if not self.symmetric:
            zero_point = whole(self.zero_point)  # type: ignore[arg-type]
            moved = self.quant_min + (zero_point - lowest) * (self.steps / before)
            write(self.zero_point, moved if zero_point.is_floating_point() else moved.round())  # type: ignore[arg-type]

    def enable_observer(self, enabled: bool = True) -> None:
        """Whether training moves the range of "ema", of weights that are followed and of learned inputs that grow, and
        starts a scale."""
        self._observes = enabled
        if self.quantizer != "dynamic":
            self.observer_on.fill_(enabled)

    def disable_observer(self) -> None:
        self.enable_observer(False)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Whether the forward pass quantizes; where not, x passes as it is and observers go on."""
        self._quantizes = enabled
        if self.quantizer != "dynamic":
            self.fake_quant_on.fill_(enabled)

    def disable_fake_quant(self) -> None:
        self.enable_fake_quant(False)

    @torch.no_grad()
    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scale (positive) and int32 zero point (None where symmetric), as a forward pass of x in eval mode uses them.

        x: a weight, where its range is followed; None: those of the last forward pass.
        """
        scale, zero_point = self._scale, self.zero_point
        if x is not None and self.is_weight:
            scale, zero_point = self._range(x, in_place=False)
        if self.quantizer == "lsq":
            scale = learned_scale(scale, whole(self.log_scale), self._log_limits(), self.steps)
        if self.symmetric or zero_point is None:
            return scale, None
        return scale, whole(zero_point.detach()).round().clamp(self.quant_min, self.quant_max).to(torch.int32)

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
        if not self._ready:
            self._meet(x)
        s, z = self.qparams(x)
        return quantize(x, s, z, quant_min=self.quant_min, quant_max=self.quant_max), s, z

    def forward(self, x: Tensor) -> Tensor:
        if not self._quantizes and not self.training:
            return x
        if not self._ready:
            self._meet(x)
        if not self._quantizes and self.quantizer != "ema":
            return x
        if self.quantizer == "dynamic":
            return _dynamic(x, self.bits, self._group_size(), self.symmetric, isinstance(self.granularity, PerChannel))
        if self.quantizer == "ema" and self.training:
            if self.is_weight and not transformed():
                forget_zeros(self.running_min, self.running_max)
            return observe_fake_quantize(
                x,
                self.observer_on,
                self.fake_quant_on,
                self.running_min,
                self.running_max,
                self._scale,
                self.zero_point,  # type: ignore[arg-type]  # a buffer here
                averaging_const=AVERAGING_CONST,
                quant_min=self.quant_min,
                quant_max=self.quant_max,
                symmetric=self.symmetric,
            )
        scale, zero_point = self._range(x, in_place=self.training)
        if self.quantizer == "lsq":
            return learned(
                x,
                scale,
                self.log_scale,
                self._log_limits(),
                zero_point,
                self.quant_min,
                self.quant_max,
                self.steps,
                self.feature_dims if self._numel is None else None,
                self._numel,
                # Nothing of a weight that is followed is clipped; LSQ's mask would take its largest value for it.
                "clip" if self._follows() and self.straight_through == "lsq" else self.straight_through,
            )
        return fake_quantize(
            x,
            scale,
            zero_point,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            straight_through=self.straight_through,
        )

    def _range(self, x: Tensor, in_place: bool) -> tuple[Tensor, Tensor | None]:
        """What x is quantized with: scale, of a learned one its start, and zero point."""
        scale, zero_point = self._scale, self.zero_point
        if self._paces():
            share = 1.0 if self.is_weight else GROWTH
            return pace(x, scale, self._magnitude, share, 2 * self.steps**-0.5, in_place), zero_point
        if self._follows():
            up, down = 1.0, 1.0
        elif self._grows():
            up, down = GROWTH, 0.0
        else:
            return scale, zero_point
        return follow(x, scale, zero_point, self.quant_min, self.quant_max, self.symmetric, up, down, in_place)

    def _follows(self) -> bool:
        """Whether the range is that of the weight as it is."""
        learned_at_few_bits = self.quantizer == "lsq" and self.bits <= MSE_BITS
        fits = self.quantizer in ("lsq", "minmax") and not learned_at_few_bits
        return fits and self.is_weight and self._observes

    def _paces(self) -> bool:
        """Whether the start of a scale learned at few bits moves with the mean magnitude of what it quantizes."""
        learned_at_few_bits = self.quantizer == "lsq" and self.bits <= MSE_BITS
        return learned_at_few_bits and self._observes and (self.is_weight or self.training) and not transformed()

    def _grows(self) -> bool:
        """Whether the range of a learned input grows with what it is given."""
        wide = self.quantizer == "lsq" and not self.is_weight and self.bits > MSE_BITS
        return wide and self.training and self._observes and not transformed()

    def _log_limits(self) -> tuple[float, float]:
        return (0.0, math.log(2)) if self.is_weight and self.bits > MSE_BITS else (-LOG_LIMIT, LOG_LIMIT)

    def extra_repr(self) -> str:
        parts = (f"{name}={getattr(self, name)!r}" for name in ("bits", "granularity", "symmetric", "quantizer"))
        return ", ".join(parts)

    def _meet(self, x: Tensor) -> None:
        """The first tensor of a quantizer without a scale, or on the meta device."""
        if not x.is_meta:
            self._materialize(x.device)
        if self.quantizer == "ema" and not self.is_weight:
            return
        if self._was_calibrated():
            self._ready = True
            return
        if not self.is_weight and not (self.training and self._observes):
            raise RuntimeError(
                f'{self.name or "quantizer"}: this "{self.quantizer}" quantizer has no scale yet; before the first '
                "forward pass in eval mode call qk.calibrate(model, batches) with batches that reach it, train on one, "
                "or load a state_dict of a calibrated model"
            )
        if x.numel() and not x.is_meta:
            observes = self._observes
            self.start(x)
            self.enable_observer(observes)

    def _materialize(self, device: torch.device) -> None:
        """Leaves the meta device, where ``load_state_dict(float_state, assign=True)`` leaves a quantizer."""
        if self._scale.is_meta:
            self.to_empty(device=device)

    def forget(self) -> None:
        """Drops the scale: the next tensor starts it anew, of an input in training mode."""
        if self.quantizer == "dynamic":
            return
        if self.quantizer != "ema":
            self.calibrated.fill_(False)
        self._ready = False
        self.enable_observer()

    def _rows(self, x: Tensor) -> Tensor:
        return x.flatten(1) if isinstance(self.granularity, PerChannel) and x.dim() > 2 else x

    def _group_size(self) -> int | None:
        if isinstance(self.granularity, PerGroup):
            return self.granularity.size
        return None if isinstance(self.granularity, PerTensor) else -1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantize:
        def apply(t: Tensor) -> Tensor:
            return fn(t) if isinstance(t, nn.Parameter) else apply_keeping_dtype(fn, t)

        was_empty = any(t.is_meta for t in self.buffers(recurse=False))
        super()._apply(apply, recurse)
        if was_empty and not self._scale.is_meta:  # to_empty leaves memory as it was
            self.reset_parameters()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "bits"] = torch.tensor([self.bits], dtype=torch.int32)
        if self.quantizer == "dynamic":
            destination[prefix + "fake_quant_on"] = torch.tensor([self._quantizes], dtype=torch.uint8)
            return
        scale = self._scale.detach()
        destination[prefix + "scale"] = scale
        if self.quantizer == "lsq":
            destination[prefix + "scale"] = self.scale.detach()
            destination[prefix + "start"] = scale
            destination[prefix + "magnitude"] = self._magnitude.detach()
            for name in self._parameters.keys() & {key.removeprefix(prefix) for key in destination}:
                destination[prefix + name] = destination[prefix + name].float()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = strict, missing_keys, unexpected_keys, error_msgs
        state = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        bits, scale, start = state.pop("bits", None), state.pop("scale", None), state.pop("start", None)
        magnitude = state.pop("magnitude", None)
        if bits is not None and int(bits) != self.bits:
            error_msgs.append(
                f"{prefix}bits: got a state of {int(bits)} bits; accepted: {self.bits}, the width of this quantizer "
                "(qk.set_bits changes it)"
            )
            return
        if self.quantizer == "dynamic":
            self._quantizes = bool(state.pop("fake_quant_on", self._quantizes))
            super()._load_from_state_dict({prefix + key: t for key, t in state.items()}, prefix, local_metadata, *rest)
            return
        if scale is None:
            missing_keys.append(prefix + "scale")
        elif scale.shape != self._scale.shape:
            error_msgs.append(
                f"{prefix}scale: got shape {list(scale.shape)}; accepted: {list(self._scale.shape)}, that of this "
                "quantizer"
            )
            return
        if scale is not None:
            for name, value in (("observer_on", self._observes), ("fake_quant_on", self._quantizes)):
                state.setdefault(name, torch.tensor([value], dtype=torch.uint8))
            self._observes = bool(state["observer_on"])
            if self.quantizer == "lsq":
                log_scale = state.get("log_scale")
                # A scale that was edited, or stands alone, is a new start.
                if (
                    start is not None
                    and log_scale is not None
                    and torch.equal(learned_scale(start, whole(log_scale), self._log_limits(), self.steps), scale)
                ):
                    scale = start
                else:
                    magnitude = None
                    state["log_scale"] = torch.zeros_like(self.log_scale if is_sharded(self.log_scale) else scale)
                if magnitude is None or magnitude.shape != scale.shape:
                    magnitude = torch.full_like(scale, -1)
            assign = self._scale.is_meta or local_metadata.get("assign_to_params_buffers", False)
            for name, value in (("_scale", scale), ("_magnitude", magnitude)):
                if name in self._buffers and assign:
                    setattr(self, name, value.detach().clone())
                elif name in self._buffers:
                    getattr(self, name).copy_(value)
        loaded = {prefix + key: value for key, value in state.items()}
        super()._load_from_state_dict(loaded, prefix, local_metadata, *rest)
        if self._scale.is_meta:
            return
        self._observes, self._quantizes = bool(self.observer_on), bool(self.fake_quant_on)
        if self.quantizer == "ema":
            self._ready = True
        elif scale is not None:
            self._ready = bool(self.calibrated)


with contextlib.suppress(AttributeError):  # torch.ao's switches (model.apply(disable_observer), …) then find it
    torch.ao.quantization.FakeQuantizeBase.register(FakeQuantize)


def _dynamic(x: Tensor, bits: int, group_size: int | None, symmetric: bool, per_channel: bool) -> Tensor:
    checks.dense("x", x)
    rows = x.flatten(1) if per_channel and x.dim() > 2 else x
    return fake_quantize_dynamic(rows, bits=bits, group_size=group_size, symmetric=symmetric).view(x.shape)


def apply_keeping_dtype(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """What ``fn`` (of Module._apply) does to t, less a change of dtype."""
    moved = fn(t)
    return moved if moved.dtype == t.dtype else t.to(moved.device)
