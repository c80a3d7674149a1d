"""The linear layer on packed, frozen weights of 2 to 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .. import checks, gemm_checks, layouts, library, samples
from ..reference import int4_gemm as reference
from ..reference.transforms import as_if
from .autograd import entered, transformed
from .frozen import as_torch_jit_takes_them, bias_gradient, constant, represented, through_weight, wants_gradient
from .int8_gemm import by_row
from .packing import pack_bits, unpack_bits
from .pickling import reduce_for_a_process
from .weight_groups import grouped, quantize_groups, resolved_group_size


def _int4_pack_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if x.dim() == 2:
        for bits in layouts.BITS:
            low, high = layouts.code_range(bits)
            yield torch.randint(low, high + 1, x.shape, dtype=torch.int8), bits


def _int4_unpack_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    for q, bits in _int4_pack_samples(x):
        yield reference.int4_pack(q, bits), *q.shape


def _int4_linear_samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    """The outputs are fp32, so that no rounding of the output adds to the difference between two orders of sums."""
    if x.dim() == 2 and x.dtype != torch.float64:
        in_groups = x.shape[1] > 64  # groups of 32, else one group for each row
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)) if in_groups else x
        k = x.shape[1]
        size = 32 if in_groups else k
        groups = layouts.groups_of(k, size)
        data = reference.int4_pack(torch.randint(-8, 8, (33, k), dtype=torch.int8))
        zero_point = torch.randint(-8, 8, (33, groups), dtype=torch.int8)
        params = torch.rand(33, groups), zero_point, torch.randn(33, groups)
        scale, zero_point, minimum = map(layouts.to_panels, params)
        total, bias = torch.randn(33), torch.randn(33)
        dynamic = None, None, *samples.INT8, torch.float32
        yield x, data, scale, None, None, total, bias, size, 8, *dynamic
        yield x, data, scale, zero_point, None, total, None, size, 8, *dynamic
        static = torch.tensor([0.02]), torch.tensor([5], dtype=torch.int32), *samples.INT8, torch.float32
        yield x, data, scale, None, minimum, total, bias, size, 8, *static
        if x.isfinite().all():
            yield x, data, scale, None, None, total, bias, size, 16, *dynamic
            yield x, data, scale, zero_point, None, total, bias, size, 16, *dynamic
        for bits in (2, 3):
            low, high = layouts.code_range(bits)
            data = reference.int4_pack(torch.randint(low, high + 1, (33, k), dtype=torch.int8), bits)
            yield x, data, scale, None, None, total, bias, size, 8, *dynamic
            yield x, data, scale, zero_point, None, total, None, size, 8, *static


def _fake_pack(q: Tensor, bits: int = 4) -> Tensor:
    n, k = q.shape
    layout = layouts.PANELS if bits == 4 else layouts.PLANES
    return q.new_empty(layouts.int4_shape(layout, n, k, k, bits), dtype=torch.uint8)


def _fake_linear(x: Tensor, data: Tensor, scale: Tensor, zero_point: Tensor | None, minimum: Tensor | None,
                 weight_sum: Tensor, *rest: Any) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], weight_sum.shape[0]), dtype=rest[-1])


MAX_CUDA_ROWS = 64  # how many rows of x csrc/cuda takes


def _not_for_cuda(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    weight_sum: Tensor,
    bias: Tensor | None,
    group_size: int,
    act_bits: int,
    *_: Any,
) -> str | None:
    """Why the kernel of csrc/cuda, which is for few rows of x, does not take a call."""
    if act_bits != 16:
        return f"takes act_bits 16, got {act_bits}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"takes x of torch.bfloat16 and torch.float16, got {x.dtype}"
    if layouts.int4_layout(data) != layouts.HALVES:
        return f'takes weights in the layout "{layouts.HALVES}", got another'
    k, m = x.shape[-1], x.shape[:-1].numel()
    if not 1 <= m <= MAX_CUDA_ROWS:
        return f"takes 1 to {MAX_CUDA_ROWS} rows of x, got {m}"
    if k == 0 or k % 8:
        return f"takes K that is a multiple of 8, for copies of 16 bytes, got {k}"
    if group_size != k and group_size % 32:
        return f"takes a group_size that is K or a multiple of 32, got {group_size}"
    return None


def _on_gpu(*args: Any) -> tuple[Any, ...]:
    """The arguments of a sample, with the weight in a GPU's layout."""
    x, data, *params, total, bias, size = args[:8]
    n, k = total.numel(), x.shape[-1]
    halves = layouts.int4_to_halves(layouts.int4_unpack(data, n, k, size), size)
    groups = (None if t is None else layouts.by_group(t, n, layouts.PANELS).t().contiguous() for t in params)
    return x, halves, *groups, total, bias, size, *args[8:]


