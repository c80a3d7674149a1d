"""Makes packed weights of a checkpoint's tensors; reads and writes codes in int32 words."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ... import gemm_checks, layouts
from ...ops.int4_gemm import PackedInt, PackedInt4
from ...ops.int8_gemm import PackedInt8
from ...ops.packing import pack_bits, unpack_bits
from .schemes import Scheme, choose, groups_of, words_of

Packed = PackedInt | PackedInt8
OF_QUANTIZED = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point")
UNKNOWN = ("weight_g_idx", "weight_global_scale")  # an order of K and a second scale, which no packed form has


def pack(prefix: str, layer: str, tensors: dict[str, Tensor], schemes: list[Scheme] | None) -> Packed:
    """Packs the weight of a layer and removes its tensors from ``tensors``."""
    own = {
        name: tensors.pop(prefix + name)
        for name in ("weight", *OF_QUANTIZED, *UNKNOWN)
        if prefix + name in tensors
    }  # fmt: skip
    for name in UNKNOWN:
        if name in own:
            raise ValueError(f"{prefix}{name}: got a tensor; accepted: none, packed weights cannot hold its meaning")
    if "weight_scale" not in own:
        raise ValueError(f"{prefix}weight_scale: missing; accepted: the scales of a quantized layer")
    scale = own["weight_scale"]
    if scale.dtype not in gemm_checks.SCALE_DTYPES:
        raise ValueError(
            f"{prefix}weight_scale: got {scale.dtype}; accepted: torch.float32, torch.bfloat16, torch.float16"
        )
    packed = own.get("weight_packed")
    n, k = _shape_of(prefix, own)
    per_row = scale.dim() <= 2 and (scale.numel() == 1 or scale.shape[0] == n)
    if not per_row or groups_of(scale) == 0 or k % groups_of(scale):
        raise ValueError(
            f"{prefix}weight_scale: got shape {list(scale.shape)}; accepted: [1], [{n}, 1] or [{n}, groups] with "
            f"groups that divide K = {k}"
        )
    words = None if packed is None else packed.shape[1]
    bits, symmetric = choose(prefix, layer, schemes, (n, k), words, scale)
    if bits not in (*layouts.BITS, 8):
        raise ValueError(f"{prefix}weight: got {bits} bits; accepted: 2, 3, 4, 8")
    zero_point = own.get("weight_zero_point")
    if zero_point is None and not symmetric:
        raise ValueError(f"{prefix}weight_zero_point: missing; accepted: zero points, as the config says asymmetric")
    if zero_point is not None:
        zero_point = _zero_points(f"{prefix}weight_zero_point", zero_point, bits, n, scale, packed is not None)
    q = own["weight"] if packed is None else _codes(packed, bits, k)
    if bits == 8:
        if groups_of(scale) != 1:
            raise ValueError(
                f"{prefix}weight_scale: got {groups_of(scale)} groups of int8 codes; accepted with 8 bits: a scale for "
                "each output channel or for the tensor"
            )
        if zero_point is not None and bool(zero_point.any()):
            raise ValueError(f"{prefix}weight_zero_point: got zero points of int8 codes; accepted with 8 bits: 0")
    try:
        if bits == 8:
            return PackedInt8.from_quantized(q, scale)
        cls = PackedInt4 if bits == 4 else PackedInt
        return cls.from_quantized(q, scale, zero_point, bits=bits)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{prefix}weight: {error}") from error


def _shape_of(prefix: str, own: Mapping[str, Tensor]) -> tuple[int, int]:
    """Checks the tensors of a layer's weight and returns its N, K."""
    packed, weight = own.get("weight_packed"), own.get("weight")
    if packed is None:
        if weight is None:
            raise ValueError(f"{prefix}weight_packed: missing; accepted: it, or an int8 {prefix}weight")
        if weight.dtype != torch.int8 or weight.dim() != 2:
            raise ValueError(
                f"{prefix}weight: got {weight.dtype} of shape {list(weight.shape)} with scales; accepted: torch.int8 "
                "[N, K]"
            )
        return weight.shape[0], weight.shape[1]
    if weight is not None:
        raise ValueError(f"{prefix}weight: got a tensor beside {prefix}weight_packed; accepted: one of them")
    if packed.dtype != torch.int32 or packed.dim() != 2:
        raise ValueError(
            f"{prefix}weight_packed: got {packed.dtype} of shape {list(packed.shape)}; accepted: torch.int32 [N, words]"
        )
    shape = own.get("weight_shape")
    if shape is None:
        raise ValueError(f"{prefix}weight_shape: missing; accepted: N, K of {prefix}weight_packed")
    if shape.is_floating_point() or shape.numel() != 2:
        raise ValueError(
            f"{prefix}weight_shape: got {shape.dtype} of shape {list(shape.shape)}; accepted: torch.int64 [2]"
        )
    n, k = (int(size) for size in shape.flatten().tolist())
    if n != packed.shape[0] or k < 0:
        raise ValueError(f"{prefix}weight_shape: got {[n, k]}; accepted: {packed.shape[0]}, weight_packed's N, and K")
    return n, k


