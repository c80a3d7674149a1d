"""A linear layer that trains on int8 matrix products: ``int8_training_linear``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .. import checks, gemm_checks
from .autograd import entered, transformed
from .dynamic import quantize_dynamic_op, range_of_bits
from .int8_gemm import int8_mm, int8_scaled_mm
from .quantize import dequantize_op
from .quantize_transposed import quantize_transposed_op
from .stochastic import seed_and_offset

QUANT_MAX = 127
LONGEST_SUM = gemm_checks.MAX_K // 16 * 16  # a multiple of 16, so that every piece of a longer sum begins aligned

Codes = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NONE: Codes = (None, None, None, None)


def _product(
    a: Any, b: Any, scale_a: Any, scale_b: Any, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """a @ b.t() of codes a [M, K] and b [N, K] with their scales, for K of any length."""
    k, wide = a.shape[1], dtype == torch.float64
    scale_b = scale_b.reshape(-1)
    if k <= gemm_checks.MAX_K and not wide:
        return int8_scaled_mm(a, b.t(), scale_a, scale_b, bias=bias, out_dtype=dtype)
    y = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64 if wide else torch.float32, device=a.device)
    for start in range(0, k, LONGEST_SUM):
        piece, other = a[:, start : start + LONGEST_SUM], b[:, start : start + LONGEST_SUM].t()
        if wide:
            y += int8_mm(piece, other)
        else:
            y += int8_scaled_mm(piece, other, scale_a, scale_b, out_dtype=torch.float32)
    if wide:
        y = y * scale_b.double() * scale_a.double()
    return (y if bias is None else y + bias).to(dtype)


def _rows(x: Tensor, quant_max: int = QUANT_MAX) -> Codes:
    q, scale, _ = quantize_dynamic_op(x, -1, -quant_max, quant_max, True)
    return q, scale, None, None


def _both(x: Tensor) -> Codes:
    return quantize_transposed_op(x, QUANT_MAX, None, 0, None)


def weight_codes(w: Tensor, output: bool, grad_input: bool) -> Codes:
    """The codes that the products need of the weight: rows for an int8 output, columns too for an int8 grad_input."""
    if grad_input:
        return _both(w.detach())
    return _rows(w.detach()) if output else NONE


def _output(x: Tensor, w: Tensor, bias: Tensor | None, codes: Codes, x_codes: Codes) -> Tensor:
    if x_codes[0] is not None and codes[0] is not None:
        return _product(x_codes[0], codes[0], x_codes[1], codes[1], bias, x.dtype)
    return F.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))


Numbers = tuple[int, int | None, int, Tensor | None]  # of the output's gradient: largest code, seed, offset twice


def _kept(
    x: Tensor, w: Tensor, codes: Codes, x_codes: Codes, int8: tuple[bool, bool, bool], keep_x: bool, keep_w: bool
) -> Codes:
    """Weight and x as the gradients' products take them: codes of columns, codes of rows, or floats."""
    output, grad_input, grad_weight = int8
    weight: tuple[Tensor | None, ...] = (None, None)
    if keep_w:
        weight = codes[2:] if grad_input else codes[:2] if output else (w, None)
    activation: tuple[Tensor | None, ...] = (None, None)
    if keep_x:
        activation = x_codes[2:] if grad_weight else x_codes[:2] if output else (x, None)
    return (*weight, *activation)  # type: ignore[return-value]


def _codes_of_input(x: Tensor, int8: tuple[bool, bool, bool], keep_x: bool) -> Codes:
    if int8[2] and keep_x:
        return _both(x)
    return _rows(x) if int8[0] else NONE


