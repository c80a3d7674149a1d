"""Weight-only int4 (W4A16) for a block of a language model: SwiGLU of three linear layers, without training.

Replaces the layers, compares the output with the float block's and with the dequantized weights', saves and loads.
At real size: python examples/int4_weight_only.py --width 4096 --hidden 11008 --tokens 1
"""

from __future__ import annotations

import argparse
import io
import time

import torch
from shared import at_least, below
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def quantized(model: nn.Module, group_size: int) -> nn.Module:
    """In place: every linear layer on int4 weights with zero points, scales in fp16, activations as they are."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            int4 = qk.nn.Int4Linear.from_float(
                layer, group_size, symmetric=False, act_bits=16, scale_dtype=torch.float16
            )
            model.set_submodule(name, int4)
    return model


def file_of(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return file


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=at_least(1), default=512)
    parser.add_argument("--hidden", type=at_least(1), default=1408)
    parser.add_argument("--tokens", type=at_least(1), default=4)
    parser.add_argument("--group-size", type=at_least(1), default=128)
    options = parser.parse_args()
    small = below(options, width=512, hidden=1408, group_size=128)

    group = options.group_size
    if group < 16 or group % 8 or options.width % group or options.hidden % group:
        sizes = f"--width, {options.width}, and --hidden, {options.hidden}"
        parser.error(f"--group-size: got {group}; accepted: a multiple of 8 of at least 16 that divides {sizes}")

    torch.manual_seed(0)
    x = torch.randn(options.tokens, options.width)
    block, int4 = SwiGLU(options.width, options.hidden), SwiGLU(options.width, options.hidden)
    int4.load_state_dict(block.state_dict())
    quantized(int4, options.group_size)

    dequantized = SwiGLU(options.width, options.hidden)  # what the codes stand for, in float
    dequantized.load_state_dict({name: int4.get_submodule(name[:-7]).weight for name in block.state_dict()})
    expected, exact, y = block(x), dequantized(x), int4(x)
    by_quantization, by_kernel = ((t - u).norm() / u.norm() for t, u in ((y, expected), (y, exact)))
    print(f"off by {by_quantization:.1%} of the float block's output, by {by_kernel:.1e} of the dequantized one's")

    was, now = len(file_of(block).getvalue()), len(file_of(int4).getvalue())
    print(f"file: {was / 1e6:.2f} MB in fp32, {now / 1e6:.2f} MB in int4, {was / now:.1f} times smaller")
    for name, model in (("float", block), ("int4", int4)):
        model(x)
        start = time.perf_counter()
        for _ in range(20):
            model(x)
        print(f"{name:<6} {(time.perf_counter() - start) / 20 * 1e3:.2f} ms for {options.tokens} tokens")

    fresh = quantized(SwiGLU(options.width, options.hidden), options.group_size)
    fresh.load_state_dict(torch.load(file_of(int4)))
    assert torch.equal(fresh(x), y)
    assert by_kernel < 1e-5
    assert small or was > 7 * now


if __name__ == "__main__":
    main()
