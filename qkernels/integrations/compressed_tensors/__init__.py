"""Reads and writes checkpoints in the safetensors layouts of compressed-tensors (0.20).

The layouts are "pack-quantized" and "int-quantized". For a layer with a weight [N, K], b bits and G groups along K the
files hold, low bits first,

    pack-quantized  weight_packed      int32 [N, ⌈K·b/32⌉]: codes + 2**(b−1), one after the other along K
                    weight_shape       int64 [2]: N, K
                    weight_zero_point  int32 [⌈N·b/32⌉, G]: zero points + 2**(b−1), one after the other along N
    int-quantized   weight             int8 [N, K]
                    weight_zero_point  integers of any dtype (its own writer: int8) [N, G]
    both            weight_scale       floating [N, G], G = 1 per channel; or [1] per tensor

and config.json says under "quantization_config" which layers these are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import gemm_checks
from ...ops.int8_gemm import PackedInt8
from .files import CONFIG, TENSORS, read, read_json, safetensors_torch, unshared
from .schemes import quantization_of, schemes_of
from .weights import OF_QUANTIZED, UNKNOWN, Packed, in_words, pack

__all__ = ["load", "quantization_config", "save"]


def load(
    source: str | os.PathLike[str] | Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> dict[str, Packed | Tensor]:
    """Reads a checkpoint with exactly its codes, scales and zero points.

    Args:
        source: a directory with model.safetensors, or with the shards that model.safetensors.index.json names, and
            config.json; one safetensors file, with or without config.json beside it; or the tensors by name.
        config: replaces config.json: the whole of it or its "quantization_config". Without any config the shape of
            weight_packed decides the bits, and an int8 weight has 8.

    Returns:
        For each quantized layer "<layer>.weight": ``PackedInt4`` for 4 bits, ``PackedInt`` for 2 or 3, ``PackedInt8``,
        with scales [N] in fp32, for 8. Every other tensor, unchanged, under its name.

    Raises:
        ValueError: a tensor is missing, has another shape or dtype, or does not fit the config; or no packed form holds
            it exactly: other bits, int8 with groups or zero points, activation order (g_idx), block and floating-point
            formats, transformed or sparse weights. The text names the tensor or the broken file.
        FileNotFoundError: no such file, or a shard that the index names is missing.
        ImportError: the safetensors package is not installed (files only).
    """
    if isinstance(source, Mapping):
        tensors = dict(source)
    else:
        tensors, found = read(safetensors_torch(), Path(source))
        if config is None and found is not None:
            config = quantization_of(found)
    schemes = schemes_of(config) if config is not None else None
    layers = {}  # a dict, so that layers keep the order of the tensors
    for name, t in tensors.items():
        layer, dot, own = name.rpartition(".")
        if own in (*OF_QUANTIZED, *UNKNOWN) or (own == "weight" and t.dtype == torch.int8):
            layers[layer + dot] = layer
    packed = {f"{prefix}weight": pack(prefix, layer, tensors, schemes) for prefix, layer in layers.items()}
    return {**packed, **tensors}


def save(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Packed | Tensor],
    *,
    act_bits: int = 16,
    scale_dtype: torch.dtype = torch.float32,
) -> None:
    """Writes model.safetensors and, into config.json, ``quantization_config``; ``load`` reads exactly the same back.

    Args:
        directory: it is made if it is missing. An existing config.json keeps all but its "quantization_config".
        tensors: packed weights under "<layer>.weight"; every other tensor, unchanged, under its name.
        act_bits: see ``quantization_config``; 16 writes the layout pack-quantized, 8 int-quantized.
        scale_dtype: dtype to write the scales of ``PackedInt8`` weights in, which are fp32 in memory: torch.float32,
            torch.bfloat16 or torch.float16. It must hold them exactly. Readers take it for the dtype of the weight.

    Raises:
        ValueError: a packed weight that the layouts cannot hold (with minima) or that has another name; no packed
            weight; another scale_dtype or act_bits; a config.json that is not JSON. Then nothing is written.
        ImportError: the safetensors package is not installed.
    """
    safetensors = safetensors_torch()
    directory = Path(directory)
    quantization = quantization_config(tensors, act_bits=act_bits)
    if scale_dtype not in gemm_checks.SCALE_DTYPES:
        raise ValueError(f"scale_dtype: got {scale_dtype}; accepted: torch.float32, torch.bfloat16, torch.float16")
    written: dict[str, Tensor] = {}
    for name, value in tensors.items():
        parts = {name: value.detach()} if isinstance(value, Tensor) else _parts(name, value, act_bits, scale_dtype)
        for part, t in parts.items():
            if part in written:
                raise ValueError(f"{part}: got a tensor of this name beside a packed weight's; accepted: one of them")
            written[part] = t.cpu().contiguous()
    path = directory / CONFIG
    config = read_json(path) if path.exists() else {}
    directory.mkdir(parents=True, exist_ok=True)
    # This writes under another name first, because the tensors may still be mapped from the old file.
    partial = directory / f"{TENSORS}.part"
    safetensors.save_file(unshared(written), partial, metadata={"format": "pt"})
    os.replace(partial, directory / TENSORS)
    text = json.dumps({**config, "quantization_config": quantization}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def quantization_config(tensors: Mapping[str, Packed | Tensor], *, act_bits: int = 16) -> dict[str, Any]:
    """The "quantization_config" of config.json for these tensors, with every layer named.

    Args:
        tensors: as in ``save``.
        act_bits: 16: activations stay in float. 8: they become int8 codes, per token from its own range; if tensors
            hold "<layer>.input_scale", one element, with that scale (asymmetric with "<layer>.input_zero_point").

    Raises:
        ValueError: as ``save``.
    """
    if act_bits not in (8, 16):
        raise ValueError(f"act_bits: got {act_bits}; accepted: 8, 16")
    layout = "int-quantized" if act_bits == 8 else "pack-quantized"
    groups: list[dict[str, Any]] = []
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            continue
        layer = _prefix(name, value)
        group = {
            "weights": _weight_args(value),
            "input_activations": _input_args(layer, tensors, act_bits),
            "output_activations": None,
            "format": layout,
        }
        for known in groups:
            if {**known, "targets": None} == {**group, "targets": None}:
                known["targets"].append(layer.removesuffix("."))
                break
        else:
            groups.append({"targets": [layer.removesuffix(".")], **group})
    if not groups:
        raise ValueError("tensors: got no packed weight; accepted: at least one PackedInt4 or PackedInt8")
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": [],
        "kv_cache_scheme": None,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
    }


def _prefix(name: str, packed: object) -> str:
    """The part of a packed weight's name before "weight"."""
    if not isinstance(packed, Packed):
        raise ValueError(f"{name}: got {type(packed).__name__}; accepted: PackedInt4, PackedInt8 or a tensor")
    prefix = name.removesuffix("weight")
    if prefix + "weight" != name or (prefix and not prefix.endswith(".")):
        raise ValueError(f'{name}: got a packed weight under this name; accepted: "<layer>.weight"')
    return prefix


