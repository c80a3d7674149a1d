"""What the tests of recurrent layers share: cases, a model, and the layers' formulas in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import qkernels as qk
from qkernels.qat import QConfig, QSpec


@dataclass
class Case:
    kind: type[nn.Module]
    form: str  # "batch", "single", "sorted" or "unsorted": how the layer gets its sequences
    options: dict[str, Any] = field(default_factory=dict)
    rule: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.kind.__name__, self.form, *self.options, *self.rule])

    def run(self, layer: nn.Module, x: Sequence[Tensor], hx: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs of each sequence, and the last states."""
        first: Any = [state[:, 0] for state in hx] if self.form == "single" else hx
        first = tuple(first) if self.kind is nn.LSTM else first[0]
        if self.form == "single":
            output, last = layer(x[0], first)
            outputs = [output]
        elif self.form == "batch":
            output, last = layer(torch.stack(list(x), 0 if layer.batch_first else 1), first)
            outputs = list(output.unbind(0 if layer.batch_first else 1))
        else:
            output, last = layer(pack_sequence(list(x), self.form == "sorted"), first)
            outputs = rebuilt(output)
        last = list(last) if isinstance(last, tuple) else [last]
        return outputs, [state.unsqueeze(1) for state in last] if self.form == "single" else last


BOTH = {"hidden": {"bits": 5}, "cell": {}}
CASES = (
    Case(nn.LSTM, "unsorted", {"num_layers": 2, "bidirectional": True}, {"output": {}}),
    Case(nn.LSTM, "unsorted", {"num_layers": 2, "bidirectional": True, "bias": False}, BOTH),
    Case(nn.LSTM, "batch", {"batch_first": True, "proj_size": 3, "num_layers": 2}, BOTH),
    Case(nn.LSTM, "single", {"bidirectional": True}, {"cell": QSpec(6, symmetric=False)}),
    Case(nn.LSTM, "sorted", {}, {"hidden": QSpec(symmetric=False), "weight": {"bits": 3}}),
    Case(nn.GRU, "batch", {"bias": False}, {"output": {"bits": 6}}),
    Case(nn.GRU, "unsorted", {"num_layers": 2, "bidirectional": True}, {"hidden": {"bits": 4}}),
    Case(nn.GRU, "single", {"batch_first": True}, {"hidden": QSpec(4, quantizer="minmax")}),
    Case(nn.RNN, "batch", {"batch_first": True, "num_layers": 3}, {"input": {"bits": 4}}),
    Case(nn.RNN, "sorted", {"nonlinearity": "relu", "bidirectional": True}, {"hidden": QSpec(5, symmetric=False)}),
)


def build(case: Case) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """A calibrated layer in fp64 that learns its scales but moves no range; its sequences; and its first states."""
    torch.manual_seed(0)
    model = nn.Sequential(case.kind(5, 8, **case.options)).double()
    lengths = {"single": [4], "batch": [4, 4, 4], "sorted": [5, 3, 1], "unsorted": [2, 5, 1, 4]}[case.form]
    sequences = [torch.randn(length, 5, dtype=torch.float64) for length in lengths]
    layer: Any = model[0]
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = (layer.proj_size or 8, 8) if case.kind is nn.LSTM else (8,)
    states = [torch.randn(count, len(lengths), width, dtype=torch.float64) for width in widths]
    prepared = qk.prepare(model, QConfig(rules=[("0", case.rule)]))
    with torch.no_grad():
        qk.calibrate(prepared, [pack_sequence([0.7 * s for s in sequences], enforce_sorted=False)] * 2)
    qk.freeze_observers(prepared)
    for parameter in prepared.named_parameters():
        if parameter[0].endswith("log_scale"):
            parameter[1].data.add_(0.3)
    return prepared[0], sequences, states


@dataclass
class Reference:
    output: list[Tensor]
    x: list[Tensor]
    hx: list[Tensor]


@dataclass
class QParams:
    parameters: dict[str, Tensor]
    scales: dict[str, tuple[Tensor, Tensor | None, float]]  # scale, zero point and LSQ's factor of each quantizer


def rounded(v: Tensor) -> Tensor:
    return v + (v.round() - v).detach()


