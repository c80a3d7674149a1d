"""Losses of what a prepared model holds: its quantized weights, and the learned ranges of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..nn.fake_quantize import FakeQuantize
from ..ops.codebook import dequantize_codebook
from ..ops.statistics import histogram
from .calibrate import check_shapes, quantizers_of
from .fold import eval_mode
from .quantized_weights import codes_of, ends_of, quantized_weights, rounded, scales_of


def weight_error(model: nn.Module) -> Tensor:
    """The squared error of the quantized weights, Σ (Q(w) − w)², with the gradients of their quantizers.

    A layer counts the sum over dim 0 of the mean over all others, so that a weight's pull does not depend on the number
    of channels. With LSQ's gradient (arXiv 1902.08153) a learned scale or level moves to where the error is smallest,
    and a clipped weight moves back into the range; the weights within it get none, as rounding passes their gradient
    straight through: ``dampening`` moves these. Where nothing is learned and nothing clipped the gradient is zero.

    Args:
        model: from ``prepare``.

    Raises:
        ValueError: the model has no quantized weights, lazy layers that have not run yet, or a "dorefa" quantizer,
            which rounds tanh of a weight.
        RuntimeError: weights under ``fully_shard``.
    """

    def error(x: Tensor, quantizer: FakeQuantize) -> Tensor:
        error = wide(quantizer(x)) - wide(x)
        d = error.detach()
        share = 1 / _per_channel(x)
        return with_gradient(error, share * _dot(d, d), d * (2 * share))

    return _of_weights(model, "weight_error", error)


def dampening(model: nn.Module) -> Tensor:
    """Pulls each weight towards the middle of its code: Σ (Q(w) − clip(w))², Q(w) constant (arXiv 2203.11086, eq. 7).

    Weights then no longer oscillate between two codes. Clipped weights add nothing, so that ranges stay free. A layer
    counts the sum over dim 0 of the mean over all others, as in the authors' code, who let the factor rise from 0 to
    0.1 by half a cosine after the first quarter of the training.

    Args:
        model: from ``prepare``.

    Raises:
        ValueError, RuntimeError: as ``weight_error``.
    """

    def pull(x: Tensor, quantizer: FakeQuantize) -> tuple[Tensor, Tensor]:
        scales = scales_of(quantizer, x)
        d = torch.clamp(wide(x), *ends_of(quantizer, x, scales))
        d.sub_(wide(rounded(quantizer, x, scales)))  # 0 where x is clipped, as its gradient is
        share = 1 / _per_channel(x)
        return share * _dot(d, d), d.mul_(2 * share)

    return _of_weights(model, "dampening", _pulled_by(pull))


def bin_regularization(model: nn.Module) -> Tensor:
    """Gathers the weights of each code at its level: the sum over codes of (mean − level)² + variance (ICCV 2021).

    From "Improving Low-Precision Network Quantization via Bin Regularization" (Han et al.). A code's bin holds the
    weights of a layer that are rounded to it; with the biased variance the sum is, per bin, the mean of (w − level)²,
    the level that of each weight's own scale. Levels and bins are constants to the gradient. The authors train without
    it first, then with a factor from 0.1 on.

    Args:
        model: from ``prepare``.

    Raises:
        ValueError, RuntimeError: as ``weight_error``.
    """

    def pull(x: Tensor, quantizer: FakeQuantize) -> tuple[Tensor, Tensor]:
        scales = scales_of(quantizer, x)
        codes, count = codes_of(quantizer, x, scales)
        ends = torch.arange(-0.5, count, count, device=x.device).view(2, 1)  # −0.5 and count − 0.5
        sizes, _ = histogram(codes.float(), *ends, bins=count)  # bincount would wait for the device
        d = wide(x) - wide(rounded(quantizer, x, scales))
        shares = sizes.view(-1).clamp(min=1).to(d.dtype).reciprocal()
        pulls = dequantize_codebook(codes, shares.new_ones(1), shares, dtype=d.dtype).mul_(d)
        return _dot(d, pulls), pulls.mul_(2)

    return _of_weights(model, "bin_regularization", _pulled_by(pull))


def kurtosis(model: nn.Module, *, target: float = 1.8) -> Tensor:
    """Makes weights uniform: the mean over layers of (mean(((w − mean)/sd)⁴) − target)² (KURE, arXiv 2002.07686).

    Uniform weights have a kurtosis of 1.8, normal ones of 3; those that are spread evenly lose less by any scale.
    Weights that are all equal (a layer that starts from zeros) have none: they count zero, without a gradient.

    Args:
        model: from ``prepare``; its quantizers decide which weights count, and nothing else.
        target: the kurtosis to reach.

    Raises:
        ValueError, RuntimeError: as ``weight_error``, except that "dorefa" counts as well.
    """

    def pull(x: Tensor, _: FakeQuantize) -> tuple[Tensor, Tensor]:
        mean = wide(x).mean()
        d = wide(x) - mean
        squares, n, limits = d.square(), max(x.numel(), 1), torch.finfo(d.dtype)
        second, third, fourth = _dot(d, d) / n, _dot(squares, d) / n, _dot(squares, squares) / n
        # What the mean of equal weights is off by rounding is no variance, nor is what has no square.
        equal = second <= (16 * limits.eps * mean).square().clamp(min=limits.tiny**0.5)
        second = second.masked_fill(equal, 1)
        excess = (fourth / second.square() - target).masked_fill(equal, 0)
        slopes = squares.sub_(fourth / second).mul_(d).sub_(third)  # of the kurtosis, up to a factor
        return excess.square(), slopes.mul_(8 / n * excess / second.square())

    return _of_weights(model, "kurtosis", _pulled_by(pull), mean=True)


def activation_range(model: nn.Module) -> Tensor:
    """The squared ranges of inputs that are learned: Σ (scale·steps)², PACT's penalty on its bound (arXiv 1805.06085).

    Against the gradient of the task, which widens a range until nothing is clipped, it keeps steps small. The gradient
    of a learned scale is that of its formula, start·exp(log_scale/sqrt(steps)) (see ``qk.nn.FakeQuantize``). Quantizers
    with several scales count the mean over them; those without a scale yet count nothing.

    Args:
        model: from ``prepare``.

    Raises:
        ValueError: no input has a learned range, or the model has no quantizers or lazy layers that have not run yet.
    """
    check_shapes(model)
    learned = learned_inputs(model)
    squares = []
    for quantizer in learned:
        factor = ((quantizer.log_scale - quantizer.log_scale.detach()) * quantizer.steps**-0.5).exp()
        if quantizer.is_calibrated:
            squares.append((wide(factor) * quantizer.scale * quantizer.steps).square().mean())
    return total(squares) if squares else learned[0].log_scale.new_zeros(())


class _WithGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = x.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None, None


def with_gradient(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """The scalar ``value``, whose gradient with respect to x is known: one tensor of x's size is kept, and no graph."""
    return _WithGradient.apply(x, value, gradient)  # type: ignore[no-any-return]