_int4_pack = library.define(
    "int4_pack",
    "(Tensor q, int bits=4) -> Tensor",
    reference.int4_pack,
    _fake_pack,
    cpu=("amx", "avx512vnni", "avx2", "scalar"),
    samples=_int4_pack_samples,
)
_int4_unpack = library.define(
    "int4_unpack",
    "(Tensor data, SymInt n, SymInt k) -> Tensor",
    reference.int4_unpack,
    lambda data, n, k: data.new_empty((n, k), dtype=torch.int8),
    cpu=("amx", "avx512vnni", "avx2", "scalar"),
    samples=_int4_unpack_samples,
)
_int4_linear = library.define(
    "int4_linear",
    "(Tensor x, Tensor data, Tensor scale, Tensor? zero_point, Tensor? minimum, Tensor weight_sum, Tensor? bias, "
    "SymInt group_size, int act_bits, Tensor? input_scale, Tensor? input_zero_point, SymInt quant_min, "
    "SymInt quant_max, ScalarType out_dtype) -> Tensor",
    reference.int4_linear,
    _fake_linear,
    cpu=("amx", "avx512vnni", "avx2", "scalar"),
    cuda=_not_for_cuda,
    triton=True,
    triton_first=True,  # until csrc/cuda's kernel has been measured on a GPU
    samples=_int4_linear_samples,
    on_gpu=_on_gpu,
    sums=(0,),
)


