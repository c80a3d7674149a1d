"""Int8Stateful: what recurrent layers on int8 weights and their cells share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .. import checks
from ..ops.int8_gemm import PackedInt8
from .fake_quantize import FakeQuantize
from .int8 import Int8Linear
from .qat_layer import SUFFIX
from .quantized import check_finite
from .recurrent_steps import States
from .replacing import take_over
from .tracing import call_as_leaf

Self = TypeVar("Self", bound="Int8Stateful")
OF_CELLS = "weight_ih", "weight_hh", "bias_ih", "bias_hh"


class Int8Stateful(nn.Module):
    """A recurrent layer, or a cell of one, whose products are Int8Linear layers.

    They are called as the float layer's weights: ``ih_l0`` and ``hh_l0`` in a layer, ``ih`` and ``hh`` in a cell. Each
    quantizes its input as an Int8Linear does: by a fixed scale, by the range of each row or of the tensor, or not at
    all (act_bits 16). The float layer's names, such as ``weight_ih_l0`` and ``bias_ih_l0``, stay attributes; a weight
    is dequantized at each access. Quantizers of cell states and of the output stay.

    Args:
        layer: a layer of ``float_class``; gives the settings, hooks and whatever else was set on it.
        parts: the Int8Linear layers by their names.
        quantizers: of "output" and of cell states ("cell_l0"), whose ranges are fixed from here on.
    """

    float_class: ClassVar[type[nn.Module]]
    settings: ClassVar[tuple[str, ...]]  # the arguments of the float layer that both keep as attributes
    input_size: int
    __call__ = call_as_leaf

    def __init__(
        self, layer: nn.Module, parts: Mapping[str, Int8Linear], quantizers: Mapping[str, FakeQuantize] | None = None
    ) -> None:
        super().__init__()
        for name in self.settings:
            setattr(self, name, getattr(layer, name))
        for name, part in parts.items():
            self.add_module(name, part)
        for role, quantizer in (quantizers or {}).items():
            quantizer.disable_observer()
            self.add_module(role + SUFFIX, quantizer)
        self.pack_for_steps()
        take_over(self, layer, self._own_names(layer)).train(layer.training)

    @classmethod
    def from_float(cls: type[Self], layer: nn.Module, *, act_bits: int = 8) -> Self:
        """Quantizes a trained layer: weights per row by amax/127; inputs and hidden states per token at run time.

        The new layer takes over the hooks of ``layer`` and whatever else was set on it.

        Args:
            act_bits: 8; or 16: inputs and hidden states stay in float.

        Raises:
            TypeError: another layer.
            ValueError: a weight holds NaN or infinity.
        """
        if not isinstance(layer, cls.float_class):
            raise TypeError(f"layer: got {type(layer).__name__}; accepted: {cls.float_class.__name__}")
        parts = {}
        for name in weight_names(layer):
            weight: Tensor = getattr(layer, name)
            part = name.removeprefix("weight_")
            bias: Tensor | None = getattr(layer, f"bias_{part}", None)
            codes, scale = PackedInt8.from_float(check_finite(weight)).unpack()
            n, k = weight.shape
            bits = 16 if part.startswith("hr") else act_bits
            parts[part] = Int8Linear(k, n, bias is not None, act_bits=bits, dtype=weight.dtype).to(weight.device)
            parts[part].set_weight(codes, scale, bias)
        return cls(layer, parts)

    def __getattr__(self, name: str) -> Any:
        kind, _, rest = name.partition("_")
        part = self.__dict__.get("_modules", {}).get(rest)
        if isinstance(part, Int8Linear):
            if kind == "weight":
                return part.weight
            if kind == "bias" and part.bias is not None:
                return part.bias
        return super().__getattr__(name)

    @property
    def parts(self) -> dict[str, Int8Linear]:
        """The Int8Linear layers by their names."""
        return {name: part for name, part in self._modules.items() if isinstance(part, Int8Linear)}

    def pack_for_steps(self) -> None:
        """Lets the products of h hold their weights as the kernel of the steps takes them."""
        for name, part in self.parts.items():
            if name.startswith("hh"):
                part.take_steps()

    def passed(self, role: str, x: Tensor) -> Tensor:
        quantizer = self._modules.get(role + SUFFIX)
        return x if quantizer is None else quantizer(x)

    def _check_input(self, x: Tensor) -> None:
        checks.dense("input", x)
        checks.require(x.is_floating_point(), f"input: got {x.dtype}; accepted: a floating dtype")
        checks.require(
            x.shape[-1] == self.input_size, f"input: got {x.shape[-1]} features; accepted: {self.input_size}"
        )

    def _in_float(
        self, x: Tensor, states: States, run: Callable[[Tensor, States], tuple[Tensor, States]]
    ) -> tuple[Tensor, States]:
        """``run`` in fp32, or in fp64 for an input in fp64; its results in the dtype that the float layer returns."""
        out_dtype, device = x.dtype, x.device.type
        dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
        arguments = x.to(dtype), tuple(state.to(dtype) for state in states)
        if dtype == torch.float32 and not x.is_meta and torch.is_autocast_enabled(device):
            out_dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                y, states = run(*arguments)
        else:
            y, states = run(*arguments)
        return y.to(out_dtype), tuple(state.to(out_dtype) for state in states)

    def _own_names(self, layer: nn.Module) -> set[str]:
        """Names that every layer of the class has."""
        lists = "_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights"
        tensors = {name for names in getattr(layer, "_all_weights", [OF_CELLS]) for name in names}
        return {*self.settings, *lists, *tensors, "nonlinearity"} | {name + SUFFIX for name in _roles(layer)}


def weight_names(layer: Any) -> list[str]:
    """The names of the weights of a recurrent layer or cell of torch."""
    names = [name for names in getattr(layer, "_all_weights", [OF_CELLS]) for name in names]
    return [name for name in names if name.startswith("weight")]


def _roles(layer: Any) -> dict[str, Any]:
    return type(layer).roles(layer) if hasattr(type(layer), "roles") else {}
