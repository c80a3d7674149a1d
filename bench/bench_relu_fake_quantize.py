"""relu and fake quantization in one, against the two and against the eager formula."""

from __future__ import annotations

from collections.abc import Callable

import peers
import pytest
import torch
from fused import COLUMNS, ROWS, contest, operands
from operands import INT8, dtypes

import qkernels as qk
from qkernels.reference import relu_fake_quantize as relu_reference


@pytest.mark.parametrize(
    ("backward", "learned"),
    [(False, False), (True, False), (True, True)],
    ids=["forward", "forward-backward", "learned-scale-forward-backward"],
)
@dtypes
def test_relu(compare: Callable[..., None], dtype: torch.dtype, backward: bool, learned: bool) -> None:
    (x,), scale = operands(dtype, 1), torch.tensor([2.6 / 127], requires_grad=learned)
    grad, data = torch.randn(ROWS, COLUMNS).to(dtype), (x.detach(), scale.detach(), None, *INT8)
    y = relu_reference.relu_fake_quantize_forward(*data)
    gradients = relu_reference.relu_fake_quantize_learnable_backward(grad, *data, 1.0)[: 1 + learned]
    options = {"quant_min": INT8[0], "quant_max": INT8[1]}

    functions = {
        "fused": lambda x, s=scale: qk.relu_fake_quantize(x, s, **options),
        "unfused": lambda x, s=scale: qk.fake_quantize(torch.relu(x), s, **options),
        "eager": lambda x, s=scale: peers.lsq(torch.relu(x), s, *INT8).to(x.dtype),
    }
    contest(compare, functions, [x, scale] if learned else [x], grad, (y, *gradients), backward)
