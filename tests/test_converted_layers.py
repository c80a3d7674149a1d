"""Layers on integers in the place of float ones: whatever touches a float layer finds what it expects."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.nn import Int4Embedding, Int4Linear, Int8Conv2d, Int8Linear, Int8TrainingLinear, PerGroup
from qkernels.qat import QConfig, QSpec, calibrate, convert, prepare

CONFIGS = {
    "int8": QConfig(),
    "int4": QConfig(QSpec(4), QSpec(8, symmetric=False)),
    "int8 weight only": QConfig(QSpec(8), None),
    "5 bits weight only": QConfig(QSpec(5, symmetric=False), None),
    "int4 weight only": QConfig(QSpec(4), None),
    "dynamic": QConfig(QSpec(8), QSpec(8, quantizer="dynamic")),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, bias=bias)
        self.fc = nn.Linear(6 * 4 * 4, 5, bias=bias)

    def forward(self, x):
        x = F.relu(self.conv(x.to(self.conv.weight.dtype)))
        return self.fc(x.flatten(1).to(self.fc.weight.dtype))


def batch(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(3, 4, 4, 4).to(dtype)


def made(config: str, dtype=torch.float32, bias: bool = True) -> tuple[nn.Module, nn.Module]:
    """A prepared model and what it converts to."""
    prepared = prepare(Net(bias).to(dtype), CONFIGS[config])
    calibrate(prepared, [batch(dtype)])
    return prepared.eval(), convert(prepared)


def layers() -> dict[str, tuple[nn.Module, nn.Module, torch.Tensor]]:
    """Each integer layer beside the float one that it was made of, and an input."""
    linear, conv, table = nn.Linear(32, 7), nn.Conv2d(4, 6, 3, groups=2), nn.Embedding(9, 32)
    images = torch.randn(2, 4, 5, 5)
    return {
        "Int8Linear": (linear, Int8Linear.from_float(linear), torch.randn(3, 32)),
        "Int8Linear, float input": (linear, Int8Linear.from_float(linear, act_bits=16), torch.randn(3, 32)),
        "Int4Linear": (linear, Int4Linear.from_float(linear), torch.randn(3, 32)),
        "Int4Linear, float input": (linear, Int4Linear.from_float(linear, act_bits=16), torch.randn(3, 32)),
        "Int4Linear, zero points": (linear, Int4Linear.from_float(linear, symmetric=False), torch.randn(3, 32)),
        "Int8Conv2d": (conv, Int8Conv2d.from_float(conv), images),
        "Int8Conv2d, float input": (conv, Int8Conv2d.from_float(conv, act_bits=16), images),
        "Int4Embedding": (table, Int4Embedding.from_float(table), torch.randint(9, (2, 3))),
    }


KINDS = list(layers())


# The weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_weight_is_the_float_layers(kind, dtype):
    source = layers()[kind][0].to(dtype)
    options = {"act_bits": 16} if "float input" in kind else {}
    if "zero points" in kind:
        options["symmetric"] = False
    layer = getattr(qk.nn, kind.partition(",")[0]).from_float(source, **options)
    assert (layer.weight.shape, layer.weight.dtype) == (source.weight.shape, dtype)
    assert layer.weight.device == source.weight.device
    step = source.weight.abs().max() / 7  # of 4 bits
    assert (layer.weight - source.weight).abs().max() <= step
    torch.testing.assert_close(
        layer.weight.sum(), source.weight.sum(), rtol=0, atol=source.weight.numel() * step.item() / 4
    )
    torch.testing.assert_close(layer.weight, layer.dequantize().to(dtype))
    assert layer.codes.dtype == torch.int8
    assert layer.codes.shape == source.weight.shape
    assert not hasattr(layer, "bias") or layer.bias.dtype == dtype
    if dtype == torch.float32:  # a cast of the model shows, scales and codes stay
        before = layer.weight
        cast = copy.deepcopy(layer).bfloat16()
        assert cast.weight.dtype == torch.bfloat16
        assert torch.equal(cast.weight, before.bfloat16())
        assert torch.equal(cast.float().weight, before)
        assert cast.double().weight.dtype == torch.float64
    names = {name for name in vars(source) if not name.startswith("_") and name not in ("padding",)}
    assert all(getattr(layer, name) == getattr(source, name) for name in names)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_forward_that_casts_to_the_weights_dtype(config):
    prepared, converted = made(config)
    x = batch()
    assert converted.conv.weight.is_floating_point()
    torch.testing.assert_close(converted(x), prepared(x), rtol=1e-4, atol=1e-4)
    y = F.relu(converted.conv(x)).flatten(1)
    assert torch.equal(converted(x), converted.fc(y))
    weight = prepared.fc.weight_fake_quant(prepared.fc.weight)
    assert torch.equal(converted.fc.weight, weight)
    assert torch.equal(converted.conv.weight, prepared.conv.weight_fake_quant(prepared.conv.weight))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "Int4Embedding"])
def test_integers_are_refused(kind, dtype):
    _, layer, x = layers()[kind]
    with pytest.raises(RuntimeError, match=rf"input: got {dtype}; accepted: a floating dtype"):
        layer(x.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_the_arguments_have_the_float_layers_names(kind):
    _, layer, x = layers()[kind]
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_the_first_version_load(kind):
    """They call the codes "weight"."""
    _, layer, x = layers()[kind]
    state = layer.state_dict()
    assert "codes" in state
    assert "weight" not in state
    old = {"weight" if key == "codes" else key: value for key, value in state.items()}
    fresh = copy.deepcopy(layer)
    fresh._hold(fresh._pack({n: torch.zeros(f[1], dtype=f[0]) for n, f in fresh._logical().items() if f}))
    assert not torch.equal(fresh(x), layer(x))
    nn.Sequential(fresh).load_state_dict({f"0.{key}": value for key, value in old.items()}, strict=True)
    assert torch.equal(fresh(x), layer(x))
    with pytest.raises(RuntimeError, match=r"weight: got torch\.float32"):  # a float checkpoint
        fresh.load_state_dict({**old, "weight": old["weight"].float()})
    assert torch.equal(fresh(x), layer(x))


# Parameters


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_tell_dtype_and_device(config, bias):
    prepared, converted = made(config, bias=bias)
    first = next(converted.parameters())
    assert first.is_floating_point()
    assert first.device == prepared.conv.weight.device
    assert all(next(layer.parameters()).is_floating_point() for layer in (converted.conv, converted.fc))
    trainable = [name for name, p in converted.named_parameters() if p.requires_grad]
    assert trainable == (["conv.bias", "fc.bias"] if bias else [])
    assert nn.utils.parameters_to_vector(converted.parameters()).isfinite().all()


@pytest.mark.parametrize("config", CONFIGS)
def test_what_walks_over_parameters(config):
    _, converted = made(config)
    x, before = batch(), converted(batch_ := batch())
    vector = nn.utils.parameters_to_vector(converted.parameters())
    nn.utils.vector_to_parameters(vector, converted.parameters())
    assert torch.equal(converted(batch_), before)
    frozen = converted.requires_grad_(False)
    assert not frozen(x).requires_grad
    converted.requires_grad_(True)
    copied = copy.deepcopy(converted)
    assert all(
        a.requires_grad == b.requires_grad for a, b in zip(copied.parameters(), converted.parameters(), strict=True)
    )
    assert torch.equal(copied(x), converted(x))
    optimizer = torch.optim.AdamW(converted.parameters(), lr=0.1, weight_decay=0.1)
    optimizer.zero_grad()
    scales = [layer.scale.clone() for layer in (converted.conv, converted.fc)]
    for p in (converted.conv.bias, converted.fc.bias):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(converted(x), copied(x))  # the biases took a step
    assert all(torch.equal(a, b.scale) for a, b in zip(scales, (converted.conv, converted.fc), strict=True))
    averaged = torch.optim.swa_utils.AveragedModel(converted)
    averaged.update_parameters(converted)
    assert torch.equal(averaged(x), converted(x))


def test_frozen_biases_stay_frozen():
    prepared = prepare(Net().requires_grad_(False))
    calibrate(prepared, [batch()])
    assert not any(p.requires_grad for p in convert(prepared).parameters())


def test_distributed_data_parallel(tmp_path):
    import torch.distributed as dist

    _, converted = made("int8")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(converted)
        x = batch()
        assert torch.equal(wrapped(x), converted(x))
    finally:
        dist.destroy_process_group()


CASTS = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64, "float": torch.float32}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", KINDS)
def test_casts_keep_scales(kind, cast):
    _, layer, _ = layers()[kind]
    moved = getattr(copy.deepcopy(layer), cast)()
    for (name, p), (_, q) in zip(moved.named_parameters(), layer.named_parameters(), strict=True):
        assert p.dtype == (CASTS[cast] if name in ("bias", "weight_dtype") else torch.float32), name
        assert torch.equal(p, q.to(p.dtype))
    for (name, b), (_, c) in zip(moved.named_buffers(), layer.named_buffers(), strict=True):
        assert b.dtype == c.dtype, name


class Normed(Net):
    """Casts what it is fed to the dtype that the model says it has."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__(bias)
        self.norm = nn.LayerNorm(5)

    def forward(self, x):
        return self.norm(super().forward(x.to(next(self.parameters()).dtype)))


