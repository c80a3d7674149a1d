"""Reads weights from GGUF files: Q4_0 and Q4_1 as packed int4, Q8_0 as codes and scales, with exactly their values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.int4_gemm import PackedInt4

_GROUP = 32  # codes of a block of Q4_0, Q4_1 and Q8_0
_PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")


class GroupedInt8(NamedTuple):
    """A Q8_0 tensor: [..., K] int8 codes with a scale for each 32 along K, which ``PackedInt8`` cannot hold.

    ``PackedInt8.from_float(t.dequantize())`` quantizes it anew, per output channel.

    Attributes:
        q: [..., K] int8.
        scale: [..., K/32] fp16, any sign.
    """

    q: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """code·scale, [..., K] in fp32: exact, bit for bit as ggml computes it."""
        blocks = self.q.unflatten(-1, (-1, _GROUP)).float() * self.scale.float()[..., None]
        return blocks.flatten(-2)


def load(
    path: str | os.PathLike[str], *, dequantize_others: bool = False
) -> dict[str, PackedInt4 | list[PackedInt4] | GroupedInt8 | Tensor]:
    """Reads the tensors of a GGUF file: names and the order of rows are the file's, shapes are torch's, [N, K].

    Q4_0 becomes a symmetric ``PackedInt4`` with groups of 32 and fp16 scales, Q4_1 a ``PackedInt4`` with ``minimum``.
    A stack of matrices [E, N, K], such as experts, becomes a list of E of them. Q8_0 becomes ``GroupedInt8``.
    ``dequantize`` of each gives ggml's fp32 values bit for bit. F32, F16, BF16, F64 and integer tensors become torch
    tensors.

    Conversion to GGUF permutes rows of some models' attention weights (Llama's query and key, for another order of
    rotary pairs). Undo this to load them into a model of another origin.

    Args:
        path: a little-endian file. A model that is split over files takes one call for each.
        dequantize_others: tensors of other quantized types (llama.cpp's Q4_0 files have a few of Q6_K) become fp32, by
            the gguf package, instead of an error.

    Raises:
        ValueError: not a whole GGUF file; a tensor of another quantized type, or of one that the gguf package cannot
            dequantize; a Q4_0 or Q4_1 tensor of other than 2 or 3 dims. The text names the tensor or the file.
        FileNotFoundError: no such file.
        ImportError: the gguf package is not installed.
    """
    gguf = _gguf()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # numpy may raise anything on a broken file
        raise ValueError(f"{path}: not a whole GGUF file ({type(error).__name__}: {error})") from error
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise ValueError(f"{path}: got a big-endian file; accepted: little-endian")
    return {t.name: _tensor(gguf, t, dequantize_others) for t in reader.tensors}


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "GGUF files need the gguf package; install it with: pip install 'qkernels[checkpoints]'"
        ) from error
    return gguf


def _tensor(gguf: Any, t: Any, dequantize_others: bool) -> PackedInt4 | list[PackedInt4] | GroupedInt8 | Tensor:
    kind = t.tensor_type.name
    if kind not in (*_PLAIN, "Q4_0", "Q4_1", "Q8_0"):
        if not dequantize_others:
            raise ValueError(
                f"{t.name}: got the type {kind}; accepted: Q4_0, Q4_1, Q8_0, {', '.join(_PLAIN)}; others with "
                "dequantize_others=True, as fp32"
            )
        try:
            return torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        except NotImplementedError as error:
            raise ValueError(f"{t.name}: got the type {kind}; the gguf package cannot dequantize it") from error
    data = torch.from_numpy(t.data.copy())  # copied, because the file is mapped read-only
    if kind in _PLAIN:
        return data.view(torch.bfloat16) if kind == "BF16" else data
    # A block holds an fp16 scale, in Q4_1 an fp16 minimum, and 32 codes. Of 4-bit codes, 0 to 15 are in the low bits of
    # 16 bytes and 16 to 31 in the high bits.
    blocks = data.unflatten(-1, (-1, gguf.GGML_QUANT_SIZES[t.tensor_type][1]))
    head = 4 if kind == "Q4_1" else 2
    params = blocks[..., :head].clone(memory_format=torch.contiguous_format).view(torch.float16)
    scale, octets = params[..., 0], blocks[..., head:]
    if kind == "Q8_0":
        return GroupedInt8(octets.flatten(-2).view(torch.int8), scale.contiguous())
    q = (torch.cat((octets & 15, octets >> 4), -1).to(torch.int8) - 8).flatten(-2)
    minimum = params[..., 1] if kind == "Q4_1" else None
    if q.dim() not in (2, 3):
        raise ValueError(f"{t.name}: got {kind} of shape {list(q.shape)}; accepted: [N, K] or [E, N, K]")
    try:
        if q.dim() == 2:
            return _packed(q, scale, minimum)
        return [_packed(q[i], scale[i], None if minimum is None else minimum[i]) for i in range(q.shape[0])]
    except RuntimeError as error:
        raise ValueError(f"{t.name}: {error}") from error


def _packed(q: Tensor, scale: Tensor, minimum: Tensor | None) -> PackedInt4:
    packed = PackedInt4.from_quantized(q, scale, minimum=minimum)
    assert isinstance(packed, PackedInt4)
    return packed
