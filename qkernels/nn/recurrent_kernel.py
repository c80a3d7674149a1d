"""Sequence: one direction of a recurrent layer by the op that runs all of its steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..ops.autograd import transformed
from ..ops.frozen import wants_gradient
from ..ops.int8_recurrent import int8_recurrent
from .fake_quantize import FakeQuantize
from .granularity import PerTensor, PerToken
from .int8 import Int8Linear
from .recurrent_steps import STEPS, Products, States, run_steps

PIECE_BYTES = 2 << 20  # 2048 rows of 2048 gates, all at once: 12.5 ms; 256 at a time: 10.8 (one thread)


class Sequence:
    """How one direction of one level of a recurrent layer runs: by the op where that can be, else step by step.

    Args:
        mode: as in ``int8_recurrent``.
        parts: the products of inputs, of h, and the projection, if there is one.
        cell: the quantizer of c.
        steps: rows of each step.
        packed: whether these are those of a packed sequence; else all are equal.
        reverse: whether steps run from the last to the first.
    """

    def __init__(
        self, mode: str, parts: list[Int8Linear], cell: nn.Module | None, steps: list[int], packed: bool, reverse: bool
    ) -> None:
        self.mode, self.parts, self.cell, self.steps, self.reverse = mode, parts, cell, steps, reverse
        self.input, self.hidden, *_ = parts
        self.sizes = steps if packed else []

    def is_taken(self, x: Tensor) -> bool:
        """Whether the op runs the steps of this input."""
        hidden, cell = self.hidden, self.cell
        if len(self.parts) > 2 or x.dtype != torch.float32 or x.device.type != "cpu" or transformed():
            return False
        if not hidden.is_packed:
            return False
        if hidden.act_bits == 8 and hidden.input_scale is None and not isinstance(hidden.input_granularity, PerToken):
            return False
        if cell is None:
            return True
        assert isinstance(cell, FakeQuantize)
        by_tensor = isinstance(cell.granularity, PerTensor) and cell.quantizer != "dynamic"
        return by_tensor and cell.integer_codes and cell.quantizes and "forward" not in vars(cell)

    def run(self, rows: Tensor, first: States) -> tuple[Tensor, States]:
        """The outputs and the last states, from the inputs of all steps and the first states."""
        product = self.input.for_steps(rows.dtype)
        if not self.is_taken(rows):
            return self.by_steps(product(rows), first)
        biases = [part._parameters["bias"] for part in (self.input, self.hidden)]
        if wants_gradient(rows, *biases, *first):
            y, *last = _Recomputed.apply(self, product(rows), biases[1], *first)
            return y, tuple(last)
        pieces = self._pieces(rows)
        outputs: list[Tensor] = []
        for piece, sizes in reversed(pieces) if self.reverse else pieces:
            y, first = self.compute(product(piece), first, sizes)
            outputs.append(y)
        if self.reverse:
            outputs.reverse()
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs), first

    def by_steps(self, gates: Tensor, first: States) -> tuple[Tensor, States]:
        """The outputs and the last states, from the gates of the inputs, in ops that autograd knows."""
        products = Products(_unchanged, *(part.for_steps(gates.dtype) for part in self.parts[1:]))
        reads = [_unchanged, _unchanged if self.cell is None else self.cell][: len(first)]
        return run_steps(STEPS[self.mode], gates, self.steps, first, products, reads, reverse=self.reverse)

    def _pieces(self, rows: Tensor) -> list[tuple[Tensor, list[int]]]:
        """Runs of steps, whose gates stay in the cache between the two ops; and the sizes of their steps."""
        gates = self.hidden.weight_shape[0]
        most = max(1, PIECE_BYTES // (4 * gates))
        if len(rows) <= most:
            return [(rows, self.sizes)]
        if not self.sizes:
            return [(piece, []) for piece in rows.split(max(1, most // self.steps[0]) * self.steps[0])]
        counts: list[list[int]] = [[]]
        for size in self.sizes:
            if counts[-1] and sum(counts[-1]) + size > most:
                counts.append([])
            counts[-1].append(size)
        return list(zip(rows.split([sum(sizes) for sizes in counts]), counts, strict=True))

    def compute(self, gates: Tensor, first: States, sizes: list[int]) -> tuple[Tensor, States]:
        hidden = self.hidden
        codes: dict[str, Any] = {"float_hidden": hidden.act_bits == 16}
        if hidden.act_bits == 8:
            codes = {"hidden_scale": hidden.input_scale, "hidden_zero_point": hidden.input_zero_point}
            codes.update(quant_min=hidden.quant_min, quant_max=hidden.quant_max)
        if self.cell is not None:
            assert isinstance(self.cell, FakeQuantize)
            codes["cell_scale"], codes["cell_zero_point"] = self.cell.qparams()
            codes.update(cell_min=self.cell.quant_min, cell_max=self.cell.quant_max)
        packed: Any = hidden._packed()
        weight = packed.data, packed.colsum, packed.scale, hidden._parameters["bias"]
        options: Any = {**codes, "sizes": sizes, "reverse": self.reverse}
        states = first[0].unsqueeze(0) if len(first) == 1 else torch.stack(first)
        y, last = int8_recurrent(gates, states, self.mode, *weight, **options)
        return y, last.unbind()


class _Recomputed(Function):
    """The op's results; the backward pass computes the steps again in ops that autograd knows."""

    @staticmethod
    def forward(ctx: Any, sequence: Sequence, gates: Tensor, bias: Tensor | None, *first: Tensor) -> Any:
        ctx.save_for_backward(gates, bias, *first)
        ctx.by_steps = sequence.by_steps
        y, last = sequence.compute(gates.detach(), tuple(state.detach() for state in first), sequence.sizes)
        return y, *(state.clone() for state in last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gates, bias, *first = ctx.saved_tensors
        with torch.enable_grad():
            own = [t.detach().requires_grad_() for t in (gates, *first)]
            y, last = ctx.by_steps(own[0], tuple(own[1:]))
        wanted = [own[0], bias, *own[1:]]
        at = [i for i, t in enumerate(wanted) if t is not None and ctx.needs_input_grad[1 + i]]
        found = torch.autograd.grad((y, *last), [wanted[i] for i in at], grads, allow_unused=True)
        result: list[Tensor | None] = [None] * (1 + len(wanted))
        for i, grad in zip(at, found, strict=True):
            result[1 + i] = grad
        return tuple(result)


def _unchanged(x: Tensor) -> Tensor:
    return x
