"""Lazy layers: what an ordinary layer becomes by prepare, a lazy one becomes by prepare and its first batch."""

import copy
import pickle

import pytest
import torch
from converting import assert_converts
from torch import nn

import qkernels as qk
from qkernels.nn import QATLayer, QATLinear

W4 = qk.QConfig(qk.QSpec(4))
LAYERS = {
    "Linear": (lambda: nn.LazyLinear(6), (5, 8)),
    "Linear without bias": (lambda: nn.LazyLinear(6, bias=False), (2, 3, 8)),
    "Conv1d": (lambda: nn.LazyConv1d(6, 3, padding=1), (2, 4, 9)),
    "Conv2d": (lambda: nn.LazyConv2d(6, 3, groups=2), (2, 4, 9, 8)),
    "Conv3d": (lambda: nn.LazyConv3d(6, 2), (2, 4, 4, 5, 4)),
    "ConvTranspose1d": (lambda: nn.LazyConvTranspose1d(6, 3), (2, 4, 9)),
    "ConvTranspose2d": (lambda: nn.LazyConvTranspose2d(4, 3, groups=4), (2, 4, 6, 5)),
    "ConvTranspose3d": (lambda: nn.LazyConvTranspose3d(6, 2), (1, 4, 3, 4, 3)),
}
each_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def ordinary(make, x: torch.Tensor, seed: int = 0) -> nn.Module:
    """The float model after its first batch, the weights of which follow from the seed."""
    model = nn.Sequential(make())
    torch.manual_seed(seed)
    model(x)
    return model


def is_lazy_still(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.lazy.LazyModuleMixin)


@each_layer
@pytest.mark.parametrize("inplace", [False, True])
def test_the_first_batch_makes_the_quantizers(make, shape, inplace) -> None:
    """Forward, backward and the names of the parameters are those of a layer that was ordinary when it was prepared."""
    x = torch.randn(shape)
    model = nn.Sequential(make())
    lazy = qk.prepare(model, W4, inplace=inplace)
    assert is_lazy_still(lazy[0])
    known = qk.prepare(ordinary(make, x), W4).train()
    torch.manual_seed(0)
    y, want = lazy.train()(x), known(x)
    assert type(lazy[0]) is type(known[0])
    assert torch.equal(y, want)
    y.sum().backward()
    want.sum().backward()
    for (name, p), (other, q) in zip(lazy.named_parameters(), known.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p.grad, q.grad)
    assert torch.equal(lazy(x), known(x))
    assert not lazy[0]._forward_pre_hooks
    assert lazy[0].weight_fake_quant.name == known[0].weight_fake_quant.name
    if not inplace:
        assert type(model[0]) is type(make())
        assert not [m for m in model.modules() if isinstance(m, qk.nn.FakeQuantize)]
        model(x)  # the float model becomes ordinary too
        assert not is_lazy_still(model[0])


