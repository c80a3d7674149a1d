"""int8_embedding_bag against torch's embedding_bag of the values, and Int8EmbeddingBag against prepared layers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import kernels_of, paths_of, results_on
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.nn import Int8EmbeddingBag, PerGroup, PerTensor
from qkernels.ops.int8_embedding_bag import int8_embedding_bag, int8_embedding_bag_op
from qkernels.qat import QConfig, QSpec

pytestmark = pytest.mark.sanitized
OP = "int8_embedding_bag"
MODES = ("sum", "mean", "max")


def table(
    rows: int, columns: int, groups: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    data = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    zero_point = torch.randint(-128, 128, (rows, groups), dtype=torch.int8)
    return data, (torch.rand(rows, groups) / 100).to(dtype), zero_point


def values(data: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    groups = scale.shape[1]
    codes = data.double().unflatten(1, (groups, -1))
    z = 0 if zero_point is None else zero_point.double()[..., None]
    return ((codes - z) * scale.double()[..., None]).flatten(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("columns", [1, 15, 16, 33, 64, 128, 144, 300])
def test_values(columns: int, mode: str) -> None:
    """All kernels, against fp64; the compiled ones give the same bits, on one thread or several."""
    for groups in [g for g in (1, 3) if columns % g == 0]:
        for dtype, index in ((torch.float32, torch.int64), (torch.bfloat16, torch.int32), (torch.float16, torch.int64)):
            data, scale, zero_point = table(40, columns, groups, dtype)
            indices = torch.randint(40, (700,), dtype=index)
            cuts = torch.randint(700, (60,)).sort().values  # bags of no rows, and of many
            offsets = torch.cat([torch.zeros(1), cuts, torch.tensor([700.0])]).to(index)
            for last in (False, True):
                for z, padding in ((None, -1), (zero_point, 7)):
                    weights = torch.rand(700) if mode == "sum" and z is not None else None
                    options: dict[str, Any] = {"mode": mode, "padding_idx": padding, "include_last_offset": last}
                    wanted = F.embedding_bag(
                        indices.long(), values(data, scale, z), offsets.long(), mode=mode, include_last_offset=last,
                        per_sample_weights=None if weights is None else weights.double(),
                        padding_idx=None if padding < 0 else padding,
                    )  # fmt: skip
                    call = lambda: int8_embedding_bag(data, scale, z, indices, offsets, weights=weights, **options)  # noqa: B023, E731
                    made = [results_on(kernel, n, [call])[0] for kernel in paths_of(OP) for n in (1, 3)]
                    with qk.use_kernel("reference"):
                        made.append(call())
                    for y in made:
                        # Each of n terms is rounded a few times, to 2^-24 of what the sum of magnitudes is at most.
                        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=2e-4)
                    for y in made[1:-1]:
                        assert torch.equal(y, made[0])


@pytest.mark.parametrize("kernel", kernels_of(OP))
def test_empty(kernel: str) -> None:
    data, scale, zero_point = table(5, 8)
    none = torch.zeros(0, dtype=torch.int64)
    with qk.use_kernel(kernel):
        for mode in MODES:
            assert torch.equal(
                int8_embedding_bag(data, scale, zero_point, none, torch.zeros(3, dtype=torch.int64), mode=mode),
                torch.zeros(3, 8),
            )
            y = int8_embedding_bag(data, scale, None, none, torch.zeros(1).long(), mode=mode, include_last_offset=True)
            assert y.shape == (0, 8)


@pytest.mark.parametrize("kernel", kernels_of(OP))
def test_what_is_not_finite(kernel: str) -> None:
    """A scale that is NaN or infinite reaches its bags, and no other."""
    data, scale, _ = table(6, 20)
    data[2] = 1
    scale[2], scale[3] = torch.nan, torch.inf
    indices, offsets = torch.tensor([0, 2, 1, 2, 0, 4, 5]), torch.tensor([0, 2, 4, 5])
    with qk.use_kernel(kernel):
        for mode in MODES:
            y = int8_embedding_bag(data, scale, None, indices, offsets, mode=mode)
            assert bool(y[:2].isnan().all())
            assert bool(y[2:].isfinite().all())


REFUSALS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"indices": torch.tensor([0, 5])}, "indices: got 5; accepted: 0 to 4"),
    ({"indices": torch.tensor([-1, 0])}, "indices: got -1; accepted: 0 to 4"),
    ({"indices": torch.zeros(2)}, "indices: got torch.float32; accepted: torch.int32, torch.int64"),
    ({"offsets": torch.tensor([0, 3])}, "offsets: got 3 at 1; accepted: 0, and from there on"),
    ({"offsets": torch.tensor([1])}, "offsets: got 1 at 0; accepted: 0, and"),
    ({"offsets": torch.tensor([0, 2, 1])}, "offsets: got 1 at 2; accepted"),
    ({"weights": torch.rand(2), "mode": "max"}, "weights: got a tensor with mode='max'; accepted: None"),
    ({"weights": torch.rand(3)}, r"weights: got shape \[3\]; accepted: \[L\] with 2"),
    ({"mode": "median"}, "mode: got 'median'; accepted: sum, mean, max"),
    ({"padding_idx": 5}, "padding_idx: got 5; accepted: -1 to 4"),
    ({"scale": torch.rand(5)}, r"scale: got shape \[5\]; accepted: contiguous \[rows, groups\]"),
)


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[message[:40] for _, message in REFUSALS])
@pytest.mark.parametrize("kernel", kernels_of(OP))
def test_refusals(kernel: str, change: dict[str, Any], message: str) -> None:
    data, scale, zero_point = table(5, 8)
    args: dict[str, Any] = {"indices": torch.tensor([0, 4]), "offsets": torch.tensor([0, 1]), "scale": scale}
    with qk.use_kernel(kernel), pytest.raises(RuntimeError, match=message):
        int8_embedding_bag(data, zero_point=zero_point, **{**args, **change})


def test_opcheck() -> None:
    data, scale, zero_point = table(5, 8)
    args = data, scale, zero_point, torch.tensor([0, 4, 1]), torch.tensor([0, 1, 3]), None, "mean", 4, True
    torch.library.opcheck(int8_embedding_bag_op, args)


SPECS = {
    "8": QSpec(8),
    "6 with zero points": QSpec(6, symmetric=False),
    "4": QSpec(4),
    "3 in groups": QSpec(3, PerGroup(4), symmetric=False),
    "one scale": QSpec(8, PerTensor()),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"mode": "sum", "padding_idx": 3},
    "mean": {"mode": "mean", "include_last_offset": True},
    "max": {"mode": "max", "padding_idx": -1},
}


def converted(spec: QSpec, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(40, 20, **options)).to(dtype)
    prepared = qk.prepare(model, QConfig(spec)).eval()
    return model, prepared, qk.convert(prepared)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_prepared_layer(options: str, spec: str) -> None:
    _, prepared, made = converted(SPECS[spec], OPTIONS[options])
    assert type(made[0]) is Int8EmbeddingBag
    indices = torch.tensor([3, 7, 39, 7, 0, 3, 12, 3, 5])
    offsets = torch.tensor([0, 3, 3, 5, 9])
    layer, own = made[0], prepared[0]
    cases = [(indices.view(3, 3), None), (indices, offsets), (indices.int(), offsets.int())]
    for input, at in cases:
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
            got, wanted = copy.deepcopy(layer).to(dtype)(input, at), copy.deepcopy(own).to(dtype)(input, at)
            assert got.dtype == dtype
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
        assert torch.equal(copy.deepcopy(layer).bfloat16()(input, at), layer(input, at).bfloat16())
    if options == "sum":
        weights = torch.rand(9)
        one, other = weights.clone().requires_grad_(), weights.clone().requires_grad_()
        torch.testing.assert_close(layer(indices, offsets, weights), own(indices, offsets, weights))
        layer(indices, offsets, one).square().sum().backward()
        own(indices, offsets, other).square().sum().backward()
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("bits", [8, 3])
def test_life(bits: int, tmp_path: Path) -> None:
    model, prepared, made = converted(QSpec(bits, symmetric=False), OPTIONS["mean"])
    indices = torch.arange(12).view(4, 3)
    y = made(indices)
    qk.save(made, tmp_path / "bags.safetensors")
    loaded = qk.load(tmp_path / "bags.safetensors", model)
    for same in (loaded, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(same[0]) is Int8EmbeddingBag
        assert torch.equal(same(indices), y)
    assert made.state_dict()["0.codes"].dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert torch.equal(made[0].weight, prepared[0].weight_fake_quant(prepared[0].weight))
    assert (made[0].mode, made[0].include_last_offset) == ("mean", True)
    assert torch.equal(qk.exact(prepared)(indices), y)
    (row,) = qk.report(made, indices, float_model=model).layers
    assert (row.kind, row.weight_bits) == ("Int8EmbeddingBag", bits)
    traced = torch.fx.symbolic_trace(made)
    assert torch.equal(traced(indices), y)
    assert torch.equal(torch.compile(made, fullgraph=True, backend="aot_eager")(indices), y)


def test_from_float() -> None:
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(30, 16, mode="sum", padding_idx=2)
    bag.note = "kept"
    made = Int8EmbeddingBag.from_float(bag)
    indices = torch.arange(30).view(10, 3)
    torch.testing.assert_close(made(indices), bag(indices), rtol=0.02, atol=0.05)
    assert made.note == "kept"
    assert made.padding_idx == 2
    assert Int8EmbeddingBag.from_float(bag, 8, False, weight_bits=4, scale_dtype=torch.bfloat16).scale.shape == (30, 2)
    with pytest.raises(ValueError, match="embedding: got max_norm=1"):
        Int8EmbeddingBag.from_float(nn.EmbeddingBag(3, 4, max_norm=1.0))
    with pytest.raises(RuntimeError, match="weight_bits: got 9; accepted: 2 to 8"):
        Int8EmbeddingBag.from_float(bag, weight_bits=9)
    for input, offsets, message in (
        (indices, torch.tensor([0]), "offsets: got a tensor with an input of 2 dims; accepted: a tensor with 1 dim"),
        (indices[0], None, "offsets: got None with an input of 1 dims"),
        (indices[None], None, "input: got 3 dims; accepted: 1 with offsets, or 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            made(input, offsets)
