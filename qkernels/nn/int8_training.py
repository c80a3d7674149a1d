"""Int8TrainingLinear: nn.Linear whose matrix products run in int8 during training."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ops import int8_training
from ..ops.autograd import transformed
from ..ops.int8_training import Codes, int8_training_linear
from .replacing import take_hooks
from .tracing import call_as_leaf

_optimizer_steps = 0


@functools.cache
def _count_optimizer_steps() -> None:
    """Counts optimizer steps from now on: some optimizers write through ``.data``, which changes no version."""

    def count(*_: Any) -> None:
        global _optimizer_steps
        _optimizer_steps += 1

    register_optimizer_step_post_hook(count)


class Int8TrainingLinear(nn.Linear):
    """nn.Linear that computes with ``int8_training_linear``; parameters and state_dict are nn.Linear's.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        output, grad_input, grad_weight: "int8" or "float", for each of the three matrix products.
        grad_bits: 2 to 8, the width of gradients in these products; an attribute that a loop may change
            (``qk.BitSchedule`` does).
        stochastic_rounding: rounds gradients stochastically. The random numbers come from torch's generator, as those
            of dropout do: ``torch.manual_seed`` and activation checkpointing repeat them.

    In training mode the layer keeps the weight's codes until the weight changes, so that gradient accumulation
    quantizes the weight once for each optimizer step; the codes take two bytes for each weight. These count as a
    change: an in-place operation (also under no_grad), another tensor in the weight's place (FSDP2 sets one at every
    all-gather), a step of any torch optimizer, a cast or a move. The layer does not see a write through
    ``weight.data`` outside an optimizer: call ``forget_codes()`` after it. Compiled code quantizes the weight at every
    call.
    """

    __call__ = call_as_leaf
    grad_bits = 8  # of layers that were saved before they had one
    _kept: tuple[weakref.ref[Tensor], tuple[Any, ...], Codes] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        output: str = "int8",
        grad_input: str = "int8",
        grad_weight: str = "int8",
        grad_bits: int = 8,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set(output, grad_input, grad_weight, grad_bits, stochastic_rounding)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        *,
        output: str = "int8",
        grad_input: str = "int8",
        grad_weight: str = "int8",
        grad_bits: int = 8,
        stochastic_rounding: bool = False,
    ) -> Int8TrainingLinear:
        """Makes a layer that shares the parameters, hooks and training mode of ``linear``."""
        if type(linear) is not nn.Linear:
            raise TypeError(f"Int8TrainingLinear.from_float: got {type(linear).__name__}; accepted: Linear")
        layer = cls.__new__(cls)
        layer.__dict__ = {
            key: value.copy() if isinstance(value, dict) else value for key, value in vars(linear).items()
        }
        take_hooks(layer, linear)
        layer._set(output, grad_input, grad_weight, grad_bits, stochastic_rounding)
        return layer

    def _set(self, output: str, grad_input: str, grad_weight: str, grad_bits: int, stochastic_rounding: bool) -> None:
        int8_training._modes(output, grad_input, grad_weight)
        int8_training.check_grad_bits(grad_bits)
        self.output, self.grad_input, self.grad_weight, self.grad_bits = output, grad_input, grad_weight, grad_bits
        self.stochastic_rounding = stochastic_rounding
        self.forget_codes()

    def forget_codes(self) -> None:
        """Quantizes the weight anew at the next call."""
        self.__dict__["_kept"] = None

    def forward(self, input: Tensor) -> Tensor:
        seed, offset = None, torch.empty(0)
        if self.stochastic_rounding and torch.is_grad_enabled():
            seed, offset = 0, torch.randint(1 << 62, (1,), device=input.device)
        codes = self._codes() if self.training and not torch.compiler.is_compiling() else None
        return int8_training_linear(
            input, self.weight, self.bias, output=self.output, grad_input=self.grad_input,
            grad_weight=self.grad_weight, grad_bits=self.grad_bits, seed=seed, offset=offset, codes=codes,
        )  # fmt: skip

    def _codes(self) -> Codes | None:
        w = self.weight
        if "int8" not in (self.output, self.grad_input):
            return None
        if (
            transformed() or type(w) not in (Tensor, nn.Parameter) or w.is_inference()
        ):  # such a tensor may have no memory and no version counter
            return None
        _count_optimizer_steps()
        key = (w._version, w.data_ptr(), w.dtype, _optimizer_steps, self.output, self.grad_input)
        if self._kept is not None and self._kept[0]() is w and self._kept[1] == key:
            return self._kept[2]
        codes = int8_training.weight_codes(w, self.output == "int8", self.grad_input == "int8")
        self.__dict__["_kept"] = (weakref.ref(w), key, codes)
        return codes

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 refills the same tensor without a change of its version, but sets the attribute each time. It sets the
        # shard after use, and the codes of the whole weight must not outlive the whole weight.
        if name == "weight":
            self.forget_codes()
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8TrainingLinear:
        self.forget_codes()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, output={self.output}, grad_input={self.grad_input}, "
            f"grad_weight={self.grad_weight}, grad_bits={self.grad_bits}, "
            f"stochastic_rounding={self.stochastic_rounding}"
        )
