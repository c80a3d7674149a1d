"""The rules of arguments of integer products (int8, int4, convolution) and of packing; see ``checks``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import layouts
from .checks import ACTIVATIONS, device, int8_range, require, values

MAX_K = 131071  # 128 * 128 * MAX_K < 2**31: no int8 dot product of this length overflows int32
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE_DTYPES = OUT_DTYPES  # dtypes of an int4 weight's scales


def devices(x: Tensor, of: str = "x", **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None:
            device(name, t, x, of)


def max_k(name: str, k: int) -> None:
    require(k <= MAX_K, f"{name}: got K = {k}; accepted: K <= {MAX_K}, where int8 products sum exactly in int32")


def activation(name: str) -> None:
    require(name in ACTIVATIONS, f"activation: got {name!r}; accepted: {', '.join(ACTIVATIONS)}")


def vector(name: str, t: Tensor, n: int, shapes: str, *, dim: int | None = None, broadcast: bool = False) -> None:
    """t holds n values, as [n] or along ``dim`` of two dims; with ``broadcast`` it may also be one value for all."""
    flat = t.dim() == 1 and t.shape[0] == n
    column = dim is not None and t.dim() == 2 and t.shape[dim] == n and t.shape[1 - dim] == 1
    require(
        flat or column or (broadcast and t.numel() == 1),
        f"{name}: got shape {list(t.shape)}; accepted: {shapes} with {n} in place of the letter",
    )


def int_zero_point(name: str, t: Tensor) -> None:
    integer = t.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
    require(integer, f"{name}: got {t.dtype}; accepted: an integer dtype up to torch.int64")
    # On a GPU a check of values would wait for the device.
    if t.dtype == torch.int64 and t.device.type == "cpu" and t.numel():
        info = torch.iinfo(torch.int32)
        low, high = int(t.min()), int(t.max())
        require(
            info.min <= low and high <= info.max,
            f"{name}: got {low if low < info.min else high}; accepted: what torch.int32 holds",
        )


def static(of: str, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> None:
    """One scale and zero point for a whole tensor: the arguments ``of``_scale and ``of``_zero_point."""
    int8_range(quant_min, quant_max)
    require(scale.numel() == 1, f"{of}_scale: got shape {list(scale.shape)}; accepted: one element")
    values(f"{of}_scale", scale)
    z = 0
    if zero_point is not None:
        require(zero_point.numel() == 1, f"{of}_zero_point: got shape {list(zero_point.shape)}; accepted: one element")
        int_zero_point(f"{of}_zero_point", zero_point)
        if zero_point.device.type != "cpu":
            return
        z = int(zero_point)
    require(
        quant_min <= z <= quant_max,
        f"{of}_zero_point: got {z}; accepted: quant_min to quant_max, {quant_min} to {quant_max}",
    )


def by_row(name: str, t: Tensor, m: int) -> None:
    vector(name, t, m, "one element, [M] or [M, 1]", dim=0, broadcast=True)


def bias_of(bias: Tensor | None, n: int, letter: str = "N") -> None:
    if bias is not None:
        vector("bias", bias, n, f"[{letter}]")
        values("bias", bias)


def int32_sums(name: str, t: Tensor) -> None:
    require(t.dtype == torch.int32 and t.is_contiguous(), f"{name}: got {t.dtype}; accepted: contiguous torch.int32")


def output(
    activation_name: str, out_dtype: torch.dtype, out_scale: Tensor | None, out_zero_point: Tensor | None
) -> None:
    activation(activation_name)
    if out_scale is None:
        require(
            out_dtype in OUT_DTYPES,
            f"out_dtype: got {out_dtype}; accepted: torch.float32, torch.bfloat16, torch.float16, and with out_scale "
            "torch.int8",
        )
        require(out_zero_point is None, "out_zero_point: got a tensor without out_scale; accepted: both, or neither")
    else:
        require(out_dtype == torch.int8, f"out_dtype: got {out_dtype}; accepted: torch.int8, as there is an out_scale")
        static("out", out_scale, out_zero_point, -128, 127)


def int8_mm(a: Tensor, b: Tensor) -> None:
    for name, t in (("a", a), ("b", b)):
        require(t.dtype == torch.int8, f"{name}: got {t.dtype}; accepted: torch.int8")
        require(t.dim() == 2, f"{name}: got shape {list(t.shape)}; accepted: 2 dims")
    require(a.device == b.device, f"b: got a tensor on {b.device}; accepted: a's device, {a.device}")
    require(a.shape[1] == b.shape[0], f"b: got shape {list(b.shape)}; accepted: [K, N] with a's K, {a.shape[1]}")
    max_k("a", a.shape[1])


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
) -> None:
    int8_mm(a, b)
    devices(
        a, "a", scale_a=scale_a, scale_b=scale_b, zero_point_a=zero_point_a, colsum_b=colsum_b, bias=bias,
        out_scale=out_scale, out_zero_point=out_zero_point,
    )  # fmt: skip
    m, n = a.shape[0], b.shape[1]
    by_row("scale_a", scale_a, m)
    values("scale_a", scale_a)
    vector("scale_b", scale_b, n, "one element, [N] or [1, N]", dim=1, broadcast=True)
    values("scale_b", scale_b)
    bias_of(bias, n)
    if zero_point_a is not None:
        by_row("zero_point_a", zero_point_a, m)
        int_zero_point("zero_point_a", zero_point_a)
    if colsum_b is not None:
        vector("colsum_b", colsum_b, n, "[N]")
        require(colsum_b.dtype == torch.int32, f"colsum_b: got {colsum_b.dtype}; accepted: torch.int32")
    output(activation, out_dtype, out_scale, out_zero_point)


def matrix_of_codes(name: str, q: Tensor) -> None:
    """q is an int8 matrix [N, K] that can be packed."""
    require(q.dtype == torch.int8, f"{name}: got {q.dtype}; accepted: torch.int8")
    require(q.dim() == 2, f"{name}: got shape {list(q.shape)}; accepted: [N, K]")
    max_k(name, q.shape[1])


def shape_of_weight(n: int, k: int) -> None:
    require(n >= 0 and k >= 0, f"n, k: got {n}, {k}; accepted: at least 0")


def int8_data(data: Tensor, n: int, k: int) -> None:
    """data is an int8 weight [N, K] in either layout."""
    require(data.dtype == torch.int8, f"data: got {data.dtype}; accepted: torch.int8")
    expected = layouts.int8_shape(layouts.int8_layout(data), n, k)
    require(
        tuple(data.shape) == expected,
        f"data: got shape {list(data.shape)}; accepted: what int8_pack gives for N = {n} and K = {k}, {list(expected)}",
    )
    require(data.is_contiguous(), "data: got strided memory; accepted: contiguous")


def rows(x: Tensor) -> None:
    require(
        x.dtype in (*OUT_DTYPES, torch.int8),
        f"x: got {x.dtype}; accepted: torch.float32, torch.bfloat16, torch.float16, torch.int8",
    )
    require(x.dim() >= 1, "x: got 0 dims; accepted: [..., K]")


def input_quantizer(
    x: Tensor, input_scale: Tensor | None, input_zero_point: Tensor | None, quant_min: int, quant_max: int
) -> None:
    """x is codes with a scale for each row or for all, or floats with one scale, or floats without (dynamic)."""
    if x.dtype == torch.int8:
        require(
            input_scale is not None, "input_scale: got None; accepted: the scale of the codes x, one element or [M]"
        )
        assert input_scale is not None
        m = x.shape[:-1].numel()
        by_row("input_scale", input_scale, m)
        values("input_scale", input_scale)
        if input_zero_point is not None:
            by_row("input_zero_point", input_zero_point, m)
            int_zero_point("input_zero_point", input_zero_point)
    elif input_scale is None:
        require(
            input_zero_point is None, "input_zero_point: got a tensor without input_scale; accepted: both, or neither"
        )
        int8_range(quant_min, quant_max)
    else:
        static("input", input_scale, input_zero_point, quant_min, quant_max)


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
) -> None:
    rows(x)
    devices(
        x, data=data, colsum=colsum, scale=scale, bias=bias, input_scale=input_scale, input_zero_point=input_zero_point,
        out_scale=out_scale, out_zero_point=out_zero_point,
    )  # fmt: skip
    n, k = colsum.numel(), x.shape[-1]
    vector("colsum", colsum, n, "[N]")
    max_k("x", k)
    int8_data(data, n, k)
    int32_sums("colsum", colsum)
    vector("scale", scale, n, "[N]")
    values("scale", scale)
    bias_of(bias, n)
    input_quantizer(x, input_scale, input_zero_point, quant_min, quant_max)
    output(activation, out_dtype, out_scale, out_zero_point)


def weight_group_size(group_size: int, k: int) -> None:
    """The group size of an int4 weight [N, K]."""
    require(
        group_size == k or (group_size >= 16 and group_size % 8 == 0 and k % group_size == 0),
        f"group_size: got {group_size}; accepted: -1 or K = {k}, or a multiple of 8, from 16 on, that divides it",
    )


def int4_data(data: Tensor, n: int, k: int, group_size: int) -> None:
    """data is a weight [N, K] of 2 to 4 bits, in the layout that its dims tell."""
    require(data.dtype == torch.uint8, f"data: got {data.dtype}; accepted: torch.uint8")
    bits = layouts.int4_bits(data)
    expected = layouts.int4_shape(layouts.int4_layout(data), n, k, group_size, bits)
    require(
        tuple(data.shape) == expected,
        f"data: got shape {list(data.shape)}; accepted: what PackedInt holds for N = {n}, K = {k} and {bits} bits, "
        f"{list(expected)}",
    )
    require(data.is_contiguous(), "data: got strided memory; accepted: contiguous")


def int4_groups(name: str, t: Tensor, n: int, groups: int, layout: str) -> None:
    """t holds the scales, zero points or minima of an int4 weight in this layout."""
    expected = layouts.groups_shape(layout, n, groups)
    require(
        tuple(t.shape) == expected,
        f"{name}: got shape {list(t.shape)}; accepted: what PackedInt holds for N = {n} and {groups} groups, "
        f"{list(expected)}",
    )
    require(t.is_contiguous(), f"{name}: got strided memory; accepted: contiguous")


def scale_dtype(name: str, t: Tensor) -> None:
    require(
        t.dtype in SCALE_DTYPES,
        f"{name}: got {t.dtype}; accepted: torch.float32, torch.bfloat16, torch.float16",
    )


def activation_bits(act_bits: int) -> None:
    require(act_bits in (8, 16), f"act_bits: got {act_bits}; accepted: 8, 16")


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
) -> None:
    rows(x)
    activation_bits(act_bits)
    require(
        out_dtype in OUT_DTYPES, f"out_dtype: got {out_dtype}; accepted: torch.float32, torch.bfloat16, torch.float16"
    )
    devices(
        x, data=data, scale=scale, zero_point=zero_point, minimum=minimum, weight_sum=weight_sum, bias=bias,
        input_scale=input_scale, input_zero_point=input_zero_point,
    )  # fmt: skip
    n, k = weight_sum.numel(), x.shape[-1]
    vector("weight_sum", weight_sum, n, "[N]")
    require(
        weight_sum.dtype == torch.float32 and weight_sum.is_contiguous(),
        f"weight_sum: got {weight_sum.dtype}; accepted: contiguous torch.float32",
    )
    max_k("x", k)
    layout = layouts.int4_layout(data)
    int4_data(data, n, k, group_size)
    weight_group_size(group_size, k)
    groups = layouts.groups_of(k, group_size)
    int4_groups("scale", scale, n, groups, layout)
    scale_dtype("scale", scale)
    require(zero_point is None or minimum is None, "minimum: got a tensor beside zero_point; accepted: one of them")
    if zero_point is not None:
        int4_groups("zero_point", zero_point, n, groups, layout)
        require(zero_point.dtype == torch.int8, f"zero_point: got {zero_point.dtype}; accepted: torch.int8")
    if minimum is not None:
        int4_groups("minimum", minimum, n, groups, layout)
        require(minimum.dtype == scale.dtype, f"minimum: got {minimum.dtype}; accepted: scale's dtype, {scale.dtype}")
    bias_of(bias, n)
    if act_bits == 8:
        input_quantizer(x, input_scale, input_zero_point, quant_min, quant_max)
        return
    require(x.dtype != torch.int8, "x: got torch.int8; accepted with act_bits 16: a floating dtype")
    require(
        input_scale is None and input_zero_point is None,
        "input_scale: got a tensor; accepted with act_bits 16: None, as x stays in float",
    )


def bits(bits: int) -> None:
    require(bits in layouts.BITS, f"bits: got {bits}; accepted: 2, 3, 4")


def pack_bits(q: Tensor, bits_: int) -> None:
    bits(bits_)
    require(q.dtype == torch.int8, f"q: got {q.dtype}; accepted: torch.int8")
    require(q.dim() >= 1, "q: got 0 dims; accepted: [..., K]")


def unpack_bits(packed: Tensor, bits_: int, k: int) -> None:
    bits(bits_)
    require(packed.dtype == torch.uint8, f"packed: got {packed.dtype}; accepted: torch.uint8")
    length = layouts.packed_length(max(k, 0), bits_)
    require(
        packed.dim() >= 1 and k >= 0 and packed.shape[-1] == length,
        f"packed: got shape {list(packed.shape)}; accepted: [..., {length}], what K = {k} codes of {bits_} bits take",
    )


def codes_of_bits(name: str, q: Tensor, bits_: int) -> None:
    """q holds codes of these bits; others would change silently. On a GPU this waits, so ops skip it there."""
    low, high = layouts.code_range(bits_)
    if q.numel() == 0 or q.is_meta:
        return
    least, most = (int(value) for value in torch.aminmax(q))
    bad = least if least < low else most
    require(low <= least and most <= high, f"{name}: got {bad}; accepted: the codes of {bits_} bits, {low} to {high}")