def ready(model: nn.Module, config: str) -> nn.Module:
    """Prepared, with some range where only a calibration would tell."""
    prepared = prepare(model, CONFIGS[config])
    for quantizer in prepared.modules():
        if isinstance(quantizer, qk.nn.FakeQuantize) and not quantizer.is_calibrated:
            quantizer.set_range(-torch.ones_like(quantizer.scale), torch.ones_like(quantizer.scale))
    return prepared


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_model_is_asked_for_its_dtype(config, bias, dtype):
    """As by those who cast what they feed it to that: of the float model, converted, cast later, loaded, copied."""

    converted, later = convert(ready(Normed(bias).to(dtype), config)), convert(ready(Normed(bias), config)).to(dtype)
    file = io.BytesIO()
    torch.save(converted.state_dict(), file)
    file.seek(0)
    with torch.device("meta"):
        empty = convert(ready(Normed(bias), config)).to(dtype)
    assigned = copy.deepcopy(empty)
    assigned.load_state_dict(torch.load(file), assign=True)
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(converted.state_dict())
    for model in (converted, later, assigned, filled, pickle.loads(pickle.dumps(converted)), copy.deepcopy(converted)):
        for layer in (model, model.conv, model.fc):
            first = next(layer.parameters())
            assert (first.dtype, first.device) == (dtype, torch.device("cpu"))
            assert first.isfinite().all()
        assert {p.dtype for p in (model.conv.bias, model.fc.bias) if p is not None} <= {dtype}
        with torch.no_grad():
            y = model(batch())
        assert y.dtype == dtype
        assert y.isfinite().all()
    x = batch()
    with torch.no_grad():
        assert all(torch.equal(model(x), converted(x)) for model in (assigned, filled))


