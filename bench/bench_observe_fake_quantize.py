"""The moving-average observer and fake quantization in one, against torch's fused op."""

from __future__ import annotations

import torch
from laps import Call, forward_backward
from operands import INT8, Compare, dtypes, granularities
from torch import Tensor

import qkernels as qk


@granularities
@dtypes
def test_forward_backward(compare: Compare, dtype: torch.dtype, per_channel: bool) -> None:
    """Symmetric; torch's op takes no bf16 on the CPU: it is given fp32."""
    x = torch.randn(256, 1024).to(dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    grad = torch.randn(x.shape).to(dtype)
    on = torch.ones(1, dtype=torch.int64)

    def call(op: Call, x: Tensor, grad: Tensor) -> Call:
        n = 256 if per_channel else 1
        stats = [torch.full((n,), torch.inf), torch.full((n,), -torch.inf), torch.ones(n)]
        stats.append(torch.zeros(n, dtype=torch.int32))
        return forward_backward(lambda: op(x, on, on, *stats, 0.01, *INT8, 0, per_channel, True), [x], grad)

    with qk.use_kernel("reference"):
        expected = call(qk.fused_moving_avg_obs_fake_quant, x, grad)()
    compare(
        call(qk.fused_moving_avg_obs_fake_quant, x, grad),
        {"torch": call(torch.fused_moving_avg_obs_fake_quant, wide, grad.float())},
        expected,
        peer_tolerance=0.1,  # its scale differs by 127.5/127
    )
