"""BatchNorm: folded behind every convolution, frozen, and with statistics that are estimated anew."""

import copy
import pickle

import pytest
import torch
from qat_models import assert_same_numbers, snapshot
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.nn import PerTensor, QATConv3d
from qkernels.qat import QConfig, QSpec, calibrate, convert, prepare, report

MINMAX = QConfig(QSpec(8, quantizer="minmax"), QSpec(8, symmetric=False, quantizer="minmax"))
MODELS = {
    "conv1d": lambda: (nn.Conv1d(3, 6, 3, padding=1, bias=False), nn.BatchNorm1d(6), (4, 3, 9)),
    "conv1d groups": lambda: (nn.Conv1d(4, 6, 2, groups=2), nn.BatchNorm1d(6), (4, 4, 9)),
    "conv2d": lambda: (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 3, 6, 5)),
    "conv3d": lambda: (nn.Conv3d(2, 4, 2, groups=2), nn.BatchNorm3d(4), (2, 2, 3, 4, 3)),
    "up1d": lambda: (nn.ConvTranspose1d(3, 4, 3, stride=2), nn.BatchNorm1d(4), (3, 3, 5)),
    "up2d groups": lambda: (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 4, 3)),
    "up3d depthwise": lambda: (nn.ConvTranspose3d(3, 3, 2, groups=3, bias=False), nn.BatchNorm3d(3), (2, 3, 3, 2, 3)),
    "sync": lambda: (nn.Conv2d(3, 6, 3), nn.SyncBatchNorm(6), (2, 3, 6, 5)),
    "sync up": lambda: (nn.ConvTranspose1d(3, 6, 3), nn.SyncBatchNorm(6), (2, 3, 6)),
}


def made(kind: str) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    conv, norm, shape = MODELS[kind]()
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        if norm.affine:
            norm.weight.normal_()
            norm.bias.normal_()
    return nn.Sequential(conv, norm, nn.ReLU()), torch.randn(shape) + 0.2


def norm_by_hand(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    y = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    return y * norm.weight.view(shape) + norm.bias.view(shape) if norm.affine else y


CONFIGS = {
    "int8": MINMAX,
    "int4": QConfig(QSpec(4), QSpec(8, symmetric=False)),
    "weight only": QConfig(QSpec(3), None),
    "in float": QConfig(QSpec(8, symmetric=False, quantizer="minmax"), MINMAX.input),  # no kernel takes the zero points
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", MODELS)
def test_folds_behind_every_convolution(kind, name):
    (model, x), config = made(kind), CONFIGS[name]
    prepared = prepare(model, config)
    calibrate(prepared, [x])
    prepared[1].eval()  # its statistics stay random, with gammas of both signs
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in prepared.parameters())
        optimizer.step()
    converted = convert(prepared)
    folded = name != "weight only"
    assert (type(converted[1]) is nn.Identity) is folded
    assert_same_numbers(converted, prepared, x, tolerance=5e-6)
    with torch.no_grad():
        expected = norm_by_hand(prepared[1], prepared[0](x)).relu()
        torch.testing.assert_close(converted(x), expected, rtol=1e-4, atol=1e-5)
    assert type(converted[0]).__name__ == ("QAT" if name == "in float" else "Int8") + type(model[0]).__name__
    if name == "in float":
        assert converted[0].bias is not None
        f = norm_by_hand_factor(prepared[1]).double()
        quantized = prepared[0].weight_fake_quant(prepared[0].weight).detach().double()
        exact = quantized * factor_of_weight(prepared[0], f)
        largest = exact.abs().max()
        assert (converted[0].weight.double() - exact).abs().max() <= 2**-24 * largest, "each rounded once"
    y = converted(x)
    assert torch.equal(qk.exact(prepared)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(converted))(x), y)
    blank = convert(prepared)
    blank.load_state_dict(converted.state_dict())
    assert torch.equal(blank(x), y)
    assert type(prepared[1]) is type(model[1]), "the prepared model stays as it was"


def norm_by_hand_factor(norm: nn.Module) -> torch.Tensor:
    gamma = norm.weight.detach().double() if norm.affine else 1.0
    return gamma / (norm.running_var.double() + norm.eps).sqrt()


