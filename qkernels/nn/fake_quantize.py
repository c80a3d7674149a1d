"""FakeQuantize: a module that keeps a scale and zero point, moves them in training and fake-quantizes with them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..ops.autograd import recomputing, transformed
from ..ops.dynamic import quantize_dynamic
from ..ops.fake_quantize import fake_quantize
from ..ops.observe_fake_quantize import observe_fake_quantize
from ..ops.quantize import quantize
from ..ops.statistics import mse_range
from .channels import back, channels_first, dynamic, rows
from .granularity import PerChannel, PerGroup, PerTensor
from .learned_scale import keep_inside, learned_scale, pace, trained_scale
from .moving_scale import MovingScale
from .quantizer_state import QuantizerState
from .ranges import block_magnitude, block_range, follow, forget_zeros, set_qparams, whole, write

# Standard deviations at which 1, 3, 7, … 255 codes on either side of zero have the smallest squared error.
GAUSSIAN_CLIPS = (1.22, 1.96, 2.48, 2.90, 3.28, 3.60, 3.92, 4.22)
AVERAGING_CONST = 0.01  # torch.ao's default: the averages remember about the last hundred batches

# These functions branch on their arguments, so torch.fx must not trace into them.
for _function in (
    "fake_quantize",
    "observe_fake_quantize",
    "follow",
    "pace",
    "forget_zeros",
    "dynamic",
):
    torch.fx.wrap(_function)


class FakeQuantize(MovingScale):
    """Quantizes a tensor to ``bits`` bits and back, with gradients, and keeps the scale.

    Args:
        bits: 2 to 8.
        granularity: which elements share a scale; all but ``PerTensor`` need ``shape`` unless quantizer is "dynamic".
        symmetric: True: codes −(2**(bits−1)−1) … 2**(bits−1)−1 without a zero point (2 bits are ternary); the range is
            its own mirror image, so a sign flip of a channel is exact. False: all 2**bits codes, with a zero point.
            None: False for "lsq+" and "pact", True for all others.
        quantizer: where the scale comes from, and the levels.
            - "lsq": it is learned (LSQ, arXiv 1902.08153), and so is the zero point, if there is one.
            - "lsq+": it is learned, and so is the zero point, which there always is (LSQ+, arXiv 2004.09576).
            - "pact": the upper end of an input's range is learned, the lower one is 0 (PACT, arXiv 1805.06085).
            - "ewgs": as "lsq", with a gradient that grows with the rounding error (EWGS, arXiv 2104.00903). The
              attribute ``ewgs_delta``, which a loop may change, is that of ``fake_quantize``; no state_dict holds it.
            - "minmax": a weight's present range, or the range of an input that ``calibrate`` saw.
            - "ema": moving averages of the minimum and maximum, updated by every forward pass in training mode.
            - "dynamic": the tensor's own range at every call.
            - "stochastic": that of "minmax"; rounding is stochastic in training mode, to the nearest in eval mode.
            - "dorefa": weights, tanh of which is rounded to 2**bits levels without a zero (DoReFa, arXiv 1606.06160).
            - "ternary": weights of 2 bits, whose scale is the present mean magnitude (BitNet b1.58, arXiv 2402.17764).
            - "nf4", "apot", "po2": a codebook of ``qk.codebooks``, scaled to the range that "minmax" has.
            - "kmeans": weights, by levels that k-means finds in the first one; training moves them.
            - "midrise": uniform levels with zero between two of them (ParetoQ's SEQ, arXiv 2502.02631).
        shape: shape of a tensor whose shape never changes (a weight).
        straight_through: how gradients pass, as in ``fake_quantize``. None: "lsq" for "lsq" and "lsq+", "pact" and
            "ewgs" for these two, "pass" for "ternary" and "kmeans", "clip" for all others. "lsq", "lsq+", "minmax" and
            "ternary" accept every other way too.
        feature_dims: for a tensor whose shape varies, how many trailing dims make up one sample. LSQ's gradient
            factor counts them alone, so that the learning rate of the scale does not depend on the batch size.

    **Learned scales.** A learned scale is start·exp(log_scale/sqrt(steps)). The Parameter ``log_scale`` starts at zero;
    ``steps`` counts the codes on the longer side of zero. An optimizer that moves every parameter by its learning rate
    (Adam) therefore changes the scale by lr/sqrt(steps) of itself: by 0.01 % at 8 bits and lr 1e-3, whereas a step of
    1e-3 on the scale itself would be as large as the scale. Under SGD the scale moves as LSQ's would from LSQ's start,
    2·mean|x|/sqrt(steps), but sqrt(steps) times slower and independently of its own start: the gradient of log_scale is
    2·dscale/(start·sqrt(steps)). Weight decay pulls the scale towards its start. The scale stays within 1/1024 to 1024
    times its start.

    **What moves the start.** Above 4 bits the start of a weight's scale follows the weight's present range, in eval
    mode too, and the scale is once to twice the start, so that nothing is clipped: at these widths clipping costs more
    error than it saves, although LSQ's gradient asks for it. Above 4 bits the start of an input's scale grows with the
    input's range, a tenth of the way at each training step, unless the scale was set by hand or by a method of
    ``calibrate`` that clips. At 4 bits or less the start of a weight's scale moves with the weight's mean magnitude;
    that of an input's moves when a batch has more than one and a half times the magnitude so far, by a tenth of the
    excess. By its gradient alone a scale could not keep pace with a network that is trained from scratch. torch.func's
    transforms move no start.

    **State.** ``scale`` and ``zero_point`` are what the next forward pass uses; for a followed weight they are what the
    last forward pass in training mode used. ``quantizer.scale = t`` sets a new start. A state_dict holds both in fp32,
    with what a learned scale needs to go on exactly (``log_scale``, ``start``, ``magnitude``), and ``bits``: a
    quantizer refuses a state of another width.

    **First tensor.** If ``calibrate`` has set no scale, "lsq" and "minmax" take it from the first tensor that they get:
    from a weight always, from an input in training mode only (one wait for the device); in eval mode an input without a
    scale raises RuntimeError. "ema" gives NaN in eval mode before its first batch. A channel whose range is zeros alone
    takes the mean range of the other channels; without one, a weight takes that of a new layer (1/sqrt(fan in)) and an
    input takes 1: the scale can be trained, and zeros stay zeros.

    **Backward passes.** A forward pass within one is activation checkpointing's second: it moves nothing, and has the
    scale of the last forward pass before.

    Scales and statistics stay fp32 when the module is cast (``model.bfloat16()``), because a bf16 average cannot move
    by less than 1/256 of itself. log_scale holds a small change, so it is cast with the model, and FSDP finds one
    dtype. From the second batch on nothing in the forward pass waits for the device.

    **Integers.** ``integer_codes`` says whether the forward pass computes integers times a scale, which ``quantize``
    returns. Levels of a codebook, of "midrise" and of "dorefa" are none.
    """

    @torch.no_grad()
    def follow(self, x: Tensor) -> None:
        """Takes the present range of a followed weight, as a forward pass in training mode does."""
        if self._ready and (self._follows() or (self.is_weight and self._paces())) and not x.is_meta:
            self._range(whole(x), in_place=True)

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Takes the scale from x, and from here on follows a weight's range.

        A learned scale of at most 4 bits becomes the one with the smallest squared error, any other that of x's range.

        SQNR in dB at 8, 4, 3, 2 bits of Gaussian weights, 144 per channel: range 43.7, 18.5, 11.1, 2.2; LSQ's own
        2·mean|x|/sqrt(steps) 27.8, 15.2, 11.4, 6.4; smallest error 43.7, 19.4, 13.5, 7.3. In QAT at 8 bits the range
        beats LSQ's formula, because its steps are six times finer.
        """
        checks.dense(self.name or "x", x)
        low, high = block_range(x, self._scale.shape)
        if not bool(low.isfinite().all() & high.isfinite().all()):
            raise RuntimeError(f"{self.name or 'x'}: got a tensor that holds NaN or infinity; accepted: finite values")
        self._start(x, low, high)

    def _start(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """``start`` for a tensor whose range is known and finite."""
        if self.learns_at_few_bits:
            values = x.detach().float() if x.dtype == torch.float64 else x.detach()
            low, high = mse_range(values, low, high, self.quant_min, self.quant_max, self.symmetric, 0.0)
        self.set_range(low, high)
        self.observe_from(block_magnitude(x, self._scale.shape))

    @torch.no_grad()
    def observe_from(self, mean_abs: Tensor) -> None:
        """Lets training move the range on from its present value, which was set for this mean magnitude."""
        if self.learns:
            self.magnitude.copy_(mean_abs)
        self.enable_observer()

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor, mean_abs: Tensor | None = None) -> None:
        """Sets scale and zero point to cover [low, high], both in scale's shape; a weight is no longer followed.

        mean_abs: the mean magnitude. If it is given, a learned scale of at most 4 bits takes LSQ's own start,
        2·mean_abs/sqrt(steps), unless that covers more than the range.
        """
        self._materialize(low.device)
        if mean_abs is not None and self.learns_at_few_bits:
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

    @torch.no_grad()
    def set_bits(self, bits: int, weight: Tensor | None = None) -> None:
        """Changes the width in place; a learned scale that training moves gets a range that fits it.

        At 4 bits and less a weight's range becomes that with the smallest squared error of its present values, as by
        ``start``; above, it is that of the values. The range of an input changes as that with the smallest squared
        error does for Gaussian values: 1.22, 1.96, 2.48, 2.90, 3.28, 3.60, 3.92 and 4.22 standard deviations for 1, 3,
        7, 15, 31, 63, 127 and 255 codes on the longer side of zero, and linear in the logarithm between them. All
        other ranges stay (scale' = scale·steps/steps'): those of other quantizers, and those that are frozen or set by
        hand, or where a method of ``calibrate`` clips above 4 bits. Parameters stay where they are in memory, so an
        optimizer's state stays valid.

        Args:
            bits: the new width.
            weight: the tensor, of a weight's quantizer; without it the range stays at 4 bits and less too.

        Raises:
            ValueError: bits other than the quantizer takes.
        """
        self.check_width(bits)
        if bits == self.bits:
            return
        scale = None if self.quantizer == "dynamic" else self.scale.clone()
        before, lowest = self.steps, self.quant_min
        fits = self.learns and self._observes and self._ready
        clip = self._gaussian_clip() if fits and not self.is_weight else None
        self._set_width(bits)
        if scale is None or not self.is_calibrated:
            return
        if self.quantizer == "ema":
            self.set_range(self.running_min, self.running_max)
            return
        if fits and weight is not None and not weight.is_meta and self.learns_at_few_bits:
            weight = whole(weight)
            low, high = block_range(weight, self._scale.shape)
            if bool(low.isfinite().all() & high.isfinite().all()):
                self._start(weight, low, high)
                return
        scale *= before / self.steps
        if self.learns:
            scale /= learned_scale(torch.ones_like(scale), whole(self.log_scale), self._log_limits(), self.steps)
            self.magnitude.fill_(-1)
        self._scale.copy_(scale)
        if not self.symmetric:
            exact = zero_point = whole(self.zero_point)  # type: ignore[arg-type]
            before_rounding = self.exact_zero_point
            if before_rounding is not None and torch.equal(
                before_rounding.to(exact.device).round(), zero_point.float()
            ):
                exact = before_rounding.to(exact.device)  # so that few bits do not blur the range of many
            moved = self.quant_min + (exact - lowest) * (self.steps / before)
            if not zero_point.is_floating_point():
                self.exact_zero_point = moved
                moved = moved.round().to(zero_point.dtype)
            write(self.zero_point, moved)  # type: ignore[arg-type]
        if clip is not None:
            self._scale *= self._gaussian_clip() / clip

    def _gaussian_clip(self) -> Tensor:
        """The range with the smallest squared error for the codes on the longer side of zero (see ``set_bits``)."""
        zero = torch.zeros_like(self._scale) if self.zero_point is None else whole(self.zero_point).detach().float()
        zero = zero.clamp(self.quant_min, self.quant_max)
        width = (torch.maximum(self.quant_max - zero, zero - self.quant_min) + 1).log2() - 1  # 0 for one code
        clips = torch.tensor(GAUSSIAN_CLIPS, device=zero.device)
        at = width.long().clamp(0, len(GAUSSIAN_CLIPS) - 2)
        return torch.lerp(clips[at], clips[at + 1], width - at)

    @torch.no_grad()
    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scale (positive) and int32 zero point (None if symmetric), as a forward pass in eval mode uses them.

        x: the weight, for a quantizer that follows its range. None: as the last forward pass used them.
        """
        scale, zero_point = self._scale, self.zero_point
        if x is not None and self.is_weight:
            scale, zero_point = self._range(x, in_place=False)
        if self.learns:
            scale = learned_scale(scale, whole(self.log_scale), self._log_limits(), self.steps)
        if self.symmetric or zero_point is None:
            return scale, None
        return scale, whole(zero_point.detach()).round().clamp(self.quant_min, self.quant_max).to(torch.int32)

    def held_qparams(self) -> list[tuple[dict[str, Any], str]]:
        """What holds the tensors that ``qparams()`` makes scale and zero point of, and their names there."""
        learned = ((self._parameters, name) for name in ("log_scale", "zero_point"))
        return [(self._buffers, "_scale"), *learned, (self._buffers, "zero_point")]

    @torch.no_grad()
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The integers behind forward's result in eval mode: codes (int8, x's shape), scale, zero point (None: 0).

        Raises:
            RuntimeError: there are none (``integer_codes`` is False).
        """
        if not self.integer_codes:
            raise RuntimeError(
                f'{self.name or "quantizer"}: got quantizer="{self.quantizer}", whose levels are no integers times a '
                "scale; accepted: a quantizer with integer_codes (for a codebook's indices: qk.quantize_codebook(x, "
                "quantizer.qparams(x)[0], quantizer.levels))"
            )
        if self.quantizer == "dynamic":
            order = channels_first(self.granularity, x)
            q, scale, zero_point = quantize_dynamic(
                rows(x, order), bits=self.bits, group_size=self._group_size(), symmetric=self.symmetric
            )
            if isinstance(self.granularity, PerChannel):
                shape = self.granularity.scale_shape(x.shape)
                scale, zero_point = (t.reshape(shape) for t in (scale, zero_point))
            return back(q, x, order), scale, None if self.symmetric else zero_point
        if not self._ready:
            self._meet(x)
        s, z = self.qparams(x)
        return quantize(x, s, z, quant_min=self.quant_min, quant_max=self.quant_max), s, z

    def forward(self, x: Tensor) -> Tensor:
        if self.last is None:
            return self._forward(x)
        return self.last.of(x, self._forward, self, self.bits, self.ewgs_delta)

    def _forward(self, x: Tensor) -> Tensor:
        if not self._quantizes and not self.training:
            return x
        if not self._ready:
            if not self._quantizes and not self._observes:
                return x
            self._meet(x)
            if not self._ready and not x.numel():
                return x  # a learned scale would get NaN for its gradient
        if not self._quantizes and self.quantizer != "ema":
            return x
        if self.quantizer == "dynamic":
            return dynamic(x, self.bits, self._group_size(), self.symmetric, self.granularity)
        if self.quantizer == "ema" and self.training:
            again = recomputing()
            if self.is_weight and not transformed() and not again:
                forget_zeros(self.running_min, self.running_max)
            return observe_fake_quantize(
                x,
                torch.zeros_like(self.observer_on) if again else self.observer_on,
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
        return self._fake_quantized(x)

    def _fake_quantized(self, x: Tensor) -> Tensor:
        """The forward pass of a quantizer that keeps a scale and has one now."""
        scale, zero_point = self._range(x, in_place=self.training)
        return self._with_qparams(x, scale, zero_point)

    @property
    def rows_apart(self) -> bool:
        """Whether each row of a weight [N, K] is quantized by itself, so that ``of_rows`` can take some of them.

        With "ewgs" the gradient of a row that is taken twice is not the sum of two.
        """
        by_group = isinstance(self.granularity, PerGroup)
        by_row = by_group or (isinstance(self.granularity, PerChannel) and self.granularity.axis in (0, (0,)))
        alike = self.quantizer in ("lsq", "lsq+", "minmax", "dynamic") and self.straight_through != "ewgs"
        return by_row and self.is_weight and alike

    def of_rows(self, weight: Tensor, index: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """gather(self(weight)) of a weight [N, K] with ``rows_apart``, at the cost of the gathered rows alone.

        gather: takes the rows ``index`` [n] of a tensor. The scales of other rows stay as they are, which changes
        nothing, because what moves them, the weight, is there when they are used again.
        """
        if not self._ready:
            self._meet(weight)
        rows = gather(weight)
        if not self._quantizes:
            return rows
        if self.quantizer == "dynamic":
            return dynamic(rows, self.bits, self._group_size(), self.symmetric, self.granularity)
        scale, zero_point = self._range_of_rows(rows, index)
        if not self.learns:
            return self._with_qparams(rows, scale, zero_point)
        keeps = self.training and not transformed()
        if self.zero_point is not None and (keeps or not self._follows()):  # else its range is not the zero point's own
            if keeps:
                keep_inside(self.zero_point, self.quant_min, self.quant_max)
            zero_point = gather(self.zero_point)
        return self._with_learned(rows, scale, zero_point, gather(self.log_scale))

    @torch.no_grad()
    def _range_of_rows(self, rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """``_range`` of the rows ``index`` alone; in training mode the quantizer keeps it."""
        index = index.long()
        scale, zero_point = self._scale[index], None if self.zero_point is None else self.zero_point.detach()[index]
        moved = [(self._scale, scale)]
        if self._paces():
            magnitude = self.magnitude[index]
            scale = pace(rows, scale, magnitude, 1.0, 2 * self.steps**-0.5, True)
            moved = [(self._scale, scale), (self.magnitude, magnitude)]
        elif self._follows():
            rule = self.quant_min, self.quant_max, self.symmetric, 1.0, 1.0
            scale, zero_point = follow(rows, scale, zero_point, *rule, False)
            moved = [(self._scale, scale)]
            if self.zero_point is not None and zero_point is not None:
                moved.append((self.zero_point.detach(), zero_point))
        else:
            return scale, zero_point
        if self.training and not transformed():
            for held, new in moved:
                held.index_copy_(0, index, new)  # where index repeats, so do the values
        return scale, zero_point

    def _meet(self, x: Tensor) -> None:
        """Handles x as the first tensor of a quantizer that has no scale or is on the meta device."""
        if not x.is_meta:
            self._materialize(x.device)
        if self.quantizer == "ema" and not self.is_weight:
            return
        if self._was_calibrated():
            self._ready = True
            return
        if not self.is_weight and not (self.training and self._observes):
            held = "" if self._observes else " behind qk.freeze_scales(model, False), as its observer is off"
            raise RuntimeError(
                f'{self.name or "quantizer"}: this "{self.quantizer}" quantizer has no scale yet; before the first '
                f"forward pass{'' if self.training else ' in eval mode'} call qk.calibrate(model, batches) with "
                f"batches that reach it, train on one{held}, or load a state_dict of a calibrated model"
            )
        if x.numel() and not x.is_meta:
            observes, frozen, observed = self._observes, self.frozen, self._observed
            self.start(x)
            self.enable_observer(observed if frozen else observes)
            if frozen:
                self.freeze()

    def _group_size(self) -> int | None:
        if isinstance(self.granularity, PerGroup):
            return self.granularity.size
        return None if isinstance(self.granularity, PerTensor) else -1

    def for_steps(self, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], object] | None]:
        """The forward pass of a tensor that comes in steps, like the state of a recurrent layer.

        All steps have one scale: its gradient is the sum over them, and what moves it moves it once, by all values
        together. A quantizer that has no scale yet lets its first sequence in training pass, and starts from it.

        x: what the first step gets.

        Returns:
            A function for each step; and one that has to get the values of all steps, as rows, after the last one, or
            None. Where the forward was replaced on the instance, as calibration does, each step is a call of it.
        """
        if "forward" in vars(self) or self.quantizer == "dynamic":
            return self, None
        finish: Callable[[Tensor], object] | None = None
        if not recomputing():
            if not self._ready:
                self._meet(x[:0])
            if not self._ready:
                finish = self._meet
            elif self._paces() or self._grows():
                finish = functools.partial(self._range, in_place=True)
            keep_inside(self.zero_point, self.quant_min, self.quant_max)
            # After the last step, finish moves these; activation checkpointing then runs the steps again.
            zero_point = None if self.zero_point is None else self.zero_point.detach().clone()
            self._of_steps = None if finish is None else (self._ready, self._scale.clone(), zero_point)
        ready, scale, zero_point = self._of_steps or (self._ready, self._scale, self.zero_point)
        if not ready or not self._quantizes:
            return _unchanged, finish
        if not self.learns and self.quantizer != "minmax":
            return self, finish
        factor = 1.0
        if self.learns:
            scale = trained_scale(scale, self.log_scale, self._log_limits(), self.steps)
            if zero_point is not None and self.zero_point is not None and zero_point is not self.zero_point:
                zero_point = zero_point + (self.zero_point - self.zero_point.detach())  # its gradient
            factor = self._grad_factor(x)
        quantize_step = functools.partial(
            fake_quantize,
            scale=scale,
            zero_point=zero_point,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            grad_factor=factor,
            straight_through=self.straight_through,
            ewgs_delta=self.ewgs_delta,
        )
        return quantize_step, finish


def _unchanged(x: Tensor) -> Tensor:
    return x


# What help() shows: __new__ names none of the arguments.
_signature = inspect.signature(QuantizerState.__init__)
FakeQuantize.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=list(_signature.parameters.values())[1:]
)

with contextlib.suppress(AttributeError):  # so that torch.ao's switches find it: model.apply(disable_observer)
    torch.ao.quantization.FakeQuantizeBase.register(FakeQuantize)
