"""Int4Linear and Int4Embedding: values against fp64, and state that comes back exactly or not at all."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import qkernels as qk
from qkernels import layouts
from qkernels.nn import FakeQuantize, Int4Embedding, Int4Linear, Int8Conv2d, Int8Linear, PerTensor, PerToken

FORMS = [(bits, symmetric) for bits in (4, 3, 2) for symmetric in (True, False)]
SCALES = (torch.float32, torch.bfloat16, torch.float16)


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


def static(symmetric: bool, bits: int = 8) -> FakeQuantize:
    quantizer = FakeQuantize(bits=bits, quantizer="minmax", symmetric=symmetric)
    quantizer.set_range(torch.tensor([-1.0]), torch.tensor([2.0]))
    return quantizer


INPUTS = {
    "per token": lambda: FakeQuantize(granularity=PerToken(), quantizer="dynamic"),
    "per tensor": lambda: FakeQuantize(granularity=PerTensor(), quantizer="dynamic"),
    "per tensor, zero point": lambda: FakeQuantize(quantizer="dynamic", symmetric=False),
    "static": lambda: static(True),
    "static, zero point": lambda: static(False),
    "static, 4 bits": lambda: static(False, 4),
}


def filled(kind: str = "zero_point", bits: int = 4, input: str | None = "static, zero point", **options) -> Int4Linear:
    """A layer of groups of 16 with random codes, scales and what else it holds."""
    n, k = 37, 48
    offset = {"symmetric": kind == "symmetric", "minimum": kind == "minimum"}
    quantizer = None if input is None else INPUTS[input]()
    layer = Int4Linear(k, n, weight_bits=bits, group_size=16, **offset, input=quantizer, **options)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    dtype = layer.scale_dtype
    layer.set_weight(
        torch.randint(low, high + 1, (n, k), dtype=torch.int8),
        torch.rand(n, 3).to(dtype),
        torch.randn(n),
        torch.randint(low, high + 1, (n, 3)) if kind == "zero_point" else None,
        minimum=torch.randn(n, 3).to(dtype) if kind == "minimum" else None,
    )
    if quantizer is not None:
        layer.set_input(quantizer)
    return layer


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


def state_bytes(state: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in state.values())


def embedding(kind: str = "zero_point", bits: int = 4, **options) -> Int4Embedding:
    return Int4Embedding.from_float(
        nn.Embedding(19, 48, padding_idx=3), 16, kind == "symmetric", weight_bits=bits, **options
    )  # fmt: skip


def conv() -> Int8Conv2d:
    layer = Int8Conv2d(4, 6, 3, groups=2, input=static(False))
    layer.set_weight(torch.randint(-127, 128, (6, 2, 3, 3), dtype=torch.int8), torch.rand(6), torch.randn(6))
    return layer


LAYERS = {
    "linear": lambda: filled("symmetric"),
    "linear, zero points": filled,
    "linear, minima, bf16 scales": lambda: filled("minimum", scale_dtype=torch.bfloat16),
    "linear, 3 bits": lambda: filled(bits=3, input="per token"),
    "linear, 2 bits, fp16 scales": lambda: filled(bits=2, scale_dtype=torch.float16),
    "linear, weight only": lambda: filled(input=None, act_bits=16),
    "embedding": lambda: embedding("symmetric"),
    "embedding, 3 bits, zero points": lambda: embedding(bits=3, scale_dtype=torch.float16),
    "int8 linear": lambda: Int8Linear.from_float(nn.Linear(48, 37)),
    "int8 convolution": conv,
}


def example(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, Int4Embedding):
        return torch.randint(19, (2, 7))
    return torch.randn(2, 4, 5, 5) if isinstance(layer, Int8Conv2d) else torch.randn(5, 48)


def blank(layer: nn.Module) -> nn.Module:
    """A layer of the same form that holds other values."""
    other = copy.deepcopy(layer)
    # What is packed stands for zeros now, what is not is 1.
    zeros = {name: torch.zeros(form[1], dtype=form[0]) for name, form in other._logical().items() if form}
    other._hold(other._pack(zeros))
    for name, t in (*other.named_parameters(), *other.named_buffers()):
        if name not in (*other.private_buffers, *other.private_parameters, "weight_dtype"):
            t.detach().fill_(1)
    return other


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Equal state, private buffers and results."""
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for key in first:
        assert first[key].dtype == second[key].dtype, key
        assert torch.equal(first[key], second[key]), key
    for (name, one), (_, two) in zip(
        (*a.named_parameters(), *a.named_buffers()), (*b.named_parameters(), *b.named_buffers()), strict=True
    ):
        assert torch.equal(one, two), name
    x = example(a)
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize("name", LAYERS)
def test_state_is_logical_and_comes_back_exactly(name, tmp_path):
    layer = LAYERS[name]()
    state = layer.state_dict()
    packed = {"data", "colsum", "weight_sum", "packed_scale", "packed_zero_point", "packed_minimum"}
    assert not packed & set(state)
    assert all(t.is_contiguous() for t in state.values())

    fresh = blank(layer)
    assert not torch.equal(fresh(x := example(layer)), layer(x))
    fresh.load_state_dict(state, strict=True)
    assert_same(fresh, layer)

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    fresh = blank(layer)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same(fresh, layer)

    safetensors = pytest.importorskip("safetensors.torch")
    nested, other = nn.Sequential(layer, nn.ReLU()), nn.Sequential(blank(layer), nn.ReLU())
    safetensors.save_model(nested, str(tmp_path / "model.safetensors"))
    safetensors.load_model(other, str(tmp_path / "model.safetensors"), strict=True)
    assert_same(other[0], layer)

    assert_same(copy.deepcopy(layer), layer)
    pickled = pickle.dumps(layer)
    assert_same(pickle.loads(pickled), layer)
    assert not any(word.encode() + b"\x94" in pickled and word in state for word in packed)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False), layer)
    assert len(buffer.getvalue()) < state_bytes(state) + 8000  # with the buffers it would hold everything twice


