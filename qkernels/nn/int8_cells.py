"""Int8LSTMCell, Int8GRUCell and Int8RNNCell: single steps on int8 weights; ``convert`` makes them from QAT cells."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .. import checks
from .int8_stateful import Int8Stateful
from .qat_layer import SUFFIX
from .recurrent_kernel import Sequence
from .recurrent_steps import States


class Int8Cell(Int8Stateful):
    """What Int8LSTMCell, Int8GRUCell and Int8RNNCell share: arguments and results of torch's cells (``Int8Stateful``).

    Its products are ``ih``, of the input, and ``hh``, of the hidden state. The op and the cases that it leaves to
    torch's ops are those of ``Int8Recurrent``, and so are dtypes, gradients and the state_dict.
    """

    settings: ClassVar[tuple[str, ...]] = ("input_size", "hidden_size", "bias")
    hidden_size: int
    nonlinearity: str
    step: ClassVar[str]
    states: ClassVar[int] = 1

    @property
    def mode(self) -> str:
        """The name of the step, as in ``int8_recurrent``."""
        return f"RNN_{self.nonlinearity.upper()}" if self.step == "RNN" else self.step

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        self._check_input(input)
        checks.require(
            input.dim() in (1, 2),
            f"input: got {input.dim()} dims; accepted: 1 (one sample) or 2 (a batch of them)",
        )
        single = input.dim() == 1
        if hx is None:
            first: States = (input.new_zeros(*input.shape[:-1], self.hidden_size),) * self.states
        else:
            first = tuple(hx) if self.states > 1 else (hx,)
        checks.require(len(first) == self.states, f"hx: got {len(first)} tensors; accepted: {self.states}")
        accepted = [*input.shape[:-1], self.hidden_size]
        for state in first:
            checks.require(
                list(state.shape) == accepted, f"hx: got a state of shape {list(state.shape)}; accepted: {accepted}"
            )
        x = input.unsqueeze(0) if single else input
        _, new = self._in_float(x, tuple(state.unsqueeze(0) if single else state for state in first), self._step)
        new = tuple(state.squeeze(0) for state in new) if single else new
        return new if self.states > 1 else new[0]

    def _step(self, x: Tensor, states: States) -> tuple[Tensor, States]:
        parts, cell = self.parts, self._modules.get("cell" + SUFFIX)
        sequence = Sequence(self.mode, [parts["ih"], parts["hh"]], cell, [len(x)], False, False)
        return sequence.run(x, states)

    def extra_repr(self) -> str:
        names = {"bias": True, "nonlinearity": "tanh"}
        options = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name, names[name]) != names[name]]
        return ", ".join([str(self.input_size), str(self.hidden_size), *options])


class Int8LSTMCell(Int8Cell):
    """nn.LSTMCell on int8 weights (see ``Int8Cell``)."""

    float_class = nn.LSTMCell
    step = "LSTM"
    states = 2


class Int8GRUCell(Int8Cell):
    """nn.GRUCell on int8 weights (see ``Int8Cell``)."""

    float_class = nn.GRUCell
    step = "GRU"


class Int8RNNCell(Int8Cell):
    """nn.RNNCell on int8 weights (see ``Int8Cell``)."""

    float_class = nn.RNNCell
    settings = (*Int8Cell.settings, "nonlinearity")
    step = "RNN"
