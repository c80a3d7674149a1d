"""LastResult: what a quantizer made of the last tensor, for the next layer that gets the same tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.autograd import transformed


class _Kept(NamedTuple):
    """A result, with all that it depends on."""

    x: weakref.ref[Tensor]
    y: Tensor
    settings: tuple[Any, ...]
    tensors: tuple[Tensor, ...]  # of the quantizer; functional_call and loading may put others in their places
    marks: tuple[tuple[int, bool], ...]  # of x, y and these tensors

    def serves(self, x: Tensor, settings: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> bool:
        same = self.x() is x and self.settings == settings and len(self.tensors) == len(tensors)
        same = same and all(own is t for own, t in zip(self.tensors, tensors, strict=True))
        return same and self.marks == _marks(x, self.y, *tensors)


class LastResult:
    """Remembers the last tensor and its result while they and the quantizer stay unchanged.

    The result lives as long as the tensor, unless a backward pass uses it up: to compute it again would count as
    another batch. One that is recorded for a backward pass which never comes keeps its graph, and by it the tensor,
    until the next tensor. Layers do not keep it: some save a view of it, and activation checkpointing saves nothing.
    Where the result would be recorded otherwise than the first time (other grad mode, or other hooks on saved tensors,
    by which activation checkpointing tells what to recompute), and in compiled code and under torch.func, the quantizer
    computes anew.
    """

    def __init__(self) -> None:
        # One tuple, read once: the replicas of nn.DataParallel share this object, each in a thread of its own.
        self._kept: _Kept | None = None

    def _left(self, x: weakref.ref[Tensor]) -> None:
        if self._kept is not None and self._kept.x is x:
            self._kept = None

    def _used(self, grad: Tensor) -> None:
        self._kept = None

    def of(self, x: Tensor, compute: Callable[[Tensor], Tensor], quantizer: nn.Module, *settings: Any) -> Tensor:
        """compute(x), or the last result if that was for the same x.

        The quantizer's tensors, its mode and the ``settings`` decide what compute(x) is.
        """
        if torch.compiler.is_compiling() or transformed() or x.is_inference() or torch.is_inference_mode_enabled():
            return compute(x)  # inference tensors do not count their changes
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
        grad = torch.is_grad_enabled()
        settings = *settings, grad, quantizer.training, None if hooks is None else tuple(map(id, hooks[:2]))
        tensors = _tensors(quantizer)
        kept = self._kept
        if kept is not None and kept.serves(x, settings, tensors):
            return kept.y
        y = compute(x)
        if y is x:  # fake quantization is switched off
            self._kept = None
        else:
            tensors = _tensors(quantizer)
            self._kept = _Kept(weakref.ref(x, self._left), y, settings, tensors, _marks(x, y, *tensors))
            if y.requires_grad:
                y.register_hook(self._used)
        return y

    def __deepcopy__(self, memo: dict[int, Any]) -> LastResult:
        return LastResult()

    def __reduce__(self) -> tuple[Any, ...]:
        return LastResult, ()


def _tensors(quantizer: nn.Module) -> tuple[Tensor, ...]:
    held = (*quantizer._parameters.values(), *quantizer._buffers.values())
    return tuple(t for t in held if t is not None)


def _marks(*tensors: Tensor) -> tuple[tuple[int, bool], ...]:
    """What tells that a tensor has changed, or wants a gradient that it did not want."""
    return tuple((t._version, t.requires_grad) for t in tensors)


class KnownResult(LastResult):
    """For a call in which the quantizer gets what it has already quantized, so that it must not do so again."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = y

    def of(self, x: Tensor, compute: Callable[[Tensor], Tensor], quantizer: nn.Module, *settings: Any) -> Tensor:
        return x if x is self.y else compute(x)
