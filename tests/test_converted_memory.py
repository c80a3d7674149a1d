"""Converted layers in other memory formats and other processes, copied and saved."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.multiprocessing
from converted import CONFIGS, KINDS, Net, batch, layers, made
from sampling import in_turn
from torch import nn

import qkernels as qk
from qkernels.nn import Int8Conv2d, Int8Linear, PerGroup
from qkernels.qat import QConfig, QSpec, convert, prepare


def strided(form: str, x: torch.Tensor) -> torch.Tensor:
    last = torch.channels_last
    return {
        "contiguous": lambda: x,
        "channels_last": lambda: x.to(memory_format=last),
        "second half": lambda: torch.cat([x, x], 1).chunk(2, 1)[1],
        "slice": lambda: torch.cat([x, x], 1)[:, : x.shape[1]],
        "slice of channels_last": lambda: torch.cat([x, x], 1).to(memory_format=last)[:, : x.shape[1]],
        "transposed": lambda: x.transpose(2, 3),
        "permuted": lambda: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "expanded": lambda: x[:1].expand(2, -1, -1, -1),
        "batch of a wider one": lambda: torch.stack([x, x], 1)[:, 0],
        "columns": lambda: torch.cat([x, x], 3)[..., ::2],
        "unbatched": lambda: x[0],
        "unbatched channels_last": lambda: x.to(memory_format=last)[0],
        "unbatched slice": lambda: torch.cat([x, x], 1)[0, x.shape[1] :],
        "empty": lambda: x[:0],
        "one image": lambda: x[:1],
        "one image channels_last": lambda: x[:1].to(memory_format=last),
    }[form]()


FORMS = [
    "contiguous", "channels_last", "second half", "slice", "slice of channels_last", "transposed", "permuted",
    "expanded", "batch of a wider one", "columns", "unbatched", "unbatched channels_last", "unbatched slice", "empty",
    "one image", "one image channels_last",
]  # fmt: skip
GEOMETRIES = {
    "3x3": ((4, 6, 3), {"padding": 1}, 5),
    "same": ((4, 6, 3), {"padding": "same"}, 5),
    "same, uneven": ((4, 6, 4), {"padding": "same"}, 5),
    "reflected": ((4, 6, 3), {"padding": 1, "padding_mode": "reflect"}, 5),
    "circular": ((4, 6, 3), {"padding": 1, "padding_mode": "circular"}, 5),
    "to 1x1": ((4, 6, 5), {}, 5),
    "of 1x1": ((4, 6, 1), {}, 1),
    "one channel in": ((1, 6, 3), {}, 5),
    "one channel out": ((4, 1, 3), {}, 5),
    "one channel in and out": ((1, 1, 1), {}, 1),
    "depthwise": ((4, 4, 3), {"groups": 4}, 5),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("weight", ["contiguous", "channels_last"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions_follow_the_memory_format(geometry, weight, act_bits):
    arguments, options, size = GEOMETRIES[geometry]
    conv = nn.Conv2d(*arguments, **options)
    if weight == "channels_last":
        conv = conv.to(memory_format=torch.channels_last)
    layer = Int8Conv2d.from_float(conv, act_bits=act_bits)
    later = Int8Conv2d.from_float(nn.Conv2d(*arguments, **options), act_bits=act_bits)
    if weight == "channels_last":
        later = later.to(memory_format=torch.channels_last)
    x = torch.randn(2, arguments[0], size, size)
    for form in FORMS:
        images = strided(form, x)
        expected, y = conv(images), layer(images)
        assert y.shape == expected.shape
        if not y.numel():
            assert y.is_contiguous()
            continue
        assert y.stride() == expected.stride(), form
        assert later(images).stride() == expected.stride(), form
        for dtype in (torch.float64, torch.bfloat16):
            got, wanted = layer(images.to(dtype)), copy.deepcopy(conv).to(dtype)(images.to(dtype))
            assert got.dtype == dtype
            assert dtype == torch.float64 or got.stride() == wanted.stride(), form
        torch.testing.assert_close(y, expected, rtol=0.1, atol=0.1)
        torch.testing.assert_close(
            y, layer(images.contiguous()), rtol=1e-4 * (act_bits == 16), atol=1e-5 * (act_bits == 16)
        )


@pytest.mark.parametrize("config", CONFIGS)
def test_a_model_moves_to_channels_last_and_back(config):
    for model in made(config):
        x = batch()
        expected, state = model(x), copy.deepcopy(model.state_dict())
        moved = copy.deepcopy(model).to(memory_format=torch.channels_last)
        y = moved(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert moved.conv(x).is_contiguous(memory_format=torch.channels_last)
        assert moved.conv.weight.is_contiguous(memory_format=torch.channels_last)
        for key, value in moved.state_dict().items():
            assert torch.equal(value, state[key]), key
        back = moved.to(memory_format=torch.contiguous_format)
        assert torch.equal(back(x), expected)
        assert back.conv(x).is_contiguous()


def test_prepared_groups_of_a_convolution_move_to_channels_last():
    prepared = prepare(nn.Conv2d(4, 6, 4), QConfig(QSpec(4, PerGroup(2)), None))
    x = torch.randn(2, 4, 6, 6)
    expected = prepared(x)
    moved = prepared.to(memory_format=torch.channels_last)
    torch.testing.assert_close(moved(x), expected)
    moved(x).sum().backward()
    torch.testing.assert_close(convert(moved)(x), expected)


MEMORY_FORMATS = [torch.channels_last, torch.channels_last_3d, torch.contiguous_format]


class WithImages(Int8Linear):
    """Holds private tensors of the ranks that torch takes for images and for videos."""

    private_buffers = (*Int8Linear.private_buffers, "image", "video")

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.register_buffer("image", torch.arange(24).view(1, 2, 3, 4), persistent=False)
        self.register_buffer("video", torch.arange(48).view(1, 2, 2, 3, 4), persistent=False)


@pytest.mark.parametrize("format", MEMORY_FORMATS)
@pytest.mark.parametrize("kind", [*KINDS, "private tensors of any rank"])
def test_a_memory_format_leaves_packed_tensors_alone(kind, format):
    if kind in KINDS:
        plain, layer, x = layers()[kind]
    else:
        plain, layer, x = nn.Linear(32, 7), WithImages(32, 7), torch.randn(3, 32)
    expected, private = layer(x), {name: getattr(layer, name) for name in layer.private_buffers}
    strides = {name: None if t is None else t.stride() for name, t in private.items()}
    rank = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(format)
    if rank is not None and plain.weight.dim() in (4, 5) and plain.weight.dim() != rank:
        for refusing in (plain, layer):
            with pytest.raises(RuntimeError, match=f"required rank {rank} tensor"):
                refusing.to(memory_format=format)
    else:
        assert layer.to(memory_format=format) is layer
        layer.double().to(torch.float32, memory_format=format)
        assert layer.weight.dim() != rank or layer.weight.is_contiguous(memory_format=format)
    for name, t in private.items():
        own = getattr(layer, name)
        assert t is own or (torch.equal(own, t) and own.stride() == strides[name]), name
    # A float product sums in another order for another format.
    torch.testing.assert_close(layer(x), expected, rtol=1e-5 if "float" in kind else 0, atol=1e-6 * ("float" in kind))


class Video(nn.Module):
    """Layers of three ranks, attention and a recurrent layer; torch itself moves no Conv2d to channels_last_3d."""

    def __init__(self, image: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3) if image else nn.Conv3d(3, 8, (1, 3, 3))
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2) if image else nn.ConvTranspose3d(8, 8, (1, 2, 2))
        self.table = nn.Embedding(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.image = image

    def forward(self, x):
        x = self.up(self.conv(x if self.image else x.unsqueeze(2)))
        x = self.depthwise(x.flatten(2)).transpose(1, 2)
        x = x + self.table(torch.arange(x.shape[1]) % 4)
        x, _ = self.recurrent(self.attention(x, x, x)[0])
        return self.head(x)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("image", [True, False])
def test_a_model_of_all_layers_moves_to_a_memory_format(image, bits):
    torch.manual_seed(0)
    model, x = Video(image).eval(), torch.randn(2, 3, 6, 6)
    prepared = prepare(model, QConfig(QSpec(bits)))
    qk.calibrate(prepared, [x])
    format = torch.channels_last if image else torch.channels_last_3d
    for moving in (prepared.eval(), convert(prepared)):
        with torch.no_grad():
            expected = moving(x)
            torch.testing.assert_close(moving.to(memory_format=format)(x), expected, rtol=1e-2, atol=1e-2)
            assert torch.equal(moving.to(memory_format=torch.contiguous_format)(x), expected)


def things() -> dict[str, object]:
    made = {kind: layer for kind, (_, layer, _) in layers().items()}
    q = torch.randint(-127, 128, (6, 2, 3, 3), dtype=torch.int8)
    return {
        **made,
        "model": nn.Sequential(made["Int8Linear"], nn.Linear(7, 3)),
        "PackedInt4": qk.PackedInt4.from_float(torch.randn(5, 64)),
        "PackedInt4, zero points": qk.PackedInt4.from_float(torch.randn(5, 64), symmetric=False),
        "PackedInt": qk.PackedInt.from_float(torch.randn(5, 64), 3),
        "PackedInt8": qk.PackedInt8.from_float(torch.randn(5, 64)),
        "PackedInt8Conv2d": qk.PackedInt8Conv2d.from_quantized(q, torch.rand(6), 2),
    }


def values_of(thing) -> list[torch.Tensor]:
    if isinstance(thing, nn.Module):
        return [*thing.state_dict().values()]
    return [t for t in thing.unpack() if t is not None]


def send_back(queue, answers) -> None:
    while (thing := queue.get()) is not None:
        answers.put([t.tolist() for t in values_of(thing)])


def compare(rank, things, expected) -> None:
    for name, thing in things.items():
        assert [t.tolist() for t in values_of(thing)] == expected[name], name
        if isinstance(thing, nn.Module):
            assert all(t.is_shared() for t in thing.buffers()), name
    things["Int8Linear"].bias.data.fill_(7)


@pytest.mark.parametrize("strategy", in_turn(["file_descriptor", "file_system"]))
def test_a_spawned_process_gets_them(strategy):
    if strategy not in torch.multiprocessing.get_all_sharing_strategies():
        pytest.skip("not on this system")
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(strategy)
    try:
        everything = things()
        expected = {name: [t.tolist() for t in values_of(thing)] for name, thing in everything.items()}
        torch.multiprocessing.spawn(compare, (everything, expected))
        assert torch.equal(everything["Int8Linear"].bias, torch.full((7,), 7.0))  # memory is shared, as torch's is
        everything["Int8Linear"].bias.data.zero_()
        context = torch.multiprocessing.get_context("spawn")
        queue, answers = context.Queue(), context.Queue()
        process = context.Process(target=send_back, args=(queue, answers))
        process.start()
        for thing in everything.values():
            queue.put(thing)
            assert answers.get(timeout=120) == [t.tolist() for t in values_of(thing)]
        queue.put(None)
        process.join(120)
        assert process.exitcode == 0
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def test_share_memory():
    for name, thing in things().items():
        if isinstance(thing, nn.Module):
            assert thing.share_memory() is thing
            assert all(t.is_shared() for t in (*thing.parameters(), *thing.buffers())), name


@pytest.mark.parametrize("name", list(things()))
def test_copies_and_files(name):
    torch.manual_seed(0)
    thing = things()[name]
    expected = values_of(thing)

    def same(other) -> None:
        assert type(other) is type(thing)
        assert all(torch.equal(a, b) for a, b in zip(values_of(other), expected, strict=True))

    for make in (copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))):
        same(make(thing))
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    same(torch.load(file, weights_only=isinstance(thing, nn.Module) is False))
    if isinstance(thing, nn.Module):  # a shallow copy shares, a deep one does not
        assert next(copy.copy(thing).parameters()) is next(thing.parameters())
        assert next(copy.deepcopy(thing).parameters()) is not next(thing.parameters())


def test_a_deep_copy_keeps_what_is_shared():
    layer = Int8Linear.from_float(nn.Linear(8, 8))
    other = copy.copy(layer)
    first, second = copy.deepcopy(nn.ModuleList([layer, other]))
    assert first.scale is second.scale
    assert first.data is second.data


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode(kind):
    _, layer, x = layers()[kind]
    expected, state = layer(x), copy.deepcopy(layer.state_dict())
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
        assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            other.load_state_dict(layer.state_dict())
            assert torch.equal(other(x), expected)
            assert other.half().dtype == torch.float16
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("config", CONFIGS)
def test_what_libraries_ask_of_a_model(config, dtype):
    """A converted model that is cast later answers as the float model does, computes in that dtype and trains there."""
    torch.manual_seed(0)
    _, converted = made(config)
    x = batch()
    expected = converted(x)
    for cast in (lambda m: m.to(dtype), lambda m: m.type(dtype), lambda m: m.to(torch.empty(1, dtype=dtype))):
        model, plain = cast(copy.deepcopy(converted)), cast(Net())
        for name in ("conv", "fc"):
            layer, other = getattr(model, name), getattr(plain, name)
            for probe in (lambda m: m.weight, lambda m: m.bias, lambda m: next(m.parameters())):
                assert (probe(layer).dtype, probe(layer).device) == (probe(other).dtype, probe(other).device)
            assert (layer.weight.shape, layer.bias.shape) == (other.weight.shape, other.bias.shape)
        y = model(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
        y.sum().backward()
        assert model.fc.bias.grad.dtype == dtype
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(x.to(dtype)), y)
            assert next(again.parameters()).dtype == dtype


def test_loading_writes_in_place():
    """Whoever shares the memory of a layer, as a CUDA graph or another process, sees what was loaded."""
    for _, layer, _ in layers().values():
        other = copy.deepcopy(layer)
        held = [t.data_ptr() for t in (*layer.parameters(), *layer.buffers())]
        layer.load_state_dict(other.state_dict())
        assert [t.data_ptr() for t in (*layer.parameters(), *layer.buffers())] == held
