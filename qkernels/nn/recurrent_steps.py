"""The steps of recurrent layers one by one, as formulas, for states that are quantized at each step.

torch's fused kernels run a whole sequence and show no state in between. ``run_steps`` computes what they do, in plain
torch: one product for the inputs of all steps, and then one product a step for the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .fake_quantize import FakeQuantize

States = tuple[Tensor, ...]  # h, or h and c
# (gates of the input, gates of the state as the product takes it, states) -> new states
Step = Callable[[Tensor, Tensor, States], States]


def lstm_step(input_gates: Tensor, hidden_gates: Tensor, states: States) -> States:
    i, f, g, o = (input_gates + hidden_gates).chunk(4, -1)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(input_gates: Tensor, hidden_gates: Tensor, states: States) -> States:
    rx, zx, nx = input_gates.chunk(3, -1)
    rh, zh, nh = hidden_gates.chunk(3, -1)
    n = (nx + (rx + rh).sigmoid() * nh).tanh()
    return (n + (zx + zh).sigmoid() * (states[0] - n),)


def tanh_step(input_gates: Tensor, hidden_gates: Tensor, states: States) -> States:
    return ((input_gates + hidden_gates).tanh(),)


def relu_step(input_gates: Tensor, hidden_gates: Tensor, states: States) -> States:
    return ((input_gates + hidden_gates).relu(),)


STEPS: dict[str, Step] = {"LSTM": lstm_step, "GRU": gru_step, "RNN_TANH": tanh_step, "RNN_RELU": relu_step}


class SequenceQuantizer:
    """One state of one sequence through its quantizer, which keeps one scale for all steps (see ``for_steps``)."""

    def __init__(self, quantizer: FakeQuantize | None, state: Tensor) -> None:
        self._quantize: Callable[[Tensor], Tensor] | None = None
        self._finish: Callable[[Tensor], object] | None = None
        if quantizer is not None:
            self._quantize, self._finish = quantizer.for_steps(state)
        self._seen: list[Tensor] = []

    def __call__(self, state: Tensor) -> Tensor:
        if self._finish is not None:
            self._seen.append(state.detach())
        return state if self._quantize is None else self._quantize(state)

    def finish(self) -> None:
        """Shows the quantizer the states of all steps at once."""
        if self._finish is not None:
            self._finish(torch.cat(self._seen))


@dataclass
class Products:
    """The products of one direction of one layer: of the inputs of all steps, of h, and the projection, if any."""

    input: Callable[[Tensor], Tensor]
    hidden: Callable[[Tensor], Tensor]
    projection: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of_weights(cls, weights: Sequence[Tensor], bias: bool) -> Products:
        """weights: weight_ih, weight_hh, both biases if ``bias``, and weight_hr if the state is projected."""
        input_bias, hidden_bias = weights[2:4] if bias else (None, None)
        return cls(
            partial(F.linear, weight=weights[0], bias=input_bias),
            partial(F.linear, weight=weights[1], bias=hidden_bias),
            partial(F.linear, weight=weights[-1]) if len(weights) % 2 else None,
        )


def run_steps(
    step: Step,
    x: Tensor,
    sizes: Sequence[int],
    states: States,
    products: Products,
    reads: Sequence[Callable[[Tensor], Tensor]],
    *,
    reverse: bool,
) -> tuple[Tensor, States]:
    """One direction of one layer: the outputs of all steps, packed as x is, and the last states.

    Each step reads the states through ``reads``, h's and c's; what it computes stays as it is until the next step reads
    it.

    Args:
        x: the rows of all steps, one step after the other, as in a PackedSequence.
        sizes: rows of each step, of which there may be less from step to step.
        states: before the first step, [N, features] each.
    """
    first, rows = states, sizes[-1] if reverse else sizes[0]
    states, ended = tuple(state[:rows] for state in states), []
    steps = list(zip(products.input(x).split(list(sizes)), sizes, strict=True))
    outputs = []
    for input_gates, size in reversed(steps) if reverse else steps:
        if size > rows:  # backwards, sequences begin at their last steps
            states = tuple(torch.cat([state, start[rows:size]]) for state, start in zip(states, first, strict=True))
        elif size < rows:
            ended.append(tuple(state[size:] for state in states))
            states = tuple(state[:size] for state in states)
        rows = size
        hidden, *cell = (read(state) for read, state in zip(reads, states, strict=True))
        h, *carried = step(input_gates, products.hidden(hidden), (states[0], *cell))
        if products.projection is not None:
            h = products.projection(h)
        states = h, *carried
        outputs.append(h)
    last = tuple(torch.cat(parts) for parts in zip(states, *reversed(ended), strict=True))
    return torch.cat(outputs[::-1] if reverse else outputs), last