def reference(layer: Any, sequences: list[Tensor], states: list[Tensor]) -> tuple[Reference, list[Tensor], QParams]:
    """What a QAT layer whose ranges stand still has to compute, one sequence after the other."""
    x = [s.clone().requires_grad_() for s in sequences]
    hx = [s.clone().requires_grad_() for s in states]
    own = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters() if "fake_quant" not in n}
    qparams = QParams(own, {})

    def quantized(name: str, t: Tensor) -> Tensor:
        quantizer = layer.quantizer_of(name)
        if quantizer is None:
            return t
        if name not in qparams.scales:
            scale = quantizer.scale.detach().to(t.dtype, copy=True).requires_grad_()
            zero_point = None
            if quantizer.zero_point is not None:
                zero_point = quantizer.zero_point.detach().to(t.dtype, copy=True).requires_grad_()
            numel = t.shape[-1]
            qparams.scales[name] = scale, zero_point, (numel * quantizer.steps) ** -0.5
        scale, zero_point, _ = qparams.scales[name]
        low, high = quantizer.quant_min, quantizer.quant_max
        z = 0.0 if zero_point is None else rounded(zero_point)
        v = t / scale + z
        inside = (low < v) & (v < high) if quantizer.quantizer == "lsq" else (low <= v.round()) & (v.round() <= high)
        return (torch.where(inside, rounded(v), v.detach().clamp(low, high).round()) - z) * scale

    weights = {name: quantized(name, t) if name.startswith("weight") else t for name, t in own.items()}
    last: list[list[list[Tensor]]] = [[] for _ in states]
    outputs = []
    for index, sequence in enumerate(x):
        rows = list(sequence)
        ends: list[list[Tensor]] = [[] for _ in states]
        for level in range(layer.num_layers):
            rows = [quantized(f"input_l{level}" if level else "input", row) for row in rows]
            made = []
            for direction in ("", "_reverse")[: 2 if layer.bidirectional else 1]:
                at = len(ends[0])
                state = [s[at, index] for s in hx]
                done = []
                for row in reversed(rows) if direction else rows:
                    state = one_step(layer, f"l{level}{direction}", weights, row, state, quantized)
                    done.append(state[0])
                made.append(done[::-1] if direction else done)
                for end, value in zip(ends, state, strict=True):
                    end.append(value)
            rows = [torch.cat(parts) for parts in zip(*made, strict=True)]
        outputs.append(torch.stack([quantized("output", row) for row in rows]))
        for all_ends, end in zip(last, ends, strict=True):
            all_ends.append(torch.stack(end))  # type: ignore[arg-type]
    return Reference(outputs, x, hx), [torch.stack(ends, 1) for ends in last], qparams  # type: ignore[arg-type]


def one_step(layer: Any, part: str, weights: dict[str, Tensor], x: Tensor, state: list[Tensor], quantized: Any) -> Any:
    zero = torch.zeros(())
    from_x = weights[f"weight_ih_{part}"] @ x + weights.get(f"bias_ih_{part}", zero)
    h = quantized(f"hidden_{part}", state[0])
    from_h = weights[f"weight_hh_{part}"] @ h + weights.get(f"bias_hh_{part}", zero)
    if layer.mode == "LSTM":
        i, f, g, o = (from_x + from_h).chunk(4)
        c = torch.sigmoid(f) * quantized(f"cell_{part}", state[1]) + torch.sigmoid(i) * torch.tanh(g)
        new = torch.sigmoid(o) * torch.tanh(c)
        return [weights[f"weight_hr_{part}"] @ new if layer.proj_size else new, c]
    if layer.mode == "GRU":
        (xr, xz, xn), (hr, hz, hn) = from_x.chunk(3), from_h.chunk(3)
        z, n = torch.sigmoid(xz + hz), torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        return [(1 - z) * n + z * state[0]]
    return [torch.relu(from_x + from_h) if layer.mode == "RNN_RELU" else torch.tanh(from_x + from_h)]


class Tagger(nn.Module):
    """Three scores for every step, from a layer of two levels or from a loop over a cell."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.is_cell = kind.endswith("_cell")
        layers = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
        cells = {"lstm_cell": nn.LSTMCell, "gru_cell": nn.GRUCell, "rnn_cell": nn.RNNCell}
        self.rnn: Any = cells[kind](5, 8) if self.is_cell else layers[kind](5, 8, num_layers=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_cell:
            return self.head(self.rnn(x)[0])
        state, outputs = None, []
        for row in x:
            state = self.rnn(row, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.stack(outputs))


def rule_for(kind: str) -> dict[str, Any]:
    return {"hidden": {}, "cell": {}} if kind.startswith("lstm") else {"hidden": {}}


def leaves(result: Any) -> list[Tensor]:
    output, states = result
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *(states if isinstance(states, tuple) else (states,))]


def packed(x: Tensor, lengths: list[int]) -> PackedSequence:
    return pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)


def rebuilt(sequence: PackedSequence) -> list[Tensor]:
    """The sequences of a packed one, each of its length."""
    padded, lengths = pad_packed_sequence(sequence, batch_first=True)
    return [row[:length] for row, length in zip(padded, lengths.tolist(), strict=True)]
