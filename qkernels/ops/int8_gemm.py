"""int8 matrix multiplication, and the linear layer on packed, frozen int8 weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .. import checks, gemm_checks, layouts, library, samples
from ..reference import int8_gemm as reference
from ..reference.transforms import as_if
from .autograd import entered, transformed
from .frozen import (
    activated,
    as_torch_jit_takes_them,
    bias_gradient,
    constant,
    represented,
    through_weight,
    wants_gradient,
)

_define = partial(library.define, cpu=("amx", "avx512vnni", "avx2", "scalar"))


def _int8_mm_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() == 2:
        m, k = x.shape
        yield samples.codes(m, k), samples.codes(33, k).t()
        yield samples.codes(k, m).t(), samples.codes(k, 5)


def _int8_scaled_mm_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for a, b in _int8_mm_samples(x):
        m, n = a.shape[0], b.shape[1]
        yield a, b, torch.rand(1), torch.rand(n), None, None, None, "none", torch.float32, None, None
        zero_point = torch.randint(-8, 8, (m, 1), dtype=torch.int32)
        rest = torch.rand(m, 1), torch.rand(n), zero_point, None, torch.randn(n)
        yield a, b, *rest, "gelu", torch.bfloat16, None, None
        yield a, b, *rest, "silu", torch.int8, torch.tensor(2.0), torch.tensor(-100)


def _int8_pack_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() == 2:
        yield (samples.codes(*x.shape),)


def _int8_unpack_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for (w,) in _int8_pack_samples(x):
        yield reference.int8_pack(w)[0], *w.shape


def _int8_linear_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() == 2 and x.dtype != torch.float64:
        data, colsum = reference.int8_pack(samples.codes(33, x.shape[1]))
        plain = "none", x.dtype, None, None
        yield x, data, colsum, torch.rand(33), torch.randn(33), None, None, *samples.INT8, *plain
        zero_point = torch.tensor([5], dtype=torch.int32)
        yield x, data, colsum, torch.rand(33), None, torch.tensor([0.02]), zero_point, *samples.INT8, *plain
        q, m = samples.codes(*x.shape), x.shape[0]
        given = torch.rand(m), torch.randint(-8, 8, (m,)), *samples.INT8
        yield q, data, colsum, torch.rand(33), None, *given, "relu", torch.int8, torch.tensor(2.0), zero_point


def _fake_mm(a: Tensor, b: Tensor) -> Tensor:
    gemm_checks.int8_mm(a, b)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.int32)


def _fake_scaled_mm(
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
    gemm_checks.int8_mm(a, b)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


def _fake_pack(w: Tensor) -> tuple[Tensor, Tensor]:
    return (
        w.new_empty(layouts.int8_shape(layouts.PANELS, *w.shape), dtype=torch.int8),
        w.new_empty((w.shape[0],), dtype=torch.int32),
    )


def _fake_linear(
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
    return x.new_empty((*x.shape[:-1], colsum.shape[0]), dtype=out_dtype)


_int8_mm = _define(
    "int8_mm", "(Tensor a, Tensor b) -> Tensor", reference.int8_mm, _fake_mm, triton=True, samples=_int8_mm_samples
)
_int8_scaled_mm = _define(
    "int8_scaled_mm",
    "(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? zero_point_a, Tensor? colsum_b, Tensor? bias, "
    "str activation, ScalarType out_dtype, Tensor? out_scale, Tensor? out_zero_point) -> Tensor",
    reference.int8_scaled_mm,
    _fake_scaled_mm,
    triton=True,
    samples=_int8_scaled_mm_samples,
)
int8_pack = _define(
    "int8_pack",
    "(Tensor w) -> (Tensor data, Tensor colsum)",
    reference.int8_pack,
    _fake_pack,
    samples=_int8_pack_samples,
)
int8_unpack = _define(
    "int8_unpack",
    "(Tensor data, SymInt n, SymInt k) -> Tensor",
    reference.int8_unpack,
    lambda data, n, k: data.new_empty((n, k)),
    cpu=("scalar",),
    samples=_int8_unpack_samples,
)
_int8_linear = _define(
    "int8_linear",
    "(Tensor x, Tensor data, Tensor colsum, Tensor scale, Tensor? bias, Tensor? input_scale, Tensor? input_zero_point, "
    "SymInt quant_min, SymInt quant_max, str activation, ScalarType out_dtype, Tensor? out_scale, "
    "Tensor? out_zero_point) -> Tensor",
    reference.int8_linear,
    _fake_linear,
    triton=True,
    samples=_int8_linear_samples,
)


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """Exact int32 product of int8 matrices, as ``torch._int_mm``, but for every shape and stride.

    Args:
        a: [M, K] int8.
        b: [K, N] int8; fastest as the ``.t()`` of a contiguous [N, K], which needs no packing at small M.

    Returns:
        [M, N] int32. Not differentiable.

    Raises:
        RuntimeError: K differs, or K > 131071, beyond which int32 could overflow.
    """
    return _int8_mm(a, b)


def _output(
    activation: str | None, out_dtype: torch.dtype | None, default: torch.dtype, out_scale: Tensor | None
) -> tuple[str, torch.dtype]:
    if out_dtype is None:
        out_dtype = default if out_scale is None else torch.int8
    return activation or "none", out_dtype


def int8_scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    zero_point_a: Tensor | None = None,
    colsum_b: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor:
    """activation(((a − zero_point_a) @ b)·scale_b·scale_a + bias): exact in integers, then fp32 in this order.

    Args:
        a: [M, K] int8; b: [K, N] int8, any strides, K ≤ 131071 (see ``int8_mm``).
        scale_a: one element, [M] or [M, 1], floating.
        scale_b: one element, [N] or [1, N], floating.
        zero_point_a: one element, [M] or [M, 1], integers within int32; the op subtracts zero_point·colsum(b).
        colsum_b: [N] int32, ``b.sum(0)`` if it is known: with a zero point it saves a GPU a pass over b.
        bias: [N], floating.
        activation: None, "relu", "gelu" (the form with erf, within 4e-7) or "silu".
        out_dtype: torch.float32, torch.bfloat16 (the default) or torch.float16: the result is rounded once. With
            out_scale it is torch.int8.
        out_scale: one element: the output is clamp(round(result/out_scale) + out_zero_point, −128, 127) in int8, codes
            for a next product; NaN becomes the zero point.
        out_zero_point: one integer within −128…127; None: 0.

    Returns:
        [M, N] of out_dtype. Differentiable in scale_a, scale_b and bias; codes carry no gradient.

    Raises:
        RuntimeError: another shape or dtype.
    """
    output = _output(activation, out_dtype, torch.bfloat16, out_scale)
    scale_a, scale_b, bias = as_torch_jit_takes_them(scale_a, scale_b, bias)
    if transformed() or wants_gradient(scale_a, scale_b, bias):
        if out_scale is None:
            return _differentiable_scaled_mm(
                a, b, scale_a, scale_b, zero_point_a, colsum_b, bias, activation, output[1], out_zero_point
            )
        scale_a, scale_b, bias = scale_a.detach(), scale_b.detach(), constant(bias)
    return _int8_scaled_mm(a, b, scale_a, scale_b, zero_point_a, colsum_b, bias, *output, out_scale, out_zero_point)


def _differentiable_scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    zero_point_a: Tensor | None,
    colsum_b: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    out_zero_point: Tensor | None,
) -> Tensor:
    """``reference.epilogue`` on the exact product, written so that autograd can differentiate it."""
    gemm_checks.int8_scaled_mm(
        a, b, scale_a, scale_b, zero_point_a, colsum_b, bias, activation or "none", out_dtype, None, out_zero_point
    )
    acc = _int8_mm(a, b)
    if zero_point_a is not None:
        colsum = b.sum(0, dtype=torch.int64) if colsum_b is None else colsum_b
        acc = acc.long() - zero_point_a.long().reshape(-1, 1) * colsum
    z = acc.float() * scale_b.float().reshape(-1) * scale_a.float().reshape(-1, 1)
    return activated(z if bias is None else z + bias.float(), activation, out_dtype)


class PackedInt8:
    """A linear layer's weight [N, K] as int8 codes in the layout that the int8 kernels stream, with its scales.

    It is frozen: no gradient flows back to the tensors that it is packed from.

    Attributes:
        data: packed codes, int8, in the order that ``layout`` names (see qkernels/layouts.py).
        colsum: [N] int32, the sum of each output channel's codes.
        scale: [N] fp32; weight ≈ code·scale.
        shape: (N, K).
    """

    def __init__(self, data: Tensor, colsum: Tensor, scale: Tensor, shape: tuple[int, int]) -> None:
        self.data, self.colsum, self.scale, self.shape = data, colsum, scale, shape

    @classmethod
    def from_float(cls, w: Tensor) -> PackedInt8:
        """Symmetric quantization per output channel: scale = amax/127, codes −127…127.

        Args:
            w: [N, K] floating. An all-zero channel gives zeros (its scale is the smallest normal fp32).

        Raises:
            ValueError: w is not a finite floating matrix.
        """
        checks.finite_weight(w)
        values = w.detach().float()
        amax = values.abs().amax(1) if w.shape[1] else values.new_zeros(w.shape[0])
        scale = (amax / 127).clamp(min=reference.TINY)
        q = (values * (1 / scale)[:, None]).round().clamp(-127, 127).to(torch.int8)
        return cls.from_quantized(q, scale)

    @classmethod
    def from_quantized(cls, q: Tensor, scale: Tensor) -> PackedInt8:
        """Packs codes q [N, K] int8 with scale: one element, [N] or [N, 1].

        Raises:
            ValueError: scale has another shape.
            RuntimeError: q is not int8 [N, K] with K ≤ 131071.
        """
        if layouts.int8_layout_on(q.device) == layouts.ROWS and q.dtype == torch.int8 and q.dim() == 2:
            gemm_checks.max_k("w", q.shape[1])
            data, colsum = layouts.int8_to_rows(q), q.sum(1, dtype=torch.int32)
        else:
            data, colsum = int8_pack(q)
        n, k = q.shape
        if scale.numel() != 1 and scale.shape not in ((n,), (n, 1)):
            raise ValueError(f"scale: got shape {list(scale.shape)}; accepted: one element, [{n}] or [{n}, 1]")
        return cls(data, colsum, scale.detach().float().reshape(-1).expand(n).contiguous(), (n, k))

    @property
    def layout(self) -> str:
        """The name and version of the order of data: "panels-1" for a CPU, "rows-1" for a GPU."""
        return layouts.int8_layout(self.data)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """(q [N, K] int8, scale [N] fp32), exactly what was packed."""
        if self.layout == layouts.ROWS:
            return layouts.int8_unpack(self.data, *self.shape), self.scale
        return int8_unpack(self.data, *self.shape), self.scale

    def __repr__(self) -> str:
        return f"PackedInt8(shape={self.shape})"


torch.serialization.add_safe_globals([PackedInt8])  # torch.load(weights_only=True)


def _rows_of(data: Tensor, scale: Tensor, k: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """The weight's rows start…stop from packed data; start is a multiple of PANEL."""
    if layouts.int8_layout(data) == layouts.ROWS:
        q = data[start:stop, :k]
    else:
        q = int8_unpack(data[start // layouts.PANEL : -(-stop // layouts.PANEL)], stop - start, k)
    return q.float().mul_(scale[start:stop, None]).to(dtype)


class _Int8Linear(Function):
    """Sends x's gradient to ``values``, which ``represented(x)`` gives. Keeps the codes of the weight."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, bias: Tensor | None, x: Tensor, data: Tensor, colsum: Tensor, scale: Tensor,
        *rest: Any,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(data, scale)
        ctx.shape, ctx.dtypes = (colsum.shape[0], x.shape[-1]), (values.dtype, None if bias is None else bias.dtype)
        return _int8_linear(x, data, colsum, scale, bias, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        data, scale = ctx.saved_tensors
        n, k = ctx.shape
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = through_weight(grad, n, k, partial(_rows_of, data, scale, k)).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dbias = bias_gradient(grad, tuple(range(grad.dim() - 1)), ctx.dtypes[1])
        return dx, dbias, *[None] * (len(ctx.needs_input_grad) - 2)


_linear = entered(_Int8Linear)


def _differentiable_linear(
    x: Tensor,
    packed: PackedInt8,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    activation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    gemm_checks.activation(activation or "none")
    sum_dtype = out_dtype if activation is None else torch.float32
    weight = packed.data, packed.colsum, packed.scale
    rest: Any = constant(input_scale), input_zero_point, quant_min, quant_max, "none", sum_dtype, None, None
    values = represented(x, input_scale, input_zero_point, quant_min, quant_max)
    if transformed():
        y = reference.int8_linear(x.detach(), *weight, constant(bias), *rest)
        w = _rows_of(packed.data, packed.scale, packed.shape[1], 0, packed.shape[0], torch.float32)
        z = as_if(y, F.linear(values.float(), w, None if bias is None else bias.float()))
    else:
        z = _linear(values, bias, x.detach(), *weight, *rest)
    return activated(z, activation, out_dtype)


def by_row(name: str, values: Tensor | None, x: Tensor) -> Tensor | None:
    """The values for the rows of x as the op takes them: one element or [M]."""
    if values is None or values.numel() == 1:
        return values
    if values.shape not in (x.shape[:-1], (*x.shape[:-1], 1)):
        raise RuntimeError(
            f"{name}: got shape {list(values.shape)}; accepted: one element, {list(x.shape[:-1])} or "
            f"{[*x.shape[:-1], 1]}, a value for each row of x"
        )
    return values.reshape(-1)


def int8_linear(
    x: Tensor,
    packed: PackedInt8,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    quant_min: int = -128,
    quant_max: int = 127,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias), where x is int8 codes or the op quantizes x to them; sums are exact.

    out = activation(((acc − zero_point·colsum)·weight_scale)·scale_x + bias) in fp32, rounded once.

    Args:
        x: [..., K]; fp32, bf16 or fp16; or int8 codes, from ``quantize_dynamic``, ``rms_norm_quantize_dynamic``,
            ``silu_mul_quantize_dynamic`` or a product with an out_scale.
        packed: weight [N, K].
        bias: [N], floating.
        input_scale: None: dynamic, each row by its own scale amax/127. One element: static quantization,
            q = clamp(round(x/input_scale) + input_zero_point, quant_min, quant_max). For codes: their scale, one
            element or one for each row, [...] or [..., 1].
        input_zero_point: one integer within quant_min…quant_max; only with input_scale; None: 0. For codes: any
            integers within int32, one or one for each row.
        quant_min, quant_max: inclusive range of a floating x's codes, within int8; a 4-bit activation has −8 and 7.
        activation, out_scale, out_zero_point: see ``int8_scaled_mm``.
        out_dtype: dtype of a floating result; by default x's dtype, for codes torch.bfloat16.

    Returns:
        [..., N] of x's dtype, of out_dtype, or with out_scale int8. A NaN in x makes its row NaN; an infinity saturates
        with a static scale and makes its row NaN with a dynamic one.

    The weight gets no gradient; all else is differentiable as the float layer on ``fake_quantize(x)``. dx = dy @ the
    dequantized weight, which passes straight through with a dynamic scale and is 0 where a static one clips; bias and a
    floating input_scale get gradients. The backward pass keeps the packed codes (with "gelu" and "silu" also fp32
    sums). int8 codes, in or out, carry no gradient.

    Raises:
        RuntimeError: another shape, dtype or range.
    """
    if x.is_nested:
        checks.dense("x", x)
    if x.dim() == 0 or x.shape[-1] != packed.shape[1]:
        raise RuntimeError(f"x: got shape {list(x.shape)}; accepted: [..., {packed.shape[1]}], the weight's K")
    if x.dtype == torch.int8:
        input_scale = by_row("input_scale", input_scale, x)
        input_zero_point = by_row("input_zero_point", input_zero_point, x)
    output = _output(activation, out_dtype, torch.bfloat16 if x.dtype == torch.int8 else x.dtype, out_scale)
    x, bias, input_scale = as_torch_jit_takes_them(x, bias, input_scale)
    if transformed() or wants_gradient(x, bias, input_scale):
        if out_scale is None and out_zero_point is None:
            return _differentiable_linear(
                x, packed, bias, input_scale, input_zero_point, quant_min, quant_max, activation, output[1]
            )
        x, bias, input_scale = x.detach(), constant(bias), constant(input_scale)
    return _int8_linear(
        x, packed.data, packed.colsum, packed.scale, bias, input_scale, input_zero_point, quant_min, quant_max,
        *output, out_scale, out_zero_point,
    )  # fmt: skip