class PackedInt:
    """A linear layer's weight [N, K] as integer codes of 2, 3 or 4 bits, as the kernels stream them: on a CPU densely,
    on a GPU two to a byte.

    Groups of ``group_size`` weights along K share a scale. A weight is code·scale, (code − zero_point)·scale, or
    (code + 8)·scale + minimum. The layout depends on the device and on this version of the kernels and never leaves the
    process: ``unpack`` and pickling use logical tensors, and ``to`` packs anew for a device with another layout.
    It is frozen: no gradient flows back to the tensors that it is packed from.

    Attributes:
        data: packed codes, uint8.
        scale, zero_point, minimum: one for each group, in the kernel's order; see ``unpack``.
        weight_sum: [N] fp32, the sum of each output channel's weights, which corrects for an input's zero point.
        shape: (N, K). group_size: along K. bits: of a code.
    """

    def __init__(
        self,
        data: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        minimum: Tensor | None,
        weight_sum: Tensor,
        shape: tuple[int, int],
        group_size: int,
        bits: int = 4,
    ) -> None:
        self.data, self.scale, self.zero_point, self.minimum = data, scale, zero_point, minimum
        self.weight_sum, self.shape, self.group_size, self.bits = weight_sum, shape, group_size, bits

    @property
    def layout(self) -> str:
        """The name and version of the order of data: "panels-1" or "planes-1" on a CPU, "halves-1" on a GPU."""
        return layouts.int4_layout(self.data)

    @classmethod
    def from_float(
        cls,
        w: Tensor,
        bits: int = 4,
        *,
        group_size: int = 32,
        symmetric: bool = True,
        scale_dtype: torch.dtype = torch.float32,
    ) -> PackedInt:
        """Quantizes by the range of each group, as ``quantize_dynamic``, with scales that scale_dtype holds.

        Args:
            w: [N, K] floating.
            bits: 2, 3 or 4.
            group_size: along K: a multiple of 8, at least 16, that divides K; or −1 or K for one group for each row.
            symmetric: True: scale = amax/7, codes −7…7 (4 bits). False: scale = range/15 and an integer zero point.
            scale_dtype: torch.float32, torch.bfloat16 or torch.float16. The codes, and the zero points of a subnormal
                scale, follow from the rounded scale, which in fp16 is at least 2⁻²⁴, the smallest number.

        Raises:
            ValueError: w is not a finite floating matrix, or has a scale that scale_dtype does not hold.
            RuntimeError: group_size, bits or scale_dtype is none of these.
        """
        checks.finite_weight(w)
        resolved_group_size(bits, group_size, w.shape[1], scale_dtype)
        q, scale, zero_point = quantize_groups(w, bits, group_size, symmetric, scale_dtype)
        return cls.from_quantized(q, scale, zero_point, bits=bits)

    @classmethod
    def from_quantized(
        cls, q: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, minimum: Tensor | None = None, bits: int = 4
    ) -> PackedInt:
        """Packs codes q [N, K] int8, −8…7 for 4 bits.

        Args:
            scale: [N, K/group_size] fp32, bf16 or fp16, kept unchanged; its shape gives the group size. [N], [N, 1] and
                one element mean one group for each row. Any sign.
            zero_point: integers of scale's shape within the codes' range.
            minimum: scale's shape and dtype, the value of code −8, instead of a zero point; only with 4 bits.

        Raises:
            RuntimeError: another shape, dtype or value.
        """
        checks.require(
            q.dtype == torch.int8 and q.dim() == 2,
            f"q: got {q.dtype} of shape {list(q.shape)}; accepted: torch.int8 [N, K]",
        )
        gemm_checks.bits(bits)
        gemm_checks.max_k("q", q.shape[1])
        gemm_checks.codes_of_bits("q", q, bits)
        n, k = q.shape
        gemm_checks.scale_dtype("scale", scale)
        scale = grouped("scale", scale, n, k)
        groups = scale.shape[1]
        group_size = k // groups if groups else k
        if zero_point is not None:
            checks.require(minimum is None, "minimum: got a tensor beside zero_point; accepted: one of them")
            gemm_checks.int_zero_point("zero_point", zero_point)
            zero_point = grouped("zero_point", zero_point, n, k, groups)
            gemm_checks.codes_of_bits("zero_point", zero_point, bits)
            zero_point = zero_point.to(torch.int8)
        if minimum is not None:
            checks.require(bits == 4, f"minimum: got a tensor with {bits} bits; accepted with 4 bits")
            minimum = grouped("minimum", minimum, n, k, groups)
            checks.require(
                minimum.dtype == scale.dtype, f"minimum: got {minimum.dtype}; accepted: scale's dtype, {scale.dtype}"
            )
        offset = reference.offset_of(scale, zero_point, minimum)
        weight_sum = reference.weight_sum_of(q, scale, offset, group_size)
        return cls._lay_out(q, scale, zero_point, minimum, weight_sum, group_size, bits)

    @classmethod
    def _lay_out(
        cls,
        q: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        minimum: Tensor | None,
        weight_sum: Tensor,
        group_size: int,
        bits: int,
    ) -> PackedInt:
        """Packs logical tensors in the layout of the device that they are on."""
        n, k = q.shape
        halves = layouts.int4_layout_on(q.device, bits) == layouts.HALVES
        data = layouts.int4_to_halves(q, group_size) if halves else _int4_pack(q, bits)
        packed_scale, packed_zero_point, packed_minimum = (
            None if t is None else t.t().contiguous() if halves else layouts.to_panels(t)
            for t in (scale, zero_point, minimum)
        )
        assert packed_scale is not None
        return cls(data, packed_scale, packed_zero_point, packed_minimum, weight_sum, (n, k), group_size, bits)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(q [N, K] int8, scale, zero_point int8 or None, minimum or None), [N, K/group_size]: what was packed."""
        n, k = self.shape
        # This copies, because a view of the padded panels would save all of them.
        scale, zero_point, minimum = (
            None if t is None else layouts.by_group(t, n, self.layout).clone(memory_format=torch.contiguous_format)
            for t in (self.scale, self.zero_point, self.minimum)
        )
        assert scale is not None
        if self.layout == layouts.HALVES:
            return layouts.int4_unpack(self.data, n, k, self.group_size), scale, zero_point, minimum
        return _int4_unpack(self.data, n, k), scale, zero_point, minimum

    def dequantize(self) -> Tensor:
        """The weight [N, K] in fp32."""
        q, scale, zero_point, minimum = self.unpack()
        offset = reference.offset_of(scale, zero_point, minimum)
        return reference.weight_of(q, scale, offset, self.group_size).float()

    def to(self, device: torch.device | str) -> PackedInt:
        """The same weight on another device, in that device's layout; itself if it is there already."""
        device = torch.device(device)
        if device == self.data.device and self.layout == layouts.int4_layout_on(device, self.bits):
            return self
        q, scale, zero_point, minimum = (None if t is None else t.to(device) for t in self.unpack())
        assert q is not None
        assert scale is not None
        weight_sum = self.weight_sum.to(device)
        return self._lay_out(q, scale, zero_point, minimum, weight_sum, self.group_size, self.bits)

    def __reduce__(self) -> tuple[Any, ...]:
        q, *params = self.unpack()
        return _restore, (type(self), pack_bits(q, self.bits), *params, self.shape[1], self.bits)

    def __repr__(self) -> str:
        kind = "minimum" if self.minimum is not None else "symmetric" if self.zero_point is None else "zero points"
        return f"{type(self).__name__}(shape={self.shape}, bits={self.bits}, group_size={self.group_size}, {kind})"


