"""int8 matrix multiplication in Triton: exact int32 sums on the tensor cores, then the reference's float operations.

One kernel serves every GPU: operands row by row along K, copied to shared memory by cp.async, and either of them on the
rows of the tensor cores' instruction (for few rows of a, the weight: swap-AB). On sm_90 large products run on as many
programs as the GPU has multiprocessors, fed by TMA, which fetch the next tile while they finish one. A product of too
few tiles to fill the GPU is cut along K; its int32 parts are added by a second kernel, which is exact in any order and
needs neither zeroed memory nor one program waiting for another.
"""

from __future__ import annotations

import functools
import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..reference import int8_gemm as reference
from . import configs, tuning
from .groups import bound
from .launch import launch
from .numerics import TINY, clamp, divide, effective_scale, narrow, reciprocal, rint, widen


@functools.cache
def gpu(device: torch.device) -> tuple[int, int, str]:
    """Architecture, multiprocessors and name; where there is no GPU (the interpreter), some GPU's."""
    if device.type != "cuda":
        return 80, 108, ""
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count, properties.name


@triton.jit
def tile_at(index, rows, cols):
    """Row and column of a tile, in bands of 8 rows of tiles: what neighbours read stays in L2."""
    band = index // (8 * cols)
    height = tl.minimum(rows - band * 8, 8)
    rest = index % (8 * cols)
    return band * 8 + rest % height, rest // height