@each_layer
@pytest.mark.parametrize("config", [W4, qk.QConfig(qk.QSpec(4, quantizer="minmax"), None), "w8a8"])
def test_calibrate(make, shape, config) -> None:
    batches = [torch.randn(shape) for _ in range(3)]
    lazy, known = qk.prepare(nn.Sequential(make()), config), qk.prepare(ordinary(make, batches[0]), config)
    torch.manual_seed(0)
    qk.calibrate(lazy, (x for x in batches))
    qk.calibrate(known, batches)
    for (key, t), (other, u) in zip(lazy.state_dict().items(), known.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(t.nan_to_num(7), u.nan_to_num(7)), key
    assert torch.equal(lazy.eval()(batches[1]), known.eval()(batches[1]))
    assert_converts(lazy, batches[1])


@each_layer
def test_a_state_dict_tells_the_shape(make, shape) -> None:
    x = torch.randn(shape)
    known = qk.prepare(ordinary(make, x), W4)
    qk.calibrate(known, [x])
    lazy = qk.prepare(nn.Sequential(make()), W4)
    lazy.load_state_dict(known.state_dict())
    assert type(lazy[0]) is type(known[0])
    assert_converts(lazy, x)
    assert {name for name, _ in lazy.named_parameters()} == {name for name, _ in known.named_parameters()}
    assert torch.equal(lazy.eval()(x), known.eval()(x))
    assert repr(lazy) == repr(known)
    # One of the float model: the weight's quantizer starts from it.
    started = qk.prepare(ordinary(make, x), W4)
    lazy = qk.prepare(nn.Sequential(make()), W4)
    lazy.load_state_dict(ordinary(make, x).state_dict(), strict=False)
    assert torch.equal(lazy.train()(x), started.train()(x))
    # One of a lazy model changes nothing.
    lazy = qk.prepare(nn.Sequential(make()), W4)
    lazy.load_state_dict(qk.prepare(nn.Sequential(make()), W4).state_dict())
    assert is_lazy_still(lazy[0])


@each_layer
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(make, shape, copy_of) -> None:
    x = torch.randn(shape)
    first = qk.prepare(nn.Sequential(make()), W4)
    second = copy_of(first)
    torch.manual_seed(0)
    y = first.train()(x)
    assert is_lazy_still(second[0])
    torch.manual_seed(0)
    assert torch.equal(second.train()(x), y)
    assert not is_lazy_still(second[0])
    assert second[0].weight is not first[0].weight
    assert torch.equal(copy_of(first)(x), first(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_unprepare_before_the_first_batch(inplace) -> None:
    model = qk.prepare(nn.Sequential(nn.LazyLinear(6), nn.LazyConv1d(3, 1)), W4)
    back = qk.unprepare(model, inplace=inplace)
    assert [type(m) for m in back] == [nn.LazyLinear, nn.LazyConv1d]
    back(torch.randn(2, 5, 8))
    assert [type(m) for m in back] == [nn.Linear, nn.Conv1d]
    assert not back[0]._forward_pre_hooks
    back(torch.randn(2, 5, 8))


def test_hooks_and_shared_inputs() -> None:
    """Two lazy layers of one input share its quantizer; a user's hooks see the layer that they are on."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.LazyLinear(8), nn.LazyLinear(4), nn.LazyLinear(4)

        def forward(self, x):
            x = self.first(x).relu()
            return self.a(x) + self.b(x)

    seen = []
    model, x = Two(), torch.randn(3, 5)
    model.a.register_forward_hook(lambda module, args, y: seen.append(module))
    prepared = qk.prepare(model)
    qk.calibrate(prepared, [x])
    assert prepared.a.input_fake_quant is prepared.b.input_fake_quant
    prepared(x)
    assert all(module is prepared.a for module in seen)
    assert_converts(prepared, x)


def test_what_is_not_known_yet_is_said() -> None:
    prepared = qk.prepare(nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 4)), W4)
    with pytest.raises(ValueError, match="the shape of '0' is not known yet; accepted: a model that has run"):
        qk.convert(prepared)
    for switch in (qk.freeze_observers, qk.enable_fake_quant, lambda model: qk.set_bits(model, 3)):
        with pytest.raises(ValueError, match="the shape of '0' is not known yet"):
            switch(prepared)
    grouped = qk.prepare(nn.Sequential(nn.LazyLinear(6)), qk.QConfig(qk.QSpec(4, qk.PerGroup(32)), None))
    with pytest.raises(ValueError, match=r"config, layer '0': .*32"):
        grouped(torch.randn(2, 40))

    class Own(nn.LazyLinear):
        pass

    with pytest.warns(UserWarning, match="0 .its shape is not known before the first batch; call the model once"):
        qk.prepare(nn.Sequential(Own(6), nn.Linear(6, 4)))


def test_a_batch_that_fails_is_named_by_its_place() -> None:
    prepared = qk.prepare(nn.Sequential(nn.LazyConv2d(6, 3)), W4)
    with pytest.raises(RuntimeError, match=r"batches\[0\]: layer '0'"):
        qk.calibrate(prepared, [torch.randn(3)])
    with pytest.raises(TypeError, match="batches: got a Tensor"):
        qk.calibrate(prepared, torch.randn(3))
    qk.calibrate(prepared, [torch.randn(2, 3, 8, 8)])
    assert isinstance(prepared[0], QATLayer)


def test_training_a_lazy_model() -> None:
    x, target = torch.randn(32, 8), torch.randn(32, 3)
    prepared = qk.prepare(nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(3)), W4)
    qk.calibrate(prepared, [x])
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-2)
    losses = []
    for _ in range(10):
        loss = nn.functional.mse_loss(prepared.train()(x), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in prepared.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert isinstance(prepared[0], QATLinear)
    report = qk.report(prepared)
    assert [row.weight_bits for row in report.layers] == [4, 4]


def test_a_report_before_the_first_batch() -> None:
    prepared = qk.prepare(nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 4)), W4)
    assert {row.name for row in qk.report(prepared).layers} == {"0", "1"}
