"""The linear layer on int4 weights in Triton: codes go from registers to tensor cores, as int8, bf16 or fp16.

A byte holds two codes, which multiply two halves of x (drawn in layouts.py), so that both are operands as they lie. A
mask makes an int8 of a code, 16 times its value; a few instructions make floats of four codes. No product is rounded.
The weight is the operand that comes from registers. For most tiles it is on the rows of the instruction (see Int4Tile).
The sums of a group are exact in int32, and fp32 for floats; times the group's scale they are added to the output's.
Where x is floating and has many rows, a kernel writes the weight out in x's dtype, and torch multiplies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import gemm_checks, layouts
from ..reference import int4_gemm as reference
from .common import configs, gemm_configs
from .common.configs import ceil_div, power_of_two
from .common.gemm import as_vector, banded_tile, gpu, pad_to_16, quantize_rows, say_once
from .common.launch import launch
from .common.numerics import INTERPRETED, bound, narrow, widen


class Groups(NamedTuple):
    """What each group of the weight has [groups, N]; with zero_point or minimum, also the sums of x [spans, M]."""

    scale: Tensor | None
    zero_point: Tensor | None = None
    minimum: Tensor | None = None
    x_sums: Tensor | None = None


class Epilogue(NamedTuple):
    """out = (y − zero_point·weight_sum)·scale_x + bias; vectors are contiguous, zero_point of one element or M."""

    scale_x: Tensor | None = None
    zero_point: Tensor | None = None
    weight_sum: Tensor | None = None
    bias: Tensor | None = None


@triton.constexpr_function
def to_int8(high, offset):
    """PTX that makes four int8 of the low or high codes of four bytes: 16·code, or with ``offset`` code + 8."""
    if not offset:
        return f"{{ .reg .b32 t; shl.b32 t, $1, {0 if high else 4}; and.b32 $0, t, 0xF0F0F0F0; }}"
    return f"{{ .reg .b32 t; shr.b32 t, $1, {4 if high else 0}; lop3.b32 $0, t, 0x0F0F0F0F, 0x08080808, 0x6A; }}"


@triton.constexpr_function
def to_float(kind, high, offset):
    """PTX that makes four bf16 or fp16 (``kind`` bf16x2 or f16x2) of the low or high codes of four bytes.

    A byte goes to 16 bits, where xor turns its code to code + 8 and sets the exponent by which the lowest bit counts 1:
    the number is 128 + 8 + code in bf16, 1024 + 8 + code in fp16, of which 1 · it − 128 or − 1024 leaves code + 8. In
    bf16 that is an fma because only newer GPUs subtract.
    """
    exponent, one = ("0x43084308", "0x3F803F80") if kind == "bf16x2" else ("0x64086408", "0x3C003C00")
    if offset:
        less = "0xC300C300" if kind == "bf16x2" else "0xE400E400"
    else:
        less = "0xC308C308" if kind == "bf16x2" else "0xE408E408"
    return f"""{{ .reg .b32 t, low, high, one, less;
        shr.b32 t, $2, {4 if high else 0};
        prmt.b32 low, t, 0, 0x4140;
        prmt.b32 high, t, 0, 0x4342;
        lop3.b32 low, low, 0x000F000F, {exponent}, 0x6A;
        lop3.b32 high, high, 0x000F000F, {exponent}, 0x6A;
        mov.b32 one, {one};
        mov.b32 less, {less};
        fma.rn.{kind} $0, low, one, less;
        fma.rn.{kind} $1, high, one, less; }}"""


@triton.jit
def codes_by_assembly(data, dtype: tl.constexpr, HIGH: tl.constexpr, OFFSET: tl.constexpr):
    if dtype == tl.int8:
        return tl.inline_asm_elementwise(to_int8(HIGH, OFFSET), "=r,r", [data], dtype=tl.int8, is_pure=True, pack=4)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            to_float("bf16x2", HIGH, OFFSET), "=r,=r,r", [data], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            to_float("f16x2", HIGH, OFFSET), "=r,=r,r", [data], dtype=tl.float16, is_pure=True, pack=4
        )


@triton.jit
def codes_in_triton(data, dtype: tl.constexpr, HIGH: tl.constexpr, OFFSET: tl.constexpr):
    """The same values, for the interpreter."""
    nibble = (data >> 4 if HIGH else data) & 15
    if dtype == tl.int8 and not OFFSET:
        return (nibble << 4).to(tl.int8, bitcast=True)
    shifted = (nibble ^ 8).to(tl.int8)
    return (shifted if OFFSET else shifted - 8).to(tl.float32).to(dtype)


@triton.jit
def codes(data, dtype: tl.constexpr, HIGH: tl.constexpr, OFFSET: tl.constexpr):
    if INTERPRETED:
        return codes_in_triton(data, dtype, HIGH, OFFSET)
    else:
        return codes_by_assembly(data, dtype, HIGH, OFFSET)


@triton.jit
def truncated(x):
    """An fp32 cut to the bits that bf16 has."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def product(w, x, sums, SWAP: tl.constexpr):
    if INTERPRETED and w.dtype == tl.bfloat16:  # which it would multiply as integers
        w, x = widen(w), widen(x)
    if SWAP:
        return tl.dot(w, x.T, sums, out_dtype=sums.dtype)
    else:
        return tl.dot(x, w.T, sums, out_dtype=sums.dtype)