@triton.jit
def scaled(
    acc, m, n, m_end, n_end, dtype: tl.constexpr, scale_a_ptr, scale_b_ptr, zero_point_ptr, colsum_ptr, bias_ptr,
    STEP_A: tl.constexpr, STEP_B: tl.constexpr, STEP_Z: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """((acc − zero_point·colsum)·scale_b)·scale_a + bias, rounded once; acc itself where there are no scales.

    m and n index acc's dims, in either order. STEP 0: one value for all.
    """
    if scale_a_ptr is None:
        return acc
    else:
        if zero_point_ptr is not None:
            z = tl.load(zero_point_ptr + m * STEP_Z, mask=m < m_end, other=0)
            colsum = tl.load(colsum_ptr + n, mask=n < n_end, other=0)
            if WIDE:
                y = (acc.to(tl.int64) - z.to(tl.int64) * colsum.to(tl.int64)).to(tl.float32)
            else:
                y = (acc - z.to(tl.int32) * colsum).to(tl.float32)
        else:
            y = acc.to(tl.float32)
        y = y * widen(tl.load(scale_b_ptr + n * STEP_B, mask=n < n_end, other=0.0))
        y = y * widen(tl.load(scale_a_ptr + m * STEP_A, mask=m < m_end, other=0.0))
        if bias_ptr is not None:
            y = y + widen(tl.load(bias_ptr + n, mask=n < n_end, other=0.0))
        return narrow(y, dtype)


@triton.jit
def put(
    out_ptr, acc, m, n, m_end, n_end, scale_a_ptr, scale_b_ptr, zero_point_ptr, colsum_ptr, bias_ptr,
    STEP_A: tl.constexpr, STEP_B: tl.constexpr, STEP_Z: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Stores the part of out that acc makes."""
    y = scaled(
        acc, m, n, m_end, n_end, out_ptr.dtype.element_ty, scale_a_ptr, scale_b_ptr, zero_point_ptr, colsum_ptr,
        bias_ptr, STEP_A, STEP_B, STEP_Z, WIDE,
    )  # fmt: skip
    tl.store(out_ptr + m.to(tl.int64) * n_end + n, y, mask=(m < m_end) & (n < n_end))


@triton.jit
def put_halves(
    out_ptr, acc, m, first, m_end, n_end, scale_a_ptr, scale_b_ptr, zero_point_ptr, colsum_ptr, bias_ptr,
    STEP_A: tl.constexpr, STEP_B: tl.constexpr, STEP_Z: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Stores acc, whose columns start at ``first``, in two halves one after the other."""
    HALF: tl.constexpr = acc.shape[1] // 2
    left, right = acc.reshape(acc.shape[0], 2, HALF).permute(0, 2, 1).split()
    n = first + tl.arange(0, HALF)[None, :]
    put(
        out_ptr, left, m, n, m_end, n_end, scale_a_ptr, scale_b_ptr, zero_point_ptr, colsum_ptr, bias_ptr, STEP_A,
        STEP_B, STEP_Z, WIDE,
    )  # fmt: skip
    put(
        out_ptr, right, m, n + HALF, m_end, n_end, scale_a_ptr, scale_b_ptr, zero_point_ptr, colsum_ptr, bias_ptr,
        STEP_A, STEP_B, STEP_Z, WIDE,
    )  # fmt: skip


@triton.jit
def mm_kernel(
    out_ptr, a_ptr, b_ptr, scale_a_ptr, scale_b_ptr, zero_point_ptr, colsum_ptr, bias_ptr, m_end, n_end, k_end,
    stride_a, stride_b, share, STEP_A: tl.constexpr, STEP_B: tl.constexpr, STEP_Z: tl.constexpr, WIDE: tl.constexpr,
    PARTS: tl.constexpr, WHOLE: tl.constexpr, SWAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of a @ b.T over ``share`` of K. WHOLE: K and share are multiples of BLOCK_K. SWAP: computes b @ a.T.

    A tile that fills the registers is finished in PARTS.
    K and the strides are multiples of 16 and the pointers aligned, so that 16 bytes are copied at a time.
    """
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(m_end, BLOCK_M), tl.cdiv(n_end, BLOCK_N))
    part = tl.program_id(1)
    first = part * share
    last = tl.minimum(first + share, k_end)
    m, n, k = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # Rows beyond the end read the last one again: no masks in the loop, and their sums are not stored.
    a_ptr += tl.minimum(m, m_end - 1).to(tl.int64)[:, None] * stride_a + (first + k)[None, :]
    b_ptr += tl.minimum(n, n_end - 1).to(tl.int64)[:, None] * stride_b + (first + k)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.int32)
    for start in range(bound(first), bound(last), BLOCK_K):
        if WHOLE:
            a, b = tl.load(a_ptr), tl.load(b_ptr)
        else:
            here = k[None, :] < last - start
            a, b = tl.load(a_ptr, mask=here, other=0), tl.load(b_ptr, mask=here, other=0)
        if SWAP:
            acc = tl.dot(b, a.T, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
        a_ptr += BLOCK_K
        b_ptr += BLOCK_K
    m, n = (m[None, :], n[:, None]) if SWAP else (m[:, None], n[None, :])
    out_ptr += part * m_end.to(tl.int64) * n_end
    if PARTS == 1:
        put(
            out_ptr, acc, m, n, m_end, n_end, scale_a_ptr, scale_b_ptr, zero_point_ptr, colsum_ptr, bias_ptr,
            STEP_A, STEP_B, STEP_Z, WIDE,
        )  # fmt: skip
    elif PARTS == 2:
        put_halves(
            out_ptr, acc, m, tile_n * BLOCK_N, m_end, n_end, scale_a_ptr, scale_b_ptr, zero_point_ptr, colsum_ptr,
            bias_ptr, STEP_A, STEP_B, STEP_Z, WIDE,
        )  # fmt: skip
    else:
        left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        put_halves(
            out_ptr, left, m, tile_n * BLOCK_N, m_end, n_end, scale_a_ptr, scale_b_ptr, zero_point_ptr, colsum_ptr,
            bias_ptr, STEP_A, STEP_B, STEP_Z, WIDE,
        )  # fmt: skip
        put_halves(
            out_ptr, right, m, tile_n * BLOCK_N + BLOCK_N // 2, m_end, n_end, scale_a_ptr, scale_b_ptr,
            zero_point_ptr, colsum_ptr, bias_ptr, STEP_A, STEP_B, STEP_Z, WIDE,
        )  # fmt: skip


@triton.jit
def persistent_mm_kernel(
    out, a, b, scale_a_ptr, scale_b_ptr, zero_point_ptr, colsum_ptr, bias_ptr, m_end, n_end, k_end,
    STEP_A: tl.constexpr, STEP_B: tl.constexpr, STEP_Z: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tiles of a @ b.T, one after the other; out, a and b are descriptors, beyond whose ends TMA reads zeros.

    The loops are flattened into one, which keeps fetching while a tile is finished, half by half (PARTS = 2): the
    other half of the shared memory that its output would take goes to one more stage.
    """
    HALF: tl.constexpr = BLOCK_N // PARTS
    tiles_m, tiles_n = tl.cdiv(m_end, BLOCK_M), tl.cdiv(n_end, BLOCK_N)
    for index in tl.range(bound(tl.program_id(0)), bound(tiles_m * tiles_n), bound(tl.num_programs(0)), flatten=True):
        tile_m, tile_n = tile_at(index, tiles_m, tiles_n)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for k in range(0, bound(k_end), BLOCK_K):
            acc = tl.dot(a.load([tile_m * BLOCK_M, k]), b.load([tile_n * BLOCK_N, k]).T, acc, out_dtype=tl.int32)
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        n = tile_n * BLOCK_N + tl.arange(0, HALF)[None, :]
        if PARTS == 1:
            y = scaled(
                acc, m, n, m_end, n_end, out.dtype, scale_a_ptr, scale_b_ptr, zero_point_ptr, colsum_ptr, bias_ptr,
                STEP_A, STEP_B, STEP_Z, WIDE,
            )  # fmt: skip
            out.store([tile_m * BLOCK_M, tile_n * BLOCK_N], y)
        else:
            left, right = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
            y = scaled(
                left, m, n, m_end, n_end, out.dtype, scale_a_ptr, scale_b_ptr, zero_point_ptr, colsum_ptr, bias_ptr,
                STEP_A, STEP_B, STEP_Z, WIDE,
            )  # fmt: skip
            out.store([tile_m * BLOCK_M, tile_n * BLOCK_N], y)
            y = scaled(
                right, m, n + HALF, m_end, n_end, out.dtype, scale_a_ptr, scale_b_ptr, zero_point_ptr, colsum_ptr,
                bias_ptr, STEP_A, STEP_B, STEP_Z, WIDE,
            )  # fmt: skip
            out.store([tile_m * BLOCK_M, tile_n * BLOCK_N + HALF], y)


@triton.jit
def join_kernel(
    out_ptr, parts_ptr, scale_a_ptr, scale_b_ptr, zero_point_ptr, colsum_ptr, bias_ptr, m_end, n_end,
    STEP_A: tl.constexpr, STEP_B: tl.constexpr, STEP_Z: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the PARTS int32 parts [PARTS, M, N] of a product, and finishes it."""
    m = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = m.to(tl.int64) * n_end + n
    acc = tl.zeros([BLOCK], tl.int32)
    for part in tl.static_range(PARTS):
        acc += tl.load(parts_ptr + part * (m_end.to(tl.int64) * n_end) + at, mask=n < n_end, other=0)
    y = scaled(
        acc, m, n, m_end, n_end, out_ptr.dtype.element_ty, scale_a_ptr, scale_b_ptr, zero_point_ptr, colsum_ptr,
        bias_ptr, STEP_A, STEP_B, STEP_Z, WIDE,
    )  # fmt: skip
    tl.store(out_ptr + at, y, mask=n < n_end)


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=5)


def _along_k(name: str, matrix: Tensor) -> Tensor:
    """[rows, K] with K in memory order, padded by zeros to a multiple of 16, every row on a 16-byte boundary."""
    rows, k = matrix.shape
    stride = matrix.stride(0) if rows > 1 else configs.ceil_16(k)
    aligned = matrix.data_ptr() % 16 == 0 and stride % 16 == 0 and stride >= k
    if k % 16 == 0 and matrix.stride(1) == 1 and aligned:
        return matrix
    wanted = "a with K in memory order" if name == "a" else "b as the .t() of an [N, K] with K in memory order"
    _say_once(
        f"qkernels: int8_mm: {name} is copied at every call; to spare that pass {wanted}, where K, the row stride and "
        "the address are multiples of 16"
    )
    return _padded(matrix)


def _padded(matrix: Tensor) -> Tensor:
    rows, k = matrix.shape
    out = matrix.new_empty(rows, configs.ceil_16(k))
    out[:, :k] = matrix
    out[:, k:] = 0
    return out


def _multiply(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    zero_point: Tensor | None = None,
    colsum: Tensor | None = None,
    bias: Tensor | None = None,
    wide: bool = False,
) -> Tensor:
    """out [M, N] from a [M, K] and b [N, K], both as ``_along_k`` gives them; nothing is empty."""
    (m, k), n = a.shape, b.shape[0]
    arch, multiprocessors, name = gpu(out.device)
    tile, splits = tuning.measured(name, arch, m, n, k) or configs.int8_mm(arch, m, n, k, multiprocessors)
    run(a, b, out, tile, splits, multiprocessors, (scale_a, scale_b, zero_point, colsum, bias), wide)
    return out


NO_STEPS = {"STEP_A": 0, "STEP_B": 0, "STEP_Z": 0, "WIDE": False}


def run(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    tile: configs.Tile,
    splits: int,
    multiprocessors: int,
    epilogue: tuple[Tensor | None, ...],
    wide: bool,
) -> None:
    """Starts the kernels of one product by one tile; ``qkernels tune`` measures them here."""
    (m, k), n = a.shape, b.shape[0]
    scale_a, scale_b, zero_point, _, _ = epilogue
    steps = {
        "STEP_A": int(scale_a is not None and scale_a.numel() > 1),
        "STEP_B": int(scale_b is not None and scale_b.numel() > 1),
        "STEP_Z": int(zero_point is not None and zero_point.numel() > 1),
        "WIDE": wide,
    }
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "num_warps": tile.warps}
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    if tile.tma and splits == 1 and n * out.element_size() % 16 == 0:
        parts, stages = configs.persistent(tile, out.element_size())
        launch(
            persistent_mm_kernel, (min(tiles, multiprocessors),),
            TensorDescriptor(out, [m, n], [n, 1], [tile.block_m, tile.block_n // parts]),
            TensorDescriptor(a, [m, k], [a.stride(0) if m > 1 else k, 1], [tile.block_m, tile.block_k]),
            TensorDescriptor(b, [n, k], [b.stride(0) if n > 1 else k, 1], [tile.block_n, tile.block_k]),
            *epilogue, m, n, k, **steps, PARTS=parts, **blocks, num_stages=stages,
        )  # fmt: skip
        return
    share = configs.share_of_k(k, splits, tile.block_k)
    shares = triton.cdiv(k, share)
    sums = out if shares == 1 else out.new_empty(shares, m, n, dtype=torch.int32)
    first, first_steps = (epilogue, steps) if shares == 1 else ((None,) * 5, NO_STEPS)
    launch(
        mm_kernel, (tiles, shares), sums, a, b, *first, m, n, k, a.stride(0) if m > 1 else k,
        b.stride(0) if n > 1 else k, share, **first_steps, PARTS=configs.gemm_parts(tile, wide and shares == 1),
        WHOLE=k % tile.block_k == 0, SWAP=tile.swap, **blocks, num_stages=tile.stages,
    )  # fmt: skip
    if shares > 1:
        block = min(1024, configs.power_of_two(n))
        grid = (m, triton.cdiv(n, block))
        launch(join_kernel, grid, out, sums, *epilogue, m, n, **steps, PARTS=shares, BLOCK=block)


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    reference.check_matrices(a, b)
    if 0 in (*a.shape, b.shape[1]):
        return reference.int8_mm(a, b)
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=torch.int32)
    return _multiply(_along_k("a", a), _along_k("b", b.t()), out)


def _vector(t: Tensor) -> Tensor:
    t = t.reshape(-1)
    return (t.float() if t.dtype == torch.float64 else t).contiguous()


def int8_scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    zero_point_a: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    reference.check_scaled(a, b, scale_a, scale_b, zero_point_a, bias, out_dtype)
    if 0 in (*a.shape, b.shape[1]):
        return reference.int8_scaled_mm(a, b, scale_a, scale_b, zero_point_a, bias, out_dtype)
    codes, weight = _along_k("a", a), _along_k("b", b.t())
    colsum, wide = None, False
    if zero_point_a is not None:
        colsum = weight.sum(1, dtype=torch.int32)
        zero_point_a = zero_point_a.reshape(-1).contiguous()
        wide = zero_point_a.dtype not in (torch.int8, torch.uint8) or a.shape[1] > reference.MAX_K // 3
    vectors = (_vector(scale_a), _vector(scale_b), zero_point_a, colsum, None if bias is None else _vector(bias))
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)
    return _multiply(codes, weight, out, *vectors, wide=wide)


@triton.jit
def quantize_rows_kernel(
    q_ptr, scale_ptr, x_ptr, input_scale_ptr, zero_point_ptr, low, high, half, middle, length, padded, stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of x as codes, zeros up to ``padded``, and its scale: NaN where a code is not the value's.

    By the row's range (input_scale_ptr is None), or by one scale and zero point. A row longer than BLOCK is read twice.
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
        scale = effective_scale(tl.load(input_scale_ptr).to(tl.float32))
        z = middle
        if zero_point_ptr is not None:
            z = tl.load(zero_point_ptr).to(tl.float32)
            scale = tl.where((z >= low) & (z <= high), scale, float("nan"))
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


def int8_linear(
    x: Tensor,
    data: Tensor,
    colsum: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    args = (x, data, colsum, scale, bias, input_scale, input_zero_point, quant_min, quant_max)
    reference.check_linear(*args)
    n, k = colsum.numel(), x.shape[-1]
    if x.numel() == 0 or n == 0:
        return reference.int8_linear(*args)
    if data.dim() == 4:
        _say_once(
            "qkernels: int8_linear: the weight is unpacked at every call: it was packed for the CPU; pack it on the "
            "GPU, where PackedInt8 keeps [N, K]"
        )
        data = _padded(reference.int8_unpack(data, n, k))
    data = _along_k("b", data)
    rows = x.detach().reshape(-1, k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    m, padded = rows.shape[0], data.shape[1]
    codes = torch.empty((m, padded), dtype=torch.int8, device=x.device)
    scale_a = torch.empty((m,), dtype=torch.float32, device=x.device)
    half = (quant_max - quant_min) // 2
    middle = 0 if input_scale is not None else quant_max - half
    bounds = tuple(float(value) for value in (quant_min, quant_max, half, middle))
    tile = configs.quantize_rows(padded)
    sizes = (*bounds, k, padded, rows.stride(0))
    launch(quantize_rows_kernel, (m,), codes, scale_a, rows, input_scale, input_zero_point, *sizes, **tile)
    zero_point = input_zero_point
    if middle:
        zero_point = torch.full((1,), middle, dtype=torch.int32, device=x.device)
    vectors = (scale_a, _vector(scale), zero_point, colsum, None if bias is None else _vector(bias))
    # Codes and zero point are within int8: their difference is below 256, and int32 holds 255·128·K up to this K.
    out = x.new_empty((m, n))
    return _multiply(codes, data, out, *vectors, wide=k > reference.MAX_K // 2).view(*x.shape[:-1], n)