def _gradients(
    grad: Tensor,
    kept: Any,
    int8: tuple[bool, bool, bool],
    numbers: Numbers,
    needs: tuple[bool, ...],
    dtypes: tuple[torch.dtype, torch.dtype | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    w, w_scale, x, x_scale = kept
    needs_x, needs_w, needs_bias = needs
    _, grad_input, grad_weight = int8
    q = scale = q_t = scale_t = dx = dw = dbias = None
    if (needs_w and grad_weight) or (needs_x and grad_input and numbers[1] is not None):
        q, scale, q_t, scale_t = quantize_transposed_op(grad, *numbers)
    elif needs_x and grad_input:
        q, scale, _, _ = _rows(grad, numbers[0])
    if needs_x and grad_input:
        dx = _product(q, w, scale, w_scale, None, grad.dtype)
    elif needs_x:
        dx = (grad @ _floats(w, w_scale, grad.dtype)).to(grad.dtype)
    if needs_w and grad_weight:
        dw = _product(q_t, x, scale_t, x_scale, None, dtypes[0])
    elif needs_w:
        dw = (grad.t() @ _floats(x, x_scale, grad.dtype)).to(dtypes[0])
    if needs_bias:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        dbias = grad.sum(0, dtype=wide).to(dtypes[1])
    return dx, dw, dbias


class _Int8TrainingLinear(Function):
    """Keeps one byte for each element of x if either product with x is int8."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, q: Tensor | None, scale: Tensor | None,
        q_t: Tensor | None, scale_t: Tensor | None, int8: tuple[bool, bool, bool], keep_x: bool, keep_w: bool,
        quant_max: int, seed: int | None, offset: int, offset_tensor: Tensor | None,
    ) -> Tensor:  # fmt: skip
        codes, x_codes = (q, scale, q_t, scale_t), _codes_of_input(x, int8, keep_x)
        ctx.save_for_backward(*_kept(x, w, codes, x_codes, int8, keep_x, keep_w), offset_tensor)
        ctx.int8, ctx.numbers = int8, (quant_max, seed, offset)
        ctx.dtypes = w.dtype, None if bias is None else bias.dtype
        return _output(x, w, bias, codes if int8[0] else NONE, x_codes if int8[0] else NONE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("int8_training_linear: got create_graph=True; accepted: first derivatives")
        *kept, offset_tensor = ctx.saved_tensors
        numbers = (*ctx.numbers, offset_tensor)
        gradients = _gradients(grad, kept, ctx.int8, numbers, ctx.needs_input_grad[:3], ctx.dtypes)
        return *gradients, None, None, None, None, None, None, None, None, None, None, None


class _FirstDerivatives(Function):
    """The identity, whose derivative raises an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("int8_training_linear: got a second derivative; accepted: first derivatives")

    @staticmethod
    def jvp(ctx: Any, tangent: Any) -> Any:
        raise RuntimeError("int8_training_linear: got a second derivative; accepted: first derivatives")


class _InTransforms(Function):
    """``_Int8TrainingLinear`` for torch.func's transforms: it saves x and w, and the backward pass makes all codes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, bias: Tensor | None, int8: tuple[bool, bool, bool], quant_max: int, seed: int | None,
        offset: int, offset_tensor: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return _output(x, w, bias, weight_codes(w, int8[0], False), _rows(x) if int8[0] else NONE)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, w, bias, ctx.int8, *ctx.numbers, offset_tensor = inputs
        ctx.save_for_backward(x, w, offset_tensor)
        ctx.dtypes = w.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *values, offset_tensor = ctx.saved_tensors
        grad, x, w = (_FirstDerivatives.apply(t) for t in (grad, *values))
        codes, x_codes = weight_codes(w, *ctx.int8[:2]), _codes_of_input(x, ctx.int8, True)
        kept, numbers = _kept(x, w, codes, x_codes, ctx.int8, True, True), (*ctx.numbers, offset_tensor)
        gradients = _gradients(grad, kept, ctx.int8, numbers, ctx.needs_input_grad[:3], ctx.dtypes)
        return *gradients, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "int8_training_linear: got forward mode; accepted: reverse mode, in which the gradient is quantized"
        )


def _floats(t: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if scale is None else dequantize_op(t, scale, None, dtype)


_linear = entered(_Int8TrainingLinear)


def int8_training_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    output: str = "int8",
    grad_input: str = "int8",
    grad_weight: str = "int8",
    grad_bits: int = 8,
    seed: int | None = None,
    offset: int | Tensor = 0,
    codes: Codes | None = None,
) -> Tensor:
    """x @ w.t() + bias for training, with each of its three matrix products in int8 or in float.

    Every int8 product quantizes both operands symmetrically, with one scale for each row along which it sums. The
    output has scales per token of x and per output channel of w, grad_input per token of grad and per input channel of
    w, grad_weight per output channel of grad and per input channel of x. Sums are exact; scales and bias follow in
    fp32.

    Args:
        x: [..., K]; fp32, bf16, fp16 or fp64.
        w: [N, K], any of these dtypes; master weights may be fp32 with x in bf16.
        bias: [N], floating.
        output, grad_input, grad_weight: "int8" or "float", for each product. With output="int8" a product in float
            takes the dequantized values behind the output. So output="int8", grad_input="float", grad_weight="float" is
            W8A8 quantization-aware training: up to the rounding of float sums, the output is that of
            ``fake_quantize_dynamic`` on x and w, and gradients pass straight through.
        grad_bits: 2 to 8, the width of the output's gradient in the products that are int8: its codes are
            −(2**(bits−1)−1) … 2**(bits−1)−1.
        seed, offset: seed=None rounds gradients to nearest. Else rounding is stochastic, as in ``quantize_stochastic``,
            so that gradients are right on average; the same numbers give the same bits. An offset tensor must not
            change before the backward pass.
        codes: ``quantize_dynamic_transposed(w)``, if it is known already, so that gradient accumulation need not repeat
            it. The first two tensors serve output, the others grad_input; those that are not needed may be None.

    Returns:
        [..., N] of x's dtype; under autocast of autocast's dtype, as F.linear, but w is not cast. Gradients have the
        dtypes of x, w and bias; that of bias is an fp32 sum of the float gradient.

    The backward pass keeps one byte for each element of x (x itself only with output="float" and grad_weight="float")
    and the weight's codes. A NaN or an infinity in a row of an operand makes the product's row NaN. Sums longer than
    131071 are cut into exact pieces, which are added in fp32. The op has first derivatives in reverse mode only, also
    under torch.func's transforms, where it makes ``codes`` anew.

    Raises:
        RuntimeError: an argument's dtype, device or shape does not fit; the message names it.
        ValueError: output, grad_input or grad_weight is another string, or grad_bits another number.
    """
    int8 = _modes(output, grad_input, grad_weight)
    check_grad_bits(grad_bits)
    _check(x, w, bias, int8, codes)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    shape, quant_max = x.shape, range_of_bits(grad_bits)[1]
    x = x.reshape(math.prod(shape[:-1]), shape[-1])
    if transformed():
        numbers = (quant_max, *((None, 0, None) if seed is None else seed_and_offset(seed, offset)))
        return _InTransforms.apply(x, w, bias, int8, *numbers).reshape(*shape[:-1], w.shape[0])
    grad = torch.is_grad_enabled()
    keep_x, keep_w = grad and w.requires_grad, grad and x.requires_grad
    w_codes: Codes = codes or weight_codes(w, int8[0], int8[1] and keep_w)
    if keep_x or keep_w or (grad and bias is not None and bias.requires_grad):
        numbers = (quant_max, *((None, 0, None) if seed is None else seed_and_offset(seed, offset)))
        y = _linear(x, w, bias, *w_codes, int8, keep_x, keep_w, *numbers)
    else:
        y = _output(x, w, bias, w_codes if int8[0] else NONE, _rows(x) if int8[0] else NONE)
    return y.reshape(*shape[:-1], w.shape[0])


def _modes(output: str, grad_input: str, grad_weight: str) -> tuple[bool, bool, bool]:
    for name, mode in (("output", output), ("grad_input", grad_input), ("grad_weight", grad_weight)):
        if mode not in ("int8", "float"):
            raise ValueError(f"{name}: got {mode!r}; accepted: int8, float")
    return output == "int8", grad_input == "int8", grad_weight == "int8"


def check_grad_bits(grad_bits: int) -> None:
    if not isinstance(grad_bits, int) or not 2 <= grad_bits <= 8:
        raise ValueError(f"grad_bits: got {grad_bits!r}; accepted: 2 to 8")


def _check(
    x: Tensor, w: Tensor, bias: Tensor | None, int8: tuple[bool, bool, bool], codes: Codes | None
) -> None:  # fmt: skip
    floating = "torch.float32, torch.float64, torch.float16, torch.bfloat16"
    for name, t in (("x", x), ("w", w), ("bias", bias)):
        if t is not None:
            checks.dense(name, t)
        if t is not None and not t.is_floating_point():
            raise RuntimeError(f"{name}: got {t.dtype}; accepted: {floating}")
        if t is not None and t.device != x.device:
            raise RuntimeError(f"{name}: got a tensor on {t.device}; accepted: x's device, {x.device}")
    if w.dim() != 2:
        raise RuntimeError(f"w: got shape {list(w.shape)}; accepted: [N, K]")
    n, k = w.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise RuntimeError(f"x: got shape {list(x.shape)}; accepted: [..., {k}], w's K")
    if bias is not None and bias.shape != (n,):
        raise RuntimeError(f"bias: got shape {list(bias.shape)}; accepted: [{n}], w's N")
    if codes is not None:
        shapes = [None if t is None else list(t.shape) for t in codes]
        accepted = [[n, k], [n, 1], [k, n], [k, 1]]
        needed = (int8[0], int8[0], int8[1], int8[1])
        if len(shapes) != 4 or any(a != b for a, b, need in zip(shapes, accepted, needed, strict=True) if need):
            raise RuntimeError(f"codes: got shapes {shapes}; accepted: quantize_dynamic_transposed(w)'s, {accepted}")