def _parts(name: str, packed: Packed, act_bits: int, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that store a packed weight."""
    prefix = _prefix(name, packed)
    if isinstance(packed, PackedInt8):
        (q, fp32), zero_point, bits = packed.unpack(), None, 8
        scale = fp32.to(scale_dtype)[:, None]
        if not bool(((scale[:, 0].float() == fp32) | fp32.isnan()).all()):
            raise ValueError(f"{name}: got scales that {scale_dtype} does not hold exactly; accepted: torch.float32")
    else:
        q, scale, zero_point, minimum = packed.unpack()
        bits = packed.bits
        if minimum is not None:
            raise ValueError(f"{name}: got minima; accepted: a symmetric weight or one with zero points")
    parts = {f"{prefix}weight_scale": scale}
    if act_bits == 8:
        parts[f"{prefix}weight"] = q
    else:
        parts[f"{prefix}weight_packed"] = in_words(q, bits)
        parts[f"{prefix}weight_shape"] = torch.tensor(packed.shape)
    if zero_point is not None:
        packed_along_n = in_words(zero_point.t().contiguous(), bits).t() if act_bits == 16 else zero_point
        parts[f"{prefix}weight_zero_point"] = packed_along_n
    return parts


def _weight_args(packed: Packed) -> dict[str, Any]:
    by_channel = isinstance(packed, PackedInt8) or packed.group_size == packed.shape[1]
    return {
        "num_bits": 8 if isinstance(packed, PackedInt8) else packed.bits,
        "type": "int",
        "symmetric": isinstance(packed, PackedInt8) or packed.zero_point is None,
        "strategy": "channel" if by_channel else "group",
        "group_size": None if isinstance(packed, PackedInt8) or by_channel else packed.group_size,
        "dynamic": False,
    }


def _input_args(prefix: str, tensors: Mapping[str, Packed | Tensor], act_bits: int) -> dict[str, Any] | None:
    name = f"{prefix}input_scale"
    static = tensors.get(name)
    if act_bits == 16:
        if static is not None:
            raise ValueError(f"{name}: got a tensor; accepted with act_bits 16: none")
        return None
    if static is None:
        return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    if not isinstance(static, Tensor) or static.numel() != 1:
        raise ValueError(f"{name}: got {getattr(static, 'shape', static)}; accepted: a tensor of one element")
    symmetric = f"{prefix}input_zero_point" not in tensors
    return {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": "tensor", "dynamic": False}
