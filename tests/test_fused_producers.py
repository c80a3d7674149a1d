"""A ReLU in front of a quantizer, in one pass with it: bits, gradients and state of the two, and what stays apart."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import qkernels as qk
from qkernels.nn import FakeQuantize
from qkernels.nn.moving_scale import MovingScale
from qkernels.nn.qat_sequential import QATSequential, part

CONFIGS = {
    "lsq": (qk.QConfig(), 2),
    "lsq, symmetric": (qk.QConfig(input=qk.QSpec(symmetric=True)), 2),
    "lsq+": (qk.QConfig(input=qk.QSpec(quantizer="lsq+")), 2),
    "clip": (qk.QConfig(input=qk.QSpec(straight_through="clip")), 2),
    "minmax": (qk.QConfig(input=qk.QSpec(quantizer="minmax")), 2),
    "minmax, 4 bits": (qk.QConfig(input=qk.QSpec(bits=4, quantizer="minmax")), 2),
    "lsq, 4 bits": (qk.QConfig(input=qk.QSpec(bits=4)), 0),  # its start moves with the mean of relu(x)
    "ema": (qk.QConfig(input=qk.QSpec(quantizer="ema")), 0),
    "dynamic": (qk.QConfig(input=qk.QSpec(quantizer="dynamic")), 0),
    "pact": (qk.QConfig(input=qk.QSpec(quantizer="pact")), 0),
}


def net(inplace: bool = False) -> nn.Sequential:
    """Two ReLUs that a layer follows, and two that none does."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace),
        nn.Conv2d(8, 6, 3, stride=2),
        nn.ReLU(inplace),
        nn.AvgPool2d(3),
        nn.Flatten(),
        nn.Linear(6, 7),
        nn.ReLU(inplace),
        nn.Linear(7, 4),
        nn.ReLU(inplace),
    )


def images(seed: int, size: float = 1.0) -> torch.Tensor:
    return torch.randn(5, 3, 9, 9, generator=torch.Generator().manual_seed(seed)) * size


def both(
    config: qk.QConfig | None = None, change: Callable[[nn.Module], object] = lambda model: None, inplace: bool = False
) -> tuple[nn.Module, nn.Module]:
    """The prepared model, and the same one whose ReLUs and quantizers stay apart."""
    fused = qk.prepare(net(inplace), config)
    qk.calibrate(fused, [images(1)])
    change(fused)
    plain = copy.deepcopy(fused)
    part(plain)
    assert type(plain) is nn.Sequential
    return fused, plain


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """The names of the quantizers that computed a ReLU too."""
    done, inner = [], MovingScale.of_relu

    def counted(self, x):
        y = inner(self, x)
        if y is not None:
            done.append(self.name)
        return y

    monkeypatch.setattr(MovingScale, "of_relu", counted)
    return done


def assert_same(fused, plain, batches, call=lambda model, x: model(x)) -> None:
    """Outputs, gradients, and after each step all that a state_dict holds, bit for bit."""
    models = (fused, plain)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in models]
    for x in batches:
        results = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            given = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = call(model, given)
            if y.requires_grad:
                y.float().square().mean().backward()
            results.append([y, given.grad, *(p.grad for p in model.parameters())])
            optimizer.step()
        assert_equal(*results)
        assert_equal(*(list(model.state_dict().values()) for model in models))


def assert_equal(got, want) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a.double().nan_to_num(7), b.double().nan_to_num(7))


def growing(n: int = 4) -> list[torch.Tensor]:
    return [images(2 + i, 1 + i) for i in range(n)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("inplace", [False, True])
def test_training_has_the_bits_of_the_two(name, inplace, passes):
    config, fused_each = CONFIGS[name]
    fused, plain = both(config, inplace=inplace)
    assert isinstance(fused, QATSequential) == (fused_each > 0 or name == "lsq, 4 bits")
    assert_same(fused, plain, growing())
    assert len(passes) == fused_each * 4
    fused.eval(), plain.eval()
    passes.clear()
    assert_same(fused, plain, growing(1))
    assert len(passes) == (2 if name == "lsq, 4 bits" else fused_each)


def test_the_range_grows_with_what_the_relu_lets_pass(passes):
    """A tenth of the way to relu(x)'s largest magnitude; what is below zero is larger, and does not count."""
    config = qk.QConfig(weight=None, input=qk.QSpec(symmetric=True))
    model = qk.prepare(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), config)
    with torch.no_grad():
        model[0].bias.fill_(-3)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 8
    qk.calibrate(model, [x])
    before, seen = model[2].input_fake_quant.scale.clone(), model[:1](2 * x)
    assert -seen.min() > seen.max() > 0
    model(2 * x)
    torch.testing.assert_close(model[2].input_fake_quant.scale, before + 0.1 * (seen.max() / 127 - before))
    assert passes == ["2.input_fake_quant"]


