"""override_torch where Python chooses between our ops and torch's, as it does on a GPU; here on the CPU."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compare import same
from overriding import AFFINE, ERRORS, NAN, A, both_routes, gradients, inputs, python_routes, rerouted
from torch import Tensor

import qkernels as qk
from qkernels.integrations import aten

pytestmark = [
    pytest.mark.sanitized,
    pytest.mark.skipif(qk.library.host is None, reason="needs the compiled kernels"),
    pytest.mark.usefixtures("override_ends"),
]


@pytest.fixture
def routed() -> Iterator[None]:
    with python_routes():
        yield


STATS = (torch.tensor([-1.0]), torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([7], dtype=torch.int32))
LEARNED = torch.tensor([0.1], requires_grad=True)
ROUTED: dict[str, Callable[[Tensor], Tensor]] = {
    **AFFINE,
    "learnable": lambda x: torch._fake_quantize_learnable_per_tensor_affine(x, LEARNED, torch.zeros(1), -8, 7),
    "learnable channels": lambda x: torch._fake_quantize_learnable_per_channel_affine(
        x, torch.full((x.size(0),), 0.1), torch.zeros(x.size(0)), 0, -8, 7, 0.5
    ),
    "fused": lambda x: torch.fused_moving_avg_obs_fake_quant(
        x, torch.ones(1), torch.ones(1), *(s.clone() for s in STATS), 0.01, -128, 127, -1
    ),
}
HALVES = (torch.float32, torch.bfloat16, torch.float16)  # fp64 is torch's


def test_python_routes_take_calls(routed: None) -> None:
    assert len(aten.DROP_INS) == len(ROUTED)
    x = torch.cat([torch.randn(39), NAN]).view(4, 10).requires_grad_()
    for name, fn in ROUTED.items():
        if name != "fused":
            assert fn(x.detach()).isnan().any(), name
        nodes = fn(x).grad_fn
        assert "Function" in str(nodes.__class__) or "Backward" in str(nodes)
        assert "qkernels" in type(nodes).__module__ or not type(nodes).__name__.startswith("Fake"), name
        (dx,) = torch.autograd.grad(fn(x).nansum(), x)
        assert dx.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_python_routes_give_torchs_bits(dtype: torch.dtype) -> None:
    """The forms with byte masks: what compiled code holds."""
    numbers = [(0.07, 3, -8, 7), (0.5, 1, -128, 127), (1.0, 0, 0, 255), (3.1, 5, 5, 5)]
    for x in inputs(dtype):
        for scale, zero_point, low, high in numbers:
            params = torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)

            def call(
                x: Tensor = x, s: float = scale, z: int = zero_point, p: Any = params, r: Any = (low, high)
            ) -> Any:
                out = [*A.fake_quantize_per_tensor_affine_cachemask(x, s, z, *r)]
                out += [torch.fake_quantize_per_tensor_affine(x, *p, *r)]
                for on in (1, 0):
                    out += A._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(x, *p, torch.tensor([on]), *r)
                return out

            same(*both_routes(call))
            for axis in range(x.dim()):
                n = x.size(axis)
                if n == 0 or bool(x.isinf().any()) or bool((x.double().abs() > 1e18).any()):
                    continue
                many = torch.arange(n) % 50 * 0.013 + scale, (torch.arange(n) % 7).int().clamp(low, high)
                op = A.fake_quantize_per_channel_affine_cachemask
                same(*both_routes(lambda x=x, p=many, a=axis, r=(low, high), op=op: op(x, *p, a, *r)))


def test_python_routes_run_ours_below_autograd(routed: None) -> None:
    """Each of torch's kernels hides NaN; through the byte masks of ours it stays, outside of the range."""
    x = torch.cat([torch.randn(39), NAN]).view(4, 10)
    one, many = torch.ones(1), torch.full((4,), 0.1)
    calls = {
        "fake_quantize_per_tensor_affine_cachemask": (x, 0.1, 2, -8, 7),
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams": (
            x, many[:1], torch.zeros(1).int(), one.long(), -8, 7,
        ),
        "fake_quantize_per_channel_affine_cachemask": (x, many, torch.zeros(4).int(), 0, -8, 7),
    }  # fmt: skip
    for name, args in calls.items():
        y, mask = getattr(A, name)(*args)
        assert y[3, 9].isnan(), name
        assert not mask[3, 9]
    stats = [s.clone() for s in STATS]
    y, mask = A._fused_moving_avg_obs_fq_helper(x, one, one, *stats, 0.01, -128, 127, -1)
    assert y[3, 9].isnan()
    same(stats, list(STATS))  # skipped; torch's would hold NaN
    assert {*calls, "_fused_moving_avg_obs_fq_helper"} | {n for n in aten.KERNELS if "backward" in n} == {*aten.KERNELS}


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_python_routes_of_the_fused_observer(per_row: bool, symmetric: bool) -> None:
    """As the C++ kernels of the CPU: output, mask and statistics, resized where they were empty."""

    def run() -> list[Tensor]:
        start = (math.inf, -math.inf, 1, 0)
        n = 0 if per_row else 1
        stats = [torch.full((n,), s, dtype=torch.float32 if i < 3 else torch.int32) for i, s in enumerate(start)]
        torch.manual_seed(0)
        outs: list[Tensor] = []
        for observer, quantizer in ((1, 1), (0, 1), (1, 0)):
            x = torch.randn(6, 5, 4).relu()
            flags = torch.tensor([observer]), torch.tensor([quantizer])
            outs += A._fused_moving_avg_obs_fq_helper(x, *flags, *stats, 0.01, -128, 127, 0, per_row, symmetric)
            outs += [s.clone() for s in stats]
        return outs

    with python_routes():
        got = run()
    with qk.override_torch():
        want = run()
    same(got, want)


