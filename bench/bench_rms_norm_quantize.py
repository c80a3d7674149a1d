"""RMSNorm and fake quantization in one, against the two and against the eager formula."""

from __future__ import annotations

from collections.abc import Callable

import peers
import torch
from fused import COLUMNS, EPS, ROWS, contest, groups, of_group, operands, passes
from operands import dtypes
from torch.nn.functional import rms_norm

import qkernels as qk
from qkernels.reference import rms_norm_quantize as rms_reference


@passes
@groups
@dtypes
def test_rms_norm(compare: Callable[..., None], dtype: torch.dtype, bits: int, group_size: int, backward: bool) -> None:
    (x,), weight = operands(dtype, 1), (torch.rand(COLUMNS) + 0.5).to(dtype).requires_grad_()
    grad, size = torch.randn(ROWS, COLUMNS).to(dtype), COLUMNS if group_size == -1 else group_size
    options = {"bits": bits, "group_size": group_size}
    data, rule = (x.detach(), weight.detach()), of_group(bits, group_size)
    y, *_, rstd = rms_reference.rms_norm_fake_quantize_dynamic_forward(*data, EPS, *rule)
    gradients = rms_reference.rms_norm_fake_quantize_dynamic_backward(grad, *data, rstd, None, None, *rule[1:3], True)
    functions = {
        "fused": lambda x, w: qk.rms_norm_fake_quantize_dynamic(x, w, eps=EPS, **options),
        "unfused": lambda x, w: qk.fake_quantize_dynamic(rms_norm(x, (COLUMNS,), w, EPS), **options),
        "eager": lambda x, w: peers.dynamic(rms_norm(x, (COLUMNS,), w, EPS), bits, size),
    }
    contest(compare, functions, [x, weight], grad, (y, *gradients), backward)
