"""Int8LSTM, Int8GRU and Int8RNN, whose gates are int8 products; ``convert`` makes them from QAT layers."""

from __future__ import annotations

import collections.abc as abc
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .. import checks
from ..ops.int8_gemm import PackedInt8
from .fake_quantize import FakeQuantize
from .int8 import Int8Linear
from .qat_layer import SUFFIX
from .quantized import check_finite
from .recurrent_forward import RecurrentForward
from .recurrent_kernel import Sequence, takes_sequence
from .recurrent_steps import STEPS, Products, States, run_steps
from .replacing import take_over
from .tracing import call_as_leaf

Self = TypeVar("Self", bound="Int8Recurrent")
SETTINGS = (
    *("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"),
    "proj_size",
)


class Int8Recurrent(RecurrentForward):
    """What Int8LSTM, Int8GRU and Int8RNN share: the arguments and results of torch's layers, on int8 weights.

    ``ih_l0``, ``hh_l0`` and, of an LSTM with a projection, ``hr_l0``, and so on for each layer and direction
    (``hh_l1_reverse``), are Int8Linear layers: the product of the inputs of all steps, that of the hidden state at each
    step, and the projection, whose input stays in float. Each quantizes its input as an Int8Linear does: by a fixed
    scale, by the range of each row or of the tensor, or not at all (act_bits 16). Quantizers of cell states and of the
    output stay.

    On a CPU one op runs all steps of a direction (see ``int8_recurrent``). It leaves to a loop over the steps, or to
    torch's float kernels on dequantized weights if h stays in float: other devices, fp64, projections, an h that is
    quantized by the range of the whole tensor, weights in groups or with zero points, and gradients, for which the
    backward pass runs the steps once more.

    Every dtype that Int8Linear takes. fp16 and bf16 are computed in fp32, from the first level to the last, and the
    results are rounded once. Differentiable in the inputs, states and biases.

    Attributes:
        weight_ih_l0, bias_ih_l0, …: as of the float layer; a weight is dequantized at each access.

    state_dict: those of the Int8Linear layers.

    Args:
        layer: nn.LSTM, nn.GRU or nn.RNN; gives the settings, hooks and whatever else was set on it.
        parts: the Int8Linear layers by their names.
        quantizers: of "output" and of cell states ("cell_l0"), whose ranges are fixed from here on.
    """

    float_class: ClassVar[type[nn.RNNBase]]
    input_size: int
    __call__ = call_as_leaf

    def __init__(
        self, layer: nn.RNNBase, parts: Mapping[str, Int8Linear], quantizers: Mapping[str, FakeQuantize] | None = None
    ) -> None:
        super().__init__()
        for name in SETTINGS:
            setattr(self, name, getattr(layer, name))
        for name, part in parts.items():
            self.add_module(name, part)
        for role, quantizer in (quantizers or {}).items():
            quantizer.disable_observer()
            self.add_module(role + SUFFIX, quantizer)
        take_over(self, layer, _own_names(layer)).train(layer.training)

    @classmethod
    def from_float(cls: type[Self], layer: nn.RNNBase, *, act_bits: int = 8) -> Self:
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
        for name, weight in layer.named_parameters(recurse=False):
            if not name.startswith("weight"):
                continue
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

    def flatten_parameters(self) -> None:
        """Does nothing: a float layer's forward may be surrounded by code that calls it."""

    def passed(self, role: str, x: Tensor) -> Tensor:
        quantizer = self._modules.get(role + SUFFIX)
        return x if quantizer is None else quantizer(x)

    def _check(self, x: Tensor, states: States, sizes: Tensor | None) -> None:
        checks.dense("input", x)
        checks.require(x.is_floating_point(), f"input: got {x.dtype}; accepted: a floating dtype")
        checks.require(
            x.shape[-1] == self.input_size, f"input: got {x.shape[-1]} features; accepted: {self.input_size}"
        )
        widths = self.widths_of_states()
        checks.require(len(states) == len(widths), f"hx: got {len(states)} tensors; accepted: {len(widths)}")
        batch = x.shape[0 if self.batch_first else 1] if sizes is None else int(sizes[0])
        for name, state, width in zip(("h_0", "c_0"), states, widths, strict=False):
            accepted = [self.num_layers * self.directions, batch, width]
            checks.require(
                list(state.shape) == accepted,
                f"hx: got {name} of shape {list(state.shape)}; accepted: {accepted} (one sequence is a batch of 1)",
            )

    def _run(self, x: Tensor, sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        dtype, device = x.dtype, x.device.type
        if dtype != torch.float64 and not x.is_meta and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                y, states = self._run_in_float(x, sizes, states)
        else:
            y, states = self._run_in_float(x, sizes, states)
        return y.to(dtype), tuple(state.to(dtype) for state in states)

    def _run_in_float(self, x: Tensor, sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return super()._run(x.to(dtype), sizes, tuple(state.to(dtype) for state in states))

    def _run_level(self, index: int, x: Tensor, sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        suffixes = self.suffixes(index)
        parts = [self._parts_of(suffix) for suffix in suffixes]
        cells = [self._modules.get(f"cell{suffix}{SUFFIX}") for suffix in suffixes]
        kernel = all(takes_sequence(x, of_one, cell) for of_one, cell in zip(parts, cells, strict=True))
        if not kernel and all(hidden.act_bits == 16 for _, hidden, *_ in parts) and not any(cells):
            x = parts[0][0]._input_values(x)
            return self._run_fused(x, sizes, states, [list(_float_weights(of_one, x.dtype)) for of_one in parts])

        def by_steps(direction: int, gates: Tensor, first: States) -> tuple[Tensor, States]:
            hidden, *projection = (part.for_steps(gates.dtype) for part in parts[direction][1:])
            cell, rows = cells[direction], self._rows_of_steps(x, sizes)
            reads = [_unchanged, _unchanged if cell is None else cell][: len(first)]
            products = Products(_unchanged, hidden, *projection)
            return run_steps(STEPS[self.mode], gates, rows, first, products, reads, reverse=direction == 1)

        def run(direction: int, rows: Tensor, first: States) -> tuple[Tensor, States]:
            input, hidden, *_ = parts[direction]
            if not kernel:
                return by_steps(direction, input.for_steps(rows.dtype)(rows), first)
            sequence = Sequence(self.mode, input, hidden, cells[direction], sizes, len(first[0]), direction == 1)
            return sequence.run(rows, first, partial(by_steps, direction))

        return self._run_directions(x, sizes, states, run)

    def _parts_of(self, suffix: str) -> list[Int8Linear]:
        """The products of inputs, of h and, if there is one, of the projection."""
        kinds = ("ih", "hh", "hr") if self.proj_size else ("ih", "hh")
        return [self._modules[kind + suffix] for kind in kinds]  # type: ignore[misc]

    def extra_repr(self) -> str:
        words = [str(self.input_size), str(self.hidden_size)]
        plain = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        for name, default in {**plain, "proj_size": 0}.items():
            if getattr(self, name) != default:
                words.append(f"{name}={getattr(self, name)}")
        return ", ".join(words)


class Int8LSTM(Int8Recurrent):
    """nn.LSTM on int8 weights (see ``Int8Recurrent``)."""

    float_class = nn.LSTM


class Int8GRU(Int8Recurrent):
    """nn.GRU on int8 weights (see ``Int8Recurrent``)."""

    float_class = nn.GRU


class Int8RNN(Int8Recurrent):
    """nn.RNN on int8 weights (see ``Int8Recurrent``)."""

    float_class = nn.RNN


def _own_names(layer: nn.RNNBase) -> set[str]:
    """Names that every layer of the class has."""
    weights = [name for names in layer._all_weights for name in names]
    lists = "_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights"
    return {*SETTINGS, *lists, *weights, "nonlinearity"} | {name + SUFFIX for name in _roles(layer)}


def _roles(layer: Any) -> dict[str, Any]:
    return type(layer).roles(layer) if hasattr(type(layer), "roles") else {}


def _float_weights(parts: abc.Sequence[Int8Linear], dtype: torch.dtype) -> Iterator[Tensor]:
    """The dequantized weights and the biases of one direction, in torch's order."""
    weights = [part.dequantize(dtype) for part in parts]
    yield from weights[:2]
    yield from (part.bias.to(dtype) for part in parts[:2] if part.bias is not None)
    yield from weights[2:]


def _unchanged(x: Tensor) -> Tensor:
    return x
