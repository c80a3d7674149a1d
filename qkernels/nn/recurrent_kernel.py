"""Sequence: one direction of a recurrent layer by the op that runs all of its steps."""

from __future__ import annotations

from collections.abc import Callable
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
from .recurrent_steps import States

Steps = Callable[[Tensor, States], tuple[Tensor, States]]
PIECE_BYTES = 2 << 20  # 2048 rows of 2048 gates, all at once: 12.5 ms; 256 at a time: 10.8 (one thread)


def takes_sequence(x: Tensor, parts: list[Int8Linear], cell: nn.Module | None) -> bool:
    """Whether the op computes one direction of one level. parts: the products of inputs, of h, and the projection."""
    hidden = parts[1]
    if len(parts) > 2 or x.dtype != torch.float32 or x.device.type != "cpu" or transformed():
        return False
    if hidden.act_bits == 16 and (hidden.zero_point is not None or hidden.scale.dim() > 1):
        return False
    if hidden.act_bits == 8 and hidden.input_scale is None and not isinstance(hidden.input_granularity, PerToken):
        return False
    if cell is None:
        return True
    assert isinstance(cell, FakeQuantize)
    by_tensor = isinstance(cell.granularity, PerTensor) and cell.quantizer != "dynamic"
    return by_tensor and cell.integer_codes and cell.quantizes and "forward" not in vars(cell)


class Sequence:
    """How the op runs one direction.

    Args:
        mode: as in ``int8_recurrent``.
        input, hidden: the products of inputs and of h.
        cell: the quantizer of c.
        sizes: of a packed sequence: the rows of each step.
        batch: rows of each step of any other sequence.
        reverse: whether steps run from the last to the first.
    """

    def __init__(
        self,
        mode: str,
        input: Int8Linear,
        hidden: Int8Linear,
        cell: nn.Module | None,
        sizes: Tensor | None,
        batch: int,
        reverse: bool,
    ) -> None:
        self.mode, self.input, self.hidden, self.batch, self.reverse = mode, input, hidden, batch, reverse
        self.cell = cell if isinstance(cell, FakeQuantize) else None
        self.sizes: list[int] = [] if sizes is None else sizes.tolist()

    def run(self, rows: Tensor, first: States, steps: Steps) -> tuple[Tensor, States]:
        """The outputs and the last states.

        Args:
            rows: the inputs of all steps.
            steps: computes the results from the gates in torch's ops, for the backward pass.
        """
        product = self.input.for_steps(rows.dtype)
        if wants_gradient(rows, self.input.bias, self.hidden.bias, *first):
            y, *last = _Recomputed.apply(self, steps, product(rows), self.hidden.bias, *first)
            return y, tuple(last)
        pieces = self._pieces(rows)
        outputs: list[Tensor] = []
        for piece, sizes in reversed(pieces) if self.reverse else pieces:
            y, first = self.compute(product(piece), first, sizes)
            outputs.append(y)
        if self.reverse:
            outputs.reverse()
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs), first

    def _pieces(self, rows: Tensor) -> list[tuple[Tensor, list[int]]]:
        """Runs of steps, whose gates stay in the cache between the two ops; and the sizes of their steps."""
        gates = self.hidden.weight_shape[0]
        most = max(1, PIECE_BYTES // (4 * gates))
        if len(rows) <= most:
            return [(rows, self.sizes)]
        if not self.sizes:
            return [(piece, []) for piece in rows.split(max(1, most // self.batch) * self.batch)]
        counts: list[list[int]] = [[]]
        for size in self.sizes:
            if counts[-1] and sum(counts[-1]) + size > most:
                counts.append([])
            counts[-1].append(size)
        return list(zip(rows.split([sum(sizes) for sizes in counts]), counts, strict=True))

    def compute(self, gates: Tensor, first: States, sizes: list[int]) -> tuple[Tensor, States]:
        hidden = self.hidden
        codes: dict[str, Any] = {}
        if hidden.act_bits == 8:
            codes = {"hidden_scale": hidden.input_scale, "hidden_zero_point": hidden.input_zero_point}
            codes.update(quant_min=hidden.quant_min, quant_max=hidden.quant_max)
        if self.cell is not None:
            codes["cell_scale"], codes["cell_zero_point"] = self.cell.qparams()
            codes.update(cell_min=self.cell.quant_min, cell_max=self.cell.quant_max)
        weight = hidden.data, hidden.colsum, hidden._scale_of("scale"), hidden.bias
        options: Any = {**codes, "sizes": sizes, "reverse": self.reverse}
        y, last = int8_recurrent(gates, torch.stack(first), self.mode, *weight, **options)
        return y, last.unbind()


class _Recomputed(Function):
    """The op's results; the backward pass computes the steps again in ops that autograd knows."""

    @staticmethod
    def forward(ctx: Any, sequence: Sequence, steps: Steps, gates: Tensor, bias: Tensor | None, *first: Tensor) -> Any:
        ctx.save_for_backward(gates, bias, *first)
        ctx.steps = steps
        y, last = sequence.compute(gates.detach(), tuple(state.detach() for state in first), sequence.sizes)
        return y, *(state.clone() for state in last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gates, bias, *first = ctx.saved_tensors
        with torch.enable_grad():
            own = [t.detach().requires_grad_() for t in (gates, *first)]
            y, last = ctx.steps(own[0], tuple(own[1:]))
        wanted = [own[0], bias, *own[1:]]
        at = [i for i, t in enumerate(wanted) if t is not None and ctx.needs_input_grad[2 + i]]
        found = torch.autograd.grad((y, *last), [wanted[i] for i in at], grads, allow_unused=True)
        result: list[Tensor | None] = [None] * (2 + len(wanted))
        for i, grad in zip(at, found, strict=True):
            result[2 + i] = grad
        return tuple(result)