@pytest.mark.parametrize("zero_point", [2.0, 0.0, -3.0, 2.5])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_python_routes_of_the_learnable_backward(axis: int | None, zero_point: float) -> None:
    n = 1 if axis is None else (6, 50)[axis]
    name, rest = ("per_tensor", ()) if axis is None else ("per_channel", (axis,))
    op = getattr(A, f"_fake_quantize_learnable_{name}_affine_backward")
    forward = getattr(A, f"_fake_quantize_learnable_{name}_affine")
    x, dy = torch.randn(6, 50), torch.randn(6, 50)
    for dtype in (torch.float32, torch.int32):
        params = torch.full((n,), 0.11), torch.full((n,), zero_point).to(dtype)
        with python_routes(), torch.no_grad():
            got, y = op(dy, x, *params, *rest, -8, 7, 0.3), forward(x, *params, *rest, -8, 7)
            default = op(dy, x, *params, *rest, -8, 7)
        with qk.override_torch():
            want, y_want = op(dy, x, *params, *rest, -8, 7, 0.3), forward(x, *params, *rest, -8, 7)
        same(y, y_want)
        same(got[0], want[0])
        same(default[0], want[0])
        for g, w in zip(got[1:], want[1:], strict=True):
            assert (g.dtype, g.shape) == (w.dtype, w.shape)
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


TORCHS: dict[str, Callable[[Tensor], Any]] = {
    "fp64": lambda x: A.fake_quantize_per_tensor_affine_cachemask(x.double(), 0.1, 0, -8, 7),
    "a range beyond fp32": lambda x: A.fake_quantize_per_tensor_affine_cachemask(x, 0.1, 0, -(2**30), 2**30),
    "a negative scale": lambda x: torch.fake_quantize_per_tensor_affine(x, -0.1, 0, -8, 7),
    "a subnormal scale": lambda x: torch.fake_quantize_per_tensor_affine(x, 1e-40, 0, -8, 7),
    "fp64 scale": lambda x: torch.fake_quantize_per_tensor_affine(
        x, torch.ones(1).double(), torch.zeros(1).int(), -8, 7
    ),
    "float zero point": lambda x: torch.fake_quantize_per_tensor_affine(x, torch.ones(1), torch.ones(1), -8, 7),
    "float zero points": lambda x: torch.fake_quantize_per_channel_affine(
        x, torch.ones(4), torch.full((4,), 0.5), 0, -8, 7
    ),
}


