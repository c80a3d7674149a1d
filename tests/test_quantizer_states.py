"""Quantizers between training steps: switches, other widths, saved states, sharded and frozen models."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from qat_models import assert_unchanged, config, quantizers, snapshot, sqnr
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.nn import FakeQuantize, PerChannel, PerGroup, PerTensor, QATLinear


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema", "dynamic"])
def test_switches(quantizer):
    torch.manual_seed(0)
    model, x = nn.Linear(8, 4), torch.randn(32, 8)
    prepared = qk.prepare(model, config(4, quantizer))
    if quantizer != "dynamic":
        qk.calibrate(prepared, [x])
    assert not torch.equal(prepared(x), model(x))
    off = prepared if quantizer != "lsq" else copy.deepcopy(prepared)
    off.apply(torch.ao.quantization.disable_fake_quant)
    for mode in (True, False):
        assert torch.equal(off.train(mode)(x), model(x))
    names = ["weight_fake_quant", "input_fake_quant"]
    assert qk.enable_fake_quant(off) == names
    assert qk.enable_fake_quant(off) == []
    assert not torch.equal(off(x), model(x))
    assert qk.enable_fake_quant(off, False) == names
    assert torch.equal(off(x), model(x))
    loaded = qk.prepare(model, config(4, quantizer))
    loaded.load_state_dict(off.state_dict())
    assert torch.equal(loaded(x), model(x))
    off.apply(torch.ao.quantization.enable_fake_quant)
    assert not torch.equal(off(x), model(x))
    off.train()
    assert qk.freeze_observers(off) == names
    assert qk.freeze_observers(off) == []
    assert qk.freeze_observers(off, False) == names
    off.apply(torch.ao.quantization.disable_observer)
    before = copy.deepcopy(off.state_dict())
    off(10 * x)
    after = off.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    fresh = qk.prepare(model, config(4, quantizer))
    fresh.load_state_dict(before)
    fresh.train()(10 * x)
    assert all(torch.equal(before[key], value) for key, value in fresh.state_dict().items())
    if quantizer == "ema":
        off.apply(torch.ao.quantization.enable_observer)
        off(10 * x)
        assert not torch.equal(off.input_fake_quant.scale, before["input_fake_quant.scale"])


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema", "dynamic"])
def test_set_bits_keeps_the_range(quantizer):
    torch.manual_seed(0)
    prepared = qk.prepare(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), config(8, quantizer))
    x = torch.randn(32, 16)
    if quantizer != "dynamic":
        qk.calibrate(prepared, [x])
    if quantizer == "lsq":
        with torch.no_grad():
            for layer in quantizers(prepared).values():
                if layer.learns:
                    layer.log_scale.fill_(0.3)
        qk.freeze_observers(prepared)  # or the range would change with the width
    before = {
        name: tuple(None if t is None else t.clone() for t in q.qparams())
        for name, q in quantizers(prepared).items()
        if quantizer != "dynamic"
    }
    assert qk.set_bits(prepared, 4, "0.*") == ["0.weight_fake_quant", "0.input_fake_quant"]
    assert qk.set_bits(prepared, 4, ["0.*"]) == []
    assert [q.bits for q in quantizers(prepared).values()] == [4, 4, 8, 8]
    for name, (scale, zero_point) in before.items():
        changed = quantizers(prepared)[name]
        assert (changed.quant_min, changed.quant_max) == ((-7, 7) if zero_point is None else (-8, 7)) or name[0] == "1"
        if name[0] == "0":
            steps = 127 / 7 if zero_point is None else 255 / 15
            torch.testing.assert_close(changed.qparams()[0], scale * steps)
            if zero_point is not None:
                low = (-8 - changed.qparams()[1]) * changed.scale
                torch.testing.assert_close(
                    low, (-128 - zero_point) * scale, rtol=0, atol=float(changed.scale.max()) / 2
                )
    prepared.eval()
    with torch.no_grad():
        torch.testing.assert_close(qk.convert(prepared)(x), prepared(x))
    for bits in (2, 3, 8):
        qk.set_bits(prepared, bits)
    for name, (scale, zero_point) in before.items():
        torch.testing.assert_close(quantizers(prepared)[name].scale, scale)
        assert zero_point is None or torch.equal(quantizers(prepared)[name].qparams()[1], zero_point)
    with pytest.raises(ValueError, match="bits: got 9"):
        qk.set_bits(prepared, 9)
    with pytest.raises(ValueError, match=r"where: got 'fc\.\*'; accepted: .* quantizers: '0\.weight_fake_quant'"):
        qk.set_bits(prepared, 4, "fc.*")
    with pytest.raises(AttributeError, match="bits"):
        prepared[0].weight_fake_quant.bits = 4


def test_a_refused_width_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    kmeans = qk.QSpec(4, quantizer="kmeans")
    prepared = qk.prepare(model, qk.QConfig(qk.QSpec(4), None, rules=[("1", {"weight": kmeans})]))
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-2)
    prepared(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()  # what follows a weight has something to follow
    before = snapshot(prepared)
    with pytest.raises(ValueError, match=r'bits: got 3 with quantizer="kmeans"'):
        qk.set_bits(prepared, 3)
    assert_unchanged(prepared, before)
    assert [q.bits for q in quantizers(prepared).values()] == [4, 4]


def test_a_state_of_another_width_is_refused():
    torch.manual_seed(0)
    model, x = nn.Linear(8, 4), torch.randn(32, 8)
    for quantizer in ("lsq", "minmax", "ema"):
        prepared = qk.prepare(model, config(8, quantizer))
        qk.calibrate(prepared, [x])
        other = qk.prepare(model, config(4, quantizer))
        with pytest.raises(RuntimeError, match=r"weight_fake_quant\.bits: got a state of 8 bits; accepted: 4"):
            other.load_state_dict(prepared.state_dict())
        qk.set_bits(other, 8)
        other.load_state_dict(prepared.state_dict())
        assert torch.equal(other.eval()(x), prepared.eval()(x))
        older = {
            key: value for key, value in prepared.state_dict().items() if not key.endswith(("bits", "_on", "start"))
        }
        older = {key: value for key, value in older.items() if not key.endswith("log_scale")}
        other = qk.prepare(model, config(8, quantizer)).eval()
        other.load_state_dict(older, strict=quantizer != "ema")  # a state without these keys
        assert torch.equal(other(x), prepared(x))
    with pytest.raises(RuntimeError, match=r"scale: got shape \[3, 1\]; accepted: \[4, 1\]"):
        other.load_state_dict({**prepared.state_dict(), "weight_fake_quant.scale": torch.ones(3, 1)})


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema"])
def test_training_resumes_bit_for_bit(quantizer, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 16)

    def steps(prepared, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            F.mse_loss(prepared(x), x[:, :4].cos()).backward()
            optimizer.step()

    prepared = qk.prepare(model, config(4, quantizer))
    qk.calibrate(prepared, [x])
    optimizer = torch.optim.Adam(qk.parameter_groups(prepared, lr=0.01, weight_decay=0.1))
    steps(prepared, optimizer, 5)
    torch.save({"model": prepared.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    steps(prepared, optimizer, 5)
    saved = torch.load(tmp_path / "state.pt")
    for assign in (False, True):
        resumed = qk.prepare(model, config(4, quantizer))
        resumed.load_state_dict(copy.deepcopy(saved["model"]), assign=assign)
        again = torch.optim.Adam(qk.parameter_groups(resumed, lr=0.01, weight_decay=0.1))
        again.load_state_dict(copy.deepcopy(saved["optimizer"]))
        steps(resumed, again, 5)
        for key, value in prepared.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), key
    if quantizer == "lsq":
        edited = {**saved["model"], "0.weight_fake_quant.scale": torch.full((16, 1), 0.5)}
        resumed.load_state_dict(edited)
        assert torch.equal(resumed[0].weight_fake_quant.scale, torch.full((16, 1), 0.5))
        assert torch.equal(resumed[2].weight_fake_quant.scale, saved["model"]["2.weight_fake_quant.scale"])
    resumed[0].weight_fake_quant.scale = torch.full((16, 1), 0.25)
    assert torch.equal(resumed[0].weight_fake_quant.scale, torch.full((16, 1), 0.25))


def test_fully_shard_takes_a_prepared_bf16_model(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    x = torch.randn(16, 8)
    prepared = qk.prepare(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), config(4))
    qk.calibrate(prepared, [x])
    prepared = prepared.bfloat16()
    assert all(quantizer.scale.dtype == torch.float32 for quantizer in quantizers(prepared).values())
    plain = copy.deepcopy(prepared)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/rendezvous")
    try:
        sharded = fully_shard(prepared)
        for model in (plain, sharded):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                model(x.bfloat16()).float().square().sum().backward()
                optimizer.step()
        for (key, value), (_, expected) in zip(sharded.state_dict().items(), plain.state_dict().items(), strict=True):
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            torch.testing.assert_close(value, expected, msg=key)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_changes_a_quantizer_reaches_a_sharded_model(symmetric, dtype, tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    x = torch.randn(16, 32, dtype=dtype)
    spec = qk.QSpec(4, PerGroup(16), symmetric=symmetric)
    prepared = qk.prepare(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype), qk.QConfig(spec))
    qk.calibrate(prepared, [x])
    with torch.no_grad():
        for quantizer in quantizers(prepared).values():
            if quantizer.learns:
                quantizer.log_scale += 0.01
    plain = copy.deepcopy(prepared)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/rendezvous")
    try:
        for layer in (prepared[0], prepared[2]):
            fully_shard(layer)
        sharded = fully_shard(prepared)

        def assert_same():
            for quantizer, expected in zip(quantizers(sharded).values(), quantizers(plain).values(), strict=True):
                for got, wanted in zip(quantizer.qparams(), expected.qparams(), strict=True):
                    assert (got is None and wanted is None) or torch.equal(got, wanted)

        for model in (plain, sharded):
            qk.set_bits(model, 3, "*weight_fake_quant")
            qk.set_bits(model, 6, "*input_fake_quant")
        assert_same()
        for model in (plain, sharded):
            state = model.state_dict()
            model.load_state_dict({key: t for key, t in state.items() if not key.endswith(("start", "log_scale"))})
        assert_same()
        for model in (plain, sharded):
            qk.calibrate(model, [3 * x])
        assert_same()
        for model in (plain, sharded):
            qk.freeze_observers(model)
        assert torch.equal(sharded.eval()(x), plain.eval()(x))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("quantizer", ["lsq", "minmax"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(4, 8), None])
def test_a_quantizer_called_twice_keeps_what_the_first_call_used(quantizer, symmetric, shape):
    torch.manual_seed(0)
    granularity = PerTensor() if shape is None else PerChannel(0)
    fake_quant = FakeQuantize(quantizer=quantizer, symmetric=symmetric, granularity=granularity, shape=shape)
    x = torch.randn(4, 8, requires_grad=True)
    fake_quant(x)
    y = fake_quant(x)
    wanted = [x, *fake_quant.parameters()]
    expected = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    fake_quant(9 * x + 5 if shape is None else x / 100)
    for got, gradient in zip(torch.autograd.grad(y.sum(), wanted), expected, strict=True):
        assert torch.equal(got, gradient)


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_prepared_models_export(quantizer, symmetric, training):
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    weight_only = qk.QConfig(qk.QSpec(8, quantizer=quantizer, symmetric=symmetric), None)
    prepared = qk.prepare(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), weight_only)
    with torch.no_grad():
        prepared[0].weight *= 3
    prepared.train(training)
    expected = copy.deepcopy(prepared)(x)
    exported = torch.export.export(prepared, (x,)).module()
    torch.testing.assert_close(exported(x), expected)


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema"])
def test_an_average_made_before_the_first_batch_is_calibrated_with_the_model(quantizer):
    torch.manual_seed(0)
    x = torch.randn(32, 16)
    prepared = qk.prepare(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), config(8, quantizer))
    called, unused = (torch.optim.swa_utils.AveragedModel(prepared) for _ in range(2))
    prepared(x)
    for averaged in (called, unused):
        averaged.update_parameters(prepared)
    y = prepared.eval()(x)
    assert torch.equal(called.eval()(x), y)
    torch.testing.assert_close(qk.convert(unused.module)(x), y)


@pytest.mark.parametrize("quantizer", ["lsq", "minmax"])
@pytest.mark.parametrize("wrap", [lambda layer: layer, nn.utils.parametrizations.weight_norm])
def test_frozen_ranges_are_those_of_the_weights_as_they_are(quantizer, wrap):
    torch.manual_seed(0)
    x = torch.randn(32, 16)
    model = nn.Sequential(wrap(nn.Linear(16, 8)), nn.ReLU(), nn.Linear(8, 4))
    prepared = qk.prepare(model, config(8, quantizer))
    qk.calibrate(prepared, [x])
    prepared.eval()
    for parameter in prepared.parameters():
        if parameter.dim() == 2 and parameter.shape[1] > 1:
            parameter.data.mul_(4)
    prepared[2].weight.data.div_(9)
    y = prepared(x)
    narrow = copy.deepcopy(prepared)
    qk.freeze_observers(prepared)
    assert torch.equal(prepared(x), y)
    prepared.train()(x)
    assert torch.equal(prepared.eval()(x), y)
    qk.set_bits(narrow, 5)
    for layer in (narrow[0], narrow[2]):
        assert sqnr(layer.weight, layer.weight_fake_quant(layer.weight)) > 20


def test_frozen_weights_stay_frozen_where_a_float_checkpoint_came_before():
    torch.manual_seed(0)
    x = torch.randn(32, 16)
    prepared = qk.prepare(nn.Linear(16, 8))
    qk.calibrate(prepared, [x])
    prepared.load_state_dict(nn.Linear(16, 8).state_dict(), strict=False)
    qk.freeze_observers(prepared)
    prepared(x)
    assert not prepared.weight_fake_quant.observer_on
    scale = prepared.weight_fake_quant.scale.clone()
    with torch.no_grad():
        prepared.weight *= 2
    prepared(x)
    assert torch.equal(prepared.weight_fake_quant.scale, scale)


def test_moving_averages_of_weights_take_transforms_in_training():
    torch.manual_seed(0)
    x = torch.randn(32, 16)
    prepared = qk.prepare(nn.Linear(16, 8), config(8, "ema"))
    qk.calibrate(prepared, [x])
    parameters = dict(prepared.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(prepared, p, (x,)).square().sum())(parameters)
    prepared(x).square().sum().backward()
    torch.testing.assert_close(gradients["weight"], prepared.weight.grad, rtol=1e-4, atol=1e-4)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, ids, mask):
        return self.fc(ids * mask)


def test_calibrate_passes_tuples_as_arguments():
    x, mask = torch.full((8, 4), 100.0), torch.full((8, 4), 0.01)
    prepared = qk.prepare(TwoInputs(), config(8, "minmax"))
    for batch in ((x, mask), [x, mask], {"ids": x, "mask": mask}):
        qk.calibrate(prepared, [batch])
        torch.testing.assert_close(prepared.fc.input_fake_quant.scale, torch.full((1,), 1 / 255))
    with pytest.raises(TypeError, match="got a tuple of 3 elements for a model that takes 2 arguments"):
        qk.calibrate(prepared, [(x, mask, x)])
    labelled = qk.prepare(nn.Linear(4, 2), config(8, "minmax"))
    qk.calibrate(labelled, [(x, torch.zeros(8))])  # a loader's pair of input and target
    torch.testing.assert_close(labelled.input_fake_quant.scale, torch.full((1,), 100 / 255))
    assert len(qk.report(prepared, (x, mask)).layers) == 1


def test_calibrate_takes_max_batches():
    taken = []

    def batches():
        for index in range(100):
            taken.append(index)
            yield torch.full((2, 4), float(index))

    prepared = qk.prepare(nn.Linear(4, 2), config(8, "minmax"))
    qk.calibrate(prepared, batches(), max_batches=3)
    assert taken == [0, 1, 2]
    torch.testing.assert_close(prepared.input_fake_quant.scale, torch.full((1,), 2 / 255))
    with pytest.raises(ValueError, match="max_batches: got 0"):
        qk.calibrate(prepared, batches(), max_batches=0)


def test_prepared_models_can_be_traced():
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    for quantizer in ("lsq", "minmax", "ema", "dynamic"):
        prepared = qk.prepare(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), config(4, quantizer))
        if quantizer != "dynamic":
            qk.calibrate(prepared, [x])
        for mode in (True, False):
            prepared.train(mode)
            expected = copy.deepcopy(prepared)(x)
            traced = torch.fx.symbolic_trace(prepared)
            assert torch.equal(traced(x), expected), (quantizer, mode)
            expected = copy.deepcopy(prepared)(x[:2])
            assert torch.equal(traced(x[:2]), expected), (quantizer, mode)


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema", "dynamic"])
def test_a_model_without_data_starts_when_it_gets_some(quantizer):
    with torch.device("meta"):
        prepared = qk.prepare(nn.Linear(8, 4), config(8, quantizer))
    prepared = prepared.to_empty(device="cpu")
    torch.manual_seed(0)
    source, x = nn.Linear(8, 4), torch.randn(16, 8)
    expected = qk.prepare(source, config(8, quantizer))
    for key, value in expected.state_dict().items():
        if key.startswith("input_fake_quant"):
            torch.testing.assert_close(prepared.state_dict()[key], value, equal_nan=True)
    prepared.load_state_dict(source.state_dict(), strict=False)
    if quantizer != "dynamic":
        qk.calibrate(prepared, [x])
        qk.calibrate(expected, [x])
    assert torch.equal(prepared(x), expected(x))
    assert isinstance(prepared, QATLinear)


def test_a_quantizer_that_neither_quantizes_nor_observes_needs_no_scale():
    model = nn.Linear(8, 4)
    prepared = qk.prepare(model)
    prepared.apply(torch.ao.quantization.disable_observer)
    prepared.apply(torch.ao.quantization.disable_fake_quant)
    x = torch.randn(3, 8)
    for training in (True, False):
        assert torch.equal(prepared.train(training)(x), model(x))