def _flipped(q: Tensor, bits: int) -> Tensor:
    """Turns two's-complement codes (int8) into codes with an offset of 2**(bits − 1), in the low bits; and back."""
    return q ^ -(1 << bits - 1)


def _codes(words: Tensor, bits: int, k: int) -> Tensor:
    """The codes [rows, k] int8 in rows of int32."""
    rows, row = words.shape
    # contiguous() would keep the strides of dims of one element, and no view takes the strides of empty rows.
    flat = words.clone(memory_format=torch.contiguous_format).flatten()
    octets = flat.view(torch.uint8).view(rows, 4 * row)[:, : layouts.packed_length(k, bits)].contiguous()
    return _flipped(octets.view(torch.int8) if bits == 8 else unpack_bits(octets, bits, k), bits)


def in_words(q: Tensor, bits: int) -> Tensor:
    """Codes [rows, k] int8 in rows of int32; the bits behind the last code are zero."""
    flipped = _flipped(q, bits)
    octets = flipped.view(torch.uint8) if bits == 8 else pack_bits(flipped, bits)
    padded = torch.nn.functional.pad(octets, (0, -octets.shape[1] % 4))
    return padded.flatten().view(torch.int32).view(q.shape[0], padded.shape[1] // 4)


def _zero_points(name: str, zero_point: Tensor, bits: int, n: int, scale: Tensor, packed: bool) -> Tensor:
    """Zero points as int8 in scale's shape: unpacked along N from int32 beside weight_packed, else cast to int8."""
    got, one_each = f"{name}: got {zero_point.dtype} of shape {list(zero_point.shape)}", zero_point.shape == scale.shape
    if not packed and scale.numel() == zero_point.numel() == 1:
        zero_point, one_each = zero_point.view(scale.shape), True
    if zero_point.dtype == torch.int8 and not one_each:
        raise ValueError(f"{name}: got shape {list(zero_point.shape)}; accepted: the scales', {list(scale.shape)}")
    if packed and zero_point.dtype != torch.int8:
        expected = (words_of(n, bits), groups_of(scale))
        if zero_point.dtype != torch.int32 or zero_point.shape != expected:
            raise ValueError(
                f"{got}; accepted beside weight_packed: torch.int32 {list(expected)}, packed along N, or torch.int8 "
                f"{list(scale.shape)}"
            )
        return _codes(zero_point.t(), bits, n).t()
    if not one_each or zero_point.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        raise ValueError(
            f"{got}; accepted beside an int8 weight: integers in the shape of the scales, {list(scale.shape)}"
        )
    narrow = zero_point.to(torch.int8)
    changed = zero_point[narrow.long() != zero_point.long()]
    if changed.numel():
        accepted = f"what {bits} bits hold, {-(1 << bits - 1)} to {(1 << bits - 1) - 1}"
        raise ValueError(f"{name}: got {int(changed[0])}; accepted: {accepted}")
    return narrow