class PackedInt4(PackedInt):
    """A ``PackedInt`` of 4 bits, codes −8…7; its arguments, errors and methods are as in ``PackedInt``."""

    @classmethod
    def from_float(  # type: ignore[override]
        cls,
        w: Tensor,
        group_size: int = 32,
        symmetric: bool = True,
        *,
        scale_dtype: torch.dtype = torch.float32,
    ) -> PackedInt4:
        """``PackedInt.from_float`` with 4 bits."""
        made = super().from_float(w, 4, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
        assert isinstance(made, PackedInt4)
        return made


for _packed in (PackedInt, PackedInt4):
    ForkingPickler.register(_packed, reduce_for_a_process)


def _restore(
    cls: type[PackedInt],
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    k: int,
    bits: int,
) -> PackedInt:
    return cls.from_quantized(unpack_bits(packed, bits, k), scale, zero_point, minimum=minimum, bits=bits)


torch.serialization.add_safe_globals([PackedInt, PackedInt4, _restore])  # torch.load(weights_only=True)


def _rows_of(
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    group_size: int,
    k: int,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight's rows start…stop from packed tensors; start is a multiple of PANEL."""
    n, layout = stop - start, layouts.int4_layout(data)
    in_panels = layout != layouts.HALVES
    panels = slice(start // layouts.PANEL, -(-stop // layouts.PANEL))
    part = (panels,) if in_panels else (slice(None), slice(start, stop))
    scale_rows, zero_point_rows, minimum_rows = (
        None if t is None else layouts.by_group(t[part], n, layout)[..., None] for t in (scale, zero_point, minimum)
    )
    assert scale_rows is not None
    q = _int4_unpack(data[panels], n, k) if in_panels else layouts.int4_unpack(data[start:stop], n, k, group_size)
    w = q.view(n, scale_rows.shape[1], group_size).float()
    if zero_point_rows is not None:
        w = w.sub_(zero_point_rows)
    if minimum_rows is not None:
        w = w.add_(8)
    w = w.mul_(scale_rows)
    return (w if minimum_rows is None else w.add_(minimum_rows)).view(n, k).to(dtype)


class _Int4Linear(Function):
    """Sends x's gradient to ``values``, which ``represented(x)`` gives. Keeps the codes of the weight."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, bias: Tensor | None, x: Tensor, data: Tensor, scale: Tensor,
        zero_point: Tensor | None, minimum: Tensor | None, weight_sum: Tensor, group_size: int, *rest: Any,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(data, scale, zero_point, minimum)
        ctx.shape, ctx.dtypes = (weight_sum.shape[0], x.shape[-1]), (values.dtype, None if bias is None else bias.dtype)
        ctx.group_size = group_size
        return _int4_linear(x, data, scale, zero_point, minimum, weight_sum, bias, group_size, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        n, k = ctx.shape
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            data, scale, zero_point, minimum = ctx.saved_tensors
            rows = partial(_rows_of, data, scale, zero_point, minimum, ctx.group_size, k)
            dx = through_weight(grad, n, k, rows).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dbias = bias_gradient(grad, tuple(range(grad.dim() - 1)), ctx.dtypes[1])
        return dx, dbias, *[None] * (len(ctx.needs_input_grad) - 2)


_linear = entered(_Int4Linear)


def _differentiable_linear(
    x: Tensor,
    packed: PackedInt,
    bias: Tensor | None,
    act_bits: int,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    out_dtype: torch.dtype,
) -> Tensor:
    weight = packed.data, packed.scale, packed.zero_point, packed.minimum
    rest: Any = (
        packed.group_size, act_bits, constant(input_scale), input_zero_point, quant_min, quant_max, out_dtype
    )  # fmt: skip
    values = represented(x, input_scale, input_zero_point, quant_min, quant_max)
    if transformed():
        y = reference.int4_linear(x.detach(), *weight, packed.weight_sum, constant(bias), *rest)
        w = packed.dequantize()
        return as_if(y, F.linear(values.float(), w, None if bias is None else bias.float()))
    return _linear(values, bias, x.detach(), *weight, packed.weight_sum, *rest)


def int4_linear(
    x: Tensor,
    packed: PackedInt,
    bias: Tensor | None = None,
    act_bits: int = 8,
    *,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    quant_min: int = -128,
    quant_max: int = 127,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ weight.T + bias with int4 weights, on int8 activations (act_bits 8) or on a float x (act_bits 16).

    act_bits 8: x is int8 codes or the op quantizes x to them. The op sums the products of a group exactly in integers,
    then the groups in order in fp32: y = Σ scale_g·acc_g, or with zero points or minima Σ (offset_g·Σx_g +
    scale_g·acc_g), where offset_g is the value of code −8. Then out = (y − zero_point·weight_sum)·scale_x + bias,
    rounded once. act_bits 16: sums are in fp32 for every dtype of x, within (K + 4)·2⁻²³·Σ|x|·(15·|scale| + |offset|)
    of the exact value; with a bf16 x a CPU that has AVX512_BF16 takes elements and partial sums below the smallest
    normal number for 0. From 128 rows of x on, Triton's kernel rounds the weight to x's dtype and torch multiplies:
    within 2⁻⁷·Σ|x|·(15·|scale| + |offset|) for bf16, within 2⁻¹⁰ of that sum for fp16, and for fp32 as
    ``torch.set_float32_matmul_precision`` says.

    Args:
        x: [..., K]; fp32, bf16 or fp16; or, with act_bits 8, int8 codes.
        packed: weight [N, K].
        bias: [N], floating.
        input_scale, input_zero_point, quant_min, quant_max: with act_bits 8, as in ``int8_linear``; by default each row
            by its own range.
        out_dtype: torch.float32, torch.bfloat16 or torch.float16; by default x's dtype, for codes torch.bfloat16.

    Returns:
        [..., N] of out_dtype. A NaN in x makes its row NaN.

    Differentiable in x, bias and input_scale, as ``int8_linear``: dx = dy @ the dequantized weight.

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
    if out_dtype is None:
        out_dtype = torch.bfloat16 if x.dtype == torch.int8 else x.dtype
    x, bias, input_scale = as_torch_jit_takes_them(x, bias, input_scale)
    if transformed() or wants_gradient(x, bias, input_scale):
        return _differentiable_linear(
            x, packed, bias, act_bits, input_scale, input_zero_point, quant_min, quant_max, out_dtype
        )
    return _int4_linear(
        x, packed.data, packed.scale, packed.zero_point, packed.minimum, packed.weight_sum, bias, packed.group_size,
        act_bits, input_scale, input_zero_point, quant_min, quant_max, out_dtype,
    )  # fmt: skip
