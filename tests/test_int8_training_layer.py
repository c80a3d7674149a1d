"""Int8TrainingLinear: codes kept from step to step, and training by one process and by two."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import run_python
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.ops import int8_training as ops


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every weight that was quantized."""
    seen: list[Tensor] = []
    original = ops.weight_codes

    def spy(w: Tensor, *rest: Any) -> ops.Codes:
        seen.append(w)
        return original(w, *rest)

    monkeypatch.setattr(ops, "weight_codes", spy)
    return seen


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "foreach": partial(torch.optim.SGD, lr=0.1, foreach=True),
    "adam fused": partial(torch.optim.AdamW, lr=0.1, fused=True),
}


class WritesData(torch.optim.Optimizer):
    """As optimizers were written before no_grad."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-0.1)


@pytest.mark.parametrize("make", [*OPTIMIZERS.values(), WritesData], ids=[*OPTIMIZERS, "through .data"])
def test_weights_are_quantized_once_for_each_optimizer_step(make: Callable[..., Any], quantized: list[Tensor]) -> None:
    layer = qk.nn.Int8TrainingLinear(16, 8)
    optimizer = make(layer.parameters())
    for step in range(3):
        optimizer.zero_grad()
        for _ in range(4):
            x = torch.randn(5, 16)
            y = layer(x)
            assert torch.equal(y, qk.int8_training_linear(x, layer.weight.clone(), layer.bias))
            y.square().sum().backward()
        assert sum(w is layer.weight for w in quantized) == step + 1
        optimizer.step()


CHANGES: dict[str, Callable[[qk.nn.Int8TrainingLinear], Any]] = {
    "in place under no_grad": lambda layer: torch.no_grad()(lambda: layer.weight.mul_(2))(),
    "in place in inference mode": lambda layer: torch.inference_mode()(lambda: layer.weight.mul_(2))(),
    "through a view": lambda layer: torch.no_grad()(lambda: layer.weight[1:].zero_())(),
    "through detach": lambda layer: layer.weight.detach().mul_(2),
    "load_state_dict": lambda layer: layer.load_state_dict(nn.Linear(16, 8).state_dict()),
    "assigned": lambda layer: layer.load_state_dict(nn.Linear(16, 8).state_dict(), assign=True),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(8, 16))),
    "other data": lambda layer: setattr(layer.weight, "data", torch.randn(8, 16)),
    "cast": lambda layer: layer.bfloat16().float(),
    "other products": lambda layer: setattr(layer, "grad_input", "float"),
    "init": lambda layer: nn.init.normal_(layer.weight),
    "foreach": lambda layer: torch.no_grad()(lambda: torch._foreach_mul_([layer.weight], 2.0))(),
    "told so": lambda layer: (layer.weight.data.mul_(2), layer.forget_codes()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_kept_codes_follow_the_weight(change: Callable[..., Any]) -> None:
    layer = qk.nn.Int8TrainingLinear(16, 8)
    x = torch.randn(5, 16, requires_grad=True)
    before = layer(x)
    assert layer._kept is not None
    change(layer)
    y = layer(x)
    fresh = qk.int8_training_linear(x, layer.weight.detach().clone(), layer.bias, grad_input=layer.grad_input)
    assert torch.equal(y, fresh)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.autograd.grad(fresh.sum(), x)[0])
    before.sum().backward()  # the graph from before the change keeps the codes that it used


def test_codes_are_not_kept_where_that_is_unsafe(quantized: list[Tensor]) -> None:
    layer, x = qk.nn.Int8TrainingLinear(16, 8), torch.randn(5, 16)
    layer.eval()
    for _ in range(2):
        layer(x)
        layer.weight.data.mul_(2)  # averages of weights are swapped in like this for evaluation
        assert torch.equal(layer(x), qk.int8_training_linear(x, layer.weight.clone(), layer.bias))
    layer.train()
    layer(x)
    other = {"weight": torch.randn(8, 16), "bias": torch.randn(8)}
    assert torch.equal(
        torch.func.functional_call(layer, other, x),
        qk.int8_training_linear(x, other["weight"], other["bias"]),
    )
    with torch._subclasses.FakeTensorMode():
        assert qk.nn.Int8TrainingLinear(16, 8)(torch.empty(5, 16)).shape == (5, 8)
    with torch.inference_mode():
        made = qk.nn.Int8TrainingLinear(16, 8)
        assert torch.equal(made(x), qk.int8_training_linear(x, made.weight, made.bias))
    twin = copy.deepcopy(layer)
    assert twin._kept is None
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    assert again._kept is None
    assert torch.equal(again(x), layer(x))


def test_module_is_nn_linear() -> None:
    linear = nn.Linear(16, 8).eval()
    layer = qk.nn.Int8TrainingLinear.from_float(linear, grad_weight="float", stochastic_rounding=True)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert "grad_weight=float, grad_bits=8, stochastic_rounding=True" in repr(layer)
    assert qk.nn.Int8TrainingLinear(16, 8, bias=False, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="from_float: got ReLU; accepted: Linear"):
        qk.nn.Int8TrainingLinear.from_float(nn.ReLU())
    with pytest.raises(ValueError, match="grad_input: got 'int4'; accepted: int8, float"):
        qk.nn.Int8TrainingLinear(16, 8, grad_input="int4")


def test_training_reaches_the_float_loss() -> None:
    """A regression that fp32 solves: int8 ends within 2 % of it, with either rounding."""
    inputs = torch.randn(256, 32)
    target = torch.sin(inputs @ torch.randn(32, 8)) + 0.3 * torch.randn(256, 8)

    def final(**options: Any) -> float:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
        if options:
            for at in (0, 2):
                model[at] = qk.nn.Int8TrainingLinear.from_float(model[at], **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            loss = F.mse_loss(model(inputs), target)
            loss.backward()
            optimizer.step()
        return loss.item()

    base = final()
    for stochastic in (False, True):
        assert abs(final(stochastic_rounding=stochastic) / base - 1) < 0.02


PARALLEL = """
import os, sys, copy
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import qkernels as qk

