"""Int4Linear and Int4Embedding: values against fp64, memory, compiled and exported code, bad arguments."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch._dynamo.testing
from int4_layers import FORMS, SCALES, assert_same, embedding, filled, state_bytes, static
from torch import nn

from qkernels.nn import FakeQuantize, Int4Embedding, Int4Linear, Int8Linear, PerTensor, PerToken


def quantized_by_hand(w, bits, group_size, symmetric, scale_dtype=torch.float32):
    """Codes, scale and zero point of each group, in fp64 from the rounded scale on."""
    n, k = w.shape
    groups = w.detach().float().reshape(n, -1, group_size)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    zero_point = torch.zeros(groups.shape[:2])
    if symmetric:
        scale = groups.abs().amax(2) / high
    else:
        least, most = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = (most - least) / (2**bits - 1)
        zero_point = low - (least / scale).round()
    scale = scale.to(scale_dtype)
    codes = ((groups * (1 / scale.float())[..., None]).round() + zero_point[..., None]).clamp(low, high)
    values = (codes - zero_point[..., None]).double() * scale.double()[..., None]
    return codes.reshape(n, k), scale, zero_point, values.reshape(n, k)


@pytest.mark.parametrize(("bits", "symmetric"), FORMS)
@pytest.mark.parametrize(("k", "group_size"), [(96, 32), (72, 24), (33, -1), (5, 5), (80, 16)])
@pytest.mark.parametrize("act_bits", [8, 16])
def test_linear_from_float_by_hand(act_bits, k, group_size, bits, symmetric):
    for n, bias, scale_dtype in itertools.product((7, 33), (True, False), SCALES):
        linear = nn.Linear(k, n, bias)
        layer = Int4Linear.from_float(
            linear, group_size, symmetric, act_bits, weight_bits=bits, scale_dtype=scale_dtype
        )  # fmt: skip
        size = k if group_size == -1 else group_size
        codes, scale, zero_point, values = quantized_by_hand(linear.weight, bits, size, symmetric, scale_dtype)
        assert torch.equal(layer.codes, codes.to(torch.int8))
        assert layer.scale.dtype == scale_dtype
        assert torch.equal(layer.scale, scale)
        assert (layer.zero_point is None) == symmetric
        assert symmetric or torch.equal(layer.zero_point, zero_point.to(torch.int8))
        assert layer.minimum is None
        torch.testing.assert_close(layer.dequantize().double(), values, rtol=1e-5, atol=1e-6)
        x = torch.randn(2, 3, k)
        fed = x.double()
        if act_bits == 8:
            input_scale = x.abs().amax(-1, keepdim=True) / 127
            fed = (x / input_scale).round().double() * input_scale.double()
        expected = fed @ values.t() + (linear.bias.double() if bias else 0)
        y = layer(x)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(x[0, 0]), y[0, 0])
        torch.testing.assert_close(layer(x.transpose(0, 1)), y.transpose(0, 1))
        assert layer(torch.empty(0, 3, k)).shape == (0, 3, n)
        for dtype in (torch.bfloat16, torch.float16):
            assert layer(x.to(dtype)).dtype == dtype
            torch.testing.assert_close(layer(x.to(dtype)).double(), expected, rtol=0.05, atol=0.05)


def test_linear_from_float_keeps_mode_and_refuses_nan():
    linear = nn.Linear(32, 3).eval()
    assert not Int4Linear.from_float(linear).training
    assert Int4Linear.from_float(linear.train()).training
    with torch.no_grad():
        linear.weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match="weight: got NaN"):
        Int4Linear.from_float(linear)
    assert type(linear) is nn.Linear


INPUTS = {
    "per token": lambda: FakeQuantize(granularity=PerToken(), quantizer="dynamic"),
    "per tensor": lambda: FakeQuantize(granularity=PerTensor(), quantizer="dynamic"),
    "per tensor, zero point": lambda: FakeQuantize(quantizer="dynamic", symmetric=False),
    "static": lambda: static(True),
    "static, zero point": lambda: static(False),
    "static, 4 bits": lambda: static(False, 4),
}


@pytest.mark.parametrize("kind", ["symmetric", "zero_point", "minimum"])
@pytest.mark.parametrize("input", [*INPUTS, None])
def test_every_input_by_hand(input, kind):
    layer = filled(kind, input=input, act_bits=16 if input is None else 8)
    x = torch.randn(2, 9, 48) + 0.3
    fed = x if input is None else INPUTS[input]()(x)
    codes, scale = layer.codes.double(), layer.scale.double().repeat_interleave(16, 1)
    if kind == "zero_point":
        codes = codes - layer.zero_point.double().repeat_interleave(16, 1)
    weight = codes * scale
    if kind == "minimum":
        weight = (codes + 8) * scale + layer.minimum.double().repeat_interleave(16, 1)
    torch.testing.assert_close(layer.dequantize().double(), weight, rtol=1e-6, atol=1e-6)
    expected = fed.detach().double() @ weight.t() + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=2e-4)


def test_memory_is_that_of_the_codes():
    """No copy of weight or scales beside the packed ones."""
    layer = Int4Linear.from_float(nn.Linear(1024, 1024, bias=False), 128)
    held = state_bytes({**dict(layer.named_buffers()), **dict(layer.named_parameters())})
    assert held <= state_bytes(layer.state_dict()) + 4 * 1024


def all_linear(bias: bool) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(1024, 1024, bias) for _ in range(4)))


def file_bytes(model: nn.Module, path) -> int:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(model.state_dict(), str(path))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert abs(len(buffer.getvalue()) / path.stat().st_size - 1) < 0.01
    return path.stat().st_size


@pytest.mark.parametrize(
    ("bias", "scale_dtype", "int4_ratio"),
    [
        (False, torch.float16, 7.75),
        (False, torch.float32, 7.5),
        (True, torch.float16, 7.7),
        (True, torch.float32, 7.47),  # 4 + 32/128 + 32/1024 bits for each weight, of 32 + 32/1024
    ],
)
def test_size_of_the_file(bias, scale_dtype, int4_ratio, tmp_path):
    model = all_linear(bias)
    fp32 = file_bytes(model, tmp_path / "fp32.safetensors")
    int4 = nn.Sequential(*(Int4Linear.from_float(layer, 128, scale_dtype=scale_dtype) for layer in model))
    int8 = nn.Sequential(*(Int8Linear.from_float(layer) for layer in model))
    assert fp32 / file_bytes(int4, tmp_path / "int4.safetensors") >= int4_ratio
    assert fp32 / file_bytes(int8, tmp_path / "int8.safetensors") >= 3.9


@pytest.mark.parametrize("input", [*INPUTS, None])
@pytest.mark.parametrize("kind", ["symmetric", "zero_point", "minimum"])
def test_linear_compiles_and_exports(kind, input):
    torch._dynamo.reset()
    layer = filled(kind, input=input, act_bits=16 if input is None else 8).eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    x = torch.randn(6, 48)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    frames = []
    with torch.no_grad():
        for batch in (6, 3, 11):
            x = torch.randn(batch, 48)
            torch.testing.assert_close(compiled(x), layer(x))
            torch.testing.assert_close(exported(x), layer(x))
            frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


@pytest.mark.parametrize(("bits", "symmetric"), FORMS)
def test_embedding_compiles_and_exports(bits, symmetric):
    torch._dynamo.reset()
    layer = embedding("symmetric" if symmetric else "zero_point", bits).eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    ids = torch.randint(19, (4, 3))
    exported = torch.export.export(layer, (ids,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for batch in (4, 2, 9):
        ids = torch.randint(19, (batch, 3))
        assert torch.equal(compiled(ids), layer(ids))
        assert torch.equal(exported(ids), layer(ids))
    assert counter.frame_count == 1


@pytest.mark.parametrize(("bits", "symmetric"), FORMS)
@pytest.mark.parametrize(("dim", "group_size"), [(96, 32), (72, 24), (33, -1), (7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_embedding_by_hand(dtype, dim, group_size, bits, symmetric):
    table = nn.Embedding(23, dim, padding_idx=-2, dtype=dtype)
    for scale_dtype in SCALES:
        layer = Int4Embedding.from_float(table, group_size, symmetric, weight_bits=bits, scale_dtype=scale_dtype)
        size = dim if group_size == -1 else group_size
        *_, values = quantized_by_hand(table.weight.detach().clone().index_fill_(0, torch.tensor(21), 1),
                                       bits, size, symmetric, scale_dtype)  # fmt: skip
        values[21] = 0  # the padding row, which has no range of its own
        for ids in (torch.arange(23), torch.randint(23, (2, 3, 4)), torch.tensor(5), torch.arange(23).int()[::2]):
            y = layer(ids)
            assert y.dtype == dtype
            assert y.shape == (*ids.shape, dim)
            tolerance = 2 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6
            torch.testing.assert_close(y.double(), values[ids.long()], rtol=tolerance, atol=1e-6)
        assert layer(torch.empty(0, 4, dtype=torch.int64)).shape == (0, 4, dim)
        assert layer.padding_idx == 21
        assert torch.equal(layer(torch.tensor([21])), torch.zeros(1, dim, dtype=dtype))
        torch.testing.assert_close(layer.dequantize().double(), values, rtol=1e-6, atol=1e-6)


def test_embedding_unpacks_the_rows_it_needs_alone(monkeypatch):
    from qkernels.nn import integer_embedding

    layer, seen = embedding(), []
    unpack = integer_embedding.unpack_bits
    monkeypatch.setattr(
        integer_embedding, "unpack_bits", lambda packed, *args: seen.append(packed.shape) or unpack(packed, *args)
    )
    layer(torch.tensor([[1, 2, 1]]))
    assert seen == [(1, 3, 24)]


def test_embedding_follows_casts():
    layer = embedding()
    expected = layer(ids := torch.arange(19))
    for cast, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64)):
        moved = getattr(nn.Sequential(copy.deepcopy(layer)), cast)()[0]
        assert moved(ids).dtype == dtype
        assert moved.scale.dtype == torch.float32
        torch.testing.assert_close(moved(ids), expected.to(dtype))
        assert pickle.loads(pickle.dumps(moved))(ids).dtype == dtype


def test_embedding_refuses_what_it_cannot_keep():
    with pytest.raises(ValueError, match=r"embedding: got max_norm=1\.0; accepted: None"):
        Int4Embedding.from_float(nn.Embedding(4, 32, max_norm=1.0))
    table = nn.Embedding(4, 32)
    with torch.no_grad():
        table.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="weight: got NaN or infinite"):
        Int4Embedding.from_float(table)
    layer = embedding()
    for bad in (-1, 19):
        with pytest.raises(IndexError):
            layer(torch.tensor([bad]))
    with pytest.raises(RuntimeError, match=r"scale: got torch.float32 of shape \[19, 2\]; accepted"):
        layer.set_weight(torch.zeros(19, 48, dtype=torch.int8), torch.ones(19, 2), layer.zero_point)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int4Linear(48, 4), r"group_size: got 32; accepted: -1 or K = 48, or a multiple of 8"),
        (lambda: Int4Linear(64, 4, weight_bits=5), "bits: got 5; accepted: 2, 3, 4"),
        (lambda: Int4Linear(64, 4, act_bits=4), "act_bits: got 4; accepted: 8, 16"),
        (lambda: Int4Linear(64, 4, scale_dtype=torch.float64), r"scale_dtype: got torch\.float64; accepted"),
        (lambda: Int4Linear(64, 4, minimum=True), "minimum: got True with symmetric=True"),
        (lambda: Int4Linear(64, 4, symmetric=False, minimum=True, weight_bits=3), "minimum: .*weight_bits=3"),
        (lambda: Int4Linear(64, 4, act_bits=16, input=FakeQuantize()), "input: got a quantizer with act_bits=16"),
        (lambda: Int4Linear.from_float(nn.Linear(48, 4)), "group_size: got 32; accepted: -1 or K = 48"),
        (lambda: Int4Linear.from_float(nn.Linear(64, 4), weight_bits=8), "bits: got 8"),
        (lambda: Int4Embedding(4, 48), "group_size: got 32"),
        (lambda: Int4Embedding(4, 32, weight_bits=1), "bits: got 1"),
        (lambda: Int4Embedding(4, 32, dtype=torch.int8), "dtype: got torch.int8; accepted: a floating dtype"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(RuntimeError, match=message):
        make()


def test_set_weight_refuses_another_form_and_changes_nothing():
    layer = filled()
    before = copy.deepcopy(layer)
    codes, scale, zero_point, bias = layer.codes, layer.scale, layer.zero_point, torch.zeros(37)
    for arguments, options, message in (
        ((codes, scale, bias), {}, "zero_point: got None; accepted by this layer: a tensor"),
        ((codes, scale, bias, zero_point), {"minimum": scale}, "minimum: got a tensor; accepted by this layer: None"),
        ((codes[1:], scale, bias, zero_point), {}, r"codes: got shape \[36, 48\]; accepted: \[37, 48\]"),
        ((codes, scale[:, :1], bias, zero_point[:, :1]), {}, "groups of 48; accepted by this layer: groups of 16"),
        ((codes, scale.half(), bias, zero_point), {}, r"scale: got torch\.float16; accepted by this layer"),
        ((codes.float(), scale, bias, zero_point), {}, r"q: got torch\.float32"),
        ((codes + 8, scale, bias, zero_point), {}, "q: got 15; accepted: the codes of 4 bits"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.set_weight(*arguments, **options)
        assert_same(layer, before)


def test_repr_says_what_the_layer_is():
    assert "group_size=16, zero_point, weight_bits=3, input_bits=8 (static, PerTensor())" in repr(filled(bits=3))
    assert "symmetric, weight_bits=4, input in float" in repr(filled("symmetric", input=None, act_bits=16))
    assert repr(embedding("symmetric")) == (
        "Int4Embedding(19, 48, padding_idx=3, weight_bits=4, group_size=16, symmetric, dtype=torch.float32)"
    )
