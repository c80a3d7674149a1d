"""correct_bias: takes the mean error that quantization leaves off the bias."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.qat import QATLinear
from .calibrate import progress
from .fold import find_folds
from .layerwise import Layerwise, holders_of
from .where import Where


def correct_bias(
    model: nn.Module,
    batches: Any,
    *,
    where: Where = "*",
    float_model: nn.Module | None = None,
    max_batches: int | None = None,
) -> dict[str, float]:
    """Makes the mean of each channel of each layer's output that of the float model, in place.

    Empirical bias correction (arXiv 1906.04721, as in AIMET): b −= mean(quantized output − float output), over all dims
    but the channels', layer after layer, each with the quantized inputs that those before it leave it. A convolution
    without a bias of its own has its BatchNorm's running mean moved, if it has one behind it that ``convert`` folds;
    other layers without one (none, a computed one, one that other modules hold too) stay as they are, and so do layers
    that got no samples. The weights do not change.

    Args:
        model: prepared and calibrated. It stays as it was after every error.
        batches: as for ``calibrate``, taken as a list.
        where: which layers, as for ``gptq``.
        float_model: the model before ``prepare``; None: the prepared model without quantization, whose weights another
            method may have rounded already.
        max_batches: how many batches to take at most; None: all.

    Returns:
        layer -> the largest magnitude by which a channel was moved.

    Raises:
        ValueError, TypeError: as ``gptq`` and ``adaround``.
    """
    work = Layerwise(model, batches, where, max_batches, float_model)
    norms, holders = find_folds(work.model).batch_norm_of, holders_of(work.model)
    corrected, moved = {}, {}
    for name in progress(work.names, "correct_bias: layers", len(work.names)):
        held = _held(work.model, name, norms, holders)
        if held is None:
            continue
        with torch.no_grad():
            layer = work.layer(name)
            outputs, targets = work.outputs(name), work.targets(name)
            if not all(any(y.numel() for y in found) for found in (outputs, targets)):
                continue
            off = _mean(layer, outputs) - _mean(layer, targets)
            held += (-off if held is layer.bias else off).to(held.dtype)
        moved[name], corrected[name] = float(off.abs().max()), held
    with torch.no_grad():
        holders = holders_of(work.source)
        for name, value in corrected.items():
            own = _held(work.source, name, norms, holders)
            assert own is not None
            own.copy_(value)
    return moved


def _held(model: nn.Module, name: str, norms: dict[str, str], holders: Counter[int]) -> Tensor | None:
    """What takes the correction of a layer: its own bias, or the mean that the BatchNorm behind it takes off."""
    bias = model.get_submodule(name)._parameters.get("bias")
    if bias is not None and holders[id(bias)] == 1:
        return bias
    return model.get_submodule(norms[name]).running_mean if name in norms else None  # type: ignore[return-value]


def _mean(layer: Any, outputs: list[Tensor]) -> Tensor:
    """Of each channel, over all outputs (fp64)."""
    channel = -1 if isinstance(layer, QATLinear) else 1 - layer.weight.dim()
    flat = [y.movedim(channel, -1).flatten(0, -2) if y.dim() > 1 else y.unsqueeze(0) for y in outputs]
    return torch.cat([y.double() for y in flat]).mean(0)
