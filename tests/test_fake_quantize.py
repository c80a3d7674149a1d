"""Fake quantization: every kernel bit for bit against the reference, gradients against autograd in fp64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from cases import FLOATS, GRANULARITIES, INPUTS, scale_of, zero_points
from compare import same
from conftest import assert_ran, kernels_of, on_backends, untouched
from gradients import saved_bytes
from samples import op_samples
from torch import Tensor

import qkernels as qk
from qkernels import checks
from qkernels.ops import dynamic
from qkernels.ops import fake_quantize as ops
from qkernels.ops import fake_quantize_learnable as learnable
from qkernels.reference import fake_quantize as reference

pytestmark = pytest.mark.sanitized

COMPILED = [name for name in kernels_of("fake_quantize_forward") if name not in ("triton", "reference")]


@pytest.mark.parametrize(("name", "shape"), GRANULARITIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels_equal_the_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Forward, masks and dx on every path, all granularities, layouts and dtypes, bit for bit."""
    x = INPUTS[name][0](dtype)
    scale, grad = scale_of(shape), torch.randn(x.shape).to(dtype)
    for zero_point in zero_points(shape):
        args = (scale, zero_point, -8, 7)
        y = reference.fake_quantize_forward(x, *args)
        laid_out = torch.empty_like(y).copy_(grad)
        masks = [reference.fake_quantize_forward_mask(x, *args, lsq)[1] for lsq in (False, True)]
        dxs = [reference.fake_quantize_backward(grad, x, *args, lsq) for lsq in (False, True)]
        for kernel in COMPILED:
            with qk.use_kernel(kernel):
                same(ops._forward(x, *args), y)
                if x.numel():
                    assert_ran(kernel)
                for lsq, mask, dx in zip((False, True), masks, dxs, strict=True):
                    y_masked, bits = ops._forward_mask(x, *args, lsq)
                    same(y_masked, y)
                    same(bits, mask)
                    same(ops._backward(grad, x, *args, lsq), dx)
                    same(ops.backward_mask(laid_out, bits), torch.empty_like(y).copy_(dx))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.05, torch.tensor([0.05]), torch.full((8, 1), 0.05)], ids=["float", "one", "rows"])
def test_both_ways_back_give_one_gradient(dtype: torch.dtype, scale: Tensor | float) -> None:
    """A leaf is kept, an activation leaves one bit per element: the gradient is the same."""
    x = (torch.randn(8, 50) * 5).to(dtype).requires_grad_()
    grad = torch.randn(8, 50).to(dtype)
    quantize = partial(qk.fake_quantize, scale=scale, quant_min=-20, quant_max=30)
    kept = torch.autograd.grad(quantize(x), x, grad)[0]
    masked = torch.autograd.grad(quantize(x * 1), x, grad)[0]
    after_relu = torch.autograd.grad(quantize(torch.relu(x)), x, grad)[0]
    params = (torch.as_tensor(scale), None, -20, 30)
    same(kept, torch.where(reference.inside_range(x.detach(), *params), grad, 0))
    same(masked, kept)
    same(after_relu, torch.where(x > 0, kept, 0))