def test_what_a_user_sets_on_a_layer_follows_casts():
    linear = nn.Linear(32, 4)
    linear.gain, linear.adapter = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)
    linear.register_buffer("shift", torch.zeros(4))
    for layer in (Int8Linear.from_float(linear), Int4Linear.from_float(linear)):
        layer.half()
        assert {t.dtype for t in (layer.gain, layer.shift, layer.adapter.weight)} == {torch.float16}
        assert layer.scale.dtype == torch.float32


def test_states_with_a_bias_in_fp32_load():
    """As earlier files of 16-bit models hold them; and a bias in 16 bits loads into a model in fp32."""
    for dtype, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        layer = Int8Linear.from_float(nn.Linear(32, 4).to(dtype))
        state = {**layer.state_dict(), "bias": torch.randn(4).to(other)}
        for assign in (False, True):
            fresh = copy.deepcopy(layer)
            fresh.load_state_dict(state, assign=assign)
            assert fresh.bias.dtype == dtype
            assert torch.equal(fresh.bias, state["bias"].to(dtype))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_layers_are_made_alike_under_any_default_dtype(default):
    torch.set_default_dtype(default)
    try:
        for layer in (Int8Linear(32, 4), Int4Linear(32, 4), Int8Conv2d(2, 2, 1), Int4Embedding(3, 32)):
            assert {t.dtype for t in layer.state_dict().values() if t.is_floating_point()} == {torch.float32}
            assert layer.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


# Hooks and what a user sets


class Counter:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("config", CONFIGS)
def test_hooks_and_attributes_survive(config):
    net, counter = Net(), Counter()
    seen = counter.seen.append
    for name, layer in (("conv", net.conv), ("fc", net.fc)):
        layer.register_forward_pre_hook(lambda m, args, name=name: seen(f"{name} pre"))
        layer.register_forward_hook(lambda m, args, kwargs, y, name=name: seen(f"{name} post"), with_kwargs=True)
        layer.register_forward_hook(lambda m, args, y: 2 * y)
        layer.register_full_backward_hook(lambda m, dx, dy, name=name: seen(f"{name} backward"))
        layer.register_state_dict_post_hook(lambda m, state, prefix, meta, name=name: seen(f"{name} state"))
        layer.register_load_state_dict_pre_hook(lambda m, state, prefix, *rest: state.pop(f"{prefix}old", None))
        layer.register_load_state_dict_post_hook(lambda m, keys, name=name: seen(f"{name} loaded"))
        layer.tag, layer.scores = f"my {name}", [1, 2]
        layer.register_buffer("mask", torch.ones(3))
        layer.register_buffer("cache", torch.ones(2), persistent=False)
        layer.extra = nn.Parameter(torch.zeros(2))
        layer.adapter = nn.Linear(2, 2)
    config = CONFIGS[config]
    rules = [("*.adapter", None)]
    prepared = prepare(net, QConfig(config.weight, config.input, rules=rules))
    calibrate(prepared, [batch()])
    prepared.eval()
    converted = convert(prepared)
    x = batch()
    counter.seen.clear()
    y = converted(x)
    assert counter.seen == ["conv pre", "conv post", "fc pre", "fc post"]
    torch.testing.assert_close(y, prepared(x), rtol=1e-4, atol=1e-4)
    for name, layer in (("conv", converted.conv), ("fc", converted.fc)):
        assert type(layer).__module__ == "qkernels.nn.int8" or type(layer) is Int4Linear
        assert (layer.tag, layer.scores) == (f"my {name}", [1, 2])
        assert torch.equal(layer.mask, torch.ones(3))
        assert {"mask", "extra", "adapter.weight"} <= set(layer.state_dict())
        assert "cache" not in layer.state_dict()
        assert torch.equal(layer.cache, torch.ones(2))
        assert not layer.training
        assert not layer.adapter.training
        assert not hasattr(layer, "weight_fake_quant")
        assert not hasattr(layer, "input_fake_quant")
    counter.seen.clear()
    state = converted.state_dict()
    assert counter.seen.count("fc state") == 1
    assert prepared.fc._load_state_dict_pre_hooks.keys() == converted.fc._load_state_dict_pre_hooks.keys()
    hooked = next(iter(converted.fc._load_state_dict_pre_hooks.values())).module
    assert hooked() is converted.fc
    converted.load_state_dict({**state, "fc.old": torch.ones(1)}, strict=True)
    assert counter.seen.count("fc loaded") == 1
    assert torch.equal(copy.deepcopy(converted).fc.cache, torch.ones(2))


