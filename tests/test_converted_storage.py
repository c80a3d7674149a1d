"""What converted layers store: codes at their bits, tied weights once, no state of another layer, exact copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.multiprocessing
from converted import CONFIGS, DTYPES, KINDS, Net, batch, layers, ready
from torch import nn

import qkernels as qk
from qkernels.nn import Int4Embedding, Int4Linear, Int8Conv2d, Int8Linear, PerGroup
from qkernels.qat import QConfig, QSpec, calibrate, convert, prepare


def stored(model: nn.Module) -> int:
    """Bytes of a state_dict, once for each storage, as a file holds them."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return sum(storages.values())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_linear_layers_hold_their_bits_in_memory(bits):
    linear = nn.Linear(128, 64)
    prepared = prepare(linear, QConfig(QSpec(bits)))
    calibrate(prepared, [torch.randn(2, 128)])
    converted = convert(prepared)
    assert converted.data.nbytes == converted.state_dict()["codes"].nbytes == 128 * 64 * bits // 8
    (row,) = qk.report(converted).layers
    assert (row.kind, row.weight_bits) == ("Int4Linear", bits)
    assert row.quantized_bytes == stored(converted)


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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("Embedding")])
def test_gradients_are_those_of_the_dequantized_weight(kind):
    source, layer, x = layers()[kind]
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    layer.requires_grad_(True)  # scales get none
    y = layer(leaf)
    expected = torch.func.functional_call(source, {"weight": layer.weight, "bias": bias}, other)
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
    no_integers = {"weight": {"quantizer": "dorefa"}}
    prepared = prepare(Tied(), QConfig(QSpec(8), None, rules=[("table", no_integers), ("head", no_integers)]))
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


def test_a_model_loads_all_of_a_state_or_nothing(tmp_path):
    def made(outputs, bits=8):
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, outputs))
        prepared = prepare(model, QConfig(QSpec(bits)))
        qk.calibrate(prepared, [torch.randn(8, 4)])
        return prepared, convert(prepared)

    prepared, converted = made(3)
    qk.save(converted, tmp_path / "model.safetensors")
    loaded = qk.load(tmp_path / "model.safetensors", nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    states = {r"2.codes_form: got codes of 8 bits for a weight \[5, 6\]": made(5)[1].state_dict()}
    states |= {
        "0.codes_form: got codes of 4 bits": made(3, 4)[1].state_dict(),
        "0.weight: got": made(3)[0].state_dict(),
    }
    cases = [(model, text, state) for model in (converted, loaded) for text, state in states.items()]
    for model, text, state in (*cases, (prepared, "0.codes: got those of a converted", made(3)[1].state_dict())):
        before = copy.deepcopy(model.state_dict())
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=f"{text}.*Nothing was loaded"):
                model.load_state_dict(state, strict=strict)
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        model.load_state_dict(before)


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
    prepared = prepare(Tied(), QConfig(QSpec(8), None, rules=[("body", None), ("table", None)]))
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
