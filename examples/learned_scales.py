"""Learned step sizes (LSQ, arXiv 1902.08153) by hand: start, gradient factor, convention, and what they gain.

One 2-bit layer imitates a float one on correlated inputs, with scales that stay at their start or are learned too.
At real size: python examples/learned_scales.py --rows 1024 --columns 1024 --steps 1000
"""

from __future__ import annotations

import argparse

import torch
from shared import at_least, below
from torch import Tensor, nn

import qkernels as qk

QUANT_MIN, QUANT_MAX = -2, 1  # 2 bits


def start_of(w: Tensor) -> Tensor:
    """LSQ's start, 2·mean|w|/sqrt(quant_max), for each row: [N, 1]."""
    return 2 * w.abs().mean(1, keepdim=True) / QUANT_MAX**0.5


def train(w: Tensor, x: Tensor, y: Tensor, steps: int, learned: bool) -> tuple[float, Tensor]:
    weight, scale = nn.Parameter(w.clone()), nn.Parameter(start_of(w), requires_grad=learned)
    factor = (w.shape[1] * QUANT_MAX) ** -0.5  # LSQ's 1/sqrt(elements·quant_max), of what one scale speaks for
    optimizer = torch.optim.SGD([weight, scale], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        q = qk.fake_quantize(
            weight,
            scale,
            quant_min=QUANT_MIN,
            quant_max=QUANT_MAX,
            grad_factor=factor,
            straight_through="lsq",  # the paper's mask: before rounding, bounds excluded; "clip" is torch's
        )
        loss = (x @ q.t() - y).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item(), scale.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=at_least(1), default=32)
    parser.add_argument("--columns", type=at_least(4), default=64)
    parser.add_argument("--steps", type=at_least(1), default=200)
    options = parser.parse_args()
    small = below(options, rows=32, columns=64, steps=200)

    torch.manual_seed(0)
    w = torch.randn(options.rows, options.columns)
    sources = options.columns // 4  # of independent noise behind the inputs
    x = torch.randn(1024, sources) @ torch.randn(sources, options.columns) / sources**0.5
    y = x @ w.t()
    scale = start_of(w)
    rounded = qk.fake_quantize(w, scale, quant_min=QUANT_MIN, quant_max=QUANT_MAX)
    loss = (x @ rounded.t() - y).square().mean().item()
    fixed, _ = train(w, x, y, options.steps, learned=False)
    learned, after = train(w, x, y, options.steps, learned=True)
    print(f"power of the output              {y.square().mean():8.3f}")
    print(f"error of 2-bit weights, rounded  {loss:8.3f}")
    print(f"weights trained, scales fixed    {fixed:8.3f}")
    print(f"weights and scales trained       {learned:8.3f}")
    print(f"the scales moved by a factor of {(after / scale).min():.2f} to {(after / scale).max():.2f}")
    assert small or learned < fixed < loss


if __name__ == "__main__":
    main()