@pytest.mark.parametrize("kind", KINDS)
def test_from_float_takes_hooks_and_attributes_over(kind):
    source, _, x = layers()[kind]
    source.tag = "mine"
    source.register_forward_hook(lambda m, args, y: y + 1)
    layer = getattr(qk.nn, kind.partition(",")[0]).from_float(source.eval())
    assert layer.tag == "mine"
    assert not layer.training
    plain = copy.copy(layer)
    plain._forward_hooks = {}
    assert torch.equal(layer(x), plain(x) + 1)


def test_an_attribute_that_clashes_is_named():
    linear = nn.Linear(32, 4)
    linear.scale = 3.0
    with pytest.warns(UserWarning, match="Linear: its attribute 'scale' is not kept"):
        layer = Int8Linear.from_float(linear)
    assert isinstance(layer.scale, nn.Parameter)


def test_hooks_of_a_folded_batch_norm():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    seen: list[torch.Tensor] = []
    hook = type(
        "Hook", (), {"__call__": lambda self, m, args, y: seen.append(y), "__deepcopy__": lambda self, memo: self}
    )
    model[1].register_forward_hook(hook())
    model[1].tag = "mine"
    prepared = prepare(model)
    x = torch.randn(2, 3, 5, 5)
    calibrate(prepared, [x])
    converted = convert(prepared)
    assert type(converted[1]) is nn.Identity
    assert converted[1].tag == "mine"
    assert not list(converted[1].state_dict())
    seen.clear()
    with torch.no_grad():
        prepared.eval()(x)
        converted(x)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-4)


# Memory formats


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


# Processes and copies


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


@pytest.mark.parametrize("strategy", ["file_descriptor", "file_system"])
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


# Tracers and compilers


@pytest.mark.parametrize("config", CONFIGS)
def test_symbolic_trace_takes_each_layer_as_one(config):
    prepared, converted = made(config)
    x = batch()
    for model in (prepared, converted):
        layer = nn.Sequential(model.conv, nn.ReLU(), nn.Flatten(), model.fc)
        traced = torch.fx.symbolic_trace(layer)
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]
        assert torch.equal(traced(x), layer(x))
        assert [type(m) for m in traced.children()] == [type(m) for m in layer.children()]
    # What the tracer made of a prepared model is one still.
    traced = torch.fx.symbolic_trace(nn.Sequential(prepared.conv, nn.ReLU(), nn.Flatten(), prepared.fc))
    assert torch.equal(convert(traced)(x), converted(x))
    assert isinstance(torch.fx.symbolic_trace(Keyword(converted.fc)), torch.fx.GraphModule)


class Keyword(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(input=x)


def test_symbolic_trace_of_the_other_layers():
    for _, layer, x in layers().values():
        traced = torch.fx.symbolic_trace(nn.Sequential(layer))
        assert torch.equal(traced(x), layer(x))
    layer, x = Int8TrainingLinear(8, 4), torch.randn(2, 8)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert torch.equal(traced(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_symbolic_trace_of_a_layer_itself(kind):
    _, layer, x = layers()[kind]
    traced = torch.fx.symbolic_trace(layer)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    for graph in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), torch.fx.symbolic_trace(traced)):
        assert torch.equal(graph(x), layer(x))
    assert layer.itself is layer
    assert [name for name, _ in layer.named_modules()] == [""]


def test_hooks_run_when_the_graph_does():
    _, converted = made("int8")
    calls: list[type] = []
    converted.fc.register_forward_hook(lambda m, args, y: calls.append(type(y)))
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Flatten(), converted.fc))
    assert calls == []
    traced(torch.randn(1, 96))
    assert calls == [torch.Tensor]


