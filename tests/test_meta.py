"""Models prepared on the meta device get their values from a state_dict, into empty tensors or by assignment."""

import copy

import pytest
import torch
from converting import assert_converts
from torch import nn
from torch.nn import functional as F

import qkernels as qk

W4 = qk.QConfig(qk.QSpec(4))


class Table(nn.Module):
    """Holds a parameter that a rule names."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return F.linear(x, self.weight)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.recurrent = kind(8, 6)

    def forward(self, x):
        return self.recurrent(x)[0]


class Adapted(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 6)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(6, 2))
        self.scaling = 0.25

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling


NAMED = qk.QConfig(qk.QSpec(4), rules=[("0.weight", {})])
SUM = qk.QConfig(qk.QSpec(4), adapters="sum")
FOLLOWED = qk.QConfig(qk.QSpec(8, quantizer="minmax"), qk.QSpec(quantizer="ema", symmetric=False))
MODELS = {
    "Linear": (lambda: nn.Linear(8, 6), W4, (5, 8)),
    "Linear, 8 bits": (lambda: nn.Linear(8, 6), None, (5, 8)),
    "Linear, minmax and ema": (lambda: nn.Linear(8, 6), FOLLOWED, (5, 8)),
    "Linear under weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), W4, (5, 8)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3), W4, (2, 3, 6, 6)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 4, 3), W4, (2, 3, 6)),
    "LSTM": (lambda: Recurrent(nn.LSTM), W4, (5, 2, 8)),
    "GRU": (lambda: Recurrent(nn.GRU), W4, (5, 2, 8)),
    "Embedding": (lambda: nn.Embedding(9, 8), W4, None),
    "MultiheadAttention": (lambda: Attention(), W4, (2, 5, 8)),
    "a parameter by name": (lambda: Table(), NAMED, (5, 8)),
    "adapters": (lambda: Adapted(), SUM, (5, 8)),
}
each_model = pytest.mark.parametrize(("make", "config", "shape"), MODELS.values(), ids=MODELS)


def an_input(shape) -> torch.Tensor:
    return torch.arange(9).view(3, 3) if shape is None else torch.randn(shape)


def on_meta(make, config) -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(make(), nn.Identity())
    prepared = qk.prepare(model, config)
    assert all(t.is_meta for t in prepared.state_dict().values() if isinstance(t, torch.Tensor) and t.dim() > 1)
    return prepared


def known(make, config, x) -> tuple[nn.Module, nn.Module]:
    """A float model, and what it becomes by prepare and calibrate."""
    model = nn.Sequential(make(), nn.Identity())
    prepared = qk.prepare(model, config)
    qk.calibrate(prepared, [x])
    return model, prepared


def assert_trains_alike(a: nn.Module, b: nn.Module, x: torch.Tensor) -> None:
    """Equal results, gradients and results after a step."""
    for model in (a, b):
        model.train()
    for _ in range(2):
        y, want = a(x), b(x)
        assert torch.equal(y, want)
        y.square().sum().backward()
        want.square().sum().backward()
        for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
            assert name == other
            assert p.device == q.device
            assert torch.equal(p.grad, q.grad), name
            with torch.no_grad():
                p -= 1e-2 * p.grad
                q -= 1e-2 * q.grad
                p.grad = q.grad = None
    assert torch.equal(a.eval()(x), b.eval()(x))


@each_model
@pytest.mark.parametrize("assign", [False, True])
def test_a_prepared_checkpoint(make, config, shape, assign) -> None:
    x = an_input(shape)
    _, want = known(make, config, x)
    prepared = on_meta(make, config)
    if not assign:
        prepared.to_empty(device="cpu")
    prepared.load_state_dict(copy.deepcopy(want.state_dict()), assign=assign)
    assert not any(t.is_meta for t in (*prepared.parameters(), *prepared.buffers()))
    assert torch.equal(prepared.eval()(x), want.eval()(x))
    assert_converts(copy.deepcopy(prepared), x)
    assert_trains_alike(prepared, want, x)


@each_model
@pytest.mark.parametrize("assign", [False, True])
def test_a_float_checkpoint(make, config, shape, assign) -> None:
    x = an_input(shape)
    model, want = known(make, config, x)
    prepared = on_meta(make, config)
    if not assign:
        prepared.to_empty(device="cpu")
    missing, unexpected = prepared.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign, strict=False)
    assert not unexpected
    assert all("_fake_quant." in key for key in missing)
    qk.calibrate(prepared, [x])
    assert not any(t.is_meta for t in (*prepared.parameters(), *prepared.buffers()))
    assert_converts(copy.deepcopy(prepared), x)
    assert_trains_alike(prepared, want, x)


@each_model
@pytest.mark.parametrize("assign", [False, True])
def test_training_starts_the_scales_that_a_float_checkpoint_lacks(make, config, shape, assign) -> None:
    x = an_input(shape)
    model = nn.Sequential(make(), nn.Identity())
    prepared, want = on_meta(make, config), qk.prepare(model, config)
    if not assign:
        prepared.to_empty(device="cpu")
    prepared.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign, strict=False)
    assert_trains_alike(prepared, want, x)
    assert_converts(prepared, x)


@each_model
def test_a_model_on_meta_runs_and_forgets_that(make, config, shape) -> None:
    """A pass on meta tensors, which counts shapes, leaves no state behind."""
    x = an_input(shape)
    _, want = known(make, config, x)
    prepared = on_meta(make, config)
    assert prepared.train()(x.to("meta")).shape == want(x).shape
    prepared.load_state_dict(copy.deepcopy(want.state_dict()), assign=True)
    assert_trains_alike(prepared, want, x)
