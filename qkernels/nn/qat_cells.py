"""QATLSTMCell, QATGRUCell and QATRNNCell: single steps that fake-quantize their weights, input and states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fake_quantize import FakeQuantize
from .qat_layer import Role
from .qat_recurrent import QATStateful
from .recurrent_steps import States, gru_step


class QATCell(QATStateful):
    """What QATLSTMCell, QATGRUCell and QATRNNCell share (see ``QATStateful`` for their states).

    Roles: "weight_ih" and "weight_hh", with a scale per row; "input"; "hidden" and, of an LSTM, "cell". The new state
    is not quantized: it is where the next step reads it. Each call quantizes the weights, so a loop over a cell takes
    longer than the layer that runs whole sequences.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None

    @classmethod
    def roles(cls, layer: nn.Module) -> dict[str, Role]:
        roles = {
            "weight_ih": Role("weight", "weight_ih"),
            "weight_hh": Role("weight", "weight_hh"),
            "input": Role("input", per_token=True),
            "hidden": Role("hidden", per_token=True),
        }
        if isinstance(layer, nn.LSTMCell):
            roles["cell"] = Role("cell", per_token=True)
        return roles

    def products(self) -> Iterator[tuple[str, FakeQuantize | None]]:
        yield "weight_ih", self.quantizer_of("input")
        yield "weight_hh", self.quantizer_of("hidden")

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if input.dim() not in (1, 2):
            raise ValueError(f"input: got {input.dim()} dims; accepted: 1 (one sample) or 2 (a batch of them)")
        single = input.dim() == 1
        x = self.passed("input", input)
        x = x.unsqueeze(0) if single else x
        pair = isinstance(self, nn.LSTMCell)
        if hx is None:
            states: States = (x.new_zeros(x.shape[0], self.hidden_size),) * (2 if pair else 1)
        else:
            states = tuple(hx) if pair else (hx,)
            states = tuple(state.unsqueeze(0) for state in states) if single else states
        weights = self.passed("weight_ih", self.weight_ih), self.passed("weight_hh", self.weight_hh)
        new = self._next(x, states, *weights)
        new = tuple(state.squeeze(0) for state in new) if single else new
        return new if pair else new[0]

    def _next(self, x: Tensor, states: States, weight_ih: Tensor, weight_hh: Tensor) -> States:
        raise NotImplementedError


class QATLSTMCell(QATCell, nn.LSTMCell):  # type: ignore[misc]
    """nn.LSTMCell with fake quantization (see ``QATCell``)."""

    float_class = nn.LSTMCell

    def _next(self, x: Tensor, states: States, weight_ih: Tensor, weight_hh: Tensor) -> States:
        read = self.passed("hidden", states[0]), self.passed("cell", states[1])
        return torch.lstm_cell(x, read, weight_ih, weight_hh, self.bias_ih, self.bias_hh)


class QATGRUCell(QATCell, nn.GRUCell):  # type: ignore[misc]
    """nn.GRUCell with fake quantization (see ``QATCell``)."""

    float_class = nn.GRUCell

    def _next(self, x: Tensor, states: States, weight_ih: Tensor, weight_hh: Tensor) -> States:
        if self.quantizer_of("hidden") is None:
            return (torch.gru_cell(x, states[0], weight_ih, weight_hh, self.bias_ih, self.bias_hh),)
        # torch's own takes one h, for the product and to carry it on.
        hidden = self.passed("hidden", states[0])
        return gru_step(F.linear(x, weight_ih, self.bias_ih), F.linear(hidden, weight_hh, self.bias_hh), states)


class QATRNNCell(QATCell, nn.RNNCell):  # type: ignore[misc]
    """nn.RNNCell with fake quantization (see ``QATCell``)."""

    float_class = nn.RNNCell

    def _is_bounded(self) -> bool:
        return self.nonlinearity == "tanh"

    def _next(self, x: Tensor, states: States, weight_ih: Tensor, weight_hh: Tensor) -> States:
        kernel = torch.rnn_tanh_cell if self.nonlinearity == "tanh" else torch.rnn_relu_cell
        return (kernel(x, self.passed("hidden", states[0]), weight_ih, weight_hh, self.bias_ih, self.bias_hh),)