@pytest.mark.parametrize("case", TORCHS)
def test_python_routes_leave_to_torch_what_ours_would_compute_otherwise(case: str) -> None:
    x = torch.cat([torch.randn(39) * 3, NAN]).view(4, 10)
    same(*both_routes(lambda: TORCHS[case](x)))


def test_python_routes_give_torchs_errors() -> None:
    for case in ("range", "zero point", "dtype"):
        call, _ = ERRORS[case]
        with pytest.raises(RuntimeError) as theirs:
            call()
        with python_routes(), pytest.raises(RuntimeError) as ours:
            call()
        assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


def test_python_routes_leave_to_torch_what_no_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 10).requires_grad_()
    want = {name: gradients(fn, [x]) for name, fn in ROUTED.items()}
    monkeypatch.setattr(aten, "_takes", lambda op, *args: False)
    with python_routes():
        for name, fn in ROUTED.items():
            same(gradients(fn, [x]), want[name])
            with torch.no_grad():
                same(fn(x), want[name][0])
        assert not rerouted()


def test_python_routes_ask_every_kernel_with_the_arguments_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may look at any argument, as Triton's do at the shape of scale."""
    asked: dict[str, int] = {}

    def only(op: str) -> list[qk.registry.Kernel]:
        schema = qk.library.dispatched(op)._schema

        def unsupported(*args: Any) -> str | None:
            asked[op] = asked.get(op, 0) + 1
            assert all(declared.has_default_value() for declared in schema.arguments[len(args) :])
            for arg, declared in zip(args, schema.arguments, strict=False):
                assert isinstance(arg, Tensor) == ("Tensor" in str(declared.type)), (op, declared)
            return None

        return [qk.registry.Kernel(op, "any", lambda: None, unsupported)]

    monkeypatch.setattr(aten.registry, "kernels", only)
    x = torch.randn(4, 10, requires_grad=True)
    with python_routes():
        for fn in ROUTED.values():
            gradients(fn, [x])
            with torch.inference_mode():
                fn(x.detach().clone())
        torch.compile(lambda x: [fn(x) for fn in ROUTED.values()], backend="aot_eager")(x.detach())
    assert set(asked) == {
        "fake_quantize_forward_mask", "fake_quantize_forward_mask.scalar", "fake_quantize_learnable_backward",
        "observe_fake_quantize",
    }  # fmt: skip


@pytest.mark.parametrize("case", ROUTED)
def test_python_routes_take_compiled_code(case: str) -> None:
    """Compiled inside or outside, graphs hold torch's ops and are rerouted where they run inside."""
    x = torch.cat([torch.randn(39), NAN]).view(4, 10).requires_grad_()
    with qk.override_torch():
        want = gradients(ROUTED[case], [x])
    assert want[0].isnan().any()
    for compile_inside in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(ROUTED[case], fullgraph=True, backend="aot_eager")
        if not compile_inside:
            gradients(compiled, [x])
        with python_routes():
            got = gradients(compiled, [x])
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_python_routes_under_transforms() -> None:
    x = torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's slow path
        same(*both_routes(lambda: torch.vmap(AFFINE["numbers"])(x)))
        for case in AFFINE:
            same(*both_routes(lambda case=case: torch.func.grad(lambda t: AFFINE[case](t).square().sum())(x)))


def test_python_routes_show_tracers_torchs_ops(routed: None) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(AFFINE["numbers"], tracing_mode="fake")(torch.randn(3, 4))
    assert "aten.fake_quantize_per_tensor_affine_cachemask" in graph.code


def test_reference_cannot_take_a_call() -> None:
    for device, takes in (("cpu", True), ("meta", False)):
        one = torch.ones(1, device=device)
        assert aten._takes("fake_quantize_forward", one, one, None, -8, 7) == takes
