"""Modules in place of functions of activations: as floats, prepared, trained and converted."""

import collections
import copy
import pickle

import pytest
import torch
from converting import assert_converts
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.nn import (
    Add,
    Cat,
    FakeQuantize,
    MatMul,
    PerToken,
    QATAdd,
    QATCat,
    QATMatMul,
    QATScaledDotProductAttention,
    ScaledDotProductAttention,
)
from qkernels.qat import QConfig, QSpec, calibrate, convert, prepare, report, unprepare

FloatFunctional = pytest.importorskip("torch.ao.nn.quantized").FloatFunctional

FIXED = QSpec(4, quantizer="minmax")


class Block(nn.Module):
    """An attention with projections of its own, a residual and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.attend, self.scores = ScaledDotProductAttention(), MatMul()
        self.add, self.cat = Add(), Cat()
        self.sum = FloatFunctional()

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = self.attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        y = self.add(self.out(y), x)
        z = self.scores(torch.softmax(self.scores(y, y.mT), -1), y)
        return self.cat([self.sum.add_relu(y, z), z], dim=-1)


def plain(block: Block, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in block.qkv(x).chunk(3, -1))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    y = block.out(y) + x
    z = torch.softmax(y @ y.mT, -1) @ y
    return torch.cat([torch.relu(y + z), z], -1)


def test_as_floats_they_are_the_functions():
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 5, 12)
    assert torch.equal(block(x), plain(block, x))
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    mask = torch.rand(3, 5) < 0.7
    options = {"attn_mask": mask, "scale": 0.3, "enable_gqa": True}
    assert torch.equal(
        ScaledDotProductAttention()(q, k, k, **options), F.scaled_dot_product_attention(q, k, k, **options)
    )


def rounded(x: torch.Tensor, quantizer: FakeQuantize) -> torch.Tensor:
    code = (x / quantizer.scale).round()
    inside = (code >= quantizer.quant_min) & (code <= quantizer.quant_max)
    y = code.clamp(quantizer.quant_min, quantizer.quant_max) * quantizer.scale
    return torch.where(inside, x + (y - x).detach(), y.detach())


CASES = {
    "matmul": (
        MatMul,
        lambda: (torch.randn(2, 3, 5), torch.randn(5, 4)),
        lambda m, a, b: rounded(a, m.left_fake_quant) @ rounded(b, m.right_fake_quant),
    ),
    "matmul, vector, bf16": (
        MatMul,
        lambda: (torch.randn(6).bfloat16(), torch.randn(2, 6, 3).bfloat16()),
        lambda m, a, b: rounded(a, m.left_fake_quant).bfloat16() @ rounded(b, m.right_fake_quant).bfloat16(),
    ),
    "attention": (
        ScaledDotProductAttention,
        lambda: tuple(torch.randn(2, 4, 3, 8).transpose(1, 2).double() for _ in range(3)),
        lambda m, q, k, v: (
            torch.softmax(rounded(q, m.query_fake_quant) @ rounded(k, m.key_fake_quant).mT / 8**0.5, -1)
            @ rounded(v, m.value_fake_quant)
        ),
    ),
    "add": (Add, lambda: (torch.randn(3, 5), torch.randn(5)), lambda m, a, b: rounded(a + b, m.output_fake_quant)),
    "cat": (
        Cat,
        lambda: ([torch.randn(3, 2), torch.randn(3, 4)], 1),
        lambda m, tensors, dim: rounded(torch.cat(tensors, dim), m.output_fake_quant),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_quantized_they_are_the_formula(case):
    torch.manual_seed(1)
    kind, make, formula = CASES[case]
    model = nn.ModuleDict({"it": kind(), "fc": nn.Linear(2, 2)})
    prepared = prepare(model, QConfig(input=FIXED, residual=FIXED))["it"]
    calibrate(prepared, [dict(zip(names_of(kind), make(), strict=True))])
    arguments = make()
    results = []
    for function in (prepared, lambda *a: formula(prepared, *a)):
        leaves, given = [], []
        for argument in arguments:
            tensors = argument if isinstance(argument, list) else [argument]
            fresh = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in tensors]
            leaves += [t for t in fresh if isinstance(t, torch.Tensor)]
            given.append(fresh if isinstance(argument, list) else fresh[0])
        y = function(*given)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
        results.append([y, *torch.autograd.grad(loss, leaves)])
    tolerance = 2e-2 if results[0][0].dtype == torch.bfloat16 else 1e-5
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert not torch.equal(results[0][0], model["it"](*arguments))


def names_of(kind: type[nn.Module]) -> tuple[str, ...]:
    return {ScaledDotProductAttention: ("query", "key", "value"), Cat: ("tensors", "dim")}.get(kind, ("left", "right"))


@pytest.mark.parametrize("operation", ["add", "mul", "add_relu", "cat", "matmul"])
def test_float_functional(operation):
    torch.manual_seed(0)
    model = nn.ModuleDict({"f": FloatFunctional(), "fc": nn.Linear(2, 2)})
    assert type(prepare(model)["f"]) is FloatFunctional
    prepared = prepare(model, QConfig(residual=FIXED))["f"]
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    prepared.output_fake_quant.set_range(torch.tensor(-2.0), torch.tensor(2.0))
    arguments = ([x, y],) if operation == "cat" else (x, y)
    expected = rounded(getattr(model["f"], operation)(*arguments), prepared.output_fake_quant)
    assert torch.equal(getattr(prepared, operation)(*arguments), expected)
    assert torch.equal(prepared.add_scalar(x, 3.0), x + 3)  # torch does not observe it either
    assert list(prepared.state_dict()) == [
        f"output_fake_quant.{key}" for key in prepared.output_fake_quant.state_dict()
    ]


def test_specs_and_rules():
    block = Block()
    prepared = prepare(block)
    kinds = {name: type(module) for name, module in prepared.named_children()}
    assert kinds["attend"] is QATScaledDotProductAttention
    assert kinds["scores"] is QATMatMul
    assert (kinds["add"], kinds["cat"], kinds["sum"]) == (Add, Cat, FloatFunctional)  # no spec for "residual"
    assert not prepared.attend.key_fake_quant.symmetric  # as QConfig's input
    rules = [("attend", {"attention": {"bits": 4}}), ("scores", {"input": None}), ("cat", {"residual": QSpec(6)})]
    prepared = prepare(block, QConfig(rules=rules))
    assert prepared.attend.value_fake_quant.bits == 4
    assert not prepared.attend.value_fake_quant.symmetric
    assert (type(prepared.scores), type(prepared.cat), type(prepared.add)) == (MatMul, QATCat, Add)
    both = prepare(block, QConfig(residual=QSpec(6), rules=[("sum", None)]))
    assert (type(both.add), type(both.cat), type(both.sum)) == (QATAdd, QATCat, FloatFunctional)
    tokens = prepare(block, QConfig(input=QSpec(8, PerToken(), quantizer="dynamic")))
    assert tokens.attend.query_fake_quant.granularity == PerToken()
    for name, kind, accepted in (
        ("add", "input", "residual"),
        ("scores", "weight", "input"),
        ("attend", "input", "att"),
    ):
        with pytest.raises(
            ValueError, match=rf"layer '{name}': a rule gives '{kind}'; accepted for this layer: {accepted}"
        ):
            prepare(block, QConfig(rules=[(name, {kind: QSpec(4)})]))


def test_a_model_with_them_trains_and_converts():
    torch.manual_seed(0)
    block = Block()
    batches = [torch.randn(4, 5, 12) for _ in range(3)]
    prepared = prepare(block, QConfig(residual=QSpec(8)))
    calibrate(prepared, batches)
    optimizer = torch.optim.Adam(prepared.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = sum((prepared.train()(x) - x.repeat(1, 1, 2)).square().mean() for x in batches)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in prepared.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    converted = assert_converts(prepared, batches[0], tolerance=1e-2)
    before = copy.deepcopy(converted.state_dict())
    converted.train()(100 * batches[0])
    assert all(map(torch.equal, converted.state_dict().values(), before.values()))  # no range moves any more
    fresh = convert(prepare_again(block, batches))
    fresh.load_state_dict(converted.state_dict(), strict=True)
    for made in (fresh, pickle.loads(pickle.dumps(converted)), copy.deepcopy(converted)):
        assert torch.equal(made.eval()(batches[0]), converted.eval()(batches[0]))
    for made in (report(prepared, batches[0], float_model=block), report(converted, batches[0], float_model=block)):
        rows = {row.name: row for row in made.layers}
        assert (rows["attend"].weight_bits, rows["attend"].input_bits, rows["add"].input_bits) == (None, 8, None)
        assert made.notes["attend"] == made.notes["add"] == "computes in float"
        assert rows["scores"].input_clipped is not None
    back = unprepare(prepared)
    assert {name: type(m) for name, m in back.named_modules()} == {name: type(m) for name, m in block.named_modules()}
    assert torch.equal(back.eval()(batches[0]), plain(back, batches[0]))


class Custom(nn.Module):
    """A product that no layer of torch computes."""

    def __init__(self, wrap=lambda y: y) -> None:
        super().__init__()
        self.w, self.wrap = nn.Parameter(torch.randn(4, 6)), wrap

    def forward(self, ids, *, x):
        return self.wrap(F.linear(x, self.w) + ids[:, None])


def test_a_module_of_any_class_by_rules():
    torch.manual_seed(0)
    model = nn.ModuleDict({"it": Custom(), "fc": nn.Linear(2, 2)})
    rules = [("it.w", {"weight": FIXED}), ("it", {"input": FIXED, "output": FIXED})]
    prepared = prepare(model, QConfig(rules=rules))["it"]
    arguments = {"ids": torch.arange(3), "x": torch.randn(3, 6)}
    calibrate(prepared, [arguments])
    assert isinstance(prepared, Custom)
    x = arguments["x"].clone().requires_grad_()
    found = [torch.autograd.grad(y.square().sum(), [x, prepared._parameters["w"]]) for y in (
        prepared(arguments["ids"], x=x),
        rounded(F.linear(rounded(x, prepared.input_fake_quant), per_row(prepared)) + torch.arange(3)[:, None],
                prepared.output_fake_quant),
    )]  # fmt: skip
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    expected = prepared.eval()(**arguments)
    for made in (copy.deepcopy(prepared), convert(prepared)):
        torch.testing.assert_close(made(**arguments), expected)
    fresh = prepare(model, QConfig(rules=rules))["it"]
    fresh.load_state_dict(prepared.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(**arguments), expected)
    back = unprepare(prepared)
    assert type(back) is Custom
    assert torch.equal(back(**arguments), model["it"](**arguments))


def per_row(layer: nn.Module) -> torch.Tensor:
    weight, quantizer = layer._parameters["w"], layer.w_fake_quant
    scale = weight.detach().abs().amax(1, keepdim=True) / quantizer.quant_max
    return weight + ((weight / scale).round() * scale - weight).detach()


Pair = collections.namedtuple("Pair", "ids y")


@pytest.mark.parametrize(
    ("wrap", "tensor"),
    [(lambda y: {"n": 3, "y": y}, lambda r: r["y"]), (lambda y: Pair(torch.arange(2), y), lambda r: r.y),
     (lambda y: [None, (y, y)], lambda r: r[1][0])],
)  # fmt: skip
def test_the_first_floating_tensor_of_a_result(wrap, tensor):
    torch.manual_seed(0)
    model = nn.ModuleDict({"it": Custom(wrap), "fc": nn.Linear(2, 2)})
    prepared = prepare(model, QConfig(rules=[(Custom, {"output": QSpec(2, quantizer="dynamic")})]))["it"]
    result = prepared(torch.arange(3), x=torch.randn(3, 6))
    assert type(result) is type(wrap(torch.ones(1)))
    assert tensor(result).unique().numel() <= 3  # two bits are ternary


def test_activations_by_their_class():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Identity(), nn.BatchNorm2d(2), nn.GELU(), nn.Flatten(), nn.Linear(8, 2)
    )
    x = torch.randn(3, 1, 4, 4)
    model(x)
    model.eval()
    spec = QSpec(8, quantizer="minmax")
    prepared = prepare(model, QConfig(rules=[(nn.GELU, {"input": spec}), ("1", {"output": spec})]))
    calibrate(prepared, [x])
    converted = assert_converts(prepared, x, tolerance=2e-2)
    assert type(converted[2]) is nn.BatchNorm2d  # the quantizer stands between it and the convolution
    assert pickle.loads(pickle.dumps(converted))(x).equal(converted(x))
    with pytest.raises(ValueError, match=r"layer '3': a rule gives 'weight'; accepted for this layer: input, out"):
        prepare(model, QConfig(rules=[("3", {"weight": QSpec(4)})]))


def prepare_again(block: nn.Module, batches) -> nn.Module:
    prepared = prepare(block, QConfig(residual=QSpec(8)))
    calibrate(prepared, batches)
    return prepared


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.add = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), Add()
        self.cat, self.sum = Cat(), FloatFunctional()

    def forward(self, x):
        return self.sum.add(self.cat([self.add(self.norm(self.conv(x)), x)], dim=1), x)


def test_a_graph_with_them_can_be_traced_and_compiled():
    torch.manual_seed(0)
    model, x = Both(), torch.randn(2, 2, 4, 4)
    model(x)
    model.eval()
    prepared = prepare(model, QConfig(residual=QSpec(8)))
    calibrate(prepared, [x])
    converted = assert_converts(prepared, x, tolerance=1e-2)
    assert type(converted.norm) is nn.Identity  # folded, for which the model is traced
    compiled = torch.compile(copy.deepcopy(prepared), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), prepared(x))
    with torch.no_grad():
        assert torch.equal(qk.exact(prepared)(x), converted(x))


def test_what_a_float_functional_makes_is_quantized_once() -> None:
    """Its method runs in the model's forward, of which ``residual`` means the sums that it makes itself."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sum = FloatFunctional()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.sum.cat([self.sum.add(x, x.flip(0)), x])

    prepared = prepare(Sums(), QConfig(residual=QSpec(4)))
    names = [name for name, module in prepared.named_modules() if isinstance(module, qk.nn.FakeQuantize)]
    assert names == ["sum.output_fake_quant"]
