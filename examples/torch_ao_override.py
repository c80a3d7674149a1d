"""A model that torch.ao prepared, unchanged, on qkernels' kernels: ``with qk.override_torch():``.

Trains one copy with torch's own ops and one inside the override, and compares their times and losses.
At real size: python examples/torch_ao_override.py --channels 64 --size 32 --steps 100
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import time
import warnings

import torch
from shared import at_least, below
from torch import Tensor, nn
from torch.ao import quantization as ao

import qkernels as qk


def prepared_by_torch(channels: int) -> nn.Module:
    model = nn.Sequential(
        ao.QuantStub(),
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
        ao.DeQuantStub(),
    )
    model.qconfig = ao.get_default_qat_qconfig("x86")
    return ao.prepare_qat(model.train())


def train(model: nn.Module, x: Tensor, target: Tensor, steps: int) -> tuple[list[float], float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, start = [], time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=at_least(1), default=16)
    parser.add_argument("--size", type=at_least(4), default=16)
    parser.add_argument("--steps", type=at_least(1), default=20)
    options = parser.parse_args()
    small = below(options, channels=16, size=16, steps=20)
    warnings.filterwarnings("ignore", message="torch.ao.quantization is deprecated")

    torch.manual_seed(0)
    x, target = torch.randn(32, 3, options.size, options.size), torch.randint(0, 10, (32,))
    model = prepared_by_torch(options.channels)
    results = {}
    for name, override in (("torch", contextlib.nullcontext), ("qkernels", qk.override_torch)):
        with override():
            train(copy.deepcopy(model), x, target, 1)  # warm-up
            results[name] = train(copy.deepcopy(model), x, target, options.steps)
    for name, (losses, seconds) in results.items():
        print(f"{name:<9} {1e3 * seconds:6.2f} ms a step, loss {losses[0]:.4f} to {losses[-1]:.4f}")
    ours, theirs = results["qkernels"][0], results["torch"][0]
    # Not to the last bit: our observer trains with the scales that torch.ao converts with (docs/differences.md).
    assert small or abs(ours[-1] - theirs[-1]) < 0.02 * theirs[0], "training went another way"


if __name__ == "__main__":
    main()
