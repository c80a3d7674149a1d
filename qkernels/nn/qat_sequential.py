"""QATSequential: a Sequential that computes a ReLU and the input quantizer of the QAT layer behind it in one pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..ops.autograd import transformed
from .fake_quantize import FakeQuantize
from .last_result import KnownResult
from .qat import QATConv1d, QATConv2d, QATConv3d, QATLinear

# Layers whose forward hands its input to the quantizer, and does nothing else with it.
TAKERS = (QATLinear, QATConv1d, QATConv2d, QATConv3d)
# Layers whose result is a new tensor that they do not keep: a ReLU in place behind them may as well leave it.
MAKERS = (*TAKERS, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class QATSequential(nn.Sequential):
    """nn.Sequential with the same numbers, gradients and state, and with one pass less over the result of a ReLU.

    A Sequential hands the result of a ReLU to the next layer alone. Where that layer quantizes it,
    ``relu_fake_quantize`` computes both: neither the ReLU's result nor the gradient between the two is written. The
    two stay apart where somebody could see what is between them (a hook, a slice of the Sequential, a call of the ReLU
    itself), while ``calibrate`` runs, and in compiled or transformed code, which has its own fusions. It holds no state
    of its own: which layers are joined is decided at each call.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or transformed() or torch_module._has_any_global_hook():
            return super().forward(input)  # type: ignore[no-any-return]
        x, layers, at = input, list(self), 0
        while at < len(layers):
            quantizer = joined(*layers[at : at + 2])
            y = None
            if quantizer is not None and _may_stay(layers[at], layers[at - 1] if at else None) and _is_plain(x):
                y = quantizer.of_relu(x)
            if quantizer is None or y is None:
                x = layers[at](x)
                at += 1
            else:
                x = _given(layers[at + 1], quantizer, y)
                at += 2
        return x


def join(model: nn.Module) -> None:
    """Makes QATSequentials, in place, of the Sequentials in which a ReLU has such a layer behind it."""
    for module in model.modules():
        if type(module) is nn.Sequential and any(joined(*pair) for pair in itertools.pairwise(module)):
            module.__class__ = QATSequential


def part(model: nn.Module) -> None:
    """Undoes ``join``."""
    for module in model.modules():
        if type(module) is QATSequential:
            module.__class__ = nn.Sequential  # type: ignore[assignment]


def joined(relu: nn.Module, taker: nn.Module | None = None) -> FakeQuantize | None:
    """The quantizer that can compute the ReLU too; None: there is none, or somebody could see the ReLU's result."""
    if type(relu) is not nn.ReLU or type(taker) not in TAKERS:
        return None
    quantizer: FakeQuantize | None = taker.input_fake_quant  # type: ignore[union-attr, assignment]
    if type(quantizer) is not FakeQuantize or not quantizer.takes_relu or quantizer.last is not None:
        return None
    both = (relu, taker, quantizer)
    return None if _are_hooked(both) or any("forward" in vars(module) for module in both) else quantizer


def _are_hooked(modules: Iterable[nn.Module | None]) -> bool:
    return any(vars(module)[name] for module in modules for name in _HOOKS)


def _may_stay(relu: nn.Module, maker: nn.Module | None) -> bool:
    """Whether nobody needs the ReLU to overwrite its input."""
    return not relu.inplace or (type(maker) in MAKERS and not _are_hooked((maker,)))


def _is_plain(x: Tensor) -> bool:
    plain = type(x) is Tensor and x.is_floating_point() and x.layout is torch.strided
    return plain and not x.is_meta and x.numel() > 0


def _given(taker: nn.Module, quantizer: FakeQuantize, y: Tensor) -> Tensor:
    """The layer's result for the tensor whose quantized form is y."""
    quantizer.last = KnownResult(y)
    try:
        return taker(y)  # type: ignore[no-any-return]
    finally:
        quantizer.last = None
