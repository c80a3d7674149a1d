"""Fake quantization of a model's weights in one call against a loop of single calls, ours and torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from bench_training import ResNet, transformer
from torch import Tensor, nn

import qkernels as qk

Call = Callable[[], Any]
Compare = Callable[..., None]
INT8 = (-127, 127)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]  # type: ignore[misc]


def many_small() -> list[Tensor]:
    return [torch.randn(32, 8 * (1 + at % 16)) for at in range(60)]  # 256 to 4096 elements


LISTS: dict[str, Callable[[], list[Tensor]]] = {
    "60 of up to 4096": many_small,
    "resnet-8's 10": lambda: weights_of(ResNet()),
    "transformer's 9": lambda: weights_of(transformer(2)),
    "4 of 1024x1024": lambda: [torch.randn(1024, 1024) for _ in range(4)],
}
lists = pytest.mark.parametrize("name", LISTS)


def operands(name: str, learned: bool) -> tuple[list[Tensor], list[Tensor]]:
    xs = [x.detach().clone().requires_grad_(learned) for x in LISTS[name]()]
    shapes = [(x.shape[0], *[1] * (x.dim() - 1)) for x in xs]
    scales = [(x.detach().abs().flatten(1).amax(1) / 100).reshape(s) for x, s in zip(xs, shapes, strict=True)]
    return xs, [scale.requires_grad_(learned) for scale in scales]


def one(x: Tensor, scale: Tensor) -> Tensor:
    return qk.fake_quantize(x, scale, quant_min=-127, quant_max=127)


def torchs(xs: list[Tensor], scales: list[Tensor], learned: bool) -> Call:
    flat = [scale.detach().reshape(-1).requires_grad_(learned) for scale in scales]
    if not learned:
        zeros = [torch.zeros(scale.numel(), dtype=torch.int32) for scale in scales]
        op = torch.fake_quantize_per_channel_affine
        return lambda: [op(x, s, z, 0, *INT8) for x, s, z in zip(xs, flat, zeros, strict=True)]
    zero_points = [torch.zeros(scale.numel()) for scale in scales]

    def call() -> list[Tensor]:
        op = torch._fake_quantize_learnable_per_channel_affine
        ys = [op(x, s, z, 0, *INT8, 1.0) for x, s, z in zip(xs, flat, zero_points, strict=True)]
        return gradients(ys, xs, flat)

    return call


class Sink(torch.autograd.Function):
    """The rest of a model in one node, so that its autograd does not hide that of the weights; dy = y."""

    @staticmethod
    def forward(ctx: Any, *ys: Tensor) -> Tensor:
        ctx.save_for_backward(*ys)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.saved_tensors


def gradients(ys: list[Tensor], xs: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
    """Gradients of x and scale of each, gathered in ``grad`` as in training."""
    Sink.apply(*ys).backward()
    leaves = [*xs, *scales]
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return [grad.reshape(-1) for grad in grads]


@lists
def test_forward(compare: Compare, name: str) -> None:
    xs, scales = operands(name, learned=False)
    expected = [one(x, scale) for x, scale in zip(xs, scales, strict=True)]
    with torch.no_grad():
        compare(
            lambda: qk.foreach_fake_quantize(xs, scales, quant_min=-127, quant_max=127),
            {
                "loop": lambda: [one(x, scale) for x, scale in zip(xs, scales, strict=True)],
                "torch loop": peers.find("torch", lambda: torchs(xs, scales, False)),
            },
            expected,
        )


@lists
def test_learnable(compare: Compare, name: str) -> None:
    """Forward and backward, LSQ gradients of weights and scales."""
    xs, scales = operands(name, learned=True)

    def many() -> list[Tensor]:
        return gradients(qk.foreach_fake_quantize(xs, scales, quant_min=-127, quant_max=127), xs, scales)

    def loop() -> list[Tensor]:
        return gradients([one(x, scale) for x, scale in zip(xs, scales, strict=True)], xs, scales)

    peer = peers.find("torch learnable", lambda: torchs(xs, scales, True))
    compare(many, {"loop": loop, "torch loop": peer}, loop())


@pytest.mark.parametrize("name", ["resnet-8, batch 32", "transformer, batch 8 of 128"])
def test_training_step(compare: Compare, name: str) -> None:
    """Forward and backward of a model whose weights are fake-quantized all at once, or one by one."""
    model, shape = (ResNet(), (32, 3, 32, 32)) if name.startswith("resnet") else (transformer(2), (8, 128, 256))
    x = torch.randn(shape)
    layers = [n for n, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    weights: dict[str, Tensor] = {f"{n}.weight": model.get_submodule(n).weight for n in layers}  # type: ignore[misc]
    xs = list(weights.values())
    scales = [(w.detach().abs().flatten(1).amax(1) / 100).reshape(-1, *[1] * (w.dim() - 1)) for w in xs]
    scales = [scale.requires_grad_() for scale in scales]

    def step(quantized: list[Tensor]) -> Tensor:
        y = torch.func.functional_call(model, dict(zip(weights, quantized, strict=True)), x)
        loss = y.square().mean()
        loss.backward()
        model.zero_grad()
        for scale in scales:
            scale.grad = None
        return loss.detach()

    def loop() -> Tensor:
        return step([one(w, scale) for w, scale in zip(xs, scales, strict=True)])

    def many() -> Tensor:
        return step(qk.foreach_fake_quantize(xs, scales, quant_min=-127, quant_max=127))

    compare(many, {"loop": loop, "float weights": lambda: step(xs)}, loop(), tolerance=1e-3, peer_tolerance=0.1)
