"""LastResult: what a quantizer made of the last tensor, for the next layer that gets the same tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.autograd import transformed


class LastResult:
    """Remembers the last tensor and its result as long as both are alive and unchanged.

    It keeps neither alive: the layers that got the result do, until their backward pass. Where the result would be
    recorded otherwise than the first time (other grad mode, or other hooks on saved tensors, by which activation
    checkpointing tells what to recompute), and in compiled code and under torch.func, the quantizer computes anew.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._y: weakref.ref[Tensor] | None = None
        self._state: tuple[Any, ...] = ()

    def of(self, x: Tensor, compute: Callable[[Tensor], Tensor], training: bool) -> Tensor:
        """compute(x), or the last result if that was for the same x."""
        if torch.compiler.is_compiling() or transformed() or x.is_inference() or torch.is_inference_mode_enabled():
            return compute(x)  # inference tensors do not count their changes
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
        state = x._version, torch.is_grad_enabled(), training, None if hooks is None else tuple(map(id, hooks[:2]))
        y = None if self._y is None or self._x is None or self._x() is not x else self._y()
        if y is not None and self._state == (*state, y._version):
            return y
        y = compute(x)
        if y is x:  # fake quantization is switched off
            self._forget()
        else:
            self._x, self._y, self._state = weakref.ref(x), weakref.ref(y), (*state, y._version)
        return y

    def __deepcopy__(self, memo: dict[int, Any]) -> LastResult:
        return LastResult()

    def __reduce__(self) -> tuple[Any, ...]:
        return LastResult, ()
