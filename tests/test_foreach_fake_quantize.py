"""Fake quantization of many tensors: bit for bit, gradients included, what fake_quantize gives for each."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cases import FLOATS, GRANULARITIES, INPUTS, scale_of
from conftest import kernels_of
from test_fake_quantize import same
from torch import Tensor

import qkernels as qk
from qkernels import checks
from qkernels.ops import fake_quantize as single
from qkernels.ops import fake_quantize_learnable as learnable
from qkernels.ops import foreach_fake_quantize as ops

KERNELS = kernels_of("foreach_fake_quantize_forward")
Lists = tuple[list[Any], ...]


def every_case() -> Lists:
    """xs, scales, zero points and ranges: every layout, dtype and granularity, and sizes on both sides of a task."""
    calls: list[tuple[Any, ...]] = []
    zero_points = [lambda shape: None, lambda shape: torch.randint(-8, 8, shape), lambda shape: torch.randn(shape) * 6]
    for at, (name, shape) in enumerate(GRANULARITIES):
        x = INPUTS[name][0](FLOATS[at % 4])
        bits = 4 + at % 5
        calls.append((x, scale_of(shape), zero_points[at % 3](shape), -(1 << (bits - 1)), (1 << (bits - 1)) - 1))
    calls.append((torch.randn(600, 700), scale_of((600, 1)), None, -8, 7))
    return tuple(list(values) for values in zip(*calls, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_equal_the_single_op(kernel: str, threads: int) -> None:
    torch.set_num_threads(threads)
    lists = every_case()
    grads = [torch.randn(x.shape).to(x.dtype) for x in lists[0]]
    factors = [0.5 + at for at in range(len(grads))]
    with qk.use_kernel(kernel):
        ys = ops._forward(*lists)
        if kernel.startswith("cpu_"):
            assert qk.library.host.last_isa() == kernel.removeprefix("cpu_")
        for lsq in (False, True):
            dxs = ops._backward(grads, *lists, lsq)
            learned = ops._learnable_backward(grads, *lists, factors, lsq)
            for at, call in enumerate(zip(*lists, strict=True)):
                same(ys[at], single._forward(*call))
                same(dxs[at], single._backward(grads[at], *call, lsq))
                expected = learnable.learnable_backward(grads[at], *call, factors[at], lsq)
                for got, want in zip((part[at] for part in learned), expected, strict=True):
                    same(got, want)


def leaves(learn_scale: bool, learn_zero_point: bool) -> Lists:
    xs = [torch.randn(6, 40), torch.randn(3, 5).bfloat16(), torch.randn(300, 1000), torch.randn(7).double()]
    scales = [torch.full((6, 1), 0.1), torch.full((1,), 0.2), torch.full((1, 1000), 0.1), torch.full((7,), 0.3)]
    zero_points = [torch.zeros(6, 1), None, torch.full((1,), 1.5), torch.zeros(7).half()]
    for x in xs:
        x.requires_grad_()
    for scale in scales:
        scale.requires_grad_(learn_scale)
    for zero_point in zero_points:
        if zero_point is not None:
            zero_point.requires_grad_(learn_zero_point)
    return xs, scales, zero_points


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("learned", [(False, False), (True, False), (True, True)], ids=["x", "scale", "zero point"])
@pytest.mark.parametrize("convention", ["clip", "lsq"])
def test_gradients_equal_the_single_op(kernel: str, learned: tuple[bool, bool], convention: str) -> None:
    quant_mins, quant_maxs, factors = [-8, -2, -128, -8], [7, 1, 127, 7], [0.5, 1.0, 0.01, 2.0]
    results = []
    for many in (True, False):
        torch.manual_seed(0)
        xs, scales, zero_points = leaves(*learned)
        wanted = [t for t in (*xs, *scales, *zero_points) if t is not None and t.requires_grad]
        with qk.use_kernel(kernel):
            if many:
                ys = qk.foreach_fake_quantize(
                    xs, scales, zero_points, quant_min=quant_mins, quant_max=quant_maxs, grad_factor=factors,
                    straight_through=convention,
                )  # fmt: skip
            else:
                one = partial(qk.fake_quantize, straight_through=convention)
                calls = zip(xs, scales, zero_points, quant_mins, quant_maxs, factors, strict=True)
                ys = [one(*c[:3], quant_min=c[3], quant_max=c[4], grad_factor=c[5]) for c in calls]
            loss = sum((y.double() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in ys)
            results.append([*ys, *torch.autograd.grad(loss, wanted)])
    assert len(results[0]) == 4 + 4 + 4 * learned[0] + 3 * learned[1]
    for got, want in zip(*results, strict=True):
        same(got.detach(), want.detach())


def test_one_number_for_all_a_shared_tensor_and_none_at_all() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    scale = torch.full((4, 1), 0.1, requires_grad=True)
    assert qk.foreach_fake_quantize([], [], quant_min=-8, quant_max=7) == []
    first, second = qk.foreach_fake_quantize((x, x), (scale, scale), quant_min=-8, quant_max=7, grad_factor=0.5)
    same(first.detach(), second.detach())
    (first.sum() + second.sum()).backward()
    y = qk.fake_quantize(x, scale, quant_min=-8, quant_max=7, grad_factor=0.5)
    for leaf, single_grad in zip((x, scale), torch.autograd.grad(y.sum(), (x, scale)), strict=True):
        same(leaf.grad, 2 * single_grad)


def test_outputs_that_the_loss_does_not_use() -> None:
    xs = [torch.randn(5, requires_grad=True) for _ in range(3)]
    ys = qk.foreach_fake_quantize(xs, [torch.ones(1)] * 3, quant_min=-1, quant_max=1)
    ys[1].sum().backward()
    assert (xs[1].grad == (xs[1].detach().round().abs() <= 1)).all()
    assert all(x.grad is None or not x.grad.any() for x in (xs[0], xs[2]))


@pytest.mark.parametrize("convention", ["clip", "lsq"])
def test_second_derivative(convention: str) -> None:
    x = torch.randn(6, 20, requires_grad=True)
    (y,) = qk.foreach_fake_quantize([x], [torch.tensor([0.1])], quant_min=-8, quant_max=7, straight_through=convention)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    same(second, torch.where((first != 0) | (y == 0), 2.0, 0.0))
    scale = torch.tensor([0.1], requires_grad=True)
    (y,) = qk.foreach_fake_quantize([x], [scale], quant_min=-8, quant_max=7)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)  # as with torch's own ops
    with pytest.raises(RuntimeError, match="learned scales have no second derivative"):
        first.sum().backward()


def test_nothing_is_kept_beside_the_parameters() -> None:
    xs, scales, zero_points = leaves(True, True)
    owned = {t.untyped_storage().data_ptr() for t in (*xs, *scales, *zero_points) if t is not None}
    kept = set()

    def pack(t: Tensor) -> Tensor:
        kept.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        qk.foreach_fake_quantize(xs, scales, zero_points, quant_min=-8, quant_max=7)
    assert kept == owned


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.randn(16, 24), torch.randn(8, 16), torch.randn(4, 8)])
        self.scales = torch.nn.ParameterList([torch.full((n, 1), 0.05) for n in (16, 8, 4)])

    def forward(self, x: Tensor) -> Tensor:
        bits = [(-127, 127), (-7, 7), (-1, 1)]
        low, high = zip(*bits, strict=True)
        weights = qk.foreach_fake_quantize(
            list(self.weights), list(self.scales), quant_min=low, quant_max=high, grad_factor=0.1
        )
        for weight in weights:
            x = torch.nn.functional.linear(x, weight).relu()
        return x


def gradients(layers: torch.nn.Module, call: Any, x: Tensor) -> list[Tensor]:
    layers.zero_grad()
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in layers.parameters())]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    layers = Layers()
    compiled = torch.compile(layers, fullgraph=True, backend=backend, dynamic=True)
    for step, batch in enumerate((5, 9)):
        x = torch.randn(batch, 24)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            got = gradients(layers, compiled, x)
        for a, b in zip(got, gradients(layers, layers, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_activation_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    layers, x = Layers(), torch.randn(5, 24)
    plain = gradients(layers, layers, x)
    for got, want in zip(
        gradients(layers, lambda t: checkpoint(layers, t, use_reentrant=False), x), plain, strict=True
    ):
        same(got, want)


def test_opcheck() -> None:
    xs = [torch.randn(6, 16), torch.randn(16, 6).t(), torch.empty(0, 3), torch.randn(5, 8)[:, ::2]]
    scales = [torch.rand(6, 1) + 0.1, torch.rand(1) + 0.1, torch.rand(1), torch.rand(5, 4) + 0.1]
    lists = (xs, scales, [None, torch.tensor([2]), None, torch.zeros(5, 4)], [-8] * 4, [7] * 4)
    grads = [torch.randn(x.shape) for x in xs]
    namespace = torch.ops.qkernels
    torch.library.opcheck(namespace.foreach_fake_quantize_forward.default, lists)
    torch.library.opcheck(namespace.foreach_fake_quantize_backward.default, (grads, *lists))
    torch.library.opcheck(namespace.foreach_fake_quantize_learnable_backward.default, (grads, *lists, [1.0] * 4, True))


X = torch.randn(4, 6)
ONE = torch.ones(1)
BAD = {
    "scales": (lambda: qk.foreach_fake_quantize([X, X], [ONE], quant_min=0, quant_max=1), "scales: got 1 values"),
    "zero_points": (
        lambda: qk.foreach_fake_quantize([X], [ONE], [None, None], quant_min=0, quant_max=1),
        "zero_points: got 2 values; accepted: one for each of the 1 tensors",
    ),
    "quant_min": (lambda: qk.foreach_fake_quantize([X], [ONE], quant_min=[], quant_max=1), "quant_min: got 0 values"),
    "grad_factor": (
        lambda: qk.foreach_fake_quantize([X], [ONE], quant_min=0, quant_max=1, grad_factor=[1.0, 2.0]),
        "grad_factor: got 2 values",
    ),
    "raw scales": (lambda: ops._forward([X], [], [None], [0], [1]), "scales: got 0 values"),
    "raw grads": (lambda: ops._backward([], [X], [ONE], [None], [0], [1]), "grads: got 0 values"),
    "grad shape": (lambda: ops._backward([X[:1]], [X], [ONE], [None], [0], [1]), r"grad: got shape \[1, 6\]"),
    "dtype": (lambda: qk.foreach_fake_quantize([X.int()], [ONE], quant_min=0, quant_max=1), "x: got torch.int32"),
    "straight_through": (
        lambda: qk.foreach_fake_quantize([X], [ONE], quant_min=0, quant_max=1, straight_through="pass"),
        "straight_through: got 'pass'; accepted: clip, lsq",
    ),
    "range": (lambda: qk.foreach_fake_quantize([X], [ONE], quant_min=[3], quant_max=1), "quant_min: got 3, above"),
    "granularity": (
        lambda: qk.foreach_fake_quantize([X], [torch.ones(4)], quant_min=0, quant_max=1), r"scale: got shape \[4\]"
    ),
    "zero point": (
        lambda: qk.foreach_fake_quantize([X], [ONE], [torch.tensor([9])], quant_min=0, quant_max=1),
        "zero_point: got 9; accepted: quant_min to quant_max",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, kernel: str) -> None:
    call, message = BAD[case]
    with qk.use_kernel(kernel), pytest.raises(RuntimeError, match=message):
        call()


def test_tensors_on_two_devices() -> None:
    with pytest.raises(RuntimeError, match=r"xs\[1\]: got a tensor on meta; accepted: the first one's device, cpu"):
        checks.foreach([X, X.to("meta")])
    assert "takes CPU tensors" in str(qk.which("foreach_fake_quantize_forward", [X.to("meta")], [ONE])[0][1])
