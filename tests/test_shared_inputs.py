"""One quantizer for layers that get one tensor: found by tracing, computed once, exact in every loop."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from qat_models import assert_same_numbers, assert_unchanged, quantizers, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

import qkernels as qk

# An input of the model itself learns no scale unless a rule asks for it.
LEARNED = qk.QConfig(rules=[("[qkv]", {"input": {"quantizer": "lsq"}})])


class Attention(nn.Module):
    """q, k and v read one tensor; it also keeps what it was given, which a tracer must not see."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.seen = None

    def forward(self, x):
        self.seen = x
        y = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1) @ self.v(x)
        return self.out(y)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.apart = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.first(x).relu()
        return self.a(x) + self.b(x) + self.apart(x + 1)


class Untraceable(nn.Module):
    """Its own forward cannot be traced; that of its children can."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x):
        if x.mean() > 1e9:
            return x
        for block in self.blocks:
            x = block(x)
        return x


def calls_of(quantizer) -> list:
    """Grows by one with each tensor that the quantizer really computes."""
    calls, inner = [], quantizer._forward

    def counted(x):
        calls.append(x.shape)
        return inner(x)

    quantizer._forward = counted
    return calls


def ready(model, x, config=None):
    prepared = qk.prepare(model, config)
    qk.calibrate(prepared, [x])
    return prepared


def test_layers_of_one_input_share_its_quantizer():
    torch.manual_seed(0)
    model, x = Untraceable(), torch.randn(2, 5, 8)
    before = snapshot(model)
    prepared = ready(model, x)
    assert_unchanged(model, before)
    assert model.blocks[0].seen is None
    for block in prepared.blocks:
        assert block.q.input_fake_quant is block.k.input_fake_quant is block.v.input_fake_quant
        assert block.out.input_fake_quant is not block.q.input_fake_quant
    assert len([name for name in quantizers(prepared) if "input" in name]) == 4
    branches = ready(Branches(), torch.randn(2, 3, 6, 6))
    assert branches.a.input_fake_quant is branches.b.input_fake_quant
    assert branches.apart.input_fake_quant is not branches.a.input_fake_quant
    other = qk.prepare(Branches(), qk.QConfig(rules=[("b", {"input": {"bits": 4}})]))
    assert other.a.input_fake_quant is not other.b.input_fake_quant


@pytest.mark.parametrize("training", [True, False])
def test_the_tensor_is_quantized_once_and_all_is_as_without_sharing(training):
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 5, 8)
    shared = ready(model, x, LEARNED).train(training)
    shared.q.input_fake_quant.disable_observer()
    apart = copy.deepcopy(shared)
    for name in ("k", "v"):
        getattr(apart, name).input_fake_quant = copy.deepcopy(apart.q.input_fake_quant)
    calls = calls_of(shared.q.input_fake_quant)
    results = []
    for made in (shared, apart):
        given = x.clone().requires_grad_()
        y = made(given)
        y.square().sum().backward()
        results.append((y, given.grad))
    assert len(calls) == 1
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    gradient = sum(getattr(apart, name).input_fake_quant.log_scale.grad for name in ("q", "k", "v"))
    torch.testing.assert_close(shared.q.input_fake_quant.log_scale.grad, gradient)
    assert_same_numbers(qk.convert(shared), shared, x, 1e-4)


@pytest.mark.parametrize(
    ("config", "kind"),
    [(None, "minmax"), (LEARNED, "lsq"), (qk.QConfig(qk.QSpec(4), qk.QSpec(4, symmetric=False)), "lsq")],
)
def test_inputs_of_the_model_itself_learn_no_scale_at_8_bits(config, kind):
    """To learn it would cost the gradient of the data."""
    prepared = qk.prepare(Attention(), config)
    assert prepared.q.input_fake_quant.quantizer == kind
    assert prepared.out.input_fake_quant.quantizer == "lsq"
    deep = qk.prepare(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(8), Attention()))
    assert deep[2].q.input_fake_quant.quantizer == "lsq"
    flat = qk.prepare(nn.Sequential(nn.Flatten(), nn.ReLU(), Attention()))
    assert flat[2].q.input_fake_quant.quantizer == "minmax"


def test_what_changes_between_two_layers_is_quantized_again():
    torch.manual_seed(0)
    prepared = ready(Attention(), torch.randn(2, 8)).eval()
    quantizer = prepared.q.input_fake_quant
    calls = calls_of(quantizer)
    with torch.no_grad():
        x = torch.randn(2, 8)
        first = prepared.q(x)
        x.mul_(0.5)
        second = prepared.q(x)
        assert len(calls) == 2
        assert not torch.equal(first, second)
        y = quantizer(x)
        assert quantizer(x) is y
        y.add_(1)
        assert not torch.equal(quantizer(x), y)
        kept = quantizer(x)
        count = len(calls)
    assert quantizer(x.requires_grad_()).requires_grad
    assert len(calls) == count + 1
    del kept
    qk.enable_fake_quant(prepared, False)
    assert quantizer(x) is x


def test_what_no_tensor_counts_is_quantized_again_too():
    """The width of a quantizer without a scale, and tensors that take the places of others."""
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    dynamic = qk.prepare(Attention(), qk.QConfig(None, qk.QSpec(8, quantizer="dynamic")))
    prepared = ready(Attention(), x, LEARNED).eval()
    quantizer, name = prepared.q.input_fake_quant, "q.input_fake_quant.log_scale"
    assert quantizer.last is not None
    with torch.no_grad():
        dynamic(x)
        qk.set_bits(dynamic, 2)
        expected = qk.fake_quantize_dynamic(x, bits=2, group_size=None)
        assert torch.equal(dynamic.q.input_fake_quant(x), expected)

        def at(value, x):
            # Tying names, torch would not put the own tensor of a module with several names back.
            given = {name: torch.full((1,), value)}
            return torch.func.functional_call(prepared, given, (x,), tie_weights=False)

        values = (0.0, 30.0, -30.0)
        for got, expected in zip([at(v, x) for v in values], [at(v, x.clone()) for v in values], strict=True):
            assert torch.equal(got, expected)
        quantizer(x)
        state = {key: t.clone() for key, t in prepared.state_dict().items()}
        state[name].fill_(20.0)
        state[name.replace("log_scale", "scale")] *= torch.exp(torch.tensor(20.0 * quantizer.steps**-0.5))
        prepared.load_state_dict(state, assign=True)
        assert torch.equal(quantizer(x), quantizer(x.clone()))


def test_who_wants_a_gradient_later_gets_one():
    torch.manual_seed(0)
    x = torch.randn(2, 8)
    given = ready(Attention(), x).q.input_fake_quant
    assert (given.quantizer, given.last is None) == ("minmax", False)
    assert not given(x).requires_grad
    (gradient,) = torch.autograd.grad(given(x.requires_grad_()).sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))  # x is what the range was calibrated on
    learned = ready(Attention(), x.detach(), LEARNED).q.input_fake_quant.requires_grad_(False)
    x = x.detach()
    assert not learned(x).requires_grad
    learned.requires_grad_()
    expected = torch.autograd.grad(learned._forward(x).square().sum(), learned.log_scale)
    assert torch.equal(torch.autograd.grad(learned(x).square().sum(), learned.log_scale)[0], expected[0])


def test_no_tensor_outlives_its_layers():
    prepared = ready(Attention(), torch.randn(2, 8)).eval()
    with torch.no_grad():
        x = torch.randn(2, 8)
        y = prepared.q.input_fake_quant(x)
        alive = weakref.ref(x), weakref.ref(y)
        del x, y
        gc.collect()
    assert [reference() for reference in alive] == [None, None]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_over_a_shared_input(reentrant):
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(3, 8)
    prepared = ready(model, x)
    qk.freeze_observers(prepared)
    gradients = []
    for wrap in (False, True):
        given = x.clone().requires_grad_()
        hidden = given * 1.0
        kept = prepared.q(hidden)  # outside: its result must not be taken for one that the checkpoint recorded
        layer = prepared.k
        y = checkpoint(layer, hidden, use_reentrant=reentrant) if wrap else layer(hidden)
        (kept.sum() + y.square().sum()).backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients)


def test_copies_pickles_and_compiled_code():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    prepared = ready(Attention(), x).eval()
    expected = prepared(x)
    for again in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert again.q.input_fake_quant is again.k.input_fake_quant
        assert torch.equal(again(x), expected)
    torch.testing.assert_close(torch.compile(prepared, fullgraph=True, backend="aot_eager")(x), expected)
    state = prepared.state_dict()
    twin = qk.prepare(Attention())
    twin.load_state_dict(state)
    assert torch.equal(twin.eval()(x), expected)
    with torch.inference_mode():
        assert torch.equal(prepared(x), expected)