@triton.jit
def multiply(w, x, sums, SWAP: tl.constexpr):
    """sums + x @ w.T; with SWAP + w @ x.T. An fp32 x is the sum of three bf16, whose products with codes are exact."""
    if x.dtype == tl.float32:
        high = truncated(x)
        rest = tl.where(high == x, 0.0, x - high)
        middle = truncated(rest)
        low = tl.where(middle == rest, 0.0, rest - middle)
        sums = product(w, low.to(tl.bfloat16), sums, SWAP)
        sums = product(w, middle.to(tl.bfloat16), sums, SWAP)
        return product(w, high.to(tl.bfloat16), sums, SWAP)
    else:
        return product(w, x, sums, SWAP)


@triton.jit
def added(y, sums, groups, group, span, m, n, m_end, n_end, here):
    """y plus what the sums of a span add to it. ``here``: the group exists, else nothing is added."""
    at = tl.cast(group, tl.int64) * n_end + n
    scale = widen(tl.load(groups.scale + at, mask=here & (n < n_end), other=0.0))
    if groups.x_sums is None:
        if sums.dtype == tl.int32:
            sums = sums >> 4  # of 16·code
    else:
        if groups.minimum is not None:
            offset = widen(tl.load(groups.minimum + at, mask=here & (n < n_end), other=0.0))
        else:
            zero_point = tl.load(groups.zero_point + at, mask=here & (n < n_end), other=0)
            offset = -(zero_point.to(tl.float32) + 8.0) * scale
        x_sums = tl.load(groups.x_sums + tl.cast(span, tl.int64) * m_end + m, mask=here & (m < m_end), other=0)
        y = y + offset * x_sums.to(tl.float32)
    return y + scale * sums.to(tl.float32)


@triton.jit
def finished(
    sums, groups, epilogue, m, n, m_end, n_end, dtype: tl.constexpr, ADD: tl.constexpr, STEP_X: tl.constexpr,
    STEP_Z: tl.constexpr,
):  # fmt: skip
    """The output. ``sums`` are those of the one group, or the output's already. STEP 0: one value for all rows."""
    if ADD == "end":
        y = added(tl.zeros(sums.shape, tl.float32), sums, groups, 0, 0, m, n, m_end, n_end, True)
    else:
        y = sums
    if epilogue.zero_point is not None:
        z = tl.load(epilogue.zero_point + m * STEP_Z, mask=m < m_end, other=0)
        y = y - z.to(tl.float32) * tl.load(epilogue.weight_sum + n, mask=n < n_end, other=0.0)
    if epilogue.scale_x is not None:
        y = y * widen(tl.load(epilogue.scale_x + m * STEP_X, mask=m < m_end, other=0.0))
    if epilogue.bias is not None:
        y = y + widen(tl.load(epilogue.bias + n, mask=n < n_end, other=0.0))
    return narrow(y, dtype)


