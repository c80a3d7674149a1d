"""Low-rank adapters (LoRA): the base or the sum is quantized, by choice."""

import copy
import pickle

import pytest
import torch
from converting import assert_converts
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.nn import Int4Linear, Int8Conv1d, Int8Conv2d, Int8Linear, QATLinear

W4 = qk.QSpec(4)
SUM = qk.QConfig(adapters="sum")


def started(layer: nn.Module) -> nn.Module:
    """Adapters that are not zero, and a frozen base, as in the midst of a training."""
    for name, p in layer.named_parameters():
        p.requires_grad_("lora_" in name)
        if "lora_" in name:
            nn.init.normal_(p, std=0.2)
    return layer


class Wrapped(nn.Module):
    """The form of PEFT: a layer beside dicts of adapters by name."""

    def __init__(self, base: nn.Module, rank: int = 3, names=("default",), bias: bool = False, p: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B, self.lora_dropout = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.scaling = {}
        self.active_adapters = list(names)
        self.disable_adapters = False
        self.merged = False
        for i, name in enumerate(names):
            if isinstance(base, nn.Linear):
                self.lora_A[name] = nn.Linear(base.in_features, rank, bias=bias)
                self.lora_B[name] = nn.Linear(rank, base.out_features, bias=bias)
            else:
                geometry = base.kernel_size, base.stride, base.padding
                self.lora_A[name] = type(base)(base.in_channels, rank, *geometry, bias=bias)
                self.lora_B[name] = type(base)(rank, base.out_channels, 1, bias=bias)
            self.lora_dropout[name] = nn.Dropout(p) if p else nn.Identity()
            self.scaling[name] = 0.5 + i

    def forward(self, x):
        y = self.base_layer(x)
        if self.merged or self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.lora_A:
                y = y + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
        return y


class Own(nn.Module):
    """The form of torchtune: the weight is the module's own."""

    def __init__(self, k: int, n: int, rank: int = 3, alpha: float = 6.0, bias: bool = True) -> None:
        super().__init__()
        self.rank, self.alpha, self.disabled = rank, alpha, False
        self.weight = nn.Parameter(torch.randn(n, k) * k**-0.5)
        self.bias = nn.Parameter(torch.randn(n)) if bias else None
        self.dropout = nn.Identity()
        self.lora_a, self.lora_b = nn.Linear(k, rank, bias=False), nn.Linear(rank, n, bias=False)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.disabled:
            return y
        return y + (self.alpha / self.rank) * self.lora_b(self.lora_a(self.dropout(x)))


class OwnLinear(nn.Linear):
    """A subclass of Linear with a forward of its own, and parameters for A and B."""

    def __init__(self, k: int, n: int, rank: int = 3) -> None:
        super().__init__(k, n)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(rank, k)), nn.Parameter(torch.randn(n, rank))
        self.scaling = 0.25

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling


class RankStabilized(Own):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.alpha / self.rank**0.5 * self.lora_b(self.lora_a(x))


class Magnitude(Wrapped):
    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.lora_magnitude_vector = nn.ParameterDict({"default": torch.ones(base.out_features)})


