"""Drop-ins for torch's own fake-quantize functions, with torch's signatures.

Beyond ``fake_quantize`` they need parameters per channel of one dim, and byte masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from .. import checks, library, samples
from ..layouts import mask_like
from ..reference import aten_fake_quantize as reference
from .autograd import is_kept, kept, masked, transformed
from .fake_quantize import fake_quantize, fake_quantize_by_numbers
from .observe_fake_quantize import observed

_define = partial(library.define, cpu=("avx512", "avx2", "scalar"))


def _channel_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for axis, channels in enumerate(x.shape):
        zero_point = torch.randint(-8, 8, (channels,), dtype=torch.int32)
        yield x, 0.01 + torch.rand(channels), zero_point, axis, *samples.INT4


def _backward_bytes_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    yield x, torch.empty_like(x, dtype=torch.bool).bernoulli_()


_forward = _define(
    "fake_quantize_forward.channel",
    "(Tensor x, Tensor scale, Tensor zero_point, int axis, SymInt quant_min, SymInt quant_max) -> Tensor",
    reference.fake_quantize_forward,
    lambda x, *_: torch.empty_like(x),
    samples=_channel_samples,
)
_forward_mask = _define(
    "fake_quantize_forward_mask.channel",
    "(Tensor x, Tensor scale, Tensor zero_point, int axis, SymInt quant_min, SymInt quant_max) -> (Tensor, Tensor)",
    reference.fake_quantize_forward_mask,
    lambda x, *_: (torch.empty_like(x), mask_like(x)),
    samples=_channel_samples,
)
_backward = _define(
    "fake_quantize_backward.channel",
    "(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int axis, SymInt quant_min, SymInt quant_max) -> Tensor",
    reference.fake_quantize_backward,
    lambda grad, x, *_: torch.empty_like(x),
    samples=samples.backward(_channel_samples),
)
_backward_bytes = _define(
    "fake_quantize_backward_bytes",
    "(Tensor grad, Tensor mask) -> Tensor",
    reference.fake_quantize_backward_bytes,
    reference.empty_gradient,
    samples=_backward_bytes_samples,
)


def _as_product(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
    with mode:
        return torch.mul(*args)


# In a compiler's graph this op becomes a product, as torch's own op does, because compilers can fuse a product.
torch.library.register_torch_dispatch(_backward_bytes.name(), FunctionalTensorMode, _as_product)


_kept = kept(_forward, _backward, reference.inside_range)
_masked = masked(_forward_mask)


def fake_quantize_per_channel_affine(
    input: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> Tensor:
    """As ``torch.fake_quantize_per_channel_affine``; also takes any integer or float zero point, bf16 scales, axis < 0.

    Args:
        input: fp32, fp64, fp16 or bf16, any shape.
        scale: [C], floating, one element for each channel; it gets no gradient.
        zero_point: [C], integers in the range, or floats, which are rounded half to even.
        axis: the dim of the channels.
        quant_min, quant_max: inclusive integer range, within ±2**24.

    Returns:
        A tensor of input's shape and dtype. NaN stays NaN, infinities saturate.

    Raises:
        RuntimeError: an argument's dtype, device, shape or range does not fit; the message names it.
    """
    scale, zero_point = _constant(scale), _constant(zero_point)
    if not input.is_cpu or transformed():  # only the CPU has kernels with an axis
        scale, zero_point = checks.channel_views(input, axis, scale, zero_point)
        return fake_quantize(input, scale, zero_point, quant_min=quant_min, quant_max=quant_max)
    if torch.is_grad_enabled() and input.requires_grad:
        return (_kept if is_kept(input) else _masked)(input, scale, zero_point, axis, quant_min, quant_max)
    return _forward(input, scale, zero_point, axis, quant_min, quant_max)


def fake_quantize_per_tensor_affine(
    input: Tensor, scale: Tensor | float, zero_point: Tensor | int, quant_min: int, quant_max: int
) -> Tensor:
    """As ``torch.fake_quantize_per_tensor_affine`` (both overloads); NaN stays NaN instead of becoming quant_min.

    Args:
        input: fp32, fp64, fp16 or bf16, any shape.
        scale, zero_point: numbers, or tensors of one element; they get no gradient.
        quant_min, quant_max: inclusive integer range, within ±2**24.

    Returns:
        A tensor of input's shape and dtype.

    Raises:
        RuntimeError: an argument's dtype, device, shape or range does not fit; the message names it.
    """
    if not isinstance(scale, Tensor) and not isinstance(zero_point, Tensor):
        return fake_quantize_by_numbers(input, scale, zero_point, quant_min, quant_max)
    return fake_quantize(input, _constant(scale), _constant(zero_point), quant_min=quant_min, quant_max=quant_max)


def _constant(param: Any) -> Any:
    return param.detach() if isinstance(param, Tensor) and param.requires_grad else param


def fake_quantize_learnable_per_tensor_affine(
    input: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, grad_factor: float = 1.0
) -> Tensor:
    """As ``torch._fake_quantize_learnable_per_tensor_affine``, with the right gradient for negative zero points.

    Args:
        input: fp32, fp64, fp16 or bf16, any shape.
        scale, zero_point: one element each, learned or not. zero_point is rounded half to even and clamped.
        quant_min, quant_max: inclusive integer range, within ±2**24.
        grad_factor: multiplies the gradients of scale and zero_point.

    Returns:
        A tensor of input's shape and dtype; gradients are those of ``fake_quantize`` with "clip".

    Raises:
        RuntimeError: an argument's dtype, device, shape or range does not fit; the message names it.
    """
    return fake_quantize(
        input, scale, rounded(zero_point), quant_min=quant_min, quant_max=quant_max, grad_factor=grad_factor
    )


def rounded(zero_point: Tensor) -> Tensor:
    # torch's learnable ops clamp a zero point of any dtype; fake_quantize clamps only a float one.
    return zero_point if zero_point.is_floating_point() else zero_point.float()


def fake_quantize_learnable_per_channel_affine(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
) -> Tensor:
    """As ``torch._fake_quantize_learnable_per_channel_affine``, in every floating dtype.

    It is ``fake_quantize_learnable_per_tensor_affine`` with scale and zero_point of shape [C] for the channels of dim
    ``axis``; the other arguments, result and errors are as in ``fake_quantize_learnable_per_tensor_affine``.
    """
    scale, zero_point = checks.channel_views(input, axis, scale, rounded(zero_point))
    return fake_quantize(input, scale, zero_point, quant_min=quant_min, quant_max=quant_max, grad_factor=grad_factor)


def fused_moving_avg_obs_fake_quant(
    x: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    averaging_const: float,
    quant_min: int,
    quant_max: int,
    ch_axis: int = -1,
    per_row_fake_quant: bool = False,
    symmetric_quant: bool = False,
) -> Tensor:
    """As ``torch.fused_moving_avg_obs_fake_quant``, in every floating dtype.

    It trains with the scale and zero point that torch.ao's observer computes at convert time from the same statistics.
    torch's own op trains with others: their scale is up to 2× away on ReLU data, and up to 0.4 % for symmetric weights
    in −128 … 127, of which 99.5 % then differ (the observer takes max(−min, max) / 127.5, torch's op the larger of
    −min / 128 and max / 127). The zero point of a signed symmetric range is 0, that of an unsigned one its lower
    middle, that of all of uint16 2**15. A scale is at least fp32's epsilon: an observer does not pass another eps on to
    its op.

    Args:
        x: fp32, fp64, fp16 or bf16, any shape.
        observer_on, fake_quant_on, running_min, running_max, scale, zero_point, averaging_const: as in
            ``observe_fake_quantize``; statistics stay fp32. As in torch, with per_row_fake_quant the op resizes
            statistics of no or one element to the number of channels.
        quant_min, quant_max: inclusive integer range, within ±2**24.
        ch_axis: the dim of the channels, with per_row_fake_quant.
        per_row_fake_quant: one scale for each channel, instead of one for x.
        symmetric_quant: whether the range is symmetric.

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        RuntimeError: an argument's dtype, device, shape or range does not fit; the message names it.
    """
    return observed(
        *observed_arguments(
            x, observer_on, fake_quant_on, running_min, running_max, scale, zero_point, averaging_const, quant_min,
            quant_max, ch_axis, per_row_fake_quant, symmetric_quant,
        )
    )  # fmt: skip


def observed_arguments(
    x: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    averaging_const: float,
    quant_min: int,
    quant_max: int,
    axis: int,
    per_row: bool,
    symmetric: bool,
) -> tuple[Any, ...]:
    """Turns the arguments of torch's op into those of the raw op; resizes statistics of channels if needed."""
    stats: tuple[Tensor, ...] = (running_min, running_max, scale, zero_point)
    if per_row:
        channels = x.shape[axis]
        for stat, start in zip(stats, (torch.inf, -torch.inf, 1, 0), strict=True):
            if stat.numel() <= 1 and stat.numel() != channels:
                stat.resize_(channels).fill_(start)
        stats = tuple(checks.channel_views(x, axis, *stats))
    steps = (quant_max - quant_min) / 2 if symmetric else 0.0
    middle = observers_middle(quant_min, quant_max)
    return x, observer_on, fake_quant_on, *stats, averaging_const, quant_min, quant_max, steps, middle


def observers_middle(quant_min: int, quant_max: int) -> int:
    """The zero point that torch.ao's observers give a symmetric range."""
    if quant_min < 0:
        return min(0, quant_max)
    if (quant_min, quant_max) == (0, 2**16 - 1):
        return 2**15  # uint16
    return (quant_min + quant_max) // 2