@pytest.mark.parametrize("config", CONFIGS)
def test_converted_models_trace_export_and_compile(config):
    torch._dynamo.reset()
    _, converted = made(config)
    x = batch()
    with torch.no_grad():
        expected = converted(x)
        traced = torch.jit.trace(converted, (x,))
        assert torch.equal(traced(x), expected)
        exported = torch.export.export(converted, (x,)).module()
        torch.testing.assert_close(exported(x), expected)
        compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS)
def test_converted_models_trace_and_export_with_gradients_enabled(config, dtype):
    """Another batch size than traced with; a graph of torch.jit holds no gradient of a kernel, and says so."""
    torch.manual_seed(0)
    _, converted = made(config, dtype)
    x, other = batch(dtype), torch.randn(7, 4, 4, 4).to(dtype)
    file = io.BytesIO()
    for example in (x, x.clone().requires_grad_()):
        traced = torch.jit.trace(converted, (example,))
        assert torch.equal(traced(other), converted(other))
        torch.jit.save(traced, file)
        file.seek(0)
        assert torch.equal(torch.jit.load(file)(other), converted(other))
        file.seek(0)
    leaf = other.clone().requires_grad_()
    if "weight only" not in config and dtype != torch.float64:
        assert not traced(leaf).requires_grad
    for strict in (True, False):
        exported = torch.export.export(
            converted, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict
        ).module()
        assert torch.equal(exported(other), converted(other))


# Other dtypes


@pytest.mark.parametrize("config", CONFIGS)
def test_fp64_models_convert(config):
    prepared, converted = made(config, torch.float64)
    x = batch(torch.float64)
    y, expected = converted(x), prepared(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert converted.fc.weight.dtype == torch.float64
    leaf = x.clone().requires_grad_()
    converted(leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0
    assert converted.fc.bias.grad is not None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "Int4Embedding"])
def test_fp64_input_by_hand(kind):
    _, layer, x = layers()[kind]
    with torch.no_grad():
        torch.testing.assert_close(layer(x.double()), layer(x).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS)
def test_autocast(config, dtype):
    prepared, converted = made(config)
    x = batch()
    with torch.autocast("cpu", dtype), torch.no_grad():
        for given in (x, x.to(dtype)):
            y, expected = converted.conv(given), prepared.conv(given)
            assert y.dtype == expected.dtype == dtype
            assert y.stride() == expected.stride()
            torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
            hidden = F.relu(expected).flatten(1)
            y, expected = converted.fc(hidden), prepared.fc(hidden)
            assert y.dtype == expected.dtype == dtype
            torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
        with torch.autocast("cpu", enabled=False):
            assert converted.conv(x).dtype == torch.float32


# Storage