def parts(layer: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    if isinstance(layer, Wrapped):
        return [(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in layer.active_adapters]
    if isinstance(layer, Own):
        return [(layer.lora_a.weight, layer.lora_b.weight, layer.alpha / layer.rank)]
    return [(layer.lora_A, layer.lora_B, layer.scaling)]


def by_hand(layer: nn.Module) -> torch.Tensor:
    """The weight of the sum."""
    weight = (layer.base_layer if isinstance(layer, Wrapped) else layer).weight
    return weight + sum(s * (b.flatten(1) @ a.flatten(1)).view(weight.shape) for a, b, s in parts(layer))


def linear() -> nn.Module:
    return started(Wrapped(nn.Linear(12, 10)))


LAYERS = {
    "linear": (linear, (5, 12)),
    "two": (lambda: started(Wrapped(nn.Linear(12, 10, bias=False), names=("a", "b"))), (2, 3, 12)),
    "biases": (lambda: started(Wrapped(nn.Linear(12, 10), bias=True)), (5, 12)),
    "conv1d": (lambda: started(Wrapped(nn.Conv1d(4, 6, 3, padding=1))), (2, 4, 9)),
    "conv2d": (lambda: started(Wrapped(nn.Conv2d(4, 6, (3, 1), stride=2))), (2, 4, 9, 8)),
    "own": (lambda: started(Own(12, 10)), (5, 12)),
    "subclass": (lambda: started(OwnLinear(12, 10)), (5, 12)),
}
each_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def prepared_sum(model: nn.Module, x: torch.Tensor, config: qk.QConfig = SUM) -> nn.Module:
    prepared = qk.prepare(nn.Sequential(model), config)
    qk.calibrate(prepared, [x])
    return prepared


@each_layer
def test_the_sum_is_quantized_as_one_weight(make, shape) -> None:
    model, x = make(), torch.randn(shape)
    prepared = prepared_sum(model, x)
    layer = prepared[0]
    assert isinstance(layer, type(model))
    assert {name for name, _ in layer.named_children() if "fake_quant" in name} == {
        "weight_fake_quant",
        "input_fake_quant",
    }
    plain = copy.deepcopy(model)
    base = plain.base_layer if isinstance(plain, Wrapped) else plain
    weight = layer.weight_fake_quant.eval()(by_hand(model))
    xq = layer.input_fake_quant.eval()(x)
    bias = base.bias
    if isinstance(model, Wrapped):
        for name in model.active_adapters:
            a, b, s = model.lora_A[name], model.lora_B[name], model.scaling[name]
            if a.bias is not None:
                bias = bias + s * (b.weight @ a.bias + b.bias)
    want = base._conv_forward(xq, weight, bias) if hasattr(base, "_conv_forward") else F.linear(xq, weight, bias)
    torch.testing.assert_close(prepared.eval()(x), want)
    assert float((want - model(x)).detach().abs().max()) < 0.1 * float(want.detach().abs().max())
    converted = assert_converts(prepared, x)
    kinds = {nn.Conv1d: Int8Conv1d, nn.Conv2d: Int8Conv2d}
    assert type(converted[0]) is kinds.get(type(base), Int8Linear)
    assert not [key for key in converted.state_dict() if "lora" in key or "base" in key]
    assert torch.equal(qk.exact(prepared)(x), converted(x))


@each_layer
def test_gradients_of_the_sum(make, shape) -> None:
    """dA = scaling·Bᵀ·G and dB = scaling·G·Aᵀ, where G is the gradient of the weight by hand."""
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    config = qk.QConfig(qk.QSpec(quantizer="minmax"), None, adapters="sum")
    prepared = qk.prepare(nn.Sequential(model), config)
    layer = prepared[0]
    base = model.base_layer if isinstance(model, Wrapped) else model
    has_bias = any("lora_A" in name and "bias" in name for name, _ in model.named_parameters())
    weight = by_hand(model).detach()
    scale = weight.flatten(1).abs().amax(1).div(127).float().double().view(-1, *[1] * (weight.dim() - 1))
    rounded = ((weight / scale).round().clamp(-127, 127) * scale).requires_grad_()
    y = base._conv_forward(x, rounded, None) if hasattr(base, "_conv_forward") else F.linear(x, rounded)
    dy = torch.randn_like(y)
    y.backward(dy)
    prepared.train()(x).backward(dy)
    g = rounded.grad.flatten(1)
    for (a, b, s), (own_a, own_b, _) in zip(parts(model), parts(layer), strict=True):
        torch.testing.assert_close(own_a.grad.flatten(1), s * b.flatten(1).T @ g, rtol=1e-6, atol=1e-6)
        db = s * g @ a.flatten(1).T
        if has_bias:  # the bias of A goes through B
            db = db + s * torch.outer(dy.sum(0), model.lora_A["default"].bias)
        torch.testing.assert_close(own_b.grad.flatten(1), db, rtol=1e-6, atol=1e-6)
    assert (layer.base_layer if isinstance(model, Wrapped) else layer).weight.grad is None


@each_layer
def test_the_float_modules_come_back(make, shape) -> None:
    model, x = make(), torch.randn(shape)
    prepared = prepared_sum(model, x)
    back = qk.unprepare(prepared)
    assert [(name, type(m)) for name, m in back[0].named_modules()] == [
        (name, type(m)) for name, m in model.named_modules()
    ]
    assert torch.equal(back.eval()(x), model.eval()(x))
    assert list(back.state_dict()) == [f"0.{key}" for key in model.state_dict()]
    burnt = qk.unprepare(prepared, burn_in=True)
    torch.testing.assert_close(burnt[0].weight, prepared[0].weight_fake_quant.eval()(by_hand(model)))


@each_layer
def test_state(make, shape) -> None:
    """Names stay; files of the float and of the prepared model load; copies and pickles compute the same."""
    model, x, config = make(), torch.randn(shape), qk.QConfig(W4, adapters="sum")
    prepared = prepared_sum(model, x, config).eval()
    assert {f"0.{key}" for key in model.state_dict()} <= set(prepared.state_dict())
    other = qk.prepare(nn.Sequential(make()), config).eval()
    assert not torch.equal(other[0].weight_fake_quant(by_hand(model)), prepared[0].weight_fake_quant(by_hand(model)))
    other.load_state_dict(prepared.state_dict())
    for each in (other, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert torch.equal(each(x), prepared(x))
    other = qk.prepare(nn.Sequential(make()), config).eval()
    other.load_state_dict(nn.Sequential(model).state_dict(), strict=False)
    other[0].input_fake_quant.load_state_dict(prepared[0].input_fake_quant.state_dict())
    assert torch.equal(other(x), prepared(x))  # the weight's quantizer started anew


@pytest.mark.parametrize("bits", [4, 8])
def test_training_the_sum(bits) -> None:
    model, x = started(Wrapped(nn.Linear(16, 8))), torch.randn(64, 16)
    target = started(copy.deepcopy(model))(x).detach()
    prepared = prepared_sum(model, x, qk.QConfig(qk.QSpec(bits), adapters="sum")).train()
    trained = [p for p in prepared.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 2e-2)
    losses = []  # of a student whose adapters differ from its teacher's
    for _ in range(30):
        loss = F.mse_loss(prepared(x), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(prepared[0].base_layer.weight, model.base_layer.weight)
    converted = assert_converts(prepared, x)
    assert isinstance(converted[0], Int4Linear if bits == 4 else Int8Linear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype) -> None:
    model, x = linear().to(dtype), torch.randn(3, 12, dtype=dtype)
    prepared = qk.prepare(nn.Sequential(model), qk.QConfig(input=None, adapters="sum"))
    layer = prepared[0].eval()
    weight = layer.weight_fake_quant(by_hand(model).to(dtype))
    assert torch.equal(layer(x), F.linear(x, weight, model.base_layer.bias))
    assert layer(x).dtype == dtype
    converted = qk.convert(prepared)(x)
    torch.testing.assert_close(converted, layer(x), rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_adapters_in_fp32_beside_a_base_in_bf16() -> None:
    """The sum is rounded once to the base's dtype."""

    class Mixed(Wrapped):
        def forward(self, x):
            low = self.lora_B["default"](self.lora_A["default"](x.float())) * self.scaling["default"]
            return (self.base_layer(x) + low).to(x.dtype)

    model = started(Mixed(nn.Linear(12, 10)))
    model.base_layer.bfloat16()
    prepared = qk.prepare(nn.Sequential(model), qk.QConfig(input=None, adapters="sum"))
    sums = []
    prepared[0].weight_fake_quant.register_forward_pre_hook(lambda module, args: sums.append(args[0]))
    x = torch.randn(3, 12).bfloat16()
    prepared.eval()(x)
    a, b, s = parts(model)[0]
    assert torch.equal(sums[0], (model.base_layer.weight.float() + s * (b @ a)).bfloat16())
    torch.testing.assert_close(qk.convert(prepared)(x), prepared(x), rtol=2e-2, atol=2e-2)


def test_autocast_leaves_the_sum_alone() -> None:
    model, x = linear(), torch.randn(5, 12)
    prepared = prepared_sum(model, x).eval()
    seen = []
    prepared[0].weight_fake_quant.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert prepared(x).dtype == torch.bfloat16
    torch.testing.assert_close(seen[0], by_hand(model), rtol=1e-6, atol=1e-6)


def test_adapters_that_are_switched_off_or_merged() -> None:
    model, x = linear(), torch.randn(5, 12)
    layer = prepared_sum(model, x)[0].eval()
    quantized = layer.weight_fake_quant(model.base_layer.weight)
    want = F.linear(layer.input_fake_quant(x), quantized, model.base_layer.bias)
    assert not torch.allclose(layer(x), want)
    for name in ("disable_adapters", "merged"):
        setattr(layer, name, True)
        torch.testing.assert_close(layer(x), want)
        setattr(layer, name, False)
    layer.active_adapters = []
    torch.testing.assert_close(layer(x), want)


def test_a_dropout_does_not_act_in_the_sum() -> None:
    model, x = started(Wrapped(nn.Linear(12, 10), p=0.5)), torch.randn(5, 12)
    with pytest.warns(UserWarning, match="the dropout of the adapters does not act, as it cannot in a sum: 0"):
        prepared = prepared_sum(model, x)
    qk.freeze_observers(prepared)
    assert torch.equal(prepared.train()(x), prepared.eval()(x))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RankStabilized(12, 10), "RankStabilized computes something else than with weight"),
        (lambda: Magnitude(nn.Linear(12, 10)), "Magnitude also holds the parameters of 'lora_magnitude_vector'"),
        (lambda: Wrapped(nn.Conv2d(4, 6, 3, groups=2)), "the shapes or strides of A"),
        (lambda: Wrapped(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")), "the shapes or strides of A"),
    ],
)
def test_what_is_no_sum_keeps_its_adapters_apart(make, words) -> None:
    model = make()
    with pytest.warns(UserWarning, match=words):
        prepared = qk.prepare(nn.Sequential(model), SUM)
    named = [name for name, m in prepared.named_modules() if isinstance(m, qk.nn.QATLayer)]
    assert named == ["0.base_layer" if isinstance(model, Wrapped) else "0"]


def test_a_base_whose_weight_the_adapters_read_is_named() -> None:
    with pytest.warns(
        UserWarning, match=r"only where called: 0.base_layer \(Magnitude.lora_magnitude_vector also reads"
    ):
        qk.prepare(nn.Sequential(Magnitude(nn.Linear(12, 10))))


def test_layers_that_differ_in_a_switch_are_tried_apart() -> None:
    class Switched(Own):
        stable = False

        def forward(self, x):
            factor = self.alpha / (self.rank**0.5 if self.stable else self.rank)
            return F.linear(x, self.weight, self.bias) + factor * self.lora_b(self.lora_a(x))

    model = nn.Sequential(*[Switched(8, 8) for _ in range(3)])
    model[1].stable = True
    with pytest.warns(UserWarning, match=r"beside the base: 1 \(the forward of Switched computes something else"):
        prepared = qk.prepare(model, SUM)
    assert [isinstance(layer, qk.nn.QATAdapted) for layer in prepared] == [True, False, True]


@pytest.mark.parametrize("config", [None, qk.QConfig(rules=[(nn.Linear, {"weight": {"bits": 4}})])])
def test_adapters_stay_in_float_beside_the_base(config) -> None:
    model, x = nn.Sequential(linear()), torch.randn(5, 12)
    prepared = qk.prepare(model, config)
    qk.calibrate(prepared, [x])
    layer = prepared[0]
    assert [n for n, m in layer.named_modules() if isinstance(m, qk.nn.QATLayer)] == ["base_layer"]
    prepared.train()(x).sum().backward()
    assert layer.base_layer.weight.grad is None
    for p in (layer.base_layer.weight_fake_quant.log_scale, layer.lora_A.default.weight, layer.lora_B.default.weight):
        assert p.grad is not None
        assert float(p.grad.abs().max()) > 0
    converted = assert_converts(prepared, x)
    assert type(converted[0].lora_A["default"]) is nn.Linear
    notes = qk.report(prepared).notes
    assert notes["0.lora_A.default"] == notes["0.lora_B.default"] == "weight stays float: it is an adapter of '0'"


def test_a_rule_with_the_very_name_quantizes_an_adapter() -> None:
    prepared = qk.prepare(nn.Sequential(linear()), qk.QConfig(rules=[("0.lora_A.default", {"weight": {"bits": 4}})]))
    assert isinstance(prepared[0].lora_A["default"], QATLinear)
    assert type(prepared[0].lora_B["default"]) is nn.Linear


def test_the_base_of_a_module_with_its_own_weight() -> None:
    """A module of no known class: its weight is quantized where it is read, its input stays in float."""
    model, x = started(Own(12, 10)), torch.randn(5, 12)
    prepared = qk.prepare(nn.Sequential(model), qk.QConfig(W4))
    layer = prepared[0].eval()
    a, b, s = parts(model)[0]
    want = F.linear(x, layer.weight_fake_quant(model.weight), model.bias) + s * F.linear(F.linear(x, a), b)
    torch.testing.assert_close(layer(x), want)
    assert not torch.allclose(want, model(x))
    torch.testing.assert_close(qk.convert(prepared)(x), want)
    with pytest.raises(ValueError, match="a rule gives 'hidden'"):
        qk.prepare(nn.Sequential(model), qk.QConfig(rules=[("0", {"hidden": {"bits": 4}})]))
    with pytest.raises(ValueError, match="holds no layer that config selects"):
        qk.prepare(nn.Sequential(model), qk.QConfig(rules=[("0", None)]))
    both = qk.prepare(nn.Sequential(model), qk.QConfig(rules=[("0", {"weight": {"bits": 3}, "input": {"bits": 8}})]))
    assert (both[0].weight_fake_quant.bits, both[0].input_fake_quant.bits) == (3, 8)


def test_the_base_of_a_subclass_of_linear_becomes_an_integer_layer() -> None:
    model, x = started(OwnLinear(12, 10)), torch.randn(5, 12)
    prepared = qk.prepare(nn.Sequential(model))
    qk.calibrate(prepared, [x])
    layer = prepared[0].eval()
    want = F.linear(layer.input_fake_quant(x), layer.weight_fake_quant(model.weight), model.bias)
    want = want + F.linear(F.linear(x, model.lora_A), model.lora_B) * model.scaling
    torch.testing.assert_close(layer(x), want)
    assert isinstance(assert_converts(prepared, x)[0], Int8Linear)


@pytest.mark.parametrize("pattern", ["0", "0.base_layer", nn.Linear, Wrapped, "*"])
def test_rules_for_a_sum(pattern) -> None:
    """They name the module, its base, or the class of either; the last one decides."""
    rules = [(pattern, {"weight": {"bits": 4}}), ("1", None)]
    prepared = qk.prepare(nn.Sequential(linear(), nn.Linear(10, 4)), qk.QConfig(rules=rules, adapters="sum"))
    assert prepared[0].weight_fake_quant.bits == 4
    rules = [("0", {"weight": {"bits": 4}}), (pattern, {"weight": {"bits": 3}}), ("1", None)]
    prepared = qk.prepare(nn.Sequential(linear(), nn.Linear(10, 4)), qk.QConfig(rules=rules, adapters="sum"))
    assert prepared[0].weight_fake_quant.bits == 3
    with pytest.raises(ValueError, match="holds no layer that config selects"):
        qk.prepare(nn.Sequential(linear()), qk.QConfig(rules=[(pattern, None)], adapters="sum"))


def test_the_report_names_the_sum() -> None:
    x = torch.randn(5, 12)
    report = qk.report(prepared_sum(linear(), x), x)
    rows = {row.name: row for row in report.layers}
    assert (rows["0"].weight_bits, rows["0"].input_bits) == (8, 8)
    assert rows["0"].weight_sqnr > 30
    assert "0" not in report.notes
    for name in ("0.base_layer", "0.lora_A.default", "0.lora_B.default"):
        assert report.notes[name] == "a part of '0', the sum of whose weights is quantized"


def test_a_sum_through_a_parametrization() -> None:
    """What a user writes with torch's own means is one weight too."""

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3, 12) * 0.2), nn.Parameter(torch.randn(10, 3) * 0.2)

        def forward(self, weight):
            return weight + 0.5 * self.b @ self.a

    model, x = nn.Sequential(nn.Linear(12, 10)), torch.randn(5, 12)
    nn.utils.parametrize.register_parametrization(model[0], "weight", LowRank())
    low = model[0].parametrizations.weight[0]
    model[0].parametrizations.weight.original.requires_grad_(False)
    prepared = qk.prepare(model)
    qk.calibrate(prepared, [x])
    layer = prepared[0]
    summed = model[0].parametrizations.weight.original + 0.5 * low.b @ low.a
    want = F.linear(layer.input_fake_quant.eval()(x), layer.weight_fake_quant.eval()(summed), model[0].bias)
    torch.testing.assert_close(prepared.eval()(x), want)
    prepared.train()(x).sum().backward()
    assert float(layer.parametrizations.weight[0].a.grad.abs().max()) > 0
    assert isinstance(assert_converts(prepared, x)[0], Int8Linear)


def test_adapters_of_a_users_own_module_are_left_in_float_by_a_rule() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.a, self.b = nn.Linear(12, 10), nn.Linear(12, 3, bias=False), nn.Linear(3, 10, bias=False)

        def forward(self, x):
            return self.base(x) + 0.5 * self.b(self.a(x))

    prepared = qk.prepare(Plain(), qk.QConfig(rules=[("[ab]", None)]))
    assert [n for n, m in prepared.named_modules() if isinstance(m, qk.nn.QATLayer)] == ["base"]


def test_config() -> None:
    config = qk.QConfig(adapters="sum")
    assert repr(eval(repr(config), {**vars(qk), "torch": torch})) == repr(config)
    assert eval(repr(config), {**vars(qk), "torch": torch}).adapters == "sum"
    for each in (config, qk.QConfig()):
        assert repr(qk.QConfig.from_json(each.to_json())) == repr(each)
    with pytest.raises(ValueError, match="adapters: got 'sums'; accepted: 'base', 'sum'; did you mean 'sum'"):
        qk.QConfig(adapters="sums")


def test_compiles() -> None:
    prepared, x = prepared_sum(linear(), torch.randn(5, 12)), torch.randn(4, 12)
    compiled = torch.compile(prepared.eval(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), prepared(x))


def test_a_batch_norm_behind_the_sum_is_folded() -> None:
    model = nn.Sequential(started(Wrapped(nn.Conv2d(4, 6, 3))), nn.BatchNorm2d(6)).eval()
    model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 8, 8)
    prepared = qk.prepare(model, SUM)
    qk.calibrate(prepared, [x])
    converted = assert_converts(prepared, x)
    assert isinstance(converted[0], Int8Conv2d)
    assert type(converted[1]) is nn.Identity