def test_memory_saved_for_backward() -> None:
    leaf = torch.randn(64, 1024, requires_grad=True)
    activation = leaf * 2
    output = torch.relu(leaf)
    scale = torch.tensor([0.1])
    quantize = partial(qk.fake_quantize, scale=scale, quant_min=-8, quant_max=7)
    parameters = scale.untyped_storage().nbytes()
    assert saved_bytes(lambda: quantize(leaf)) == leaf.untyped_storage().nbytes() + parameters  # the parameter itself
    assert saved_bytes(lambda: quantize(activation)) == leaf.numel() // 8
    assert saved_bytes(lambda: quantize(output)) == output.untyped_storage().nbytes() + parameters  # relu keeps it


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_forward"), indirect=True)
def test_known_values(kernel: str) -> None:
    """Ties go to even before the zero point is added; infinities saturate; NaN stays; bounds are inclusive."""
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, math.inf, -math.inf, math.nan, 6.49, 6.51, -0.0])
    y = qk.fake_quantize(x, torch.ones(1), torch.tensor([1]), quant_min=-8, quant_max=7)
    expected = torch.tensor([0.0, 2, 2, 0, -2, 6, -9, math.nan, 6, 6, 0])
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert not torch.signbit(y[-1])


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_forward"), indirect=True)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bad_scales(kernel: str, dtype: torch.dtype) -> None:
    """A dead channel gives zeros; a denormal scale acts as the smallest normal; negative and NaN scales give NaN."""
    x = torch.randn(6, 20).to(dtype)
    x[0] = 0
    scale = torch.tensor([0.0, 1e-42, -0.1, math.nan, 0.1, math.inf]).reshape(6, 1)
    y = qk.fake_quantize(x, scale, quant_min=-8, quant_max=7).float()
    assert (y[0] == 0).all()
    tiny = torch.finfo(torch.float32).tiny
    expected = x[1].double().sign() * torch.where(x[1] < 0, 8, 7) * tiny
    torch.testing.assert_close(y[1].double(), expected.to(dtype).double(), rtol=0, atol=0)
    assert y[2].isnan().all()
    assert y[3].isnan().all()
    assert y[4].isfinite().all()
    assert y[5].isnan().all()
    learned = learnable.learnable_backward(torch.ones_like(x), x, scale, None, -8, 7, 1.0)[1]
    assert learned[2:4].isnan().all()


@pytest.mark.parametrize("kernel", COMPILED)
def test_fault_offsets_beyond_2_31(kernel: str) -> None:
    """Elements beyond 2**31 of a lazily committed tensor, reached by strides."""
    storage = untouched(2**31 + 4096, torch.bfloat16)
    x = storage.as_strided((2, 4096), (2**31, 1))
    x.copy_(torch.randn(2, 4096))
    with qk.use_kernel(kernel):
        y = qk.fake_quantize(x, torch.tensor([[0.1], [0.2]]), quant_min=-8, quant_max=7)
    same(y, reference.fake_quantize_forward(x.contiguous(), torch.tensor([[0.1], [0.2]]), None, -8, 7))


def test_dense_tensor_beyond_2_31() -> None:
    """A dense tensor whose element numbers need 64 bits: 4 GiB in (zero pages) and 4 GiB out."""
    x = untouched(2 * (2**30 + 2048), torch.bfloat16).view(2, -1)
    tail = torch.randn(2, 2048).bfloat16()
    x[:, -2048:] = tail
    scale = torch.tensor([[0.1], [0.2]])
    y = qk.fake_quantize(x, scale, quant_min=-8, quant_max=7)
    same(y[:, -2048:].contiguous(), reference.fake_quantize_forward(tail, scale, None, -8, 7))


@pytest.mark.parametrize("number", range(len(op_samples())))
def test_opcheck(number: int) -> None:
    op, args = op_samples()[number]
    packet, _, overload = op.partition(".")
    torch.library.opcheck(getattr(getattr(torch.ops.qkernels, packet), overload or "default"), args)


def test_every_op_of_the_family_is_opchecked() -> None:
    modules = ("fake_quantize", "fake_quantize_learnable", "dynamic", "observe_fake_quantize", "aten_fake_quantize")
    elsewhere = {"fake_quantize_straight_through_backward", "quantize_dynamic"}
    references = [kernel for kernel in qk.kernels() if kernel.name == qk.registry.REFERENCE]
    family = {kernel.op for kernel in references if kernel.fn.__module__.rpartition(".")[2] in modules}
    assert family - elsewhere == {op for op, _ in op_samples()}