def stored(model: nn.Module) -> int:
    """Bytes of a state_dict, once for each storage, as a file holds them."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return sum(storages.values())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("input", [QSpec(8), None])
def test_convolutions_are_stored_at_their_bits(input, bits):
    conv = nn.Conv2d(6, 10, 3, groups=2, bias=False)
    prepared = prepare(conv, QConfig(QSpec(bits), input))
    x = torch.randn(2, 6, 5, 5)
    calibrate(prepared, [x])
    converted = convert(prepared)
    numel = conv.weight.numel()
    codes = -(-numel * bits // 8) if bits <= 4 else numel
    form = 4 * 5 + (4 * 2 if input else 0)
    assert stored(converted) == codes + 4 * 10 + form + (4 if input else 0)
    assert qk.report(converted).quantized_bytes == qk.report(prepared).quantized_bytes == stored(converted)
    assert torch.equal(converted.codes, prepared.weight_fake_quant.quantize(conv.weight)[0])
    fresh = copy.deepcopy(converted)
    fresh.set_weight(torch.zeros_like(converted.codes), torch.ones(10), None)
    fresh.load_state_dict(converted.state_dict())
    assert torch.equal(fresh(x), converted(x))
    old = {"weight" if key == "codes" else key: t for key, t in converted.state_dict().items()}
    old["weight"] = converted.codes  # a byte for each, as the first version wrote them
    fresh.set_weight(torch.zeros_like(converted.codes), torch.ones(10), None)
    fresh.load_state_dict(old)
    assert torch.equal(fresh(x), converted(x))
    if bits <= 4:
        with pytest.raises(RuntimeError, match="weight: q: got 100; accepted: the codes of"):
            fresh.load_state_dict({**old, "weight": torch.full_like(old["weight"], 100)})


@pytest.mark.parametrize("granularity", [None, qk.PerTensor(), PerGroup(8)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_only_holds_codes(dtype, bits, symmetric, granularity):
    model = nn.Sequential(nn.Linear(16, 24), nn.Conv1d(24, 1, 1), nn.Linear(1, 8, bias=False))[::2].to(dtype)
    model = nn.Sequential(model[0], nn.Linear(24, 8, bias=False).to(dtype))
    prepared = prepare(model, QConfig(QSpec(bits, granularity, symmetric), None))
    converted = convert(prepared)
    x = torch.randn(5, 16).to(dtype)
    assert torch.equal(converted(x), prepared(x))
    held = sum(t.numel() * t.element_size() for t in (*converted.parameters(), *converted.buffers()))
    forms, dtypes = sum(4 * layer.codes_form.numel() for layer in converted), 2 * dtype.itemsize
    assert held - dtypes == stored(converted) - forms
    assert stored(converted) == qk.report(converted).quantized_bytes == qk.report(prepared).quantized_bytes
    assert held < 0.6 * 4 * sum(p.numel() for p in model.parameters())
    assert type(converted[0]) is Int8Linear
    assert "input in float" in repr(converted[0])
    fresh = convert(prepare(model, QConfig(QSpec(bits, granularity, symmetric), None)))
    fresh.load_state_dict(converted.state_dict())
    assert torch.equal(fresh(x), converted(x))


@pytest.mark.parametrize("spec", [QSpec(8), QSpec(4, PerGroup(3)), QSpec(5, PerGroup(3), symmetric=False), QSpec(2)])
def test_weight_only_convolutions(spec):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.Conv2d(6, 6, 3, groups=3))
    prepared = prepare(model, QConfig(spec, None))
    converted = convert(prepared)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(converted(x), prepared(x))
    assert type(converted[0]) is Int8Conv2d
    assert stored(converted) == qk.report(prepared).quantized_bytes == qk.report(converted).quantized_bytes


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "Int4Embedding"])
def test_gradients_are_those_of_the_dequantized_weight(kind):
    _, layer, x = layers()[kind]
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    layer.requires_grad_(True)  # scales get none
    y = layer(leaf)
    plain = F.linear if x.dim() == 2 else lambda x, w, b: F.conv2d(x, w, b, groups=2)
    expected = plain(other, layer.weight, bias)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for name, p in layer.named_parameters() if name != "bias")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 64)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.body(self.table(ids)))


def test_a_weight_shared_with_a_float_layer_is_stored_once():
    ids = torch.randint(64, (2, 5))
    prepared = prepare(Tied(), QConfig(QSpec(8), None))
    converted = convert(prepared)
    assert torch.equal(converted(ids), prepared.eval()(ids))
    assert converted.head.weight is converted.table.weight
    assert type(converted.body) is Int8Linear
    assert stored(converted) < stored(Tied())
    assert qk.report(converted).quantized_bytes == qk.report(prepared).quantized_bytes == stored(converted)
    file = io.BytesIO()
    torch.save(converted.state_dict(), file)
    plain = io.BytesIO()
    torch.save(Tied().state_dict(), plain)
    assert len(file.getvalue()) < len(plain.getvalue())


class TiedLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(64, 64, bias=i < 2) for i in range(3))
        self.second.weight = self.third.weight = self.first.weight

    def forward(self, x):
        return self.third(self.second(self.first(x)))


def memory(model: nn.Module) -> int:
    """Bytes that it takes, once for each storage."""
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    return sum(held.values())


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_tied_layers_share_their_codes(config, trained):
    torch.manual_seed(0)
    prepared = prepare(TiedLinears(), CONFIGS[config])
    assert prepared.second.weight_fake_quant is prepared.first.weight_fake_quant
    x = torch.randn(5, 64)
    calibrate(prepared, [x])
    if trained:
        optimizer = torch.optim.Adam(qk.parameter_groups(prepared, 1e-2))
        for _ in range(3):
            optimizer.zero_grad()
            prepared(x).square().mean().backward()
            optimizer.step()
    converted, alone = convert(prepared), convert(ready(nn.Linear(64, 64), config))
    with torch.no_grad():
        torch.testing.assert_close(converted(x), prepared.eval()(x), rtol=0.05, atol=0.05)
    file, plain = io.BytesIO(), io.BytesIO()
    torch.save(converted, file)
    torch.save(alone, plain)
    file.seek(0)
    copies = {
        "as converted": converted,
        "deep copy": copy.deepcopy(converted),
        "pickle": pickle.loads(pickle.dumps(converted)),
        "file": torch.load(file, weights_only=False),
        "loaded": convert(ready(TiedLinears(), config)),
        "cast": copy.deepcopy(converted).bfloat16().float(),
    }
    copies["loaded"].load_state_dict(converted.state_dict())
    small = 4 * 64 * 3 + 3 * 64 + 500  # biases, and what little each layer has beside its weight
    for name, model in copies.items():
        assert model.second.data is model.third.data is model.first.data, name
        assert stored(model) < stored(alone) + small, name
        assert memory(model) < memory(alone) + small, name
        if name != "cast":
            with torch.no_grad():
                assert torch.equal(model(x), converted(x)), name
    assert len(file.getvalue()) < len(plain.getvalue()) + 64 * 64 // 2 + 12000
    assert qk.report(converted).quantized_bytes == qk.report(prepared).quantized_bytes == stored(converted)
    assert qk.report(converted).float_bytes == 4 * (64 * 64 + 2 * 64)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_tied_layers_load_codes_that_differ(config, assign):
    """As a model holds them whose layers were tied by hand; no layer writes into another one's memory."""
    torch.manual_seed(0)
    x = torch.randn(5, 64)
    converted, other = convert(ready(TiedLinears(), config)), convert(ready(TiedLinears(), config))
    source = convert(ready(nn.Linear(64, 64, bias=False), config)).state_dict()
    state = {**other.state_dict(), **{f"third.{key}": value for key, value in source.items()}}
    converted.load_state_dict(state, assign=assign)
    for key, value in converted.state_dict().items():
        assert torch.equal(value, state[key]), key
    with torch.no_grad():
        assert torch.equal(converted.second(x), other.second(x))
        assert not torch.equal(converted.third(x), other.third(x))
    converted.load_state_dict(other.state_dict(), assign=assign)
    assert converted.third.data is converted.first.data


