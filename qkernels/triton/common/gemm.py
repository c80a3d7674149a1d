"""What the int8 and int4 GEMMs share: the GPU, the order of tiles, padded operands, the codes of rows of x."""

from __future__ import annotations

import functools
import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, gemm_configs
from .launch import launch
from .numerics import TINY, bound, clamp, divide, effective_scale, reciprocal, rint, widen


@functools.cache
def gpu(device: torch.device) -> tuple[int, int, str]:
    """Architecture, multiprocessors and name of the GPU. The interpreter, which has none, gets an A100's."""
    if device.type != "cuda":
        return 80, 108, ""
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count, properties.name


@triton.jit
def banded_tile(index, rows, cols):
    """Row and column of a tile. Tiles go in bands of 8 rows of tiles, so that what neighbours read stays in L2."""
    band = index // (8 * cols)
    height = tl.minimum(rows - band * 8, 8)
    rest = index % (8 * cols)
    return band * 8 + rest % height, rest // height


@triton.jit
def static_qparams(scale_ptr, zero_point_ptr, z, low, high):
    """The one scale, NaN if it or its zero point is not valid, and the zero point, or ``z`` if there is none."""
    scale = effective_scale(tl.load(scale_ptr).to(tl.float32))
    if zero_point_ptr is not None:
        z = tl.load(zero_point_ptr).to(tl.float32)
        scale = tl.where((z >= low) & (z <= high), scale, float("nan"))
    return scale, z


@functools.cache
def say_once(message: str) -> None:
    warnings.warn(message, stacklevel=5)


def pad_to_16(matrix: Tensor) -> Tensor:
    rows, k = matrix.shape
    out = matrix.new_empty(rows, gemm_configs.ceil_16(k))
    out[:, :k] = matrix
    out[:, k:] = 0
    return out


def as_vector(t: Tensor) -> Tensor:
    t = t.reshape(-1)
    return (t.float() if t.dtype == torch.float64 else t).contiguous()


@triton.jit
def quantize_rows_kernel(
    q_ptr, scale_ptr, x_ptr, input_scale_ptr, zero_point_ptr, low, high, half, middle, length, padded, stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The codes of a row of x, with zeros up to ``padded``, and its scale, which is NaN if x has no code somewhere.

    The scale comes from the row's range (input_scale_ptr is None), or there is one scale and zero point for all rows. A
    row longer than BLOCK is read twice.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    q_ptr += row * padded
    if input_scale_ptr is None:
        top = tl.zeros([BLOCK], tl.int32)
        for start in range(0, bound(length), BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = widen(tl.load(x_ptr + at, mask=at < length, other=0.0))
            top = tl.maximum(top, tl.abs(x).to(tl.int32, bitcast=True))  # ordered as the floats, NaN above infinity
        amax = tl.max(top, 0).to(tl.float32, bitcast=True)
        scale = tl.maximum(divide(amax, half), TINY, propagate_nan=tl.PropagateNan.ALL)
        scale = tl.where(scale < float("inf"), scale, float("nan"))
        z = middle
    else:
        scale, z = static_qparams(input_scale_ptr, zero_point_ptr, middle, low, high)
    inv = reciprocal(scale)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, bound(padded), BLOCK):
        at = start + tl.arange(0, BLOCK)
        t = widen(tl.load(x_ptr + at, mask=at < length, other=0.0)) * inv
        bad |= (t != t).to(tl.int32)
        q = clamp(rint(t) + z, low, high)
        q = tl.where((at < length) & (q == q), q, 0.0)
        tl.store(q_ptr + at, q.to(tl.int8), mask=at < padded)
    tl.store(scale_ptr + row, tl.where(tl.max(bad, 0) > 0, float("nan"), scale))


def quantize_rows(
    rows: Tensor, padded: int, scale: Tensor | None, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, int]:
    """Codes [M, padded], the scale of each row, and the zero point of rows that are quantized by their own ranges."""
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    m, k = rows.shape
    codes = torch.empty((m, padded), dtype=torch.int8, device=rows.device)
    row_scale = torch.empty((m,), dtype=torch.float32, device=rows.device)
    half = (quant_max - quant_min) // 2
    middle = 0 if scale is not None else quant_max - half
    sizes = (*map(float, (quant_min, quant_max, half, middle)), k, padded, rows.stride(0))
    tile = configs.quantize_rows(padded)
    launch(quantize_rows_kernel, (m,), codes, row_scale, rows, scale, zero_point, *sizes, **tile)
    return codes, row_scale, middle
