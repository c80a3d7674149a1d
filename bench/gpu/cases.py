"""What is timed on a GPU: each fake-quant op at every size and dtype, its peers, and the bytes it has to move."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qkernels as qk
from qkernels import layouts

sys.path.append(str(Path(__file__).parent.parent))
import peers

Call = Callable[..., Any]
INT8 = (-128, 127)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# In the order in which they are timed: what decides comes first, so that a short run has it.
DECISIVE: list[tuple[tuple[int, ...], str]] = [
    ((16384, 8192), "bf16"),
    ((4096, 4096), "bf16"),
    ((16384, 8192), "fp32"),
    ((4096, 4096), "fp32"),
]
OTHERS: list[tuple[tuple[int, ...], str]] = [
    ((8192, 8192), "bf16"),
    ((128, 64, 56, 56), "bf16"),
    ((128, 64, 56, 56), "fp32"),
    ((1024, 1024), "bf16"),
    ((64, 64), "fp32"),
    ((8192, 8192), "fp32"),
    ((1024, 1024), "fp32"),
    ((64, 64), "bf16"),
    ((16384, 8192), "fp16"),  # fp16 code is bf16 code
]


@dataclass(frozen=True)
class Case:
    """One op. Everything is built for a shape and a dtype.

    ``make`` gives the inputs of one call; ``ours`` and the peers take them. ``moved`` is the fewest bytes per element
    that the op can move, for elements of b bytes: each input read once, each output written once (the observer alone
    must read x twice: its range is not known before).
    """

    name: str
    op: str  # the raw op whose kernels compete
    make: Callable[[tuple[int, ...], torch.dtype], tuple[Any, ...]]
    ours: Call
    moved: Callable[[int], float]
    aten: Call | None = None
    aten_moves: Callable[[int], float] | None = None  # what torch's kernels move, by their source
    aten_waits: bool = False  # torch's op reads a value on the host, which no graph can capture
    formula: Call | None = None  # timed as it is, and compiled by torch.compile
    tolerance: float = 0.05  # of the peers, whose scales and near ties differ; ours is held to the reference


def channel_dim(shape: tuple[int, ...]) -> int:
    return 1 if len(shape) == 4 else 0


def per_channel(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size if at == channel_dim(shape) else 1 for at, size in enumerate(shape))


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def scale_of(shape: tuple[int, ...]) -> Tensor:
    return (2.6 / 127) * (0.9 + 0.2 * torch.rand(shape, device="cuda"))


def static(granularity: Callable[[tuple[int, ...]], tuple[int, ...]], *, grad: bool, learned: bool = False) -> Any:
    """x, a scale that clips about 1 % of it, zero points, and for a backward pass the gradient of y."""

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        x, scale = values(shape, dtype), scale_of(granularity(shape))
        zero_point = torch.zeros(scale.shape, dtype=torch.int32, device="cuda")
        if not grad:
            return x, scale, zero_point
        return x.requires_grad_(), scale.requires_grad_(learned), zero_point, values(shape, dtype)

    return make


def activation(x: Tensor) -> Tensor:
    """Not a leaf, as in a network: what a function keeps of it counts."""
    return x.view(x.shape)


def there_and_back(function: Call, *, learned: bool = False) -> Call:
    """The gradients of x, and of scale where it is learned, of function(x, scale, zero_point)."""

    def call(x: Tensor, scale: Tensor, zero_point: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        y = function(x if learned else activation(x), scale, zero_point)
        return torch.autograd.grad(y, (x, scale) if learned else (x,), grad)

    return call


def quantizer(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return qk.fake_quantize(x, scale, zero_point, quant_min=-128, quant_max=127)


def aten_tensor(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *INT8)


def aten_channel(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.fake_quantize_per_channel_affine(
        x, scale.flatten(), zero_point.flatten(), channel_dim(tuple(x.shape)), *INT8
    )


def aten_learnable_tensor(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point.float(), *INT8, 1.0)


def aten_learnable_channel(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    dim = channel_dim(tuple(x.shape))
    return torch._fake_quantize_learnable_per_channel_affine(
        x, scale.flatten(), zero_point.float().flatten(), dim, *INT8, 1.0
    )


def formula(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    q = peers.round_straight_through(x / scale) + zero_point
    return ((peers.clamp(q, *INT8) - zero_point) * scale).to(x.dtype)


def lsq(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return peers.lsq(x, scale, *INT8).to(x.dtype)


def with_grad(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return values(shape, dtype).requires_grad_(), values(shape, dtype)


def dynamic(function: Call) -> Call:
    return lambda x, grad: torch.autograd.grad(function(activation(x)), x, grad)[0]


def observed(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    on = torch.ones(1, dtype=torch.int64, device="cuda")
    low, high = -torch.ones(1, device="cuda"), torch.ones(1, device="cuda")
    return values(shape, dtype), on, on, low, high, torch.ones(1, device="cuda"), on.int() - 1


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-128, 127).to(torch.int8), scale


def normed(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return quantized_rows(torch.nn.functional.rms_norm(x.float(), x.shape[-1:]) * weight)


def gated(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return quantized_rows(torch.nn.functional.silu(gate.float()) * up)


def rectified(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return qk.relu_fake_quantize(x, scale, zero_point, quant_min=-128, quant_max=127)


OBSERVER = (0.01, *INT8)
ONE = lambda shape: (1,)  # noqa: E731

CASES = [
    Case(
        "forward, per tensor",
        "fake_quantize_forward",
        static(ONE, grad=False),
        quantizer,
        lambda b: 2 * b,
        aten=aten_tensor,
        aten_moves=lambda b: 2 * b + 1,
        formula=formula,
    ),
    Case(
        "forward, per channel",
        "fake_quantize_forward",
        static(per_channel, grad=False),
        quantizer,
        lambda b: 2 * b,
        aten=aten_channel,
        aten_moves=lambda b: 3 * b + 1,
        aten_waits=True,
        formula=formula,
    ),
    Case(
        "forward+backward, per tensor",
        "fake_quantize_backward_mask",
        static(ONE, grad=True),
        there_and_back(quantizer),
        lambda b: 4 * b + 1 / 4,
        aten=there_and_back(aten_tensor),
        aten_moves=lambda b: 4 * b + 2,
        formula=there_and_back(formula),
    ),
    Case(
        "forward+backward, per channel",
        "fake_quantize_backward_mask",
        static(per_channel, grad=True),
        there_and_back(quantizer),
        lambda b: 4 * b + 1 / 4,
        aten=there_and_back(aten_channel),
        aten_moves=lambda b: 5 * b + 2,
        aten_waits=True,
        formula=there_and_back(formula),
    ),
    Case(
        "backward from a mask",
        "fake_quantize_backward_mask",
        lambda shape, dtype: (values(shape, dtype), layouts.mask_like(values(shape, dtype)).random_()),
        lambda grad, mask: torch.ops.qkernels.fake_quantize_backward_mask(grad, mask),
        lambda b: 2 * b + 1 / 8,
    ),
    Case(
        "LSQ forward+backward, per tensor",
        "fake_quantize_learnable_backward",
        static(ONE, grad=True, learned=True),
        there_and_back(quantizer, learned=True),
        lambda b: 5 * b,
        aten=there_and_back(aten_learnable_tensor, learned=True),
        aten_moves=lambda b: 2 * b + 1 + 7 * b,
        aten_waits=True,
        formula=there_and_back(lsq, learned=True),
    ),
    Case(
        "LSQ forward+backward, per channel",
        "fake_quantize_learnable_backward",
        static(per_channel, grad=True, learned=True),
        there_and_back(quantizer, learned=True),
        lambda b: 5 * b,
        aten=there_and_back(aten_learnable_channel, learned=True),
        aten_moves=lambda b: 3 * b + 1 + 7 * b,
        aten_waits=True,
        formula=there_and_back(lsq, learned=True),
    ),
    Case(
        "LSQ backward, per tensor",
        "fake_quantize_learnable_backward",
        static(ONE, grad=True),
        lambda x, scale, zero_point, grad: torch.ops.qkernels.fake_quantize_learnable_backward(
            grad, x.detach(), scale, zero_point, *INT8, 1.0
        )[:2],
        lambda b: 3 * b,
    ),
    Case(
        "dynamic int8 per token, forward+backward",
        "fake_quantize_dynamic_forward",
        with_grad,
        dynamic(qk.fake_quantize_dynamic),
        lambda b: 2 * b,
        formula=dynamic(lambda x: peers.dynamic(x, 8, x.shape[-1])),
    ),
    Case(
        "dynamic int4 group 8 to 32, forward+backward",
        "fake_quantize_dynamic_forward",
        with_grad,
        dynamic(lambda x: qk.fake_quantize_dynamic(x, bits=4, group_size=32 if x.shape[-1] % 32 == 0 else 8)),
        lambda b: 2 * b + 8 / 32,
        formula=dynamic(lambda x: peers.dynamic(x, 4, 32 if x.shape[-1] % 32 == 0 else 8)),
        tolerance=0.4,
    ),
    Case(
        "moving-average observer + forward, per tensor",
        "observe_fake_quantize",
        observed,
        lambda x, *rest: qk.fused_moving_avg_obs_fake_quant(x, *rest, *OBSERVER),
        lambda b: 3 * b + 1 / 8,
        aten=lambda x, *rest: torch.fused_moving_avg_obs_fake_quant(x, *rest, *OBSERVER, 0),
        aten_moves=lambda b: 3 * b + 1,
    ),
    Case(
        "quantize int8 per token",
        "quantize_dynamic",
        lambda shape, dtype: (values(shape, dtype),),
        lambda x: qk.quantize_dynamic(x)[:2],
        lambda b: b + 1,
        formula=quantized_rows,
    ),
    Case(
        "RMSNorm + quantize int8 per token",
        "rms_norm_quantize_dynamic",
        lambda shape, dtype: (values(shape, dtype), values(shape[-1:], torch.float32)),
        lambda x, weight: qk.rms_norm_quantize_dynamic(x, weight)[:2],
        lambda b: b + 1,
        formula=normed,
    ),
    Case(
        "SiLU·mul + quantize int8 per token",
        "silu_mul_quantize_dynamic",
        lambda shape, dtype: (values(shape, dtype), values(shape, dtype)),
        lambda gate, up: qk.silu_mul_quantize_dynamic(gate, up)[:2],
        lambda b: 2 * b + 1,
        formula=gated,
    ),
    Case(
        "ReLU + fake-quant, forward+backward",
        "relu_fake_quantize_forward_mask",
        static(ONE, grad=True),
        there_and_back(rectified),
        lambda b: 4 * b + 1 / 4,
        aten=there_and_back(lambda x, *params: aten_tensor(torch.relu(x), *params)),
        aten_moves=lambda b: 9 * b + 2,
        formula=there_and_back(lambda x, *params: formula(torch.relu(x), *params)),
    ),
]
