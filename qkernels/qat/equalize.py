"""equalize: gives the channels of neighbouring layers like ranges, and leaves what the model computes as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.fake_quantize import FakeQuantize
from .chains import Chains
from .convert import identity_for
from .copying import copy_of, replace_modules
from .fold import factor_and_bias, find_folds
from .integer_convolution import times

SWEEPS, SETTLED = 40, 1e-3  # over all pairs at most; a factor that differs less from 1 counts as none


def equalize(model: nn.Module) -> nn.Module:
    """A copy of a float model that computes the same in eval mode, with weights whose channels have like ranges.

    Cross-layer equalization (arXiv 1906.04721). Of two layers with a ReLU between them, or something else that scales
    as its input does (pools, dropout, nothing), the first one's output channel i and bias are divided by
    sᵢ = √(r1ᵢ/r2ᵢ), and the second one's input channel is multiplied by it, where r1ᵢ and r2ᵢ are the largest
    magnitudes of these weights. It goes through all pairs until nothing moves. Before that it folds every BatchNorm
    that alone follows a convolution: it is meant for quantization without training.

    Weights with one scale for the whole tensor gain, where a channel that is small in one layer is made up for in the
    next, as in MobileNets; where each output channel has its own scale, little is left to gain. A net whose channels
    were scaled apart so, by up to a hundred times, kept less than 1 % of its squared error with 8-bit
    weights.

    Args:
        model: a float model, before ``prepare``; it stays as it is. torch.fx has to trace it, or the parts of it that
            hold such pairs.

    Raises:
        ValueError: no such pair, or a model that is prepared already.
        TypeError: model is no module.
    """
    if isinstance(model, nn.Module) and any(isinstance(module, FakeQuantize) for module in model.modules()):
        raise ValueError("model: got one that is prepared; accepted: a float model, before qk.prepare")
    chains = Chains(model)
    made = _folded(copy_of(model), chains.plain)
    pairs = list(Chains(made).pairs())
    if not pairs:
        raise ValueError(
            "model: holds no two layers with nothing but a ReLU, a pool or a dropout between them in what torch.fx can "
            "trace; accepted: one with such a pair"
        )
    layers: dict[str, Any] = dict(made.named_modules())
    with torch.no_grad():
        for _ in range(SWEEPS):
            if max(_equalize(layers[first], layers[second]) for first, second in pairs) < SETTLED:
                break
    return made


@torch.no_grad()
def _folded(model: nn.Module, plain: set[str]) -> nn.Module:
    """The model with the BatchNorms behind plain convolutions folded into these."""
    made: dict[nn.Module, nn.Module] = {}
    for name, norm_name in find_folds(model).batch_norm_of.items():
        if name not in plain:
            continue
        layer: Any = model.get_submodule(name)
        norm = model.get_submodule(norm_name)
        factor, bias = factor_and_bias(norm, layer.bias)
        layer.weight.copy_(times(layer, layer.weight.double(), factor))
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
        made[norm] = identity_for(norm).train(norm.training)
    return replace_modules(model, made.get)


def _equalize(first: Any, second: Any) -> float:
    """Makes the ranges of one pair alike; returns by how much a factor differs from 1 at most."""
    before = first.weight.flatten(1).abs().amax(1)
    # [groups, outputs, inputs, …]: an input channel meets the outputs of its group alone.
    columns = second.weight.unflatten(0, (getattr(second, "groups", 1), -1))
    if columns.dim() == 3:  # behind a flatten a channel is several features
        columns = columns.unflatten(2, (len(before), -1))
    after = columns.abs().amax((1, *range(3, columns.dim()))).flatten()
    factor = torch.where((before > 0) & (after > 0), (before / after).sqrt(), 1.0).to(before.dtype)
    first.weight.div_(_along(factor, first.weight, 0))
    if first.bias is not None:
        first.bias.div_(factor)
    columns.mul_(factor.view(len(columns), 1, -1, *[1] * (columns.dim() - 3)))
    return float((factor - 1).abs().max())


def _along(factor: Tensor, weight: Tensor, dim: int) -> Tensor:
    return factor.view([-1 if at == dim else 1 for at in range(weight.dim())])