def factor_of_weight(conv: nn.Module, f: torch.Tensor) -> torch.Tensor:
    """The factor of each element of the weight, found by indices."""
    w = conv.weight
    factor = torch.empty(w.shape[:2], dtype=torch.double)
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            out = i
            if conv.transposed:
                out = i // (conv.in_channels // conv.groups) * w.shape[1] + j
            factor[i, j] = f[out]
    return factor.view(*w.shape[:2], *[1] * (w.dim() - 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["conv1d", "conv3d", "up2d groups"])
def test_folds_in_other_dtypes(kind, dtype):
    model, x = made(kind)
    model, x = model.to(dtype), x.to(dtype)
    prepared = prepare(model, MINMAX)
    calibrate(prepared, [x])
    converted = convert(prepared)
    assert type(converted[1]) is nn.Identity
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-6
    assert_same_numbers(converted, prepared, x, tolerance=tolerance)


class Twice(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Doubled(nn.ConvTranspose2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Grown(nn.Conv3d):
    def forward(self, x):
        return F.conv3d(F.pad(x, [1] * 6), self.weight, self.bias)


def test_what_is_not_folded():
    torch.manual_seed(0)
    cases = {
        "the forward of Twice is its own": nn.Sequential(nn.Conv2d(3, 4, 3), Twice(4)),
        "the forward of 0 does more than convolve": nn.Sequential(Doubled(3, 4, 3), nn.BatchNorm2d(4)),
        "straight from a convolution": nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.BatchNorm1d(4)),
        "keeps no running": nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4, track_running_stats=False)),
    }
    for reason, model in cases.items():
        x = torch.randn(2, 3, *[6] * (len(model[0].kernel_size)))
        prepared = prepare(model, MINMAX)
        calibrate(prepared, [x])
        prepared(x)
        converted = convert(prepared)
        assert_same_numbers(converted, prepared, x)
        assert any(reason in note for note in report(prepared).notes.values()), reason
        assert not any(isinstance(module, nn.Identity) for module in converted.modules())
    grown = nn.Sequential(Grown(2, 3, 3), nn.BatchNorm3d(3))
    x = torch.randn(2, 2, 3, 3, 3)
    prepared = prepare(grown, MINMAX)
    calibrate(prepared, [x])
    assert_same_numbers(convert(prepared), prepared, x)


def test_two_convolutions_of_one_weight_fold_each_with_its_own_norm():
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv3d(2, 2, 1, bias=False), nn.Conv3d(2, 2, 1, bias=False)
            self.b.weight = self.a.weight
            self.norm_a, self.norm_b = nn.BatchNorm3d(2), nn.BatchNorm3d(2)

        def forward(self, x):
            return self.norm_b(self.b(self.norm_a(self.a(x)).relu()))

    model, x = Two(), torch.randn(3, 2, 2, 3, 2)
    nn.init.uniform_(model.norm_b.weight, -2, -1)
    prepared = prepare(model, CONFIGS["in float"])
    calibrate(prepared, [x])
    prepared(x)
    converted = convert(prepared)
    assert type(converted.a) is QATConv3d
    assert not torch.equal(converted.a.weight, converted.b.weight)
    assert_same_numbers(converted, prepared, x)


@pytest.mark.parametrize("before", [True, False])
def test_sync_batch_norm_before_or_after_prepare(before):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))
    model.insert(3, nn.Flatten(2))
    x, plain = torch.randn(2, 3, 5, 5), prepare(model, MINMAX)
    calibrate(plain, [x])
    convert_sync = nn.SyncBatchNorm.convert_sync_batchnorm
    prepared = prepare(convert_sync(copy.deepcopy(model)), MINMAX) if before else convert_sync(copy.deepcopy(plain))
    if before:
        calibrate(prepared, [x])
    assert type(prepared[1]) is nn.SyncBatchNorm
    for _ in range(2):
        torch.testing.assert_close(prepared(x), plain(x), rtol=1e-4, atol=1e-5)
    converted = convert(prepared)
    assert type(converted[1]) is type(converted[5]) is nn.Identity
    assert_same_numbers(converted, prepared, x, flips=0.02)


class Scaled(nn.BatchNorm1d):
    """A subclass without a forward of its own."""


@pytest.mark.parametrize("of", ["prepared", "float"])
def test_frozen_batch_norms(of):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 4, 3), Scaled(4), nn.ReLU(), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4, track_running_stats=False)
    )
    x = torch.randn(5, 3, 8)
    model(x)
    if of == "prepared":
        model = prepare(model, MINMAX)
        calibrate(model, [x])
    plain = copy.deepcopy(model)
    assert qk.freeze_bn(model) == ["1"]
    assert qk.freeze_bn(model) == []
    assert isinstance(model[1], Scaled)
    assert "FrozenScaled(4" in repr(model)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert each.eval().train() is each
        assert each[0].training
        assert each[4].training
        assert not each[1].training
        before = [t.clone() for t in each[1].buffers()]
        y = each(x)
        first = plain[0](x)
        torch.testing.assert_close(each[:2](x), norm_by_hand(plain[1], first), rtol=1e-5, atol=1e-5)
        y.square().sum().backward()
        assert all(map(torch.equal, before, each[1].buffers()))
        assert each[1].weight.grad.abs().sum() > 0
        assert each[0].weight.grad.isfinite().all()
    assert model.state_dict().keys() == plain.state_dict().keys()
    if of == "prepared":
        assert type(convert(model)[1]) is nn.Identity
        assert_same_numbers(convert(model), model, x, flips=0.02)
        model.train()
    assert qk.freeze_bn(model, False) == ["1"]
    assert type(model[1]) is Scaled
    assert model[1].training
    assert not torch.equal(model(x), y)
    assert not torch.equal(model[1].running_mean, before[0])
    model.eval()
    qk.freeze_bn(model)
    qk.freeze_bn(model, False)
    assert not model[1].training
    assert qk.freeze_bn(nn.Linear(2, 2)) == []
    with pytest.raises(TypeError, match="model: got a dict; accepted"):
        qk.freeze_bn({})