def test_a_layer_with_two_names_is_stored_once():
    model = nn.Module()
    model.first = nn.Linear(64, 64)
    model.again = model.first
    model.forward = lambda x: model.first(x)
    for make in (Int8Linear.from_float, Int4Linear.from_float):
        model = nn.Module()
        model.first = model.again = make(nn.Linear(64, 64))
        state = model.state_dict()
        assert len(state) == 2 * len(model.first.state_dict())
        assert stored(model) == stored(model.first)
        held = state["first.codes"]
        held.zero_()
        assert not torch.equal(model.state_dict()["first.codes"], held)  # what was changed is not handed out again
        assert torch.equal(state["again.codes"], held)


# States of other layers

OTHERS = {  # pairs of layers whose states have the same names, dtypes and shapes
    "K of Int4Linear": (lambda: nn.Linear(33, 5), lambda: nn.Linear(34, 5), QSpec(4), QSpec(4), QSpec(8)),
    "K, 2 bits": (lambda: nn.Linear(37, 5), lambda: nn.Linear(40, 5), QSpec(2), QSpec(2), None),
    "bits of Int4Linear": (lambda: nn.Linear(48, 5), lambda: nn.Linear(64, 5), QSpec(4), QSpec(3), QSpec(8)),
    "bits, with groups": (
        lambda: nn.Linear(48, 5),
        lambda: nn.Linear(96, 5),
        QSpec(4, PerGroup(16), symmetric=False),
        QSpec(2, PerGroup(32), symmetric=False),
        None,
    ),
    "kernel of a convolution": (
        lambda: nn.Conv2d(2, 4, (3, 1)),
        lambda: nn.Conv2d(2, 4, (1, 3)),
        QSpec(4),
        QSpec(4),
        QSpec(8),
    ),
    "groups of a convolution": (
        lambda: nn.Conv2d(4, 4, 2, groups=2),
        lambda: nn.Conv2d(2, 4, (1, 4)),
        QSpec(3),
        QSpec(3),
        None,
    ),
    "channels of a convolution": (lambda: nn.Conv2d(4, 4, 1), lambda: nn.Conv2d(1, 4, 2), QSpec(2), QSpec(2), QSpec(8)),
    "padded channels": (lambda: nn.Conv2d(1, 1, 3), lambda: nn.Conv2d(5, 1, (1, 2)), QSpec(4), QSpec(4), QSpec(8)),
    "width of the input": (
        lambda: nn.Linear(32, 5),
        lambda: nn.Linear(32, 5),
        QSpec(8),
        QSpec(8),
        (QSpec(8), QSpec(4)),
    ),
    "width of int8 codes": (lambda: nn.Linear(32, 5), lambda: nn.Linear(32, 5), QSpec(8), QSpec(6), QSpec(8)),
    "input of a convolution": (
        lambda: nn.Conv2d(2, 4, 3),
        lambda: nn.Conv2d(2, 4, 3),
        QSpec(8),
        QSpec(8),
        (QSpec(7, symmetric=False), QSpec(8, symmetric=False)),
    ),
}


