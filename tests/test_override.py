"""override_torch: entered and left, by threads and exceptions, and under compilers, tracers and transforms."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import same
from conftest import on_backends, run_python
from overriding import AFFINE, NAN, both, gradients, rerouted
from torch import Tensor, nn

import qkernels as qk

pytestmark = [
    pytest.mark.sanitized,
    pytest.mark.skipif(qk.library.host is None, reason="needs the compiled kernels"),
    pytest.mark.usefixtures("override_ends"),
]


def test_plain_call_holds_until_restored() -> None:
    first = qk.override_torch()
    second = qk.override_torch()
    assert rerouted()
    first.restore()
    first.restore()
    assert rerouted()
    second.restore()
    assert not rerouted()
    with second:
        assert rerouted()


def test_a_forgotten_call_still_holds_in_a_subprocess() -> None:
    done = run_python("""
import gc, torch, qkernels as qk
qk.override_torch()
gc.collect()
print(torch.fake_quantize_per_tensor_affine(torch.tensor([float("nan")]), 0.1, 0, -8, 7).item())
""")
    assert done.stdout == "nan\n", done.stderr
    assert done.stderr == ""


def test_nested_interleaved_and_left_by_an_exception() -> None:
    def fail() -> None:
        with qk.override_torch():
            with qk.override_torch():
                assert rerouted()
            assert rerouted()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not rerouted()
    one, two = qk.override_torch(), qk.override_torch()
    with one:
        two.restore()
        assert rerouted()
    assert not rerouted()
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(qk.override_torch())
        assert rerouted()


def test_torch_is_what_it_was_afterwards() -> None:
    x = torch.cat([torch.randn(1000), NAN, torch.tensor([math.inf])]).requires_grad_()
    before = [gradients(fn, [x.view(2, -1)]) for fn in AFFINE.values()]
    for _ in range(3):
        with qk.override_torch():
            assert rerouted()
        for fn, want in zip(AFFINE.values(), before, strict=True):
            same(gradients(fn, [x.view(2, -1)]), want)


def test_every_thread_is_rerouted() -> None:
    seen: list[bool] = []

    def work() -> None:
        seen.append(rerouted())
        x = torch.randn(50, requires_grad=True)
        AFFINE["numbers"](x).sum().backward()

    with qk.override_torch():
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == [True] * 8


def test_entered_by_many_threads_at_once() -> None:
    gate = threading.Barrier(8)
    seen: list[bool] = []

    def work() -> None:
        gate.wait()
        for _ in range(20):
            with qk.override_torch():
                pass
        handle = qk.override_torch()
        gate.wait()
        seen.append(rerouted())
        gate.wait()
        handle.restore()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 8


def test_without_compiled_kernels_torch_stays_and_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qk.library, "host", None)
    monkeypatch.setattr(qk.library, "cpu_missing", "not built here")
    with pytest.warns(UserWarning, match="leaves torch's own kernels on the CPU: not built here"), qk.override_torch():
        assert not rerouted()


# Above the kernels: tracing, compiling, transforms.


@pytest.mark.parametrize(("case", "backend"), on_backends(AFFINE))
def test_compiled(case: str, backend: str) -> None:
    """Compiled inside or outside, code is rerouted where it runs inside, and only there."""
    x = torch.cat([torch.randn(39), NAN]).view(4, 10).requires_grad_()
    want = gradients(AFFINE[case], [x])
    with qk.override_torch():
        ours = gradients(AFFINE[case], [x])
    assert ours[0].isnan().any()
    for compile_inside in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(AFFINE[case], fullgraph=True, backend=backend)
        if compile_inside:
            with qk.override_torch():
                gradients(compiled, [x])
        with torch.compiler.set_stance("default" if not compile_inside else "fail_on_recompile"):
            torch.testing.assert_close(gradients(compiled, [x]), want, rtol=0, atol=0, equal_nan=True)
        with torch.compiler.set_stance("fail_on_recompile"), qk.override_torch():
            torch.testing.assert_close(gradients(compiled, [x]), ours, rtol=0, atol=0, equal_nan=True)


def test_compiled_learnable_and_fused() -> None:
    x, scale, zero_point = torch.randn(6, 20), torch.full((6,), 0.05), torch.ones(6)
    one = torch.ones(1, dtype=torch.int64)

    def fn(x: Tensor, s: Tensor, z: Tensor, stats: list[Tensor]) -> Tensor:
        y = torch._fake_quantize_learnable_per_channel_affine(x, s, z, 0, -8, 7, 0.5)
        return torch.fused_moving_avg_obs_fake_quant(y * 3, one, one, *stats, 0.1, 0, 255, -1)

    def run(fn: Callable[..., Tensor]) -> list[Tensor]:
        stats = [torch.tensor([-1.0]), torch.tensor([1.0]), torch.ones(1), torch.zeros(1, dtype=torch.int32)]
        leaves = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
        return [*gradients(lambda *leaves: fn(*leaves, stats), leaves), *stats]

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    got, want = both(lambda: run(compiled))
    torch.testing.assert_close(want, run(fn), rtol=1e-6, atol=1e-6)
    with qk.override_torch():
        torch.testing.assert_close(got, run(fn), rtol=1e-6, atol=1e-6)


def test_graphs_hold_torchs_ops() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return AFFINE["channels"](AFFINE["tensors"](x))

    def ops(program: torch.export.ExportedProgram) -> list[str]:
        return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]

    x = torch.randn(3, 4)
    got, want = both(lambda: ops(torch.export.export(Model(), (x,))))
    assert got == want
    assert any("fake_quantize_per_channel_affine" in op for op in got)
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[Any] = []
    with qk.override_torch():
        backend = aot_autograd(
            fw_compiler=lambda g, _: graphs.append(g) or g, bw_compiler=lambda g, _: graphs.append(g) or g
        )
        torch._dynamo.reset()
        torch.compile(Model(), backend=backend)(x.clone().requires_grad_()).sum().backward()
    targets = {str(node.target) for g in graphs for node in g.graph.nodes if node.op == "call_function"}
    assert "aten.mul.Tensor" in targets
    assert not any("qkernels" in target for target in targets)


def test_fake_and_meta_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def call() -> list[tuple]:
        with FakeTensorMode():
            x = torch.randn(3, 4, 5, requires_grad=True)
            outs = [gradients(fn, [x]) for fn in AFFINE.values()]
        return [(t.shape, t.stride(), t.dtype) for out in outs for t in out]

    got, want = both(call)
    assert got == want
    with qk.override_torch(), pytest.raises(NotImplementedError):
        AFFINE["numbers"](torch.ones(3, device="meta"))  # as in torch


def test_vmap_and_forward_mode() -> None:
    x = torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's slow path
        same(*both(lambda: torch.vmap(AFFINE["numbers"])(x)))
        same(*both(lambda: torch.func.grad(lambda t: AFFINE["numbers"](t).square().sum())(x)))
    with qk.override_torch(), pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(AFFINE["numbers"], (x,), (x,))


def test_no_grad_inference_mode_autocast_and_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(5, 6, requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            same(*both(lambda: [fn(x.detach()).clone() for fn in AFFINE.values()]))

    def call() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(lambda x: checkpoint(AFFINE["tensors"], x @ x.t(), use_reentrant=False), [x])

    torch.testing.assert_close(*both(call), rtol=0, atol=0)
