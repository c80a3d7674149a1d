"""SiLU(gate)·up and fake quantization in one, against the two and against the eager formula."""

from __future__ import annotations

from collections.abc import Callable

import peers
import torch
from fused import COLUMNS, ROWS, contest, groups, of_group, operands, passes
from operands import dtypes
from torch.nn.functional import silu

import qkernels as qk
from qkernels.reference import silu_mul_quantize as silu_reference


@passes
@groups
@dtypes
def test_silu_mul(compare: Callable[..., None], dtype: torch.dtype, bits: int, group_size: int, backward: bool) -> None:
    inputs = operands(dtype, 2)
    grad, size = torch.randn(ROWS, COLUMNS).to(dtype), COLUMNS if group_size == -1 else group_size
    options = {"bits": bits, "group_size": group_size}
    data, rule = [t.detach() for t in inputs], of_group(bits, group_size)
    y = silu_reference.silu_mul_fake_quantize_dynamic_forward(*data, *rule)[0]
    gradients = silu_reference.silu_mul_fake_quantize_dynamic_backward(grad, *data, None, None, *rule[1:3])
    functions = {
        "fused": lambda gate, up: qk.silu_mul_fake_quantize_dynamic(gate, up, **options),
        "unfused": lambda gate, up: qk.fake_quantize_dynamic(silu(gate) * up, **options),
        "eager": lambda gate, up: peers.dynamic(silu(gate) * up, bits, size),
    }
    contest(compare, functions, inputs, grad, (y, *gradients), backward)