BATCHES = torch.randn(3, 2, 2, 8, 32, generator=torch.Generator().manual_seed(5))  # step, micro-batch, rank

def model():
    torch.manual_seed(0)
    layer = qk.nn.Int8TrainingLinear
    return nn.Sequential(layer(32, 64), nn.GELU(), layer(64, 32))

def loss(m, x):
    return (m(x) - 1).square().mean()

def expected():
    m = model()
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
    for step in BATCHES:
        for micro in step:
            for x in micro:
                (loss(m, x) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in m.parameters()]

def work(rank, kind, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{kind}", rank=rank, world_size=2)
    m = model()
    if kind == "ddp":
        trained = nn.parallel.DistributedDataParallel(m)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for layer in (m[0], m[2]):
            fully_shard(layer, mesh=mesh, reshard_after_forward=kind != "fsdp kept")
        trained = fully_shard(m, mesh=mesh)
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
    for step in BATCHES:
        for at, micro in enumerate(step):
            last = at == 1
            if kind == "ddp":
                trained.require_backward_grad_sync = last
            else:
                trained.set_requires_gradient_sync(last)
                if kind == "fsdp kept":
                    trained.set_reshard_after_backward(last)
            loss(trained, micro[rank]).backward()
            if kind == "fsdp":
                assert m[0]._kept is None, "codes of the whole weight outlive it"
            elif not last:
                assert m[0]._kept is not None
        optimizer.step()
        optimizer.zero_grad()
    for p, want in zip(m.parameters(), expected(), strict=True):
        p = p.full_tensor() if hasattr(p, "full_tensor") else p
        torch.testing.assert_close(p.detach(), want, rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()
    print("done", flush=True)

if __name__ == "__main__":
    import __main__
    folder, *kinds = sys.argv[1:]
    context = mp.get_context("fork")  # for each kind, of the one process that has imported all
    for kind in kinds:
        processes = [context.Process(target=work, args=(rank, kind, folder)) for rank in range(2)]
        [p.start() for p in processes]
        [p.join() for p in processes]
        if failed := max(abs(p.exitcode) for p in processes):
            print(kind, file=sys.stderr)
            sys.exit(failed)
"""


def test_two_processes(tmp_path: Any) -> None:
    """DDP and FSDP2 on gloo, with gradient accumulation: the parameters of one process that saw all batches."""
    kinds = ["ddp", "fsdp", "fsdp kept"]
    result = run_python(PARALLEL, str(tmp_path), *kinds)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("done") == 2 * len(kinds)
