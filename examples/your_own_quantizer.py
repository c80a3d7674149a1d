"""A quantizer of your own upon the ops: differentiable by autograd, compilable, no kernel to write.

Learnable weight clipping (OmniQuant, arXiv 2308.13137): the scale of a group is its largest magnitude times a learned
fraction. The fraction is plain torch, the op gives dscale, autograd does the rest. The gradients are compared with the
formula in plain torch, and the compiled module with the eager one.
At real size: python examples/your_own_quantizer.py --rows 4096 --columns 4096 --backend inductor
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from shared import at_least, below
from torch import Tensor, nn

import qkernels as qk


class LearnedClip(nn.Module):
    """Fake quantization by groups of a row; each group has one parameter, the logit of its fraction."""

    def __init__(self, rows: int, columns: int, bits: int = 3, group_size: int = 32) -> None:
        super().__init__()
        self.group_size, self.quant_max = group_size, 2 ** (bits - 1) - 1
        self.logit = nn.Parameter(torch.full((rows, columns // group_size), 4.0))  # sigmoid(4) = 0.98

    def scale(self, w: Tensor) -> Tensor:
        amax = w.detach().abs().unflatten(-1, (-1, self.group_size)).amax(-1)
        return amax * self.logit.sigmoid() / self.quant_max  # [rows, groups]: its shape is the granularity

    def forward(self, w: Tensor) -> Tensor:
        return qk.fake_quantize(w, self.scale(w), quant_min=-self.quant_max, quant_max=self.quant_max)

    def formula(self, w: Tensor) -> Tensor:
        """The same in plain torch: dozens of passes over w, and temporaries of its size."""
        scale = self.scale(w).repeat_interleave(self.group_size, -1)
        v = w * (1 / scale)
        q = (v + (v.round() - v).detach()).clamp(-self.quant_max, self.quant_max)
        return q * scale


def gradients(
    module: LearnedClip, quantize: Callable[[Tensor], Tensor], w: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    w = w.clone().requires_grad_()
    module.logit.grad = None
    y = quantize(w)
    (y - target).square().sum().backward()
    return y.detach(), w.grad, module.logit.grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=at_least(1), default=64)
    parser.add_argument("--columns", type=at_least(32, multiple_of=32), default=256)
    parser.add_argument("--steps", type=at_least(1), default=100)
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile; inductor needs a compiler")
    options = parser.parse_args()
    small = below(options, rows=64, columns=256, steps=100)

    torch.manual_seed(0)
    w = torch.randn(options.rows, options.columns) * torch.rand(options.rows, 1)
    target = torch.randn_like(w)
    module = LearnedClip(options.rows, options.columns)
    nn.init.constant_(module.logit, 0.5)  # sigmoid(0.5) = 0.62: some values are clipped, and the fractions feel it

    ours = gradients(module, module, w, target)
    theirs = gradients(module, module.formula, w, target)
    compiled = gradients(module, torch.compile(module, fullgraph=True, backend=options.backend), w, target)
    for name, a, b, c in zip(("y", "dw", "dlogit"), ours, theirs, compiled, strict=True):
        print(f"{name:<7} against the formula {(a - b).abs().max():.1e}, compiled {(a - c).abs().max():.1e}")
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)

    nn.init.constant_(module.logit, 4.0)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    before = (module(w) - w).square().mean().item()
    for _ in range(options.steps):
        optimizer.zero_grad()
        (module(w) - w).square().mean().backward()
        optimizer.step()
    after = (module(w) - w).square().mean().item()
    print(f"squared error of 3-bit weights: {before:.3e} at 0.98 of the range, {after:.3e} with learned fractions")
    assert small or after < before


if __name__ == "__main__":
    main()
