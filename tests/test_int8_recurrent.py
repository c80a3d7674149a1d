"""int8_recurrent: every kernel against the reference bit for bit, the reference against torch's layers; threads."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from compare import same
from conftest import kernels_of, paths_of, results_on
from torch import Tensor

import qkernels as qk
from qkernels.ops.int8_recurrent import int8_recurrent, int8_recurrent_op
from qkernels.recurrent_checks import GATES, STATES
from qkernels.reference.int8_recurrent import int8_recurrent as reference

pytestmark = pytest.mark.sanitized
OP = "int8_recurrent"
STATIC = {"hidden_scale": torch.tensor([1 / 127])}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "static": STATIC,
    "asymmetric": {"hidden_scale": torch.tensor(0.01), "hidden_zero_point": torch.tensor([-7]), "quant_max": 100},
    "4 bits": {"hidden_scale": torch.tensor([0.1]), "quant_min": -8, "quant_max": 7},
    "float": {"float_hidden": True},
}


def operands(mode: str, n: int, hidden: int, rows: int) -> tuple[Any, ...]:
    """gates, states, mode, data, colsum, scale."""
    q = torch.randint(-127, 128, (GATES[mode] * hidden, hidden), dtype=torch.int8)
    packed = qk.PackedInt8.from_quantized(q, torch.rand(len(q)) * 0.02 / max(hidden, 1) ** 0.5)
    states = torch.rand(STATES[mode], n, hidden) * 2 - 1
    return torch.randn(rows, len(q)), states, mode, packed.data, packed.colsum, packed.scale


def check(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, want, strict=True):
        same(one, other)


def on_each_path(args: tuple[Any, ...], options: dict[str, Any], *, counts: tuple[int, ...] = (1,)) -> None:
    with qk.use_kernel("reference"):
        want = int8_recurrent(*args, **options)
    for kernel in paths_of(OP):
        for threads in counts:
            check(tuple(results_on(kernel, threads, [lambda: int8_recurrent(*args, **options)])), want)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("mode", GATES)
def test_values(mode: str, quantizer: str) -> None:
    """Panels that end with gates and that do not, rows in one block and in several, packed and reversed."""
    for n, hidden in ((3, 8), (1, 32), (2, 33), (50, 64), (5, 1)):
        sizes = [n, n, n // 2 + 1, 1]
        for rows, options in (
            (4 * n, {}),
            (4 * n, {"reverse": True, "bias": torch.randn(GATES[mode] * hidden).bfloat16()}),
            (sum(sizes), {"sizes": sizes}),
            (sum(sizes), {"sizes": sizes, "reverse": True}),
        ):
            on_each_path(operands(mode, n, hidden, rows), {**QUANTIZERS[quantizer], **options})


def test_many_tasks() -> None:
    """Enough work for several threads: the tasks of one step go to whoever comes."""
    for mode, n, hidden in (("LSTM", 1, 512), ("GRU", 60, 200), ("RNN_TANH", 100, 320)):
        for quantizer in ("static", "float"):
            on_each_path(operands(mode, n, hidden, 3 * n), QUANTIZERS[quantizer], counts=(1, 2, 3))


@pytest.mark.parametrize("reverse", [False, True])
def test_cells(reverse: bool) -> None:
    args, options = operands("LSTM", 3, 20, 12), {**STATIC, "reverse": reverse, "cell_scale": torch.tensor([0.3])}
    on_each_path(args, {**options, "cell_min": -4, "cell_max": 3})
    on_each_path(args, {**options, "cell_zero_point": torch.tensor([5], dtype=torch.int32)})


@pytest.mark.parametrize("mode", GATES)
def test_against_torch(mode: str) -> None:
    """With h in float the reference is torch's layer on the dequantized weight, in fp64."""
    kind = {"LSTM": torch.nn.LSTM, "GRU": torch.nn.GRU}.get(mode, torch.nn.RNN)
    options = {} if mode in ("LSTM", "GRU") else {"nonlinearity": mode.removeprefix("RNN_").lower()}
    layer = kind(7, 20, **options).double()
    gates, states, _, data, colsum, scale = operands(mode, 3, 20, 12)
    q = qk.PackedInt8(data, colsum, scale, (len(scale), 20)).unpack()[0]
    x = torch.randn(4, 3, 7, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(q * scale[:, None])
        gates = (x.flatten(0, 1) @ layer.weight_ih_l0.T + layer.bias_ih_l0).float()
        hx = tuple(states[:, None].double())
        y, last = layer(x, hx if mode == "LSTM" else hx[0])
    none = None, None, -128, 127
    bias = layer.bias_hh_l0.detach()
    got = reference(gates, states, [], mode, data, colsum, scale, bias, True, *none, *none, False)
    torch.testing.assert_close(got[0].double(), y.flatten(0, 1), rtol=1e-5, atol=1e-5)
    last = torch.cat(last) if mode == "LSTM" else last
    torch.testing.assert_close(got[1].double(), last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", GATES)
def test_unusual_values_and_layouts(mode: str) -> None:
    """NaN stays in its row, infinities saturate; strided and empty tensors."""
    gates, states, *weight = operands(mode, 4, 33, 12)
    gates[0, 0], gates[1, 5], gates[5, 2], states[0, 3, 1] = math.nan, math.inf, -math.inf, math.nan
    on_each_path((gates, states, *weight), STATIC)
    on_each_path((gates, states, *weight), {})
    on_each_path((gates, states, *weight), QUANTIZERS["float"])
    y, _ = int8_recurrent(gates, states, *weight, **STATIC)
    assert not bool(y[4].isfinite().any())
    assert bool(y[[5, 6, 9, 10]].isfinite().all()) or mode == "RNN_RELU"
    wide = torch.randn(12, 2 * gates.shape[1])[:, ::2]
    on_each_path((wide, states.transpose(1, 2).contiguous().transpose(1, 2), *weight), STATIC)
    for n, rows in ((4, 0), (0, 0)):
        args = operands(mode, n, 33, rows)
        y, last = int8_recurrent(*args, **STATIC)
        assert y.shape == (0, 33)
        assert torch.equal(last, args[1])
    y, last = int8_recurrent(*operands(mode, 4, 0, 12), **STATIC)
    assert y.shape == (12, 0)


@pytest.mark.parametrize("hidden", [1, 7, 16, 50, 512])
def test_states_in_float_are_as_exact_as_fp32(hidden: int) -> None:
    """The sums of the reference against fp64: within what a sum in fp32 may be off, from tiny to huge states."""
    from qkernels.reference.int8_recurrent import three_codes

    q = torch.randint(-127, 128, (64, hidden)).double()
    for size in (1e-42, 1e-30, 1.0, 0.99609375, 127.5, 3e38):
        h = (torch.rand(4, hidden) * 2 - 1) * size
        h[0] = 0
        h[1, 0] = size  # the largest of its row is all but a power of two, and one
        h[2, 0] = size * (127 / 128)
        codes, unit = three_codes(h)
        assert int(codes.abs().max()) <= 128
        values = sum(c * u.double() for c, u in zip(codes, unit, strict=True))
        worst = h.abs().amax(1, keepdim=True).double() * 2**-23 * 1.01 + 2.0**-126
        assert bool(((values - h.double()).abs() <= worst).all())
        sums, wanted = values @ q.t(), h.double() @ q.t()
        in_fp32 = h.abs().amax(1).double() * 2**-23 * q.abs().sum(1).max() + 2.0**-126 * 127 * hidden
        assert bool(((sums - wanted).abs() <= in_fp32[:, None]).all())


def test_threads_that_call_at_once() -> None:
    """Each call's threads wait for each other's tasks, in whatever order they come: none waits for ever."""
    torch.set_num_threads(4)
    args = operands("LSTM", 4, 256, 40)
    want = int8_recurrent(*args, **STATIC)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: int8_recurrent(*args, **STATIC), range(24)):
            check(got, want)


def test_opcheck() -> None:
    for mode in ("LSTM", "GRU"):
        gates, states, _, *weight = operands(mode, 3, 8, 6)
        hidden = STATIC["hidden_scale"], None, -128, 127
        args = (gates, states, [3, 2, 1], mode, *weight, None, False, *hidden, None, None, -8, 7, True)
        torch.library.opcheck(int8_recurrent_op, args)


ONE = torch.ones(1)
REFUSALS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"mode": "lstm"}, "mode: got 'lstm'; accepted: LSTM, GRU, RNN_TANH, RNN_RELU"),
    ({"gates": torch.randn(6, 31)}, r"gates: got shape \[6, 31\]; accepted: \[rows, 32\]"),
    ({"gates": torch.randn(7, 32)}, "gates: got 7 rows; accepted: a multiple of the 3 rows of states, or sizes"),
    ({"gates": torch.randn(6, 32).double()}, "gates: got torch.float64; accepted: torch.float32"),
    ({"gates": torch.randn(32)}, r"gates: got shape \[32\]; accepted: \[rows, gates·H\]"),
    ({"states": torch.randn(1, 3, 8)}, r"states: got shape \[1, 3, 8\]; accepted: \[2, N, H\]"),
    ({"states": torch.randn(3, 8)}, r"states: got shape \[3, 8\]; accepted: "),
    ({"sizes": [3, 2]}, "sizes: got a sum of 5; accepted: the rows of gates, 6"),
    ({"sizes": [2, 4]}, r"sizes: got \[2, 4\]; accepted: from at most 3, the rows of states, down to at least 1"),
    ({"sizes": [3, 3, 0]}, r"sizes: got \[3, 3, 0\]; accepted: from at most 3"),
    ({"data": torch.zeros(1, 1, 32, 4, dtype=torch.int8)}, "data: got .*; accepted: what "),
    ({"colsum": torch.zeros(32)}, "colsum: got torch.float32; accepted: contiguous torch.int32"),
    ({"float_hidden": True}, "hidden_scale, hidden_zero_point: got a tensor with float_hidden; accepted: None"),
    ({"scale": torch.ones(31)}, r"scale: got shape \[31\]"),
    ({"bias": torch.ones(31)}, r"bias: got shape \[31\]"),
    ({"hidden_scale": torch.ones(2)}, r"hidden_scale: got shape \[2\]; accepted: one element"),
    ({"hidden_scale": None, "hidden_zero_point": ONE.int()}, "hidden_zero_point: got a tensor without hidden_scale"),
    ({"hidden_zero_point": torch.tensor([300])}, "hidden_zero_point: got 300; accepted: quant_min to quant_max"),
    ({"quant_max": 128}, "quant_m.*: got .*128; accepted: -128 <= "),
    ({"cell_scale": torch.ones(2)}, r"cell_scale: got shape \[2\]; accepted: one element"),
    ({"cell_scale": ONE, "cell_zero_point": torch.tensor([9])}, "cell_zero_point: got 9; accepted: quant_min to"),
    ({"mode": "GRU", "gates": torch.randn(6, 24), "cell_scale": ONE}, "cell_scale: got a tensor with mode='GRU'"),
)


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[message[:40] for _, message in REFUSALS])
@pytest.mark.parametrize("kernel", kernels_of(OP))
def test_refusals(kernel: str, change: dict[str, Any], message: str) -> None:
    mode = change.get("mode", "LSTM")
    gates, states, _, data, colsum, scale = operands(mode if mode in GATES else "LSTM", 3, 8, 6)
    args: dict[str, Any] = {"gates": gates, "states": states, "mode": mode, "data": data, "colsum": colsum}
    args.update(scale=scale, **STATIC, cell_max=7)
    with qk.use_kernel(kernel), pytest.raises(RuntimeError, match=message):
        int8_recurrent(**{**args, **change})