@triton.jit(do_not_specialize=["m_end", "n_groups", "steps", "share", "total"])
def int4_mm_kernel(
    out_ptr, x_ptr, data_ptr, groups, epilogue, m_end, n_end, k_end, length, stride_x, n_groups, group_size, span_size,
    steps, share, total, ADD: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr,
    WHOLE: tl.constexpr, PART: tl.constexpr, STEP_X: tl.constexpr, STEP_Z: tl.constexpr, SWAP: tl.constexpr,
    STAGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of the layer over ``share`` of the ``total`` steps along K (see KLoop).

    PART: the join kernel finishes the tile. WHOLE: the steps divide x and every row of data, which has ``length``
    bytes. ``k_end`` and the stride of x are multiples of 16.
    """
    W: tl.constexpr = x_ptr.dtype.element_ty if x_ptr.dtype.element_ty != tl.float32 else tl.bfloat16
    SUM: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    OFFSET: tl.constexpr = groups.x_sums is not None
    tile_m, tile_n = banded_tile(tl.program_id(0), tl.cdiv(m_end, BLOCK_M), tl.cdiv(n_end, BLOCK_N))
    part = tl.program_id(1)
    first = part * share
    last = tl.minimum(first + share, total)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m, n = (rows[None, :], columns[:, None]) if SWAP else (rows[:, None], columns[None, :])
    # Rows beyond the end read the last one again: no masks in the loop, and their sums are not stored.
    x_ptr += tl.minimum(rows, m_end - 1).to(tl.int64)[:, None] * stride_x
    data_ptr += tl.minimum(columns, n_end - 1).to(tl.int64)[:, None] * length
    none = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], SUM)
    sums, y = none, none.to(tl.float32)
    at = tl.arange(0, WIDTH)[None, :]
    if ADD == "codes":
        per_group = tl.cdiv(group_size, span_size)
        for span in range(bound(first), bound(last)):
            group = span // per_group
            begin = group * group_size + (span % per_group) * span_size
            end = tl.minimum(begin + span_size, (group + 1) * group_size)
            sums = none
            for start in range(bound(begin), bound(end), WIDTH):
                k = start + at
                data = tl.load(data_ptr + k // (2 * HALF) * HALF + k % HALF, mask=k < end, other=0)
                x = tl.load(x_ptr + k, mask=k < end, other=0)
                data = data >> (k // HALF % 2 * 4).to(tl.uint8)
                sums = multiply(codes(data, W, False, OFFSET), x, sums, SWAP)
            y = added(y, sums, groups, group, span, m, n, m_end, n_end, True)
    else:
        data_ptr += at
        x_ptr += at // HALF * (2 * HALF) + at % HALF
        # With stages named for this loop, scales are fetched as early as codes and x.
        for step in tl.range(bound(first), bound(last), num_stages=STAGES):
            for i in tl.static_range(PIECES):
                piece = step * PIECES + i
                byte = piece * WIDTH
                if WHOLE:
                    data = tl.load(data_ptr + byte)
                    x_low, x_high = tl.load(x_ptr + 2 * byte), tl.load(x_ptr + 2 * byte + HALF)
                else:
                    data = tl.load(data_ptr + byte, mask=at < length - byte, other=0)
                    k = 2 * byte + at // HALF * (2 * HALF) + at % HALF
                    x_low = tl.load(x_ptr + 2 * byte, mask=k < k_end, other=0)
                    x_high = tl.load(x_ptr + 2 * byte + HALF, mask=k + HALF < k_end, other=0)
                low, high = codes(data, W, False, OFFSET), codes(data, W, True, OFFSET)
                if ADD == "halves":
                    group = 2 * piece
                    sums = multiply(low, x_low, none, SWAP)
                    y = added(y, sums, groups, group, group, m, n, m_end, n_end, WHOLE or group < n_groups)
                    group += 1
                    sums = multiply(high, x_high, none, SWAP)
                    y = added(y, sums, groups, group, group, m, n, m_end, n_end, WHOLE or group < n_groups)
                elif ADD == "piece":
                    sums = multiply(high, x_high, multiply(low, x_low, none, SWAP), SWAP)
                    y = added(y, sums, groups, piece, piece, m, n, m_end, n_end, WHOLE or piece < n_groups)
                else:
                    sums = multiply(high, x_high, multiply(low, x_low, sums, SWAP), SWAP)
            if ADD == "span":
                complete = ((step + 1) % steps == 0) | (step + 1 == total)
                if complete:
                    span = step // steps
                    y = added(y, sums, groups, tl.minimum(span, n_groups - 1), span, m, n, m_end, n_end, True)
                    sums = none
    if ADD == "end":
        y = sums
    if not PART:
        y = finished(y, groups, epilogue, m, n, m_end, n_end, out_ptr.dtype.element_ty, ADD, STEP_X, STEP_Z)
    out_ptr += tl.cast(part, tl.int64) * m_end * n_end
    tl.store(out_ptr + m.to(tl.int64) * n_end + n, y, mask=(m < m_end) & (n < n_end))


@triton.jit(do_not_specialize=["m_end"])
def int4_join_kernel(
    out_ptr, parts_ptr, groups, epilogue, m_end, n_end, ADD: tl.constexpr, PARTS: tl.constexpr, STEP_X: tl.constexpr,
    STEP_Z: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the PARTS parts [PARTS, M, N] of sums in their order, and finishes them."""
    m = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.cast(m, tl.int64) * n_end + n
    sums = tl.load(parts_ptr + at, mask=n < n_end, other=0)
    for part in tl.static_range(1, PARTS):
        sums += tl.load(parts_ptr + tl.cast(part, tl.int64) * m_end * n_end + at, mask=n < n_end, other=0)
    y = finished(sums, groups, epilogue, m, n, m_end, n_end, out_ptr.dtype.element_ty, ADD, STEP_X, STEP_Z)
    tl.store(out_ptr + at, y, mask=n < n_end)


@triton.jit(do_not_specialize=["m_end", "spans"])
def int4_x_sums_kernel(
    sums_ptr, x_ptr, m_end, stride_x, group_size, span_size, spans, SPANS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The sums [spans, M] of x over each span of a row, in int32 for codes and else in fp32."""
    m = tl.program_id(0)
    span = tl.program_id(1) * SPANS + tl.arange(0, SPANS)
    per_group = tl.cdiv(group_size, span_size)
    begin = span // per_group * group_size + span % per_group * span_size
    end = tl.where(span < spans, tl.minimum(begin + span_size, (span // per_group + 1) * group_size), 0)
    x_ptr += tl.cast(m, tl.int64) * stride_x
    total = tl.zeros([SPANS], sums_ptr.dtype.element_ty)
    for start in range(0, bound(span_size), WIDTH):
        k = begin[:, None] + start + tl.arange(0, WIDTH)[None, :]
        x = tl.load(x_ptr + k, mask=k < end[:, None], other=0)
        if x.dtype == tl.int8:
            total += tl.sum(x.to(tl.int32), 1)
        else:
            total += tl.sum(widen(x), 1)
    tl.store(sums_ptr + tl.cast(span, tl.int64) * m_end + m, total, mask=span < spans)


@triton.jit
def int4_dequantize_kernel(
    w_ptr, data_ptr, groups, n_end, k_end, length, group_size, HALF: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The weight [N, K] in w's dtype, computed in fp32 and rounded once; a tile of bytes for each program."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    data = tl.load(data_ptr + n.to(tl.int64) * length + at, mask=(n < n_end) & (at < length), other=0)
    for HIGH in tl.static_range(2):
        k = at // HALF * (2 * HALF) + at % HALF + HALF * HIGH
        here = (n < n_end) & (k < k_end)
        of = (k // group_size).to(tl.int64) * n_end + n
        code = ((((data >> (4 * HIGH)) & 15) ^ 8).to(tl.int8)).to(tl.float32)
        scale = widen(tl.load(groups.scale + of, mask=here, other=0.0))
        if groups.minimum is not None:
            w = code * scale + widen(tl.load(groups.minimum + of, mask=here, other=0.0))
        elif groups.zero_point is not None:
            w = (code - 8.0 - tl.load(groups.zero_point + of, mask=here, other=0).to(tl.float32)) * scale
        else:
            w = (code - 8.0) * scale
        tl.store(w_ptr + n.to(tl.int64) * k_end + k, narrow(w, w_ptr.dtype.element_ty), mask=here)


def int4_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    weight_sum: Tensor,
    bias: Tensor | None,
    group_size: int,
    act_bits: int,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    out_dtype: torch.dtype,
) -> Tensor:
    args = (
        x, data, scale, zero_point, minimum, weight_sum, bias, group_size, act_bits, input_scale, input_zero_point,
        quant_min, quant_max, out_dtype,
    )  # fmt: skip
    gemm_checks.int4_linear(*args)
    n, k = weight_sum.numel(), x.shape[-1]
    if x.numel() == 0 or n == 0:
        return reference.int4_linear(*args)
    if (layout := layouts.int4_layout(data)) != layouts.HALVES:
        say_once(
            "qkernels: int4_linear: the weight is unpacked at every call: it was packed for the CPU; pack it on the "
            "GPU, or take .to(device) of it"
        )
        data = layouts.int4_to_halves(layouts.int4_unpack(data, n, k, group_size), group_size)
        params = (scale, zero_point, minimum)
        groups = Groups(*(None if t is None else layouts.by_group(t, n, layout).t().contiguous() for t in params))
    else:
        groups = Groups(scale, zero_point, minimum)
    offset = None if bias is None else as_vector(bias)
    rows = x.detach().reshape(-1, k)
    out = x.new_empty((rows.shape[0], n), dtype=out_dtype)
    if act_bits == 16 and rows.shape[0] >= gemm_configs.INT4_DEQUANTIZED:
        _multiply_dequantized(out, rows, data, groups, offset, group_size)
    elif act_bits == 16:
        _multiply(out, _aligned(rows), k, data, groups, Epilogue(bias=offset), group_size)
    else:
        if x.dtype == torch.int8:
            assert input_scale is not None
            codes, scale_x, middle = _aligned(rows), as_vector(input_scale), 0
        else:
            codes, scale_x, middle = quantize_rows(
                rows, gemm_configs.ceil_16(k), input_scale, input_zero_point, quant_min, quant_max
            )
        z = as_vector(input_zero_point) if input_zero_point is not None else None
        if middle:
            z = torch.full((1,), middle, dtype=torch.int32, device=x.device)
        _multiply(out, codes, k, data, groups, Epilogue(scale_x, z, weight_sum, offset), group_size)
    return out.view(*x.shape[:-1], n)


def _aligned(rows: Tensor) -> Tensor:
    """[M, K] with K in memory order, padded by zeros to a multiple of 16, every row on a 16-byte boundary."""
    stride = rows.stride(0) if rows.shape[0] > 1 else 16
    aligned = rows.data_ptr() % 16 == 0 and stride * rows.element_size() % 16 == 0
    if rows.shape[1] % 16 == 0 and rows.stride(1) == 1 and aligned:
        return rows
    say_once(
        "qkernels: int4_linear: x is copied at every call; to spare that pass x with K in memory order, where K is a "
        "multiple of 16 and the row stride and the address are multiples of 16 bytes"
    )
    return pad_to_16(rows)


def _multiply(
    out: Tensor, x: Tensor, k: int, data: Tensor, groups: Groups, epilogue: Epilogue, group_size: int
) -> None:
    """out [M, N] by the kernels; x is as ``_aligned`` gives it, and k its columns without the padding."""
    m, n = out.shape
    arch, multiprocessors, _ = gpu(out.device)
    size = x.element_size()
    tile, splits = gemm_configs.int4_linear(arch, m, n, k, group_size, size, multiprocessors)
    loop = gemm_configs.int4_k_loop(group_size, k, tile.block_k, integer=size == 1)
    total, share = gemm_configs.int4_shares(loop, k, group_size, splits)
    if loop.add == "codes":
        say_once(
            f"qkernels: int4_linear: groups of {group_size} are read code by code at every call; groups of 32, 64 or a "
            "multiple of 128, or one for each row, are read whole"
        )
    padded, n_groups = gemm_configs.ceil_16(k), layouts.groups_of(k, group_size)
    stride = x.stride(0) if m > 1 else padded
    if groups.zero_point is not None or groups.minimum is not None:
        spans = n_groups * ceil_div(group_size, loop.span)
        x_sums = x.new_empty((spans, m), dtype=torch.int32 if size == 1 else torch.float32)
        tile_of_sums = gemm_configs.int4_x_sums(spans, loop.span)
        launch(
            int4_x_sums_kernel, (m, ceil_div(spans, tile_of_sums["SPANS"])), x_sums, x, m, stride, group_size,
            loop.span, spans, **tile_of_sums,
        )  # fmt: skip
        groups = groups._replace(x_sums=x_sums)
    shares = ceil_div(total, share)
    step_x, step_z = (int(t is not None and t.numel() > 1) for t in (epilogue.scale_x, epilogue.zero_point))
    how: dict[str, Any] = {"ADD": loop.add, "STEP_X": step_x, "STEP_Z": step_z}
    result = out
    if shares > 1:
        exact = loop.add == "end" and size == 1
        result = out.new_empty((shares, m, n), dtype=torch.int32 if exact else torch.float32)
    step = 2 * loop.width * loop.pieces
    tiles = ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n)
    launch(
        int4_mm_kernel, (tiles, shares), result, x, data, groups, epilogue if shares == 1 else Epilogue(), m, n, padded,
        data.shape[1], stride, n_groups, group_size, loop.span, loop.steps, share, total, HALF=loop.half,
        WIDTH=loop.width, PIECES=loop.pieces, WHOLE=padded % step == 0, PART=shares > 1, **how, SWAP=tile.swap,
        STAGES=tile.stages, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.warps, num_stages=tile.stages,
        maxnreg=configs.UNSPILLED,
    )  # fmt: skip
    if shares > 1:
        block = min(1024, power_of_two(n))
        grid = m, ceil_div(n, block)
        launch(int4_join_kernel, grid, out, result, groups, epilogue, m, n, PARTS=shares, BLOCK=block, **how)


def _multiply_dequantized(
    out: Tensor, x: Tensor, data: Tensor, groups: Groups, bias: Tensor | None, group_size: int
) -> None:
    """out [M, N] by way of the weight in x's dtype and torch's product."""
    n, k = out.shape[1], x.shape[1]
    w = x.new_empty(n, k)
    tile = gemm_configs.INT4_DEQUANTIZE
    grid = ceil_div(n, tile["BLOCK_N"]), ceil_div(data.shape[1], tile["WIDTH"])
    half = layouts.half_of(group_size, k)
    launch(int4_dequantize_kernel, grid, w, data, groups, n, k, data.shape[1], group_size, HALF=half, **tile)
    if bias is None and out.dtype == x.dtype:
        torch.mm(x, w.t(), out=out)
    else:
        y = torch.mm(x, w.t()).float()
        out.copy_(y if bias is None else y + bias.float())