def test_a_pickle_holds_no_packed_buffer():
    layer = Int4Linear.from_float(nn.Linear(512, 512), 128)
    assert len(pickle.dumps(layer)) < state_bytes(layer.state_dict()) + 4000
    assert layer.__getstate__()["_buffers"]["data"] is None
    assert layer.data is not None


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "cpu", "share_memory"])
def test_casts_and_moves_keep_the_state(name, cast):
    layer = LAYERS[name]()
    moved = getattr(copy.deepcopy(layer), cast)()
    state = layer.state_dict()
    for key, value in moved.state_dict().items():
        assert value.dtype == (moved.dtype if key == "bias" else state[key].dtype)
        assert torch.equal(value, state[key].to(value.dtype))
    if not isinstance(layer, Int4Embedding) and cast in ("cpu", "share_memory"):
        assert_same(moved, layer)


@pytest.mark.parametrize("name", LAYERS)
def test_bad_state_names_the_tensor_and_changes_nothing(name):
    layer = LAYERS[name]()
    good = layer.state_dict()
    other = blank(layer)
    before = copy.deepcopy(other)
    model = nn.ModuleDict({"layer": other})

    def refused(state, message, strict=True):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict({f"layer.{key}": value for key, value in state.items()}, strict=strict)
        assert_same(other, before)

    for key, value in good.items():
        if key == "codes_form":  # files of earlier versions have none
            continue
        without = {k: v for k, v in good.items() if k != key}
        refused(without, rf'Missing key\(s\).*"layer\.{key}"')
        assert model.load_state_dict({f"layer.{k}": v for k, v in without.items()}, strict=False).missing_keys == [
            f"layer.{key}"
        ]
        assert_same(other, before)
        wrong = torch.int32 if value.is_floating_point() else torch.float32
        for strict in (True, False):
            accepted = rf"; accepted: {value.dtype} of shape"
            refused({**good, key: value.to(wrong)}, rf"layer\.{key}: got {wrong} of shape .*{accepted}", strict)
            refused({**good, key: value[1:]}, rf"layer\.{key}: got {value.dtype} of shape .*{accepted}", strict)
            refused({**good, key: value[None]}, rf"layer\.{key}: got .*{accepted}", strict)
            refused({**good, key: "text"}, rf"layer\.{key}: got str{accepted}", strict)
    for key in ("zero_point", "minimum", "input_scale"):
        if key not in good and (key in layer._logical() or key in layer._buffers):
            for strict in (True, False):
                refused({**good, key: torch.ones(1)}, rf"layer\.{key}: got .*; accepted: none", strict)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\).*"layer\.extra"'):
        blank(layer).load_state_dict({**good, "layer.extra": torch.ones(1)})
    model.load_state_dict({f"layer.{k}": v for k, v in {**good, "extra": torch.ones(1)}.items()}, strict=False)
    assert_same(other, layer)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_point_out_of_range_is_refused(bits):
    layer = filled(bits=bits)
    before = copy.deepcopy(layer)
    state = {**layer.state_dict(), "bias": torch.zeros(37)}
    state["zero_point"] = torch.full_like(state["zero_point"], 2 ** (bits - 1))
    with pytest.raises(RuntimeError, match=rf"zero_point: got {2 ** (bits - 1)}; accepted: the codes of {bits} bits"):
        layer.load_state_dict(state)
    assert_same(layer, before)


