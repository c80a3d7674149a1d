"""int8 matrix multiplication in plain torch: exact integer sums, then one fixed order of float operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import FUNCTIONS, check_activation

MAX_K = 131071  # 128 * 128 * MAX_K < 2**31: no int8 dot product of this length overflows int32
PANEL = 32  # output channels of one panel of packed weights
TINY = torch.finfo(torch.float32).tiny
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def check_k(name: str, k: int) -> None:
    check(k <= MAX_K, f"{name}: got K = {k}; accepted: K <= {MAX_K}, where int8 products sum exactly in int32")


def check_matrices(a: Tensor, b: Tensor) -> None:
    for name, t in (("a", a), ("b", b)):
        check(t.dtype == torch.int8, f"{name}: got {t.dtype}; accepted: torch.int8")
        check(t.dim() == 2, f"{name}: got shape {list(t.shape)}; accepted: 2 dims")
    check(a.device == b.device, f"b: got a tensor on {b.device}; accepted: a's device, {a.device}")
    check(a.shape[1] == b.shape[0], f"b: got shape {list(b.shape)}; accepted: [K, N] with a's K, {a.shape[1]}")
    check_k("a", a.shape[1])


def check_vector(name: str, t: Tensor, n: int, shapes: str, *, dim: int | None = None, broadcast: bool = False) -> None:
    """t holds n values: as [n], along ``dim`` of two dims, or as one value for all where ``broadcast``."""
    flat = t.dim() == 1 and t.shape[0] == n
    column = dim is not None and t.dim() == 2 and t.shape[dim] == n and t.shape[1 - dim] == 1
    check(
        flat or column or (broadcast and t.numel() == 1),
        f"{name}: got shape {list(t.shape)}; accepted: {shapes} with {n} in place of the letter",
    )


def check_floating(name: str, t: Tensor) -> None:
    check(
        t.is_floating_point(),
        f"{name}: got {t.dtype}; accepted: torch.float32, torch.float64, torch.float16, torch.bfloat16",
    )


def check_zero_point(name: str, t: Tensor) -> None:
    integer = t.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
    check(integer, f"{name}: got {t.dtype}; accepted: an integer dtype up to torch.int64")
    if (
        t.dtype == torch.int64 and t.device.type == "cpu" and t.numel()
    ):  # elsewhere a look at the values would synchronise
        info = torch.iinfo(torch.int32)
        low, high = int(t.min()), int(t.max())
        check(
            info.min <= low and high <= info.max,
            f"{name}: got {low if low < info.min else high}; accepted: what torch.int32 holds",
        )


def exact_mm(a: Tensor, b: Tensor) -> Tensor:
    """Exact int64 sums: every partial sum is an integer below 2**53."""
    return (a.double() @ b.double()).long()


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    check_matrices(a, b)
    return exact_mm(a, b).int()


def check_output(
    activation: str, out_dtype: torch.dtype, out_scale: Tensor | None, out_zero_point: Tensor | None
) -> None:
    check_activation(activation)
    if out_scale is None:
        check(
            out_dtype in OUT_DTYPES,
            f"out_dtype: got {out_dtype}; accepted: torch.float32, torch.bfloat16, torch.float16, and with out_scale "
            "torch.int8",
        )
        check(out_zero_point is None, "out_zero_point: got a tensor without out_scale; accepted: both, or neither")
    else:
        check(out_dtype == torch.int8, f"out_dtype: got {out_dtype}; accepted: torch.int8, as there is an out_scale")
        check_static("out", out_scale, out_zero_point, -128, 127)


def epilogue(
    acc: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    """acc [M, N] exact; scale_a one element or [M, 1]; scale_b one element or [N]; bias [N]."""
    y = acc.float() * scale_b.float() * scale_a.float()
    if bias is not None:
        y = y + bias.float()
    y = FUNCTIONS[activation](y)
    if out_scale is None:
        return y.to(out_dtype)
    scale, zero_point = static_qparams("out", out_scale, out_zero_point, -128, 127)
    q = ((y * (1 / scale)).round() + zero_point).clamp(-128, 127)
    return torch.where(q.isnan(), zero_point, q).to(torch.int8)


def check_scaled(
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
    check_matrices(a, b)
    m, n = a.shape[0], b.shape[1]
    check_vector("scale_a", scale_a, m, "one element, [M] or [M, 1]", dim=0, broadcast=True)
    check_floating("scale_a", scale_a)
    check_vector("scale_b", scale_b, n, "one element, [N] or [1, N]", dim=1, broadcast=True)
    check_floating("scale_b", scale_b)
    if bias is not None:
        check_vector("bias", bias, n, "[N]")
        check_floating("bias", bias)
    if zero_point_a is not None:
        check_vector("zero_point_a", zero_point_a, m, "one element, [M] or [M, 1]", dim=0, broadcast=True)
        check_zero_point("zero_point_a", zero_point_a)
    if colsum_b is not None:
        check_vector("colsum_b", colsum_b, n, "[N]")
        check(colsum_b.dtype == torch.int32, f"colsum_b: got {colsum_b.dtype}; accepted: torch.int32")
    check_output(activation, out_dtype, out_scale, out_zero_point)


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
    output = (activation, out_dtype, out_scale, out_zero_point)
    check_scaled(a, b, scale_a, scale_b, zero_point_a, colsum_b, bias, *output)
    acc = exact_mm(a, b)
    if zero_point_a is not None:
        acc = acc - zero_point_a.long().reshape(-1, 1) * b.sum(0, dtype=torch.int64)
    return epilogue(acc, scale_a.reshape(-1, 1), scale_b.reshape(-1), bias, *output)


def packed_shape(n: int, k: int) -> tuple[int, int, int, int]:
    return ((n + PANEL - 1) // PANEL, (k + 3) // 4, PANEL, 4)


def k_major_shape(n: int, k: int) -> tuple[int, int]:
    """Of weights packed for a GPU: [N, K], K padded by zeros to the 16 bytes that a GPU copies at a time."""
    return n, (k + 15) // 16 * 16


def int8_pack(w: Tensor) -> tuple[Tensor, Tensor]:
    """data[panel][k // 4][channel % 32][k % 4] and the sum of each channel; missing channels and k are zeros."""
    check(w.dtype == torch.int8, f"w: got {w.dtype}; accepted: torch.int8")
    check(w.dim() == 2, f"w: got shape {list(w.shape)}; accepted: [N, K]")
    n, k = w.shape
    check_k("w", k)
    n_panels, groups, _, _ = packed_shape(n, k)
    padded = torch.nn.functional.pad(w, (0, groups * 4 - k, 0, n_panels * PANEL - n))
    data = padded.view(n_panels, PANEL, groups, 4).permute(0, 2, 1, 3).clone(memory_format=torch.contiguous_format)
    return data, w.sum(1, dtype=torch.int32)


def check_packed(data: Tensor, n: int, k: int) -> None:
    check(data.dtype == torch.int8, f"data: got {data.dtype}; accepted: torch.int8")
    expected = packed_shape(n, k) if data.dim() != 2 else k_major_shape(n, k)
    check(
        tuple(data.shape) == expected,
        f"data: got shape {list(data.shape)}; accepted: what int8_pack gives for N = {n} and K = {k}, {list(expected)}",
    )
    check(data.is_contiguous(), "data: got strided memory; accepted: contiguous")


def int8_unpack(data: Tensor, n: int, k: int) -> Tensor:
    check_packed(data, n, k)
    if data.dim() == 2:
        return data[:, :k].clone(memory_format=torch.contiguous_format)
    n_panels, groups, _, _ = data.shape
    return (
        data.permute(0, 2, 1, 3)
        .reshape(n_panels * PANEL, groups * 4)[:n, :k]
        .clone(memory_format=torch.contiguous_format)
    )


def check_codes(quant_min: int, quant_max: int) -> None:
    check(
        -128 <= quant_min < quant_max <= 127,
        f"quant_min, quant_max: got {quant_min}, {quant_max}; accepted: -128 <= quant_min < quant_max <= 127",
    )


def check_static(of: str, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> None:
    """One scale and zero point, the arguments ``of``_scale and ``of``_zero_point."""
    check_codes(quant_min, quant_max)
    check(scale.numel() == 1, f"{of}_scale: got shape {list(scale.shape)}; accepted: one element")
    check_floating(f"{of}_scale", scale)
    if zero_point is None:
        return
    check(zero_point.numel() == 1, f"{of}_zero_point: got shape {list(zero_point.shape)}; accepted: one element")
    check_zero_point(f"{of}_zero_point", zero_point)
    if zero_point.device.type == "cpu":
        z = int(zero_point)
        check(
            quant_min <= z <= quant_max,
            f"{of}_zero_point: got {z}; accepted: quant_min to quant_max, {quant_min} to {quant_max}",
        )


def static_qparams(
    of: str, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    """The scale as fp32, floored at the smallest normal one and NaN where negative, and the zero point.

    A zero point beyond the range makes the scale NaN: on a GPU the host cannot look at it without waiting.
    """
    check_static(of, scale, zero_point, quant_min, quant_max)
    s = scale.detach().float().reshape(())
    s = torch.where(s < 0, torch.nan, s.clamp(min=TINY))
    if zero_point is None:
        return s, torch.zeros((), dtype=torch.int64, device=s.device)
    z = zero_point.reshape(()).long()
    return torch.where((z >= quant_min) & (z <= quant_max), s, torch.nan), z


def quantize_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    """Codes, and which elements were NaN (their code is quant_min; the caller makes their outputs NaN)."""
    t = x.float() * (1 / scale)
    q = (t.round() + zero_point).clamp(quant_min, quant_max)
    return torch.where(t.isnan(), quant_min, q).to(torch.int8), t.isnan()


def check_linear(
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
    check(
        x.dtype in (*OUT_DTYPES, torch.int8),
        f"x: got {x.dtype}; accepted: torch.float32, torch.bfloat16, torch.float16, torch.int8",
    )
    check(x.dim() >= 1, "x: got 0 dims; accepted: [..., K]")
    n, k = colsum.numel(), x.shape[-1]
    check_vector("colsum", colsum, n, "[N]")
    check_k("x", k)
    check_packed(data, n, k)
    check(
        colsum.dtype == torch.int32 and colsum.is_contiguous(),
        f"colsum: got {colsum.dtype}; accepted: contiguous torch.int32",
    )
    check_vector("scale", scale, n, "[N]")
    check_floating("scale", scale)
    if bias is not None:
        check_vector("bias", bias, n, "[N]")
        check_floating("bias", bias)
    if input_scale is None:
        check(x.dtype != torch.int8, "input_scale: got None; accepted: the scale of the codes x, one element or [M]")
        check(
            input_zero_point is None, "input_zero_point: got a tensor without input_scale; accepted: both, or neither"
        )
        check_codes(quant_min, quant_max)
    elif x.dtype == torch.int8:
        m = x.shape[:-1].numel()
        check_vector("input_scale", input_scale, m, "one element, [M] or [M, 1]", dim=0, broadcast=True)
        check_floating("input_scale", input_scale)
        if input_zero_point is not None:
            check_vector("input_zero_point", input_zero_point, m, "one element, [M] or [M, 1]", dim=0, broadcast=True)
            check_zero_point("input_zero_point", input_zero_point)
    else:
        check_static("input", input_scale, input_zero_point, quant_min, quant_max)
    check_output(activation, out_dtype, out_scale, out_zero_point)


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
    output = (activation, out_dtype, out_scale, out_zero_point)
    check_linear(x, data, colsum, scale, bias, input_scale, input_zero_point, quant_min, quant_max, *output)
    n, k = colsum.numel(), x.shape[-1]
    rows = x.detach().reshape(-1, k) if k else x.new_empty(x.shape[:-1].numel(), 0)
    zero_point: Tensor | int
    if x.dtype == torch.int8:
        assert input_scale is not None
        q, scale_a = rows, input_scale.detach().reshape(-1, 1)
        zero_point = 0 if input_zero_point is None else input_zero_point.reshape(-1, 1).long()
    else:
        if input_scale is None:
            half = (quant_max - quant_min) // 2
            zero_point = quant_max - half
            amax = rows.float().abs().amax(1, keepdim=True) if k else rows.new_zeros(rows.shape[0], 1).float()
            scale_a = (amax / half).clamp(min=TINY)
            scale_a = torch.where(scale_a.isfinite(), scale_a, torch.nan)
        else:
            scale_a, zero_point = static_qparams("input", input_scale, input_zero_point, quant_min, quant_max)
        q, nan = quantize_codes(rows, scale_a, zero_point, quant_min, quant_max)
        scale_a = torch.where(nan.any(1, keepdim=True), torch.nan, scale_a)
    acc = exact_mm(q, int8_unpack(data, n, k).t()) - zero_point * colsum.long()
    return epilogue(acc, scale_a, scale, bias, *output).reshape(*x.shape[:-1], n)
