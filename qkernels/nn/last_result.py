"""LastResult: what a quantizer made of the last tensor, for the next layer that gets the same tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.autograd import transformed


class LastResult:
    """Remembers the last tensor and its result while they and the quantizer stay unchanged.

    The result lives as long as the tensor, unless a backward pass uses it up: to compute it again would count as
    another batch. Layers do not keep it: some save a view of it, and activation checkpointing saves nothing. Where the
    result would be recorded otherwise than the first time (other grad mode, or other hooks on saved tensors, by which
    activation checkpointing tells what to recompute), and in compiled code and under torch.func, the quantizer computes
    anew.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._y: Tensor | None = None
        self._state: tuple[Any, ...] = ()

    def _left(self, x: weakref.ref[Tensor]) -> None:
        if x is self._x:
            self._forget()

    def _used(self, grad: Tensor) -> None:
        self._forget()

    def of(self, x: Tensor, compute: Callable[[Tensor], Tensor], quantizer: nn.Module) -> Tensor:
        """compute(x), or the last result if that was for the same x; the quantizer's tensors decide compute(x)."""
        if torch.compiler.is_compiling() or transformed() or x.is_inference() or torch.is_inference_mode_enabled():
            return compute(x)  # inference tensors do not count their changes
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
        grad = torch.is_grad_enabled()
        state = x._version, grad, quantizer.training, None if hooks is None else tuple(map(id, hooks[:2]))
        y = None if self._x is None or self._x() is not x else self._y
        if y is not None and self._state == (*state, y._version, *_versions(quantizer)):
            return y
        y = compute(x)
        if y is x:  # fake quantization is switched off
            self._forget()
        else:
            self._x = weakref.ref(x, self._left)
            self._y = y
            self._state = (*state, y._version, *_versions(quantizer))
            if y.requires_grad:
                y.register_hook(self._used)
        return y

    def __deepcopy__(self, memo: dict[int, Any]) -> LastResult:
        return LastResult()

    def __reduce__(self) -> tuple[Any, ...]:
        return LastResult, ()


def _versions(quantizer: nn.Module) -> tuple[int, ...]:
    held = (*quantizer._parameters.values(), *quantizer._buffers.values())
    return tuple(t._version for t in held if t is not None)
