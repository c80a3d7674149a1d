"""Int8LSTMCell, Int8GRUCell, Int8RNNCell: equal to the prepared cells they are made of, in every option; their life."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels.nn import Int8GRUCell, Int8Linear, Int8LSTMCell, Int8RNNCell, PerGroup, PerToken
from qkernels.qat import QConfig, QSpec

CELLS: dict[Any, Any] = {nn.LSTMCell: Int8LSTMCell, nn.GRUCell: Int8GRUCell, nn.RNNCell: Int8RNNCell}
OPTIONS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (nn.LSTMCell, {}),
    (nn.LSTMCell, {"bias": False}),
    (nn.GRUCell, {}),
    (nn.GRUCell, {"bias": False}),
    (nn.RNNCell, {}),
    (nn.RNNCell, {"nonlinearity": "relu", "bias": False}),
)
PER_TOKEN = QSpec(8, PerToken(), quantizer="dynamic")
CONFIGS: dict[str, tuple[QConfig, dict[str, Any]]] = {
    "default": (QConfig(), {}),
    "weights": (QConfig(input=None), {}),
    "groups": (QConfig(QSpec(8, PerGroup(4), symmetric=False), None), {}),
    "hidden": (QConfig(QSpec(4)), {"hidden": QSpec(symmetric=False)}),
    "tokens": (QConfig(QSpec(5), PER_TOKEN), {"hidden": PER_TOKEN}),
    "dynamic": (QConfig(), {"hidden": QSpec(7, quantizer="dynamic")}),
    "cell": (QConfig(), {"hidden": {}, "cell": QSpec(6, symmetric=False)}),
}


class Loop(nn.Module):
    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell: Any = cell

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        outputs = []
        for row in x.unbind(0):
            state = self.cell(row, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


def made(kind: Any, options: dict[str, Any], config: str) -> tuple[Any, Any, Any]:
    """A loop over a cell, prepared and converted."""
    torch.manual_seed(0)
    model = Loop(kind(12, 20, **options))
    base, rule = CONFIGS[config]
    rule = rule if kind is nn.LSTMCell else {key: value for key, value in rule.items() if key != "cell"}
    prepared = qk.prepare(model, QConfig(base.weight, base.input, rules=[("cell", rule)] if rule else ()))
    qk.calibrate(prepared, [torch.randn(6, 4, 12)])
    return model, prepared.eval(), qk.convert(prepared)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=lambda v: "-".join(v) if isinstance(v, dict) else v.__name__)
def test_equals_the_prepared_cell(kind: Any, options: dict[str, Any], config: str) -> None:
    _, prepared, converted = made(kind, options, config)
    assert type(converted.cell) is CELLS[kind]
    assert list(converted.cell.parts) == ["ih", "hh"]
    states = [torch.rand(4, 20) - 0.5 for _ in range(2 if kind is nn.LSTMCell else 1)]
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.float64, 1e-9)):
        own = copy.deepcopy(prepared).to(dtype)
        hx: Any = tuple(state.to(dtype) for state in states)
        for x in (torch.randn(6, 4, 12, dtype=dtype), torch.randn(6, 4, 24, dtype=dtype)[..., ::2]):
            for state in (None, hx if kind is nn.LSTMCell else hx[0]):
                with torch.no_grad():
                    got, wanted = converted(x, state), own(x, state)
                assert got.dtype == dtype
                torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
                assert float((got - wanted).abs().quantile(0.5)) <= 1e-5
        torch.testing.assert_close(converted(x[:, 0]), own(x[:, 0]), rtol=tolerance, atol=tolerance)  # one sample
        assert converted(x[:, :0]).shape == (6, 0, 20)


@pytest.mark.parametrize("kind", CELLS)
def test_halves_autocast_and_gradients(kind: Any) -> None:
    _, prepared, converted = made(kind, {}, "weights")
    x = torch.randn(6, 4, 12)
    wanted = converted(x)
    for dtype in (torch.bfloat16, torch.float16):
        y = copy.deepcopy(converted).to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), wanted, rtol=3e-2, atol=3e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert converted(x).dtype == torch.bfloat16
    grads = []
    for module in (prepared, converted):
        own = x.clone().requires_grad_()
        module(own).sin().sum().backward()
        grads.append((own.grad, module.cell.bias_ih.grad, module.cell.bias_hh.grad))
    for made_, other in zip(*grads, strict=True):
        torch.testing.assert_close(made_, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CELLS)
def test_life(kind: Any, tmp_path: Path) -> None:
    """Saved and loaded by name, pickled, copied, reported and compiled."""
    model, prepared, converted = made(kind, {}, "cell")
    x = torch.randn(5, 3, 12)
    with torch.no_grad():
        y = converted(x)
    qk.save(converted, tmp_path / "cell.safetensors")
    loaded = qk.load(tmp_path / "cell.safetensors", model)
    qk.save(qk.convert(made(kind, {}, "default")[1]), tmp_path / "floats.safetensors")
    in_float = qk.load(tmp_path / "floats.safetensors", model)
    assert all(isinstance(part, Int8Linear) and part.is_packed for part in in_float.cell.parts.values())
    for same in (loaded, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert type(same.cell) is CELLS[kind]
        assert torch.equal(same(x), y)
    assert torch.equal(qk.exact(prepared)(x), y)
    with torch.no_grad():
        compiled = torch.compile(converted.cell, fullgraph=True, backend="aot_eager")
        first, wanted = compiled(x[0]), converted.cell(x[0])
    torch.testing.assert_close(first, wanted, rtol=0, atol=0)
    (row,) = qk.report(converted, x, float_model=model).layers
    assert (row.kind, row.weight_bits, row.input_bits) == (CELLS[kind].__name__, 8, 8)
    weight = prepared.cell.weight_hh_fake_quant(prepared.cell.weight_hh)
    torch.testing.assert_close(converted.cell.weight_hh, weight)
    assert torch.equal(converted.cell.bias_ih, model.cell.bias_ih)
    assert "(hh): Int8Linear(" in str(converted.cell)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("act_bits", [8, 16])
def test_from_float(kind: Any, act_bits: int) -> None:
    torch.manual_seed(0)
    cell = kind(32, 48)
    cell.note = "kept"
    made_ = CELLS[kind].from_float(cell, act_bits=act_bits)
    x = torch.randn(6, 32)
    got, wanted = made_(x), cell(x)
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)
    assert made_.note == "kept"
    with pytest.raises(TypeError, match=f"layer: got Linear; accepted: {kind.__name__}"):
        CELLS[kind].from_float(nn.Linear(3, 3))


def test_refusals() -> None:
    cell = Int8LSTMCell.from_float(nn.LSTMCell(12, 20))
    x, h = torch.randn(4, 12), torch.zeros(4, 20)
    for input, hx, message in (
        (x[:, :5], None, "input: got 5 features; accepted: 12"),
        (x[None], None, r"input: got 3 dims; accepted: 1 \(one sample\) or 2"),
        (x.long(), None, "input: got torch.int64; accepted: a floating dtype"),
        (x, (h,), "hx: got 1 tensors; accepted: 2"),
        (x, (h, h[:1]), r"hx: got a state of shape \[1, 20\]; accepted: \[4, 20\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cell(input, hx)
