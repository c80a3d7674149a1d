"""QATLSTM, QATGRU and QATRNN: recurrent layers that fake-quantize their weights, inputs, states and output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .fake_quantize import FakeQuantize
from .qat_layer import QATLayer, Role
from .quantizer_rules import RULES
from .recurrent_forward import RecurrentForward
from .recurrent_steps import STEPS, Products, SequenceQuantizer, States, run_steps
from .tracing import call_as_leaf


class QATStateful(QATLayer):
    """What recurrent layers and their cells share: quantizers of states.

    A state passes through its quantizer where a step reads it. The hidden state h is quantized for its product alone,
    and is carried on in float: GRU's new state is in part its old one, which would otherwise be rounded again and again
    at every step. The cell state c is carried on as its quantizer gives it, c' = f·Q(c) + i·g.

    h lies within (−1, 1) in an LSTM without projection, in a GRU and in an RNN of tanh, unless the caller starts from a
    larger one. There a quantizer that keeps a scale starts from [−1, 1] and needs no calibration; ``calibrate`` may
    make the range smaller. The quantizers of c, which has no bounds, and of any other h need calibration, or they take
    their scale from the first sequence in training, which then passes in float.
    """

    hidden_size: int
    __call__ = call_as_leaf

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new weights, as torch's layers do; these would draw the parameters of the quantizers too."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    def _is_bounded(self) -> bool:
        """Whether h lies within (−1, 1)."""
        return True

    def products(self) -> Iterator[tuple[str, FakeQuantize | None]]:
        """The names of all weights, each with the quantizer of what it is multiplied by."""
        raise NotImplementedError

    def _prepared(self) -> None:
        for name, role, quantizer in self.own_quantizers():
            if role.kind not in ("hidden", "cell"):
                continue
            if quantizer.quantizer == "ema":
                others = ", ".join(kind for kind, rule in RULES.items() if rule.inputs and kind != "ema")
                raise ValueError(
                    f'{quantizer.name or name}: got quantizer="ema", whose averages would count every step, the last '
                    f"ones most; accepted: {others}"
                )
            if role.kind == "hidden" and self._is_bounded() and not quantizer.is_calibrated:
                one = torch.ones_like(quantizer.scale)
                if not one.is_meta:
                    quantizer.set_range(-one, one)


class QATRecurrent(RecurrentForward, QATStateful):
    """What QATLSTM, QATGRU and QATRNN share (see ``QATStateful`` for their states).

    Roles: each weight by its name, with a scale per row, which is a gate's; "input", and "input_l1" and so on for what
    the upper layers of the stack get, behind dropout; "output" for the last layer's sequence, not the states beside it;
    "hidden_l0" and, of an LSTM, "cell_l0", each layer and direction its own ("hidden_l1_reverse").

    Weights are quantized once for a sequence. If no state is quantized, torch's fused kernels run each layer of the
    stack. Else a loop over the steps does (see ``run_steps``), which takes several times as long. Of a packed sequence,
    quantizers see the valid steps alone.

    torch.compile runs torch's recurrent layers in eager mode, and so these; with ``fullgraph`` it refuses both. It
    compiles cells.
    """

    _all_weights: list[list[str]]

    @classmethod
    def roles(cls, layer: nn.Module) -> dict[str, Role]:
        recurrent: Any = layer
        names = [_Names(names) for names in recurrent._all_weights]
        roles = {weight: Role("weight", weight) for name in names for weight in name.weights}
        roles["input"] = Role("input", per_token=True)
        for index in range(1, recurrent.num_layers):
            roles[f"input_l{index}"] = Role("input", per_token=True)
        roles.update({name.hidden: Role("hidden", per_token=True) for name in names})
        if recurrent.mode == "LSTM":
            roles.update({name.cell: Role("cell", per_token=True) for name in names})
        roles["output"] = Role("output", per_token=True)
        return roles

    def _prepared(self) -> None:
        self._init_flat_weights()  # a list of its own
        super()._prepared()

    def _released(self, module: nn.Module) -> None:
        module._init_flat_weights()  # type: ignore[operator]

    @torch.no_grad()
    def _init_flat_weights(self) -> None:
        # Without gradients: torch's list holds what a parametrization computes, and such a tensor cannot be copied.
        super()._init_flat_weights()  # type: ignore[misc]

    def _is_bounded(self) -> bool:
        return self.mode != "RNN_RELU" and self.proj_size == 0

    def products(self) -> Iterator[tuple[str, FakeQuantize | None]]:
        for index in range(self.num_layers):
            for suffix in self.suffixes(index):
                yield f"weight_ih{suffix}", self.quantizer_of(f"input_l{index}" if index else "input")
                yield f"weight_hh{suffix}", self.quantizer_of(f"hidden{suffix}")
                if self.proj_size:
                    yield f"weight_hr{suffix}", None

    def _check(self, x: Tensor, states: States, sizes: Tensor | None) -> None:
        self.check_forward_args(x, states if len(states) > 1 else states[0], sizes)  # type: ignore[operator]

    def _run_level(self, index: int, x: Tensor, sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        part = slice(index * self.directions, (index + 1) * self.directions)
        names = [_Names(names) for names in self._all_weights[part]]
        quantizers = [(self.quantizer_of(name.hidden), self.quantizer_of(name.cell)) for name in names]
        weights = [[self._weight(key) for key in name.all] for name in names]
        if all(quantizer is None for pair in quantizers for quantizer in pair):
            return self._run_fused(x, sizes, states, weights)
        return self._run_steps(x, sizes, states, weights, quantizers)

    def _weight(self, name: str) -> Tensor:
        value: Tensor = getattr(self, name)
        return self.passed(name, value)

    def _run_steps(
        self,
        x: Tensor,
        sizes: Tensor | None,
        states: States,
        weights: Sequence[Sequence[Tensor]],
        quantizers: Sequence[tuple[FakeQuantize | None, FakeQuantize | None]],
    ) -> tuple[Tensor, States]:
        steps = self._rows_of_steps(x, sizes)

        def run(direction: int, rows: Tensor, first: States) -> tuple[Tensor, States]:
            own, pair = weights[direction], quantizers[direction]
            reads = [SequenceQuantizer(quantizer, state) for quantizer, state in zip(pair, first, strict=False)]
            products = Products.of_weights(own, self.bias)
            result = run_steps(STEPS[self.mode], rows, steps, first, products, reads, reverse=direction == 1)
            for read in reads:
                read.finish()
            return result

        return self._run_directions(x, sizes, states, run)


class _Names:
    """The names of what one direction of one layer has, from those of its weights and biases in torch's order."""

    def __init__(self, names: list[str]) -> None:
        self.all = names
        self.weights = [name for name in names if name.startswith("weight")]
        suffix = names[0].removeprefix("weight_ih")
        self.hidden, self.cell = "hidden" + suffix, "cell" + suffix


class QATLSTM(QATRecurrent, nn.LSTM):  # type: ignore[misc]
    """nn.LSTM with fake quantization (see ``QATRecurrent``)."""

    float_class = nn.LSTM


class QATGRU(QATRecurrent, nn.GRU):  # type: ignore[misc]
    """nn.GRU with fake quantization (see ``QATRecurrent``)."""

    float_class = nn.GRU


class QATRNN(QATRecurrent, nn.RNN):  # type: ignore[misc]
    """nn.RNN with fake quantization (see ``QATRecurrent``)."""

    float_class = nn.RNN
