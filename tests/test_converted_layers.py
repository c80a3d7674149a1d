"""Layers on integers in the place of float ones: weights, parameters, casts, hooks and attributes as a user expects."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.multiprocessing
from converted import CONFIGS, DTYPES, KINDS, Net, batch, layers, made, ready
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.nn import Int4Embedding, Int4Linear, Int8Conv2d, Int8Linear
from qkernels.qat import QConfig, calibrate, convert, prepare


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
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("Embedding")])
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