def _pulled_by(pull: Callable[[Tensor, FakeQuantize], tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """An error of a weight whose quantizer is a constant to the gradient: ``pull`` gives its value and gradient."""

    def error(x: Tensor, quantizer: FakeQuantize) -> Tensor:
        with torch.no_grad():
            value, gradient = pull(x, quantizer)
        return with_gradient(x, value, gradient)

    return error


def _of_weights(
    model: nn.Module, name: str, error: Callable[[Tensor, FakeQuantize], Tensor], mean: bool = False
) -> Tensor:
    """The sum over quantized weights. Quantizers and parametrizations move nothing, as they are in eval mode."""
    check_weights(model, name)
    with eval_mode(model):
        errors = [error(each.value, each.quantizer) for each in quantized_weights(model)]
    return total(errors) / (len(errors) if mean else 1)


def check_weights(model: nn.Module, name: str) -> None:
    """Refuses a model without weights that the loss ``name`` is for."""
    weights = list(quantized_weights(model))
    if not weights:
        raise ValueError(f"{name}: got a model without quantized weights; accepted: one whose config has a weight spec")
    squashed = next((each for each in weights if each.quantizer.quantizer == "dorefa"), None)
    if squashed is not None and name != "kurtosis":
        raise ValueError(
            f'{name}: got {squashed.name!r} with quantizer="dorefa", which rounds tanh of the weight; accepted: a '
            "quantizer that rounds the weight itself"
        )


def learned_inputs(model: nn.Module) -> list[FakeQuantize]:
    learned = [quantizer for quantizer in quantizers_of(model).values() if quantizer.learns and not quantizer.is_weight]
    if not learned:
        raise ValueError(
            "activation_range: got a model whose inputs have no learned range; accepted: inputs with a quantizer such "
            'as "lsq", "lsq+", "pact" or "ewgs"'
        )
    return learned


def total(terms: list[Tensor]) -> Tensor:
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _per_channel(x: Tensor) -> int:
    """How many elements share an index of dim 0."""
    return max(x[0].numel() if len(x) else 1, 1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def wide(x: Tensor) -> Tensor:
    """x in fp32 at least."""
    return x if x.dtype == torch.float64 else x.float()
