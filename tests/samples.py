"""Arguments of the fake-quantization ops, for opcheck and for running each op once."""

from __future__ import annotations

import math

import torch


def op_samples() -> list[tuple[str, tuple]]:
    x, grad = torch.randn(4, 24), torch.randn(4, 24)
    scale, zero_point = torch.rand(4, 1) * 0.1 + 0.01, torch.randint(-8, 8, (4, 1), dtype=torch.int32)
    stats = [torch.full((1,), math.inf), torch.full((1,), -math.inf), torch.ones(1), torch.zeros(1, dtype=torch.int32)]
    one = torch.ones(1, dtype=torch.int64)
    samples: list[tuple[str, tuple]] = []
    for value in (x, x.t().contiguous().t(), torch.empty(4, 0), x[:, ::2]):
        dy = grad[:, : value.shape[1]]
        for zp in (None, zero_point):
            params = (scale, zp, -8, 7)
            samples += [
                ("fake_quantize_forward", (value, *params)),
                ("fake_quantize_forward_mask", (value, *params, zp is None)),
                ("fake_quantize_backward", (dy, value, *params, zp is None)),
                ("fake_quantize_learnable_backward", (dy, value, *params, 0.5, zp is None)),
            ]
        for symmetric in (True, False):
            for group in (-1, 0):
                samples.append(("fake_quantize_dynamic_forward", (value, group, -8, 7, symmetric)))
        samples.append(("observe_fake_quantize", (value, one, one, *stats, 0.01, -128, 127, 127.0, 0)))
    for name, head in (("forward", (x,)), ("forward_mask", (x,)), ("backward", (grad, x))):
        samples.append((f"fake_quantize_{name}.scalar", (*head, 0.1, 2, -8, 7)))
    channels = (torch.rand(24) * 0.1 + 0.01, torch.randint(-8, 8, (24,), dtype=torch.int32), 1, -8, 7)
    for name, head in (("forward", (x,)), ("forward_mask", (x,)), ("backward", (grad, x))):
        samples.append((f"fake_quantize_{name}.channel", (*head, *channels)))
    samples.append(("fake_quantize_backward_bytes", (x, x > 0)))
    samples.append(("fake_quantize_backward_mask", (x, torch.randint(0, 255, (12,), dtype=torch.uint8))))
    return samples