def test_values_follow_the_formula(passes):
    """Against plain torch, without this package's ops."""
    fused, _ = both(qk.QConfig(weight=None, input=qk.QSpec(quantizer="minmax", symmetric=True)))
    fused.eval()
    x = images(3, 2)
    before = fused[:2](x)
    assert not passes
    scale = fused[3].input_fake_quant.scale
    r = (before.relu() / scale).round().clamp(-127, 127) * scale
    seen = fused[:4](x)
    assert passes == ["3.input_fake_quant"]
    torch.testing.assert_close(seen, nn.functional.conv2d(r, fused[3].weight, fused[3].bias, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, passes):
    fused, plain = both(change=lambda model: model.to(dtype))
    assert_same(fused, plain, [x.to(dtype) for x in growing(3)])
    assert len(passes) == 6


def test_autocast(passes):
    def call(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert_same(*both(), growing(3), call)
    assert len(passes) == 6


def test_channels_last_and_strided(passes):
    batches = [x.to(memory_format=torch.channels_last) for x in growing(2)] + [images(4).transpose(2, 3)]
    assert_same(*both(change=lambda model: model.to(memory_format=torch.channels_last)), batches)
    assert len(passes) == 6


@pytest.mark.parametrize(
    ("change", "each"),
    [
        (qk.freeze_observers, 2),
        (lambda model: qk.enable_fake_quant(model, inputs=False), 0),
        (lambda model: qk.enable_fake_quant(model, weights=False), 2),
        (lambda model: qk.set_bits(model, 6), 2),
        (lambda model: qk.set_bits(model, 4), 0),
        (lambda model: (qk.set_bits(model, 3), qk.freeze_observers(model)), 2),
    ],
)
def test_switches(change, each, passes):
    assert_same(*both(change=change), growing(3))
    assert len(passes) == 3 * each


def test_values_that_are_odd():
    nan, inf, low = images(2), images(3), images(4)
    nan[0, 0, 0, 0], inf[0, 0, 0, 0], low[0, 0, 0, 0] = torch.nan, torch.inf, -torch.inf
    for x in (nan, inf, low, torch.zeros_like(nan)):
        assert_same(*both(qk.QConfig(rules=[("0", None)])), [x, images(5)])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bias", [-99.0, 99.0])
def test_all_below_and_all_above_zero(symmetric, bias):
    def shift(model):
        with torch.no_grad():
            model[1].bias.fill_(bias)

    assert_same(*both(qk.QConfig(input=qk.QSpec(symmetric=symmetric)), shift), growing(3))


def test_empty_batch():
    model = qk.prepare(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    qk.calibrate(model, [torch.randn(5, 4)])
    before = copy.deepcopy(model.state_dict())
    model(torch.empty(0, 4)).sum().backward()
    assert_equal(list(model.state_dict().values()), list(before.values()))
    assert model[0].weight.grad.count_nonzero() == 0
    assert model.eval()(torch.empty(0, 4)).shape == (0, 3)


@pytest.mark.parametrize("target", ["2", "3", "3.input_fake_quant"])
@pytest.mark.parametrize(
    "register", ["register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook"]
)
def test_hooks_see_what_they_saw(target, register, passes):
    seen = {True: [], False: []}
    fused, plain = both()
    for model in (fused, plain):
        note = seen[model is fused]

        def hook(module, *values, note=note):
            note.extend(t.clone() for value in values for t in (value if isinstance(value, tuple) else (value,)))

        getattr(model.get_submodule(target), register)(hook)
    assert_same(fused, plain, growing(2))
    assert passes == ["9.input_fake_quant"] * 2
    assert seen[True]
    assert_equal(seen[True], seen[False])


def test_global_hooks(passes):
    fused, _ = both()
    kinds = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, x, y: kinds.append(type(module)))
    fused(images(2))
    handle.remove()
    assert not passes
    assert kinds.count(nn.ReLU) == 4


def test_a_hook_in_front_of_a_relu_in_place(passes):
    """The hook's tensor is overwritten by the ReLU, as ever."""
    fused, plain = both(inplace=True)
    kept = []
    for model in (fused, plain):
        model[1].register_forward_hook(lambda module, x, y: kept.append(y.detach()))
        model(images(2))
    assert passes == ["9.input_fake_quant"]
    assert torch.equal(*kept)
    assert (kept[0] >= 0).all()


def test_a_relu_in_place_changes_the_callers_tensor():
    """So the sum of a residual block in which it comes first has relu(x)."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3, padding=1))
    prepared = qk.prepare(block, qk.QConfig(input=qk.QSpec(quantizer="minmax")))
    qk.calibrate(prepared, [images(1)])
    x = images(2)
    prepared(x)
    assert torch.equal(x, images(2).relu())


def test_slices_and_single_calls(passes):
    fused, plain = both()
    x = images(2)
    for model in (fused.eval(), plain.eval()):
        model.seen = model[:3](x)
        model.next = model[3](model.seen)
    assert not passes
    assert_equal([fused.seen, fused.next], [plain.seen, plain.next])
    assert (fused.seen.unique().numel()) > 256


def test_calibrate_again(passes):
    fused, plain = both()
    passes.clear()
    for model in (fused, plain):
        qk.calibrate(model, [images(7, 3)])
    assert not passes
    assert_equal(list(fused.state_dict().values()), list(plain.state_dict().values()))


def test_a_first_batch_sets_the_scale(passes):
    fused = qk.prepare(net(), qk.QConfig())
    plain = copy.deepcopy(fused)
    part(plain)
    assert_same(fused, plain, growing(3))
    assert len(passes) == 4  # not in the first step


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, passes):
    def call(model, x):
        return checkpoint(model, x, use_reentrant=reentrant)

    def parts(model, x):
        return checkpoint_sequential(model, 4, x, use_reentrant=reentrant)

    def inside(model, x):
        return checkpoint(model[2:], model[:2](x), use_reentrant=reentrant)

    for way in (call, parts, inside):
        assert_same(*both(), growing(3), way)
    assert len(passes) == 2 * 3 * 4


def test_accumulated_gradients_and_two_graphs():
    """Two forward passes, then one backward pass through both."""
    assert_same(*both(), growing(3), lambda model, x: model(x) + model(x * 2))


def test_compiled_and_transformed(passes):
    fused, plain = both()
    x = images(2)
    fused.eval(), plain.eval()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_equal([compiled(x)], [plain(x)])
    state = {name: p.detach() for name, p in fused.named_parameters()}

    def loss(state, model):
        return torch.func.functional_call(model, state, (x,)).square().mean()

    gradients = [torch.func.grad(loss)(state, model) for model in (fused, plain)]
    assert_equal(*(list(g.values()) for g in gradients))
    assert not passes
    with torch.inference_mode():
        assert_equal([fused(x)], [plain(x)])
    assert len(passes) == 2


def test_tracing_keeps_the_relus(passes):
    fused, plain = both()
    traced = torch.fx.symbolic_trace(fused.eval())
    assert sum(type(module) is nn.ReLU for module in traced.modules()) == 4
    assert_equal([traced(images(2))], [plain.eval()(images(2))])
    assert not passes


def test_second_derivative():
    results = []
    for model in both(qk.QConfig(input=qk.QSpec(quantizer="minmax"))):
        x = images(2).requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        results.append([g, *torch.autograd.grad(g.square().sum(), x)])
    assert_equal(*results)


def test_copies_files_and_the_way_back(tmp_path, passes):
    fused, plain = both()
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in plain.named_modules()]
    for made in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        passes.clear()
        assert_same(made, copy.deepcopy(plain), growing(2))
        assert len(passes) == 4
    for result in (qk.convert(fused), qk.unprepare(fused), qk.unprepare(copy.deepcopy(fused), inplace=True)):
        assert {type(module) for module in result.modules()}.isdisjoint({QATSequential})
        assert type(result) is nn.Sequential
    assert isinstance(fused, QATSequential)
    assert torch.equal(qk.exact(fused)(images(2)), qk.convert(plain)(images(2)))
    assert str(qk.report(fused)) == str(qk.report(plain))


def test_in_place_and_nested(passes):
    model = nn.ModuleDict({"a": net(), "b": nn.Sequential(net(), nn.Identity())})
    root, inner = model["a"], model["b"][0]
    assert qk.prepare(model, inplace=True) is model
    assert model["a"] is root
    assert isinstance(root, QATSequential)
    assert isinstance(inner, QATSequential)
    assert type(model["b"]) is nn.Sequential
    qk.unprepare(model, inplace=True)
    assert type(root) is type(inner) is nn.Sequential


class Own(nn.Linear):
    """Reads its input twice."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


class OwnReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Own(8, 3)),
        nn.Sequential(nn.Linear(8, 8), OwnReLU(), nn.Linear(8, 3)),
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Identity(), nn.Linear(8, 3)),
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))),
    ],
    ids=["own forward", "own relu", "not next", "parametrized"],
)
def test_what_stays_apart(model, passes):
    prepared = qk.prepare(model)
    x = torch.randn(5, 8)
    qk.calibrate(prepared, [x])
    prepared(x)
    assert type(prepared) is nn.Sequential
    assert not passes


@pytest.mark.parametrize("quantizer", ["stochastic", "po2", "ewgs", "midrise"])
def test_quantizers_without_a_fused_op(quantizer, passes):
    fused = qk.prepare(net(), qk.QConfig(input=qk.QSpec(quantizer=quantizer)))
    qk.calibrate(fused, [images(1)])
    fused(images(2))
    assert type(fused) is nn.Sequential
    assert not passes


def test_a_layer_that_was_replaced_later(passes):
    """Adapters and the like replace layers after prepare: the new one gets the ReLU's own result."""
    fused, plain = both()
    for model in (fused, plain):
        model[9] = nn.Sequential(model[9])
    assert_same(fused, plain, growing(2))
    assert passes == ["3.input_fake_quant"] * 2


def test_an_error_in_the_layer_leaves_the_quantizer_as_it_was():
    fused, _ = both()
    weight = fused[3]._parameters["bias"]
    fused[3]._parameters["bias"] = torch.nn.Parameter(torch.zeros(5))
    with pytest.raises(RuntimeError):
        fused(images(2))
    fused[3]._parameters["bias"] = weight
    quantizer = fused[3].input_fake_quant
    assert isinstance(quantizer, FakeQuantize)
    assert quantizer.last is None
