"""int8 matrix multiplication in Triton: exact int32 sums on the tensor cores, then the reference's float operations.

One kernel serves every GPU: operands row by row along K, copied to shared memory by cp.async, and either of them on the
rows of the tensor cores' instruction (for few rows of a, the weight: swap-AB). On sm_90 large products run on as many
programs as the GPU has multiprocessors, fed by TMA, which fetch the next tile while they finish one. A product of too
few tiles to fill the GPU is cut along K; its int32 parts are added by a second kernel, which is exact in any order and
needs neither zeroed memory nor one program waiting for another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import gemm_checks, layouts
from ..reference import int8_gemm as reference
from .common import gemm_configs, tuning
from .common.activation import activate
from .common.configs import ceil_div, power_of_two
from .common.gemm import as_vector, banded_tile, gpu, pad_to_16, quantize_rows, say_once, static_qparams
from .common.launch import launch
from .common.numerics import bound, clamp, narrow, reciprocal, rint, widen


class Epilogue(NamedTuple):
    """The tensors that finish a product. Vectors are contiguous; How says whether a kernel steps through them.

    out = activation(((acc − zero_point·colsum)·scale_b)·scale_a + bias); with out_scale its int8 codes. Without scales
    out is acc.
    """

    scale_a: Tensor | None = None
    scale_b: Tensor | None = None
    zero_point: Tensor | None = None
    colsum: Tensor | None = None
    bias: Tensor | None = None
    out_scale: Tensor | None = None
    out_zero_point: Tensor | None = None


class How(NamedTuple):
    """How an epilogue is computed, as constexpr. A step of 0: there is one value for all rows or columns."""

    step_a: int = 0
    step_b: int = 0
    step_z: int = 0
    wide: bool = False  # acc − zero_point·colsum by way of int64
    activation: str = "none"


def how_of(epilogue: Epilogue, wide: bool = False, activation: str = "none") -> How:
    a, b, z = (int(t is not None and t.numel() > 1) for t in (epilogue.scale_a, epilogue.scale_b, epilogue.zero_point))
    return How(a, b, z, wide, activation)


@triton.jit
def scaled(acc, m, n, m_end, n_end, dtype: tl.constexpr, epilogue, HOW: tl.constexpr):
    """The output that acc makes (see Epilogue), rounded once. m and n index acc's dims, in either order."""
    if epilogue.scale_a is None:
        return acc
    else:
        if epilogue.zero_point is not None:
            z = tl.load(epilogue.zero_point + m * HOW.step_z, mask=m < m_end, other=0)
            colsum = tl.load(epilogue.colsum + n, mask=n < n_end, other=0)
            if HOW.wide:
                y = (acc.to(tl.int64) - z.to(tl.int64) * colsum.to(tl.int64)).to(tl.float32)
            else:
                y = (acc - z.to(tl.int32) * colsum).to(tl.float32)
        else:
            y = acc.to(tl.float32)
        y = y * widen(tl.load(epilogue.scale_b + n * HOW.step_b, mask=n < n_end, other=0.0))
        y = y * widen(tl.load(epilogue.scale_a + m * HOW.step_a, mask=m < m_end, other=0.0))
        if epilogue.bias is not None:
            y = y + widen(tl.load(epilogue.bias + n, mask=n < n_end, other=0.0))
        ACTIVATION: tl.constexpr = HOW.activation
        y = activate(y, ACTIVATION)
        if epilogue.out_scale is None:
            return narrow(y, dtype)
        else:
            scale, z = static_qparams(epilogue.out_scale, epilogue.out_zero_point, 0.0, -128.0, 127.0)
            q = clamp(rint(y * reciprocal(scale)) + z, -128.0, 127.0)
            return tl.where(q == q, q, z).to(tl.int8)


