"""Int8LSTM, Int8GRU and Int8RNN, whose gates are int8 products; ``convert`` makes them from QAT layers."""

from __future__ import annotations

import collections.abc as abc
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import checks
from .int8 import Int8Linear
from .int8_stateful import Int8Stateful
from .qat_layer import SUFFIX
from .recurrent_forward import RecurrentForward
from .recurrent_kernel import Sequence
from .recurrent_steps import States


class Int8Recurrent(RecurrentForward, Int8Stateful):
    """What Int8LSTM, Int8GRU and Int8RNN share: the arguments and results of torch's layers (see ``Int8Stateful``).

    Its products are ``ih_l0``, ``hh_l0`` and, of an LSTM with a projection, ``hr_l0``, and so on for each layer and
    direction (``hh_l1_reverse``): that of the inputs of all steps, that of the hidden state at each step, and the
    projection, whose input stays in float.

    On a CPU one op runs all steps of a direction (see ``int8_recurrent``), in exact integers even if h stays in float.
    It leaves to a loop over the steps, or to torch's float kernels on dequantized weights if h stays in float: other
    devices, fp64, projections, an h that is quantized by the range of the whole tensor, weights in groups or with zero
    points, and gradients, for which the backward pass runs the steps once more.

    Every dtype that Int8Linear takes. fp16 and bf16 are computed in fp32, from the first level to the last, and the
    results are rounded once. Differentiable in the inputs, states and biases.

    state_dict: those of the Int8Linear layers.
    """

    settings: ClassVar[tuple[str, ...]] = (
        *("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"),
        "proj_size",
    )

    def flatten_parameters(self) -> None:
        """Does nothing: a float layer's forward may be surrounded by code that calls it."""

    def _check(self, x: Tensor, states: States, sizes: Tensor | None) -> None:
        self._check_input(x)
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
        levels = super()._run
        return self._in_float(x, states, lambda x, states: levels(x, sizes, states))

    def _run_level(self, index: int, x: Tensor, sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        rows = self._rows_of_steps(x, sizes)
        sequences = []
        for direction, suffix in enumerate(self.suffixes(index)):
            cell = self._modules.get(f"cell{suffix}{SUFFIX}")
            sequences.append(Sequence(self.mode, self._parts_of(suffix), cell, rows, sizes is not None, direction == 1))
        in_float = all(sequence.hidden.act_bits == 16 and sequence.cell is None for sequence in sequences)
        if in_float and not all(sequence.is_taken(x) for sequence in sequences):
            x = sequences[0].input._input_values(x)
            weights = [list(_float_weights(sequence.parts, x.dtype)) for sequence in sequences]
            return self._run_fused(x, sizes, states, weights)
        return self._run_directions(x, sizes, states, lambda at, rows, first: sequences[at].run(rows, first))

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


def _float_weights(parts: abc.Sequence[Int8Linear], dtype: torch.dtype) -> Iterator[Tensor]:
    """The dequantized weights and the biases of one direction, in torch's order."""
    weights = [part.dequantize(dtype) for part in parts]
    yield from weights[:2]
    yield from (part.bias.to(dtype) for part in parts[:2] if part.bias is not None)
    yield from weights[2:]