COMPILE_CASES = {
    "static": lambda x, s, low, high: qk.fake_quantize(x * 1, s, quant_min=low, quant_max=high),
    "leaf": lambda x, s, low, high: qk.fake_quantize(x, s, quant_min=low, quant_max=high),
    "learnable": lambda x, s, low, high: qk.fake_quantize(x, s, s.detach() * 0, quant_min=low, quant_max=high),
    "channel": lambda x, s, low, high: qk.fake_quantize_per_channel_affine(
        x, s.expand(x.shape[1]), torch.zeros(x.shape[1]), 1, low, high
    ),
    "dynamic": lambda x, s, low, high: qk.fake_quantize_dynamic(x * s, bits=4, group_size=8),
    "asymmetric": lambda x, s, low, high: qk.fake_quantize_dynamic(x * s, bits=8, symmetric=False),
}


@pytest.mark.parametrize(("case", "backend"), on_backends(COMPILE_CASES))
def test_compile_fullgraph_without_recompiles(case: str, backend: str) -> None:
    fn = COMPILE_CASES[case]
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=backend)
    changes = [(8, 0.1, -8, 7), (8, 0.3, -8, 7), (8, 0.1, -128, 127), (16, 0.1, -2, 1), (5, 0.2, -4, 3)]
    for step, (batch, scale, low, high) in enumerate(changes):
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            x = torch.randn(batch, 24, requires_grad=True)
            s = torch.tensor([scale], requires_grad=case == "learnable")
            leaves = [x, s] if s.requires_grad else [x]
            y = compiled(x, s, low, high)
            got = torch.autograd.grad(y.square().sum(), leaves)
        expected = fn(x, s, low, high)
        same(y.detach(), expected.detach())
        for a, b in zip(got, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16, 24))
        self.scale = torch.nn.Parameter(torch.full((16, 1), 0.05))

    def forward(self, x: Tensor) -> Tensor:
        w = qk.fake_quantize(self.weight, self.scale, quant_min=-127, quant_max=127)
        return torch.nn.functional.linear(qk.fake_quantize_dynamic(x), w)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    layer, x = Layer().eval(), torch.randn(4, 24)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (x,), strict=strict, dynamic_shapes={"x": {0: batch}})
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = {str(node.target) for graph in graphs for node in graph.nodes}
    assert "qkernels.fake_quantize_forward.default" in targets
    assert "qkernels.fake_quantize_dynamic_forward.default" in targets
    wider = torch.randn(7, 24)
    torch.testing.assert_close(program.module()(wider), layer(wider), rtol=0, atol=0)


