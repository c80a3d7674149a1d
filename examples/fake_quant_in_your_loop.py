"""Fused fake quantization in a training loop of your own: two calls in a layer, nothing else changes.

Trains a small classifier in float, rounds its weights to 3 bits, and trains the rounded one for as many steps again.
At real size: python examples/fake_quant_in_your_loop.py --width 1024 --steps 2000
"""

from __future__ import annotations

import argparse
import time

import torch
from shared import at_least, below
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk

QUANT_MIN, QUANT_MAX = -3, 3  # 3 bits, symmetric


class QuantLinear(nn.Linear):
    """A linear layer on 3-bit weights with a learned scale for each output, and 8-bit activations by token."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        amax = self.weight.detach().abs().amax(1, keepdim=True)
        self.scale = nn.Parameter(amax / QUANT_MAX)  # [N, 1]: its shape says that each row has its own

    def forward(self, x: Tensor) -> Tensor:
        factor = (self.weight[0].numel() * QUANT_MAX) ** -0.5  # LSQ's, for a scale that speaks for one row
        w = qk.fake_quantize(self.weight, self.scale, quant_min=QUANT_MIN, quant_max=QUANT_MAX, grad_factor=factor)
        return F.linear(qk.fake_quantize_dynamic(x, bits=8), w, self.bias)


def train(model: nn.Module, x: Tensor, target: Tensor, steps: int, lr: float) -> float:
    """Your loop, as it was. Returns the seconds of a step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    start = time.perf_counter()
    for step in range(steps):
        batch = torch.arange(64).add(64 * step) % len(x)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), target[batch]).backward()
        optimizer.step()
    return (time.perf_counter() - start) / steps


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, target: Tensor) -> float:
    return (model(x).argmax(1) == target).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=at_least(1), default=128)
    parser.add_argument("--steps", type=at_least(1), default=400)
    options = parser.parse_args()
    small = below(options, width=128, steps=400)

    torch.manual_seed(0)
    x = torch.randn(4096, 32)
    target = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 10))(x).argmax(1)
    width = options.width
    model = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    float_seconds = train(model, x, target, options.steps, lr=3e-3)
    float_accuracy = accuracy(model, x, target)

    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, QuantLinear(layer))
    ptq_accuracy = accuracy(model, x, target)
    qat_seconds = train(model, x, target, options.steps, lr=1e-3)
    qat_accuracy = accuracy(model, x, target)

    print(f"float                   accuracy {float_accuracy:.1%}, {1e3 * float_seconds:.2f} ms a step")
    print(f"3-bit weights, rounded  accuracy {ptq_accuracy:.1%}")
    print(f"3-bit weights, trained  accuracy {qat_accuracy:.1%}, {1e3 * qat_seconds:.2f} ms a step")
    assert small or qat_accuracy > ptq_accuracy


if __name__ == "__main__":
    main()
