"""The linear layer on int4 weights in plain torch: integer sums group by group, then one order of float operations.

A weight is code·scale of its group along K, (code − zero_point)·scale, or (code + 8)·scale + minimum: ``minimum`` is
the value of the smallest code, as GGUF's Q4_1 stores it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .int8_gemm import (
    OUT_DTYPES,
    PANEL,
    TINY,
    check,
    check_codes,
    check_floating,
    check_k,
    check_static,
    check_vector,
    check_zero_point,
    exact_mm,
    quantize_codes,
    static_qparams,
)

MAX_GROUP = 32768  # longer groups are summed in parts: 16 * 15 * 128 * MAX_GROUP < 2**31
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_group_size(group_size: int, k: int) -> None:
    check(
        group_size == k or (group_size >= 16 and group_size % 8 == 0 and k % group_size == 0),
        f"group_size: got {group_size}; accepted: -1 or K = {k}, or a multiple of 8, from 16 on, that divides it",
    )


def groups_of(k: int, group_size: int) -> int:
    return k // group_size if k else 1


# The CPU's layout: panels of 32 output channels. A byte holds the code of a channel, plus 8, in its low bits and that
# of the channel 16 further in its high bits; what is missing is 0.


def panel_shape(n: int, k: int) -> tuple[int, int, int, int]:
    return ((n + PANEL - 1) // PANEL, (k + 3) // 4, PANEL // 2, 4)


def int4_pack(q: Tensor) -> Tensor:
    """data[panel][k // 4][channel % 16][k % 4] of channels c (low bits) and c + 16 of a panel."""
    check(q.dtype == torch.int8, f"q: got {q.dtype}; accepted: torch.int8")
    check(q.dim() == 2, f"q: got shape {list(q.shape)}; accepted: [N, K]")
    n, k = q.shape
    check_k("q", k)
    n_panels, steps, half, _ = panel_shape(n, k)
    codes = torch.nn.functional.pad((q + 8).to(torch.uint8) & 15, (0, steps * 4 - k, 0, n_panels * PANEL - n))
    low, high = codes.view(n_panels, 2, half, steps, 4).unbind(1)
    return (low | high << 4).permute(0, 2, 1, 3).clone(memory_format=torch.contiguous_format)


def int4_unpack(data: Tensor, n: int, k: int) -> Tensor:
    check_data(data, n, k, panel_shape(n, k))
    n_panels, steps, half, _ = data.shape
    codes = torch.stack((data & 15, data >> 4), 1).permute(0, 1, 3, 2, 4).reshape(n_panels * 2 * half, steps * 4)
    return codes[:n, :k].to(torch.int8) - 8


def to_panels(t: Tensor) -> Tensor:
    """Scales or zero points [N, groups] as the CPU reads them: [panels, groups, 32], missing channels 0."""
    n, groups = t.shape
    n_panels = (n + PANEL - 1) // PANEL
    padded = torch.nn.functional.pad(t, (0, 0, 0, n_panels * PANEL - n))
    return padded.view(n_panels, PANEL, groups).transpose(1, 2).clone(memory_format=torch.contiguous_format)


# A GPU's layout: rows, in which a byte holds two codes that are ``half`` apart in k, so that its low bits and its high
# bits are two operands of tensor cores as they are, each within one group. Scales and zero points are [groups, N].


def half_of(group_size: int, k: int) -> int:
    """How far apart in k the two codes of a byte are."""
    return 64 if group_size == k else next((half for half in (64, 32, 16) if group_size % half == 0), 64)


def halves_shape(n: int, k: int, half: int) -> tuple[int, int]:
    return n, (k + 2 * half - 1) // (2 * half) * half


def to_halves(q: Tensor, half: int) -> Tensor:
    """data[n][k // (2·half)][k % half]: the code of k in the low bits, of k + half in the high; missing k are 0."""
    n, k = q.shape
    _, length = halves_shape(n, k, half)
    low, high = (
        torch.nn.functional.pad(q, (0, 2 * length - k)).view(n, length // half, 2, half).to(torch.uint8).unbind(2)
    )
    return (low & 15 | high << 4).reshape(n, length)


def from_halves(data: Tensor, k: int, half: int) -> Tensor:
    blocks = data.view(data.shape[0], data.shape[1] // half, half)
    codes = torch.stack((blocks & 15, blocks >> 4), 2).flatten(1)[:, :k]
    return ((codes ^ 8).to(torch.int8) - 8).clone(memory_format=torch.contiguous_format)


def unpack(data: Tensor, n: int, k: int, group_size: int) -> Tensor:
    """The codes [N, K] of either layout."""
    return int4_unpack(data, n, k) if data.dim() == 4 else from_halves(data, k, half_of(group_size, k))


def by_group(t: Tensor, n: int) -> Tensor:
    """[N, groups] from either layout of scales and zero points."""
    return t.transpose(1, 2).reshape(-1, t.shape[1])[:n] if t.dim() == 3 else t.t()


def check_data(data: Tensor, n: int, k: int, expected: tuple[int, ...]) -> None:
    check(data.dtype == torch.uint8, f"data: got {data.dtype}; accepted: torch.uint8")
    check(
        tuple(data.shape) == expected,
        f"data: got shape {list(data.shape)}; accepted: what PackedInt4 holds for N = {n} and K = {k}, "
        f"{list(expected)}",
    )
    check(data.is_contiguous(), "data: got strided memory; accepted: contiguous")


def check_groups(name: str, t: Tensor, data: Tensor, n: int, groups: int) -> None:
    expected = ((n + PANEL - 1) // PANEL, groups, PANEL) if data.dim() == 4 else (groups, n)
    check(
        tuple(t.shape) == expected,
        f"{name}: got shape {list(t.shape)}; accepted: what PackedInt4 holds for N = {n} and {groups} groups, "
        f"{list(expected)}",
    )
    check(t.is_contiguous(), f"{name}: got strided memory; accepted: contiguous")


def check_scale_dtype(name: str, t: Tensor) -> None:
    check(
        t.dtype in SCALE_DTYPES,
        f"{name}: got {t.dtype}; accepted: torch.float32, torch.bfloat16, torch.float16",
    )


def check_linear(
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
) -> None:
    check(
        x.dtype in (*OUT_DTYPES, torch.int8),
        f"x: got {x.dtype}; accepted: torch.float32, torch.bfloat16, torch.float16, torch.int8",
    )
    check(x.dim() >= 1, "x: got 0 dims; accepted: [..., K]")
    check(act_bits in (8, 16), f"act_bits: got {act_bits}; accepted: 8, 16")
    check(
        out_dtype in OUT_DTYPES, f"out_dtype: got {out_dtype}; accepted: torch.float32, torch.bfloat16, torch.float16"
    )
    n, k = weight_sum.numel(), x.shape[-1]
    check_vector("weight_sum", weight_sum, n, "[N]")
    check(
        weight_sum.dtype == torch.float32 and weight_sum.is_contiguous(),
        f"weight_sum: got {weight_sum.dtype}; accepted: contiguous torch.float32",
    )
    check_k("x", k)
    check_group_size(group_size, k)
    halves = halves_shape(n, k, half_of(group_size, k))
    check_data(data, n, k, halves if data.dim() == 2 else panel_shape(n, k))
    groups = groups_of(k, group_size)
    check_groups("scale", scale, data, n, groups)
    check_scale_dtype("scale", scale)
    check(zero_point is None or minimum is None, "minimum: got a tensor beside zero_point; accepted: one of them")
    if zero_point is not None:
        check_groups("zero_point", zero_point, data, n, groups)
        check(zero_point.dtype == torch.int8, f"zero_point: got {zero_point.dtype}; accepted: torch.int8")
    if minimum is not None:
        check_groups("minimum", minimum, data, n, groups)
        check(minimum.dtype == scale.dtype, f"minimum: got {minimum.dtype}; accepted: scale's dtype, {scale.dtype}")
    if bias is not None:
        check_vector("bias", bias, n, "[N]")
        check_floating("bias", bias)
    if act_bits == 16:
        check(x.dtype != torch.int8, "x: got torch.int8; accepted with act_bits 16: a floating dtype")
        check(
            input_scale is None and input_zero_point is None,
            "input_scale: got a tensor; accepted with act_bits 16: None, as x stays in float",
        )
        return
    if x.dtype == torch.int8:
        check(input_scale is not None, "input_scale: got None; accepted: the scale of the codes x, one element or [M]")
        assert input_scale is not None
        m = x.shape[:-1].numel()
        check_vector("input_scale", input_scale, m, "one element, [M] or [M, 1]", dim=0, broadcast=True)
        check_floating("input_scale", input_scale)
        if input_zero_point is not None:
            check_vector("input_zero_point", input_zero_point, m, "one element, [M] or [M, 1]", dim=0, broadcast=True)
            check_zero_point("input_zero_point", input_zero_point)
    elif input_scale is None:
        check(
            input_zero_point is None,
            "input_zero_point: got a tensor without input_scale; accepted: both, or neither",
        )
        check_codes(quant_min, quant_max)
    else:
        check_static("input", input_scale, input_zero_point, quant_min, quant_max)


def quantize_input(
    x: Tensor, input_scale: Tensor | None, input_zero_point: Tensor | None, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, Tensor | int]:
    """Codes [M, K], scales (one element or [M, 1]) and zero points (an int, or of as many elements) of rows x."""
    rows = x.detach().reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)
    if x.dtype == torch.int8:
        assert input_scale is not None
        z = 0 if input_zero_point is None else input_zero_point.reshape(-1, 1).long()
        return rows, input_scale.detach().float().reshape(-1, 1), z
    zero_point: Tensor | int
    if input_scale is None:
        half = (quant_max - quant_min) // 2
        zero_point = quant_max - half
        amax = rows.float().abs().amax(1, keepdim=True) if rows.shape[1] else rows.new_zeros(rows.shape[0], 1).float()
        scale = (amax / half).clamp(min=TINY)
        scale = torch.where(scale.isfinite(), scale, torch.nan)
    else:
        scale, zero_point = static_qparams("input", input_scale, input_zero_point, quant_min, quant_max)
    q, nan = quantize_codes(rows, scale, zero_point, quant_min, quant_max)
    return q, torch.where(nan.any(1, keepdim=True), torch.nan, scale), zero_point


def offset_of(scale: Tensor, zero_point: Tensor | None, minimum: Tensor | None) -> Tensor | None:
    """The value of code −8, in fp32."""
    if minimum is not None:
        return minimum.float()
    return None if zero_point is None else -(zero_point.float() + 8) * scale.float()


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
    check_linear(
        x, data, scale, zero_point, minimum, weight_sum, bias, group_size, act_bits, input_scale, input_zero_point,
        quant_min, quant_max, out_dtype,
    )  # fmt: skip
    n, k = weight_sum.numel(), x.shape[-1]
    q = unpack(data, n, k, group_size)
    scale = by_group(scale, n).float()
    offset = offset_of(
        scale,
        None if zero_point is None else by_group(zero_point, n),
        None if minimum is None else by_group(minimum, n),
    )
    if act_bits == 16:
        rows = x.detach().reshape(-1, k) if k else x.new_empty(x.shape[:-1].numel(), 0)
        y = rows.float() @ weight_of(q, scale, offset, group_size).float().t()
    else:
        codes, scale_x, zero_x = quantize_input(x, input_scale, input_zero_point, quant_min, quant_max)
        y = torch.zeros(codes.shape[0], n, device=x.device)
        for group in range(scale.shape[1] if k else 0):
            for first in range(group * group_size, (group + 1) * group_size, MAX_GROUP):
                last = min(first + MAX_GROUP, (group + 1) * group_size)
                a, w = codes[:, first:last], q[:, first:last]
                if offset is not None:
                    w = w + 8
                    y = y + offset[:, group] * a.sum(1, keepdim=True, dtype=torch.int64).float()
                y = y + scale[:, group] * exact_mm(a, w.t()).float()
        if isinstance(zero_x, Tensor):
            y = y - zero_x.float() * weight_sum
        elif zero_x:
            y = y - zero_x * weight_sum
        y = y * scale_x
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype).reshape(*x.shape[:-1], n)


def weight_of(q: Tensor, scale: Tensor, offset: Tensor | None, group_size: int) -> Tensor:
    """The weight [N, K] in fp64, exactly, but for the rounding of offset."""
    codes = q.double().reshape(q.shape[0], scale.shape[1], group_size)
    if offset is None:
        return (codes * scale.double()[..., None]).reshape(q.shape)
    return ((codes + 8) * scale.double()[..., None] + offset.double()[..., None]).reshape(q.shape)


def weight_sum_of(q: Tensor, scale: Tensor, offset: Tensor | None, group_size: int) -> Tensor:
    """The sum of each output channel's weights [N], rounded once to fp32."""
    sums = q.reshape(q.shape[0], scale.shape[1], group_size).sum(-1, dtype=torch.int64).double()
    if offset is None:
        return (sums * scale.double()).sum(1).float()
    return ((sums + 8 * group_size) * scale.double() + group_size * offset.double()).sum(1).float()