def without_form(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As earlier files hold them."""
    return {key: value for key, value in state.items() if not key.endswith("codes_form")}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_the_state_of_another_layer_is_refused(name, assign):
    *makes, first, second, inputs = OTHERS[name]
    inputs = inputs if isinstance(inputs, tuple) else (inputs, inputs)
    models = []
    for make, weight, input in zip(makes, (first, second), inputs, strict=True):
        prepared = prepare(nn.Sequential(make()), QConfig(weight, input))
        for quantizer in prepared.modules():
            if isinstance(quantizer, qk.nn.FakeQuantize) and not quantizer.is_calibrated:
                quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
        models.append(convert(prepared))
    for source, model in (models, models[::-1]):
        state, before = dict(source.state_dict()), copy.deepcopy(model.state_dict())
        forms = [(value.dtype, value.shape) for value in without_form(before).values()]
        assert forms == [(value.dtype, value.shape) for value in without_form(state).values()]  # nothing else tells
        own, other = (str(list(layer[0].weight_shape)) for layer in (model, source))
        with pytest.raises(RuntimeError) as refused:
            model.load_state_dict(state, strict=False, assign=assign)
        text = str(refused.value)
        assert f"0.codes_form: got codes of {source[0].weight_bits} bits for a weight {other}" in text
        assert f"accepted: codes of {model[0].weight_bits} bits for a weight {own}" in text
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        for kept in (before, without_form(before)):
            model.load_state_dict(kept, assign=assign)
        with pytest.raises(RuntimeError, match=r"0.codes_form: got torch.int32 of shape \[1\]; accepted: codes of"):
            model.load_state_dict({**before, "0.codes_form": torch.zeros(1, dtype=torch.int32)})


def test_the_state_of_another_embedding_is_refused():
    tables = [
        Int4Embedding.from_float(nn.Embedding(9, k), -1, weight_bits=bits) for k, bits in ((33, 4), (34, 4), (44, 3))
    ]
    for table in tables:
        for other in tables:
            if other is table:
                continue
            before = copy.deepcopy(table.state_dict())
            with pytest.raises(RuntimeError, match=r"codes_form: got codes of \d bits for a weight"):
                table.load_state_dict(other.state_dict())
            assert all(torch.equal(value, before[key]) for key, value in table.state_dict().items())


# exact


@pytest.mark.parametrize("config", CONFIGS)
def test_exact_follows_training(config):
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(96, 5)
    )
    prepared = prepare(model, CONFIGS[config])
    x = batch()
    calibrate(prepared, [x])
    evaluated = qk.exact(prepared)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    prepared.train()
    modes = [m.training for m in prepared.modules()]
    for step in range(3):
        state = copy.deepcopy(prepared.state_dict())
        y = evaluated(x)
        assert torch.equal(y, convert(prepared)(x))
        assert not y.requires_grad
        assert [m.training for m in prepared.modules()] == modes
        assert all(
            torch.equal(a.nan_to_num(7), b.nan_to_num(7))
            for a, b in zip(state.values(), prepared.state_dict().values(), strict=True)
        )
        assert not evaluated.eval().training
        assert not evaluated.train().training
        assert [m.training for m in prepared.modules()] == modes
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
        if step == 1:
            prepared[5].weight.data.mul_(2)  # which no tensor's version shows
    assert next(evaluated.parameters()) is next(prepared.parameters())
    assert torch.equal(evaluated(x), convert(prepared)(x))
    prepared.bfloat16()
    assert torch.equal(evaluated(x.bfloat16()), convert(prepared)(x.bfloat16()))
    other = copy.deepcopy(evaluated)
    assert torch.equal(other(x.bfloat16()), evaluated(x.bfloat16()))


def test_exact_shares_every_tensor():
    prepared = prepare(Tied(), QConfig(QSpec(8), None, rules=[("body", None)]))
    seen = []
    prepared.table.register_forward_hook(lambda m, args, y: seen.append(m.weight))
    qk.exact(prepared)(torch.randint(64, (2, 5)))
    assert seen[0] is prepared.table.weight


def test_exact_names_what_is_not_calibrated():
    prepared = prepare(Net())
    with pytest.raises(ValueError, match=r"'conv.input_fake_quant' is not calibrated, nor are 'fc.input_fake_quant'"):
        qk.exact(prepared)
    with pytest.raises(ValueError, match="without quantizers"):
        qk.exact(Net())


def test_a_whole_model_flips_few_codes():
    """What the docstring of convert promises: a last bit seldom becomes a step of a later layer's input."""
    apart = largest = total = 0.0
    for seed in range(10):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for _ in range(8):
            layers += [nn.Linear(64, 64), nn.ReLU()]
        prepared = prepare(nn.Sequential(*layers, nn.Linear(64, 10)))
        x = torch.randn(256, 64)
        calibrate(prepared, [x])
        prepared.eval()
        with torch.no_grad():
            expected, y = prepared(x), convert(prepared)(x)
        error = (y - expected).abs() / expected.abs().max()
        apart += float((error > 1e-5).double().sum())
        total += error.numel()
        largest = max(largest, float(error.max()))
    assert apart / total < 0.05
    assert largest < 0.02