def test_a_frozen_batch_norm_compiles():
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), torch.randn(5, 3, 8)
    prepared = prepare(model, MINMAX)
    calibrate(prepared, [x])
    qk.freeze_bn(prepared)
    compiled = torch.compile(prepared, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), prepared(x))


def test_reestimated_statistics_are_the_mean_over_the_batches():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.5), nn.Conv1d(4, 2, 1), nn.BatchNorm1d(2)
    )
    batches = [torch.randn(n, 3, 8) * 2 + 1 for n in (5, 3, 4)]
    config = QConfig(QSpec(3), QSpec(8, symmetric=False, quantizer="ema"))
    prepared = prepare(model, config)
    calibrate(prepared, batches)
    for x in batches:
        prepared(x).sum().backward()
    prepared[0].eval()
    qk.freeze_bn(prepared[3:])
    before = snapshot(prepared)
    assert qk.reestimate_bn(prepared, [*batches, batches[0][:0]]) is None
    state, modules = snapshot(prepared)
    assert modules == before[1], "classes and modes"
    assert (prepared[1].momentum, prepared[4].momentum) == (0.3, 0.1)
    prepared.eval()
    outs = [prepared[0](x) for x in batches]
    mean = sum(y.mean((0, 2)) for y in outs) / 3
    var = sum(y.var((0, 2)) for y in outs) / 3
    torch.testing.assert_close(prepared[1].running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prepared[1].running_var, var, rtol=1e-5, atol=1e-6)
    assert prepared[1].num_batches_tracked == 3
    for key, t in state.items():
        moved = "running" in key and key.startswith(("1.", "4."))
        assert torch.equal(t, before[0][key]) is not moved or "num_batches" in key, key
    # The second one sees what the first one normalizes by its batch.
    ys = [prepared[3](F.batch_norm(y, None, None, prepared[1].weight, prepared[1].bias, True)) for y in outs]
    torch.testing.assert_close(prepared[4].running_mean, sum(y.mean((0, 2)) for y in ys) / 3, rtol=1e-5, atol=1e-6)
    qk.reestimate_bn(prepared, iter(batches), max_batches=1)
    torch.testing.assert_close(prepared[1].running_mean, outs[0].mean((0, 2)), rtol=1e-5, atol=1e-6)
    assert_same_numbers(convert(prepared), prepared, batches[0], flips=0.05)


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other, self.calls = nn.BatchNorm1d(2), nn.BatchNorm1d(2), 0

    def forward(self, x):
        return self.norm(x)


def test_bad_batches_leave_the_statistics_as_they_were():
    torch.manual_seed(0)
    model, x = Breaks(), torch.randn(4, 2)
    model.norm(x + 3)
    before = snapshot(model)
    cases = [
        ([], ValueError, "batches: got none that holds elements"),
        ([x[:0]], ValueError, "batches: got none that holds elements"),
        ([x, x * torch.nan], ValueError, "batches: the input of 'norm' holds NaN or infinity"),
        ([x, torch.randn(4, 3)], RuntimeError, r"batches\[1\]: layer 'norm' \(BatchNorm1d\) failed"),
        (x, TypeError, "batches: got a Tensor"),
    ]
    for batches, error, text in cases:
        with pytest.raises(error, match=text):
            qk.reestimate_bn(model, batches)
        state, modules = snapshot(model)
        assert modules == before[1]
        assert all(torch.equal(t, before[0][key]) for key, t in state.items())
        assert model.norm.momentum == 0.1
    with pytest.raises(ValueError, match="max_batches: got 0"):
        qk.reestimate_bn(model, [x], max_batches=0)
    with pytest.raises(ValueError, match="model: got one without a BatchNorm that keeps running statistics"):
        qk.reestimate_bn(nn.Linear(2, 2), [x])
    with pytest.warns(UserWarning, match="no batch reached other; they stay as they were"):
        qk.reestimate_bn(model, [x])
    torch.testing.assert_close(model.norm.running_mean, x.mean(0))


def test_one_scale_for_all_channels_folds_too():
    torch.manual_seed(0)
    model, x = made("up2d groups")
    prepared = prepare(model, QConfig(QSpec(8, PerTensor())))
    calibrate(prepared, [x])
    converted = convert(prepared)
    assert type(converted[1]) is nn.Identity
    assert_same_numbers(converted, prepared, x, tolerance=5e-6)