@triton.jit
def put(out_ptr, acc, m, n, m_end, n_end, epilogue, HOW: tl.constexpr):
    """Stores the part of out that acc makes."""
    y = scaled(acc, m, n, m_end, n_end, out_ptr.dtype.element_ty, epilogue, HOW)
    tl.store(out_ptr + m.to(tl.int64) * n_end + n, y, mask=(m < m_end) & (n < n_end))


@triton.jit
def put_halves(out_ptr, acc, m, first, m_end, n_end, epilogue, HOW: tl.constexpr):
    """Stores acc, whose columns start at ``first``, in two halves one after the other."""
    HALF: tl.constexpr = acc.shape[1] // 2
    left, right = acc.reshape(acc.shape[0], 2, HALF).permute(0, 2, 1).split()
    n = first + tl.arange(0, HALF)[None, :]
    put(out_ptr, left, m, n, m_end, n_end, epilogue, HOW)
    put(out_ptr, right, m, n + HALF, m_end, n_end, epilogue, HOW)


@triton.jit(do_not_specialize=["m_end"])
def int8_mm_kernel(
    out_ptr, a_ptr, b_ptr, epilogue, m_end, n_end, k_end, stride_a, stride_b, share, HOW: tl.constexpr,
    PARTS: tl.constexpr, WHOLE: tl.constexpr, SWAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of a @ b.T over ``share`` of K. WHOLE: K and share are multiples of BLOCK_K. SWAP: computes b @ a.T.

    A tile that fills the registers is finished in PARTS.
    K and the strides are multiples of 16 and the pointers aligned, so that 16 bytes are copied at a time.
    """
    tile_m, tile_n = banded_tile(tl.program_id(0), tl.cdiv(m_end, BLOCK_M), tl.cdiv(n_end, BLOCK_N))
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
    out_ptr += part.to(tl.int64) * m_end * n_end
    if PARTS == 1:
        put(out_ptr, acc, m, n, m_end, n_end, epilogue, HOW)
    elif PARTS == 2:
        put_halves(out_ptr, acc, m, tile_n * BLOCK_N, m_end, n_end, epilogue, HOW)
    else:
        left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        put_halves(out_ptr, left, m, tile_n * BLOCK_N, m_end, n_end, epilogue, HOW)
        put_halves(out_ptr, right, m, tile_n * BLOCK_N + BLOCK_N // 2, m_end, n_end, epilogue, HOW)


@triton.jit(do_not_specialize=["m_end"])
def int8_persistent_mm_kernel(
    out, a, b, epilogue, m_end, n_end, k_end, HOW: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tiles of a @ b.T, one after the other; out, a and b are descriptors, beyond whose ends TMA reads zeros.

    The loops are flattened into one, which keeps fetching while a tile is finished, half by half (PARTS = 2): the
    other half of the shared memory that its output would take goes to one more stage.
    """
    HALF: tl.constexpr = BLOCK_N // PARTS
    tiles_m, tiles_n = tl.cdiv(m_end, BLOCK_M), tl.cdiv(n_end, BLOCK_N)
    for index in tl.range(bound(tl.program_id(0)), bound(tiles_m * tiles_n), bound(tl.num_programs(0)), flatten=True):
        tile_m, tile_n = banded_tile(index, tiles_m, tiles_n)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for k in range(0, bound(k_end), BLOCK_K):
            acc = tl.dot(a.load([tile_m * BLOCK_M, k]), b.load([tile_n * BLOCK_N, k]).T, acc, out_dtype=tl.int32)
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        n = tile_n * BLOCK_N + tl.arange(0, HALF)[None, :]
        if PARTS == 1:
            y = scaled(acc, m, n, m_end, n_end, out.dtype, epilogue, HOW)
            out.store([tile_m * BLOCK_M, tile_n * BLOCK_N], y)
        else:
            left, right = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
            y = scaled(left, m, n, m_end, n_end, out.dtype, epilogue, HOW)
            out.store([tile_m * BLOCK_M, tile_n * BLOCK_N], y)
            y = scaled(right, m, n + HALF, m_end, n_end, out.dtype, epilogue, HOW)
            out.store([tile_m * BLOCK_M, tile_n * BLOCK_N + HALF], y)


@triton.jit(do_not_specialize=["m_end"])
def int8_join_kernel(
    out_ptr, parts_ptr, epilogue, m_end, n_end, HOW: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Adds the PARTS int32 parts [PARTS, M, N] of a product, and finishes it."""
    m = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = m.to(tl.int64) * n_end + n
    acc = tl.zeros([BLOCK], tl.int32)
    for part in tl.static_range(PARTS):
        acc += tl.load(parts_ptr + part * (tl.cast(m_end, tl.int64) * n_end) + at, mask=n < n_end, other=0)
    y = scaled(acc, m, n, m_end, n_end, out_ptr.dtype.element_ty, epilogue, HOW)
    tl.store(out_ptr + at, y, mask=n < n_end)


def _along_k(name: str, matrix: Tensor) -> Tensor:
    """[rows, K] with K in memory order, padded by zeros to a multiple of 16, every row on a 16-byte boundary."""
    rows, k = matrix.shape
    stride = matrix.stride(0) if rows > 1 else gemm_configs.ceil_16(k)
    aligned = matrix.data_ptr() % 16 == 0 and stride % 16 == 0 and stride >= k
    if k % 16 == 0 and matrix.stride(1) == 1 and aligned:
        return matrix
    wanted = "a with K in memory order" if name == "a" else "b as the .t() of an [N, K] with K in memory order"
    say_once(
        f"qkernels: int8_mm: {name} is copied at every call; to spare that pass {wanted}, where K, the row stride and "
        "the address are multiples of 16"
    )
    return pad_to_16(matrix)


def _multiply(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    epilogue: Epilogue,
    wide: bool = False,
    activation: str = "none",
) -> Tensor:
    """out [M, N] from a [M, K] and b [N, K], both as ``_along_k`` gives them; nothing is empty."""
    (m, k), n = a.shape, b.shape[0]
    arch, multiprocessors, name = gpu(out.device)
    tile, splits = tuning.measured(name, arch, m, n, k) or gemm_configs.int8_mm(arch, m, n, k, multiprocessors)
    run(a, b, out, tile, splits, multiprocessors, epilogue, how_of(epilogue, wide, activation))
    return out


def run(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    tile: gemm_configs.Tile,
    splits: int,
    multiprocessors: int,
    epilogue: Epilogue,
    how: How,
) -> None:
    """Starts the kernels of one product by one tile; ``qkernels tune`` measures them here."""
    (m, k), n = a.shape, b.shape[0]
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "num_warps": tile.warps}
    tiles = ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n)
    if tile.tma and splits == 1 and n * out.element_size() % 16 == 0:
        parts, stages = gemm_configs.persistent(tile, out.element_size())
        launch(
            int8_persistent_mm_kernel, (min(tiles, multiprocessors),),
            TensorDescriptor(out, [m, n], [n, 1], [tile.block_m, tile.block_n // parts]),
            TensorDescriptor(a, [m, k], [a.stride(0) if m > 1 else k, 1], [tile.block_m, tile.block_k]),
            TensorDescriptor(b, [n, k], [b.stride(0) if n > 1 else k, 1], [tile.block_n, tile.block_k]), epilogue, m, n,
            k, HOW=how, PARTS=parts, **blocks, num_stages=stages,
        )  # fmt: skip
        return
    share = gemm_configs.share_of_k(k, splits, tile.block_k)
    shares = ceil_div(k, share)
    whole = shares == 1
    sums = out if whole else out.new_empty(shares, m, n, dtype=torch.int32)
    parts = gemm_configs.gemm_parts(tile, whole and (how.wide or how.activation in ("gelu", "silu")))
    launch(
        int8_mm_kernel, (tiles, shares), sums, a, b, epilogue if whole else Epilogue(), m, n, k,
        a.stride(0) if m > 1 else k, b.stride(0) if n > 1 else k, share, HOW=how if whole else How(), PARTS=parts,
        WHOLE=k % tile.block_k == 0, SWAP=tile.swap, **blocks, num_stages=tile.stages,
    )  # fmt: skip
    if not whole:
        block = min(1024, power_of_two(n))
        launch(
            int8_join_kernel, (m, ceil_div(n, block)), out, sums, epilogue, m, n, HOW=how, PARTS=shares, BLOCK=block,
        )  # fmt: skip


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    gemm_checks.int8_mm(a, b)
    if 0 in (*a.shape, b.shape[1]):
        return reference.int8_mm(a, b)
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=torch.int32)
    return _multiply(_along_k("a", a), _along_k("b", b.t()), out, Epilogue())


def _one(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.reshape(-1)


def int8_scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    zero_point_a: Tensor | None,
    colsum_b: Tensor | None,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    args = (a, b, scale_a, scale_b, zero_point_a, colsum_b, bias, activation, out_dtype, out_scale, out_zero_point)
    gemm_checks.int8_scaled_mm(*args)
    if 0 in (*a.shape, b.shape[1]):
        return reference.int8_scaled_mm(*args)
    codes, weight = _along_k("a", a), _along_k("b", b.t())
    wide = False
    if zero_point_a is None:
        colsum_b = None
    else:
        colsum_b = weight.sum(1, dtype=torch.int32) if colsum_b is None else colsum_b.contiguous()
        zero_point_a = zero_point_a.reshape(-1).contiguous()
        wide = zero_point_a.dtype not in (torch.int8, torch.uint8) or a.shape[1] > gemm_checks.MAX_K // 3
    offset = None if bias is None else as_vector(bias)
    vectors = (
        as_vector(scale_a),
        as_vector(scale_b),
        zero_point_a,
        colsum_b,
        offset,
        _one(out_scale),
        _one(out_zero_point),
    )
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)
    return _multiply(codes, weight, out, Epilogue(*vectors), wide, activation)


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
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    args = (
        x, data, colsum, scale, bias, input_scale, input_zero_point, quant_min, quant_max, activation, out_dtype,
        out_scale, out_zero_point,
    )  # fmt: skip
    gemm_checks.int8_linear(*args)
    n, k = colsum.numel(), x.shape[-1]
    if x.numel() == 0 or n == 0:
        return reference.int8_linear(*args)
    if layouts.int8_layout(data) == layouts.PANELS:
        say_once(
            "qkernels: int8_linear: the weight is unpacked at every call: it was packed for the CPU; pack it on the "
            "GPU, where PackedInt8 keeps [N, K]"
        )
        data = layouts.int8_to_rows(layouts.int8_unpack(data, n, k))
    data = _along_k("b", data)
    rows = x.detach().reshape(-1, k)
    scale_a, zero_point = input_scale, input_zero_point
    # Codes and zero point are within int8: their difference is below 256, and int32 holds 255·128·K up to this K.
    wide = k > gemm_checks.MAX_K // 2
    if x.dtype == torch.int8:
        codes = _along_k("x", rows)
        if codes.shape[1] != data.shape[1]:
            codes = pad_to_16(codes)
        assert scale_a is not None
        scale_a = as_vector(scale_a)
        if zero_point is not None:
            zero_point = zero_point.reshape(-1).contiguous()
            wide = wide or zero_point.dtype not in (torch.int8, torch.uint8)
    else:
        codes, scale_a, middle = quantize_rows(rows, data.shape[1], input_scale, input_zero_point, quant_min, quant_max)
        if middle:
            zero_point = torch.full((1,), middle, dtype=torch.int32, device=x.device)
    offset = None if bias is None else as_vector(bias)
    epilogue = Epilogue(scale_a, as_vector(scale), zero_point, colsum, offset, _one(out_scale), _one(out_zero_point))
    out = x.new_empty((rows.shape[0], n), dtype=out_dtype)
    return _multiply(codes, data, out, epilogue, wide, activation).view(*x.shape[:-1], n)
