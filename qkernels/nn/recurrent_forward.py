"""RecurrentForward: the forward of torch's recurrent layers around levels that a subclass runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from .recurrent_steps import States

# (index of the direction, rows of all steps, first states) -> outputs as the rows are, last states
Direction = Callable[[int, Tensor, States], tuple[Tensor, States]]


class RecurrentForward(nn.Module):
    """The arguments and results of nn.LSTM, nn.GRU and nn.RNN, for layers with quantizers.

    A subclass runs each level of the stack, which is a layer of one or two directions. Quantizers of the roles
    "input", "input_l1", … and "output" get what goes into a level and the last level's sequence.
    """

    mode: str
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    passed: Any  # (role, x) -> x through the quantizer of the role, if there is one

    def _check(self, x: Tensor, states: States, sizes: Tensor | None) -> None:
        """Raises an error if a tensor does not fit the layer."""
        raise NotImplementedError

    def _run_level(self, index: int, x: Tensor, sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        """The outputs of one level of the stack, both directions side by side, and its last states."""
        raise NotImplementedError

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        sizes = order = back = None
        if isinstance(input, PackedSequence):
            x, sizes, order, back = input
        else:
            x = input
            if x.dim() not in (2, 3):
                raise ValueError(f"input: got {x.dim()} dims; accepted: 2 (one sequence) or 3 (a batch of them)")
        single = sizes is None and x.dim() == 2
        if single:
            x = x.unsqueeze(0 if self.batch_first else 1)
        states = self._first_states(x, sizes, hx, single, order)
        self._check(x, states, sizes)
        y, states = self._run(x, sizes, states)
        if back is not None:
            states = tuple(state.index_select(1, back) for state in states)
        if single:
            y, states = y.squeeze(0 if self.batch_first else 1), tuple(state.squeeze(1) for state in states)
        output = y if sizes is None else PackedSequence(y, sizes, order, back)
        return output, states if len(states) > 1 else states[0]

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def suffixes(self, index: int) -> list[str]:
        """How the names of what each direction of a level has end."""
        return [f"_l{index}{direction}" for direction in ("", "_reverse")[: self.directions]]

    def widths_of_states(self) -> list[int]:
        """Features of h and, of an LSTM, of c."""
        return [self.proj_size or self.hidden_size, self.hidden_size][: 2 if self.mode == "LSTM" else 1]

    def _first_states(self, x: Tensor, sizes: Tensor | None, hx: Any, single: bool, order: Tensor | None) -> States:
        """[layers·directions, N, features] each, in the order of the batch that is packed."""
        if hx is None:
            batch = int(sizes[0]) if sizes is not None else x.shape[0 if self.batch_first else 1]
            count = self.num_layers * self.directions
            return tuple(x.new_zeros(count, batch, width) for width in self.widths_of_states())
        states: States = tuple(hx) if self.mode == "LSTM" else (hx,)
        if single:
            states = tuple(state.unsqueeze(1) for state in states)
        return states if order is None else tuple(state.index_select(1, order) for state in states)

    def _run(self, x: Tensor, sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        """The levels of the stack, one after the other."""
        last = []
        for index in range(self.num_layers):
            if index and self.dropout and self.training:
                x = F.dropout(x, self.dropout)
            x = self.passed(f"input_l{index}" if index else "input", x)
            first = states
            if self.num_layers > 1:
                part = slice(index * self.directions, (index + 1) * self.directions)
                first = tuple(state[part] for state in states)
            x, ended = self._run_level(index, x, sizes, first)
            last.append(ended)
        joined = last[0] if len(last) == 1 else tuple(torch.cat(parts) for parts in zip(*last, strict=True))
        return self.passed("output", x), joined

    def _run_fused(
        self, x: Tensor, sizes: Tensor | None, states: States, weights: Sequence[Sequence[Tensor]]
    ) -> tuple[Tensor, States]:
        """A level by torch's kernels. weights: of each direction, in torch's order."""
        kernel = _KERNELS[self.mode]
        first = states if len(states) > 1 else states[0]
        flat = [weight for of_one in weights for weight in of_one]
        options = (first, flat, self.bias, 1, 0.0, self.training, self.bidirectional)
        y, *ended = kernel(x, *options, self.batch_first) if sizes is None else kernel(x, sizes, *options)
        return y, tuple(ended)

    def _rows_of_steps(self, x: Tensor, sizes: Tensor | None) -> list[int]:
        if sizes is not None:
            return sizes.tolist()  # type: ignore[no-any-return]
        steps, rows = (1, 0) if self.batch_first else (0, 1)
        return [x.shape[rows]] * x.shape[steps]

    def _run_directions(self, x: Tensor, sizes: Tensor | None, states: States, run: Direction) -> tuple[Tensor, States]:
        """A level by ``run``, a direction after the other."""
        steps_first = x.transpose(0, 1) if self.batch_first and sizes is None else x
        if not steps_first.shape[0]:
            raise RuntimeError("input: got a sequence without steps; accepted: at least one")
        flat = steps_first.flatten(0, 1) if sizes is None else x
        outputs, ended = [], []
        for index in range(self.directions):
            y, last = run(index, flat, tuple(state.select(0, index) for state in states))
            outputs.append(y)
            ended.append(last)
        y = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        if sizes is None:
            y = y.view(*steps_first.shape[:2], y.shape[-1])
            y = y.transpose(0, 1) if self.batch_first else y
        # Stacked even if it is one: users detach states in place, which no view allows.
        return y, tuple(torch.stack(parts) for parts in zip(*ended, strict=True))


_KERNELS: dict[str, Callable[..., Any]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}
