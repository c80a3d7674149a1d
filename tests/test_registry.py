"""The registry itself, and the choice of kernels through qk.kernels, qk.which and qk.use_kernel."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import kernels_of

import qkernels as qk
from qkernels import registry, selfcheck
from qkernels.reference import fake_quantize as reference
from qkernels.registry import Mendable
from qkernels.samples import trials

OP = "fake_quantize_forward"


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh op that only the registry knows."""
    monkeypatch.setattr(registry, "_kernels", {})
    monkeypatch.setattr(registry, "_said", set())
    return "op"


def refuse(reason: str) -> Callable[..., str | None]:
    return lambda *args: reason


def accept(*args: Any) -> str | None:
    return None


def test_reference_stays_last(op: str) -> None:
    registry.register(op, "reference", lambda x: ("reference", x), accept)
    registry.register(op, "best", lambda x: ("best", x), accept)
    registry.register(op, "second", lambda x: ("second", x), accept)
    assert [kernel.name for kernel in registry.kernels(op)] == ["best", "second", "reference"]
    assert registry.run(op, 7) == ("best", 7)


def test_first_that_can_runs_and_which_says_why(op: str) -> None:
    registry.register(op, "reference", lambda x: ("reference", x), accept)
    registry.register(op, "odd", lambda x: ("odd", x), lambda *args: "x is even" if args and args[0] % 2 == 0 else None)
    assert registry.run(op, 3) == ("odd", 3)
    assert registry.run(op, 4) == ("reference", 4)
    assert registry.which(op, 4) == [("odd", "x is even"), ("reference", None)]
    assert registry.which(op) == [("odd", None), ("reference", None)]


def test_a_reason_that_can_be_mended_is_said_once(op: str) -> None:
    registry.register(op, "reference", lambda: "reference", accept)
    registry.register(op, "fast", lambda: "fast", refuse(Mendable("not built; run make")))
    with pytest.warns(UserWarning, match=r"op runs on a slower kernel: not built; run make"):
        registry.run(op)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.run(op)


def test_a_reason_that_cannot_be_mended_is_not_said(op: str) -> None:
    registry.register(op, "reference", lambda: "reference", accept)
    registry.register(op, "fast", lambda: "fast", refuse("takes other shapes"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.run(op) == "reference"


def test_no_kernel_takes_the_call(op: str) -> None:
    registry.register(op, "fast", lambda: "fast", refuse("takes other shapes"))
    with pytest.raises(RuntimeError, match=r"op: no kernel takes this call: .*fast.*takes other shapes"):
        registry.run(op)


def test_a_name_is_taken_once(op: str) -> None:
    registry.register(op, "fast", lambda: "fast", accept)
    with pytest.raises(ValueError, match="name: op has a kernel 'fast' already"):
        registry.register(op, "fast", lambda: "fast", accept)


def test_unknown_op_is_named() -> None:
    with pytest.raises(ValueError, match=r"op: no op is named 'fake_quant'; the ops are .*fake_quantize_forward"):
        qk.which("fake_quant")


def test_every_op_has_a_reference_and_self_test_cases() -> None:
    ops = {kernel.op for kernel in qk.kernels()}
    for op in ops:
        assert qk.kernels(op)[-1].name == "reference"
    assert ops == set(trials)
    for op in ops:
        assert any(True for x in selfcheck.inputs(quick=True) for _ in trials[op].samples(x)), f"{op}: no quick case"


def test_every_declared_kernel_is_compiled() -> None:
    """All other tests of compiled kernels loop over what can run: this one notices where that is nothing."""
    assert qk.library.cpu_missing is None
    path = qk.library.host.isa_names().index(qk.library.host.active_isa())
    for kernel in qk.kernels():
        if kernel.name.startswith("cpu_"):
            needed = qk.library.host.isa_names().index(kernel.name.removeprefix("cpu_"))
            assert (kernel.unsupported() is None) == (needed <= path), kernel.unsupported()


def test_which_refuses_tensors_of_another_device() -> None:
    x = torch.empty(3, device="meta")
    answers = dict(qk.which(OP, x, torch.tensor([1.0]), None, -8, 7))
    assert answers["cpu_scalar"] == "takes CPU tensors, got one on meta"
    assert answers["reference"] is None


@pytest.mark.parametrize("kernel", kernels_of(OP), indirect=True)
def test_the_forced_kernel_runs(kernel: str) -> None:
    x, scale = torch.randn(5, 7), torch.tensor([0.1])
    y = qk.fake_quantize(x, scale, quant_min=-8, quant_max=7)
    assert torch.equal(y, reference.fake_quantize_forward(x, scale, None, -8, 7))


def forward(x: torch.Tensor) -> str | None:
    """The path that one call took; None: the reference."""
    qk.library.host.clear_last_isa()
    qk.fake_quantize(x, torch.tensor([0.1]), quant_min=-8, quant_max=7)
    return qk.library.host.last_isa()


def test_use_kernel_refuses_on_entry_a_path_that_the_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qk.library.host, "supported_isa", lambda: "avx2")
    for isa in ("avx512", "avx512vnni", "amx"):
        with (
            pytest.raises(RuntimeError, match=f"use_kernel: cannot run cpu_{isa}: this CPU has no {isa}"),
            qk.use_kernel(f"cpu_{isa}"),
        ):
            raise AssertionError("entered")


def test_use_kernel_nests_and_is_undone_by_an_exception() -> None:
    x = torch.randn(5)
    before = forward(x)
    with qk.use_kernel("reference"):
        assert forward(x) is None
        with qk.use_kernel("cpu_scalar"):
            assert forward(x) == "scalar"
        assert forward(x) is None
    assert forward(x) == before
    with pytest.raises(KeyError), qk.use_kernel("cpu_scalar"), qk.use_kernel("reference"):
        raise KeyError
    assert forward(x) == before


def test_use_kernel_reaches_other_threads_and_the_backward_pass() -> None:
    paths = []
    x = torch.randn(64, requires_grad=True)
    with qk.use_kernel("cpu_scalar"):
        thread = threading.Thread(target=lambda: paths.append(forward(torch.randn(5))))
        thread.start()
        thread.join()
        y = qk.fake_quantize(x, torch.tensor([0.1]), quant_min=-8, quant_max=7)
        qk.library.host.clear_last_isa()
        y.sum().backward()
        paths.append(qk.library.host.last_isa())
    assert paths == ["scalar", "scalar"]


def test_use_kernel_names_what_exists() -> None:
    message = r"name: no kernel is named 'fast'; the kernels are .*cpu_scalar.*reference"
    with pytest.raises(ValueError, match=message), qk.use_kernel("fast"):
        pass


def test_a_forced_kernel_that_cannot_run_fails_loudly(op: str) -> None:
    registry.register(op, "reference", lambda: "reference", accept)
    registry.register(op, "fast", lambda: "fast", refuse("takes other shapes"))
    with pytest.raises(RuntimeError, match="op: kernel 'fast' was asked for by use_kernel but cannot run: takes other"):
        registry._select_forced(op, "fast", ())
    with pytest.raises(RuntimeError, match="op: has no kernel 'none'; it has fast, reference"):
        registry._select_forced(op, "none", ())