def test_a_checkpoint_of_another_form_is_refused():
    for source, target, message in (
        (filled(), filled("symmetric"), r"zero_point: got torch\.int8 of shape \[37, 3\]; accepted: none"),
        (filled("symmetric"), filled(), 'Missing key.*"zero_point"'),
        (filled("minimum"), filled(), 'Missing key.*"zero_point"'),
        (filled(bits=3), filled(), r"codes: got torch.uint8 of shape \[37, 18\]; accepted: .*\[37, 24\]"),
        (filled(scale_dtype=torch.float16), filled(), "scale: got torch.float16.*accepted: torch.float32"),
        (filled(input="static"), filled(), 'Missing key.*"input_zero_point"'),
        (Int8Linear.from_float(nn.Linear(48, 37)), filled(), r"codes: got torch.int8 of shape \[37, 48\]"),
    ):
        before = copy.deepcopy(target)
        with pytest.raises(RuntimeError, match=message):
            target.load_state_dict(source.state_dict())
        assert_same(target, before)


@pytest.mark.parametrize("kind", ["symmetric", "zero_point", "minimum"])
def test_a_move_to_a_gpu_repacks(kind, monkeypatch):
    """The layout follows the device: here the CPU is said to take a GPU's."""
    layer = filled(kind)
    x = example(layer)
    with qk.use_kernel("reference"):
        expected, state = layer(x), layer.state_dict()
        monkeypatch.setattr(layouts, "int4_layout_on", lambda device: layouts.HALVES)
        moved = copy.deepcopy(layer).to("cpu")
        assert moved.data.shape == (37, 32)  # rows of 48 codes in halves of 16
        assert moved.packed_scale.shape == (3, 37)
        assert torch.equal(moved(x), expected)
        for key, value in moved.state_dict().items():
            assert torch.equal(value, state[key]), key
        again = pickle.loads(pickle.dumps(moved))
        assert again.data.dim() == 2
        monkeypatch.undo()
        assert_same(moved.to("cpu"), layer)
        assert_same(pickle.loads(pickle.dumps(again.to("cpu"))), layer)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "int8 convolution"])
def test_meta_device(name):
    layer = LAYERS[name]()
    state = layer.state_dict()
    on_meta = copy.deepcopy(layer).to("meta")
    assert all(t.is_meta for t in (*on_meta.parameters(), *on_meta.buffers()))
    assert {k: (t.shape, t.dtype) for k, t in on_meta.state_dict().items()} == {
        k: (t.shape, t.dtype) for k, t in state.items()
    }
    x = example(layer)
    if not isinstance(layer, Int8Linear):  # its zero point and scale are looked at
        assert on_meta(x.to("meta")).shape == layer(x).shape
    filled_again = on_meta.to_empty(device="cpu")
    filled_again.load_state_dict(state)
    assert_same(filled_again, layer)
    assigned = copy.deepcopy(layer).to("meta")
    assigned.load_state_dict(state, assign=True)
    assert_same(assigned, layer)


def test_made_on_meta():
    with torch.device("meta"):
        layers = nn.ModuleList(
            [
                Int4Linear(48, 5, group_size=16, symmetric=False, input=FakeQuantize(symmetric=False)),
                Int4Linear(48, 5, group_size=16, symmetric=False, minimum=True),
                Int4Embedding(9, 48, group_size=16, symmetric=False),
            ]
        )
    assert all(t.is_meta for t in (*layers.parameters(), *layers.buffers()))
    assert not any(t.is_meta for t in layers.to_empty(device="cpu").buffers())


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
    from qkernels.nn import int4

    layer, seen = embedding(), []
    unpack = int4.unpack_bits
    monkeypatch.setattr(int4, "unpack_bits", lambda packed, *args: seen.append(packed.shape) or unpack(packed, *args))
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
