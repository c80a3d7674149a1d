"""int8 matrix multiplication, and the linear layer on packed int8 weights. Inference ops: not differentiable."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import library
from ..reference import int8_gemm as reference

_define = partial(library.define, cpu=("avx512vnni", "avx2", "scalar"))


def _fake_mm(a: Tensor, b: Tensor) -> Tensor:
    reference.check_matrices(a, b)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.int32)


def _fake_scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    zero_point_a: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    reference.check_matrices(a, b)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


def _fake_pack(w: Tensor) -> tuple[Tensor, Tensor]:
    return (
        w.new_empty(reference.packed_shape(w.shape[0], w.shape[1]), dtype=torch.int8),
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
) -> Tensor:
    return x.new_empty((*x.shape[:-1], colsum.shape[0]))


_int8_mm = _define("int8_mm", "(Tensor a, Tensor b) -> Tensor", reference.int8_mm, _fake_mm, triton=True)
_int8_scaled_mm = _define(
    "int8_scaled_mm",
    "(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? zero_point_a, Tensor? bias, ScalarType out_dtype) "
    "-> Tensor",
    reference.int8_scaled_mm,
    _fake_scaled_mm,
    triton=True,
)
_int8_pack = _define("int8_pack", "(Tensor w) -> (Tensor data, Tensor colsum)", reference.int8_pack, _fake_pack)
_int8_unpack = _define(
    "int8_unpack",
    "(Tensor data, SymInt n, SymInt k) -> Tensor",
    reference.int8_unpack,
    lambda data, n, k: data.new_empty((n, k)),
    cpu=("scalar",),
)
_int8_linear = _define(
    "int8_linear",
    "(Tensor x, Tensor data, Tensor colsum, Tensor scale, Tensor? bias, Tensor? input_scale, Tensor? input_zero_point, "
    "SymInt quant_min, SymInt quant_max) -> Tensor",
    reference.int8_linear,
    _fake_linear,
    triton=True,
)


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """Exact int32 product of int8 matrices, as ``torch._int_mm`` but for every shape and stride.

    Args:
        a: [M, K] int8.
        b: [K, N] int8; fastest as the ``.t()`` of a contiguous [N, K], which needs no packing at small M.

    Returns:
        [M, N] int32. Not differentiable.

    Raises:
        RuntimeError: K differs, or K > 131071, beyond which int32 could overflow.
    """
    return _int8_mm(a, b)


def int8_scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    zero_point_a: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """((a − zero_point_a) @ b)·scale_b·scale_a + bias: exact in integers, then fp32 in this order, rounded once.

    Args:
        a: [M, K] int8; b: [K, N] int8, any strides, K ≤ 131071 (see ``int8_mm``).
        scale_a: one element, [M] or [M, 1], floating.
        scale_b: one element, [N] or [1, N], floating.
        zero_point_a: one element, [M] or [M, 1], integers within int32; taken off as zero_point·colsum(b).
        bias: [N], floating.
        out_dtype: torch.float32, torch.bfloat16 or torch.float16.

    Returns:
        [M, N] of out_dtype. Not differentiable.

    Raises:
        RuntimeError: a shape or dtype other than these.
    """
    return _int8_scaled_mm(a, b, scale_a, scale_b, zero_point_a, bias, out_dtype)


class PackedInt8:
    """A linear layer's weight [N, K] as int8 codes in the layout that the int8 kernels stream, with its scales.

    Attributes:
        data: packed codes, int8: for the CPU in panels (csrc/cpu/int8_gemm.h), on a GPU [N, K] with K padded to 16.
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
        if w.dim() != 2 or not w.is_floating_point():
            raise ValueError(f"w: got {w.dtype} of shape {list(w.shape)}; accepted: floating [N, K]")
        values = w.detach().float()
        if not bool(values.isfinite().all()):
            raise ValueError("w: got NaN or infinite values; accepted: finite weights")
        amax = values.abs().amax(1) if w.shape[1] else values.new_zeros(w.shape[0])
        scale = (amax / 127).clamp(min=reference.TINY)
        q = (values * (1 / scale)[:, None]).round().clamp(-127, 127).to(torch.int8)
        return cls.from_quantized(q, scale)

    @classmethod
    def from_quantized(cls, q: Tensor, scale: Tensor) -> PackedInt8:
        """Packs codes q [N, K] int8 with scale: one element, [N] or [N, 1].

        Raises:
            ValueError: scale has another shape. RuntimeError: q is not int8 [N, K] with K ≤ 131071.
        """
        if q.device.type == "cuda" and q.dtype == torch.int8 and q.dim() == 2:
            reference.check_k("w", q.shape[1])
            data, colsum = q.new_zeros(reference.k_major_shape(*q.shape)), q.sum(1, dtype=torch.int32)
            data[:, : q.shape[1]] = q
        else:
            data, colsum = _int8_pack(q)
        n, k = q.shape
        if scale.numel() != 1 and scale.shape not in ((n,), (n, 1)):
            raise ValueError(f"scale: got shape {list(scale.shape)}; accepted: one element, [{n}] or [{n}, 1]")
        return cls(data, colsum, scale.detach().float().reshape(-1).expand(n).contiguous(), (n, k))

    def unpack(self) -> tuple[Tensor, Tensor]:
        """(q [N, K] int8, scale [N] fp32), exactly what was packed."""
        if self.data.dim() == 2:
            return self.data[:, : self.shape[1]].clone(memory_format=torch.contiguous_format), self.scale
        return _int8_unpack(self.data, *self.shape), self.scale

    def __repr__(self) -> str:
        return f"PackedInt8(shape={self.shape})"


def int8_linear(
    x: Tensor,
    packed: PackedInt8,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    quant_min: int = -128,
    quant_max: int = 127,
) -> Tensor:
    """x @ weight.T + bias with x quantized to int8 on the way in; sums are exact, the float epilogue is fp32.

    out = ((acc − zero_point·colsum)·weight_scale)·scale_x + bias, rounded once to x's dtype.

    Args:
        x: [..., K]; fp32, bf16 or fp16.
        packed: weight [N, K].
        bias: [N], floating.
        input_scale: None: dynamic, each row by its own scale amax/127. One element: static quantization,
            q = clamp(round(x/input_scale) + input_zero_point, quant_min, quant_max).
        input_zero_point: one integer within quant_min…quant_max; only with input_scale; None: 0.
        quant_min, quant_max: inclusive range of x's codes, within int8; a 4-bit activation has −8 and 7.

    Returns:
        [..., N] of x's dtype. A NaN in x makes its row NaN; an infinity saturates with a static scale and makes its row
        NaN with a dynamic one. Not differentiable.

    Raises:
        RuntimeError: a shape, dtype or range other than these.
    """
    if x.dim() == 0 or x.shape[-1] != packed.shape[1]:
        raise RuntimeError(f"x: got shape {list(x.shape)}; accepted: [..., {packed.shape[1]}], the weight's K")
    return _int8_linear(
        x, packed.data, packed.colsum, packed.scale, bias, input_scale, input_zero_point, quant_min, quant_max
    )