def test_activation_checkpointing_and_autocast() -> None:
    from torch.utils.checkpoint import checkpoint

    layer, x = Layer(), torch.randn(4, 24, requires_grad=True)
    layer(x).square().sum().backward()
    plain = [x.grad.clone(), *(p.grad.clone() for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    for got, want in zip([x.grad, *(p.grad for p in layer.parameters())], plain, strict=True):
        same(got, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()


TWICE = {
    "kept": lambda x: qk.fake_quantize(x, torch.tensor([0.1]), torch.tensor([2]), quant_min=-8, quant_max=7),
    "kept number": lambda x: qk.fake_quantize(x, 0.1, quant_min=-8, quant_max=7),
    "mask": lambda x: qk.fake_quantize(x * 1, 0.1, quant_min=-8, quant_max=7),
    "dynamic": lambda x: qk.fake_quantize_dynamic(x),
    "asymmetric": lambda x: qk.fake_quantize_dynamic(x, bits=4, symmetric=False),
}


@pytest.mark.parametrize("case", TWICE)
def test_second_derivative(case: str) -> None:
    """Of sum(y²): dx = 2·y·inside, and its derivative 2·inside."""
    x = torch.randn(6, 20, requires_grad=True)
    y = TWICE[case](x)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    inside = (first != 0) | (y == 0)
    assert inside.any()
    same(second, torch.where(inside, 2.0, 0.0))


@pytest.mark.parametrize("kernel", COMPILED)
def test_threads_give_identical_bits(kernel: str) -> None:
    x, grad = torch.randn(300, 1111), torch.randn(300, 1111)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with qk.use_kernel(kernel):
            for shape in ((1,), (300, 1), (1, 1111)):
                args = (scale_of(shape).fill_(0.03), None, -8, 7)
                results.append([ops._forward(x, *args), *learnable.learnable_backward(grad, x, *args, 1.0)])
            results.append(list(dynamic._dynamic_forward(x, -1, -8, 7, False)))
    half = len(results) // 2
    for first, second in zip(results[:half], results[half:], strict=True):
        for a, b in zip(first, second, strict=True):
            same(a, b)


X = torch.randn(4, 6)
BAD = {
    "x dtype": (lambda: qk.fake_quantize(X.long(), torch.ones(1), quant_min=0, quant_max=1), "x: got torch.int64"),
    "scale dtype": (lambda: qk.fake_quantize(X, torch.ones(1).int(), quant_min=0, quant_max=1), "scale: got torch.int"),
    "scale shape": (lambda: qk.fake_quantize(X, torch.ones(4, 4), quant_min=0, quant_max=1), r"scale: got shape"),
    "scale rank": (lambda: qk.fake_quantize(X, torch.ones(4), quant_min=0, quant_max=1), r"scale: got shape \[4\]"),
    "zero_point shape": (
        lambda: qk.fake_quantize(X, torch.ones(4, 1), torch.zeros(1, 6), quant_min=0, quant_max=1),
        r"zero_point: got shape \[1, 6\]",
    ),
    "range order": (lambda: qk.fake_quantize(X, torch.ones(1), quant_min=3, quant_max=1), "quant_min: got 3, above"),
    "range size": (
        lambda: qk.fake_quantize(X, torch.ones(1), quant_min=0, quant_max=2**24 + 1),
        "quant_min, quant_max: got 0, 16777217",
    ),
    "zero_point value": (
        lambda: qk.fake_quantize(X, torch.ones(1), torch.tensor([500]), quant_min=-128, quant_max=127),
        "zero_point: got 500; accepted: quant_min to quant_max, -128 to 127",
    ),
    "zero_point number": (lambda: qk.fake_quantize(X, 0.1, 9, quant_min=-8, quant_max=7), "zero_point: got 9"),
    "zero_point tensor": (
        lambda: qk.fake_quantize(X, 0.1, torch.zeros(1), quant_min=-8, quant_max=7),
        "zero_point: got a tensor beside a float scale",
    ),
    "grad shape": (
        lambda: ops._backward(X[:2], X, torch.ones(1), None, -8, 7),
        r"grad: got shape \[2, 6\]; accepted: x's shape \[4, 6\]",
    ),
    "grad dtype": (lambda: ops._backward(X.double(), X, torch.ones(1), None, -8, 7), "grad: got torch.float64"),
    "mask": (lambda: ops.backward_mask(X, torch.zeros(2, dtype=torch.uint8)), "mask: got"),
}


@pytest.mark.parametrize("kernel", kernels_of("fake_quantize_forward"))
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, kernel: str) -> None:
    call, message = BAD[case]
    with qk.use_kernel(kernel), pytest.raises((RuntimeError, ValueError), match=message):
        call()


def test_other_device_is_named() -> None:
    """By the reference's check, as a second device is not at hand: the compiled one compares with the CPU."""
    with pytest.raises(RuntimeError, match="scale: got a tensor on meta; accepted: x's device, cpu"):
        checks.fake_quantize(X, torch.ones(1, device="meta"), None, -8, 7)


def test_a_number_as_zero_point_is_looked_at_on_every_device() -> None:
    """A kernel on a GPU looks at no value; here a device without any."""
    x, scale = torch.empty(3, device="meta"), torch.ones(1, device="meta")
    for zero_point in (-9, 8, 1.5):
        with pytest.raises(RuntimeError, match=f"zero_point: got {zero_point}; accepted: "):
            qk.fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7)  # type: ignore[arg-type]
    assert qk.fake_quantize(x, scale, 0, quant_min=-8, quant_max=7).shape == x.shape
