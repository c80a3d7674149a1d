"""Checkpoints in the safetensors layouts of compressed-tensors (0.20), "pack-quantized" and "int-quantized".

Of a layer with a weight [N, K], b bits and G groups along K the files hold, low bits first,

    pack-quantized  weight_packed      int32 [N, ⌈K·b/32⌉]: codes + 2**(b−1), one after the other along K
                    weight_shape       int64 [2]: N, K
                    weight_zero_point  int32 [⌈N·b/32⌉, G]: zero points + 2**(b−1), one after the other along N
    int-quantized   weight             int8 [N, K]
                    weight_zero_point  integers of any dtype (its own writer: int8) [N, G]
    both            weight_scale       floating [N, G], G = 1 per channel; or [1] per tensor

and config.json says of which layers, under "quantization_config".
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import gemm_checks, layouts
from ..ops.int4_gemm import PackedInt, PackedInt4
from ..ops.int8_gemm import PackedInt8
from ..ops.packing import pack_bits, unpack_bits

Packed = PackedInt | PackedInt8

_FILE, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_OF_QUANTIZED = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point")
_UNKNOWN = ("weight_g_idx", "weight_global_scale")  # an order of K, a second scale: no packed form has them


def load(
    source: str | os.PathLike[str] | Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> dict[str, Packed | Tensor]:
    """Reads a checkpoint; codes, scales and zero points come out exactly as they lie in it.

    Args:
        source: a directory with model.safetensors, or with the shards that model.safetensors.index.json names, and
            config.json; one safetensors file, with config.json beside it or none; or the tensors by name.
        config: instead of config.json, the whole of it or its "quantization_config". Without any the bits are those
            that the shape of weight_packed allows, and an int8 weight has 8.

    Returns:
        For each quantized layer "<layer>.weight", of 4 bits as ``PackedInt4``, of 2 or 3 as ``PackedInt``, of 8 as
        ``PackedInt8``, whose scales are [N] in fp32; every other tensor under its name, as it is.

    Raises:
        ValueError: a tensor is missing, misshapen or of another dtype, does not fit the config, or is nothing that a
            packed form holds exactly: other bits, int8 with groups or zero points, activation order (g_idx), block and
            floating-point formats, transformed or sparse weights. It names the tensor, or the file that is broken.
        FileNotFoundError: no such file, or a shard that the index names is missing.
        ImportError: the safetensors package is not installed (files only).
    """
    if isinstance(source, Mapping):
        tensors = dict(source)
    else:
        tensors, found = _read(_safetensors(), Path(source))
        config = found if config is None else config
    schemes = _schemes(config) if config is not None else None
    layers = {}  # in the order of the tensors
    for name, t in tensors.items():
        layer, dot, own = name.rpartition(".")
        if own in (*_OF_QUANTIZED, *_UNKNOWN) or (own == "weight" and t.dtype == torch.int8):
            layers[layer + dot] = layer
    packed = {f"{prefix}weight": _pack(prefix, layer, tensors, schemes) for prefix, layer in layers.items()}
    return {**packed, **tensors}


def save(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Packed | Tensor],
    *,
    act_bits: int = 16,
    scale_dtype: torch.dtype = torch.float32,
) -> None:
    """Writes model.safetensors and, into config.json, ``quantization_config``; ``load`` gives the same back, exactly.

    Args:
        directory: made where it is missing. Of a config.json that is there, all but "quantization_config" stays.
        tensors: packed weights under "<layer>.weight"; every other tensor under its name, as it is.
        act_bits: see ``quantization_config``; 16 writes the layout pack-quantized, 8 int-quantized.
        scale_dtype: of the scales of ``PackedInt8`` weights, which are fp32 in memory: torch.float32, torch.bfloat16 or
            torch.float16, which must hold them exactly. Readers take the dtype of scales for that of the weight.

    Raises:
        ValueError: a packed weight that the layouts cannot hold (with minima), or under another name; no packed weight;
            scale_dtype or act_bits; a config.json that is none. Then nothing is written.
        ImportError: the safetensors package is not installed.
    """
    safetensors = _safetensors()
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
    path = directory / _CONFIG
    config = _json(path) if path.exists() else {}
    directory.mkdir(parents=True, exist_ok=True)
    # Under another name first: tensors that were loaded from here may still be read from the old file.
    partial = directory / f"{_FILE}.part"
    safetensors.save_file(_unshared(written), partial, metadata={"format": "pt"})
    os.replace(partial, directory / _FILE)
    text = json.dumps({**config, "quantization_config": quantization}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def quantization_config(tensors: Mapping[str, Packed | Tensor], *, act_bits: int = 16) -> dict[str, Any]:
    """The "quantization_config" of config.json for these tensors, with every layer named.

    Args:
        tensors: as in ``save``.
        act_bits: 16, activations stay floating; or 8, they are int8, each token by its own range, or by the layer's
            "<layer>.input_scale", one element, where tensors have it (with "<layer>.input_zero_point" asymmetric).

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


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "compressed-tensors checkpoints need the safetensors package; install it with: "
            "pip install 'qkernels[checkpoints]'"
        ) from error
    return safetensors.torch


def _read(safetensors: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a file or directory, and what the config.json there says of their quantization."""
    described = (path if path.is_dir() else path.parent) / _CONFIG
    config = _quantization(_json(described)) if described.exists() else None
    if not path.is_dir():
        return _read_file(safetensors, path), config
    if (path / _FILE).exists():
        return _read_file(safetensors, path / _FILE), config
    if not (path / _INDEX).exists():
        raise FileNotFoundError(f"{path}: holds neither {_FILE} nor {_INDEX}")
    shards = _json(path / _INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{path / _INDEX}: weight_map: got {type(shards).__name__}; accepted: file names by tensor")
    for name, shard in shards.items():
        if not (path / shard).is_file():
            raise FileNotFoundError(f"{path / shard}: missing; {_INDEX} says that {name} is in it")
    tensors: dict[str, Tensor] = {}
    for shard in dict.fromkeys(shards.values()):
        held = _read_file(safetensors, path / shard)
        for name in (name for name, place in shards.items() if place == shard):
            if name not in held:
                raise ValueError(f"{name}: missing in {path / shard}, where {_INDEX} says it is")
            tensors[name] = held[name]
    return tensors, config


def _read_file(safetensors: Any, path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return dict(safetensors.load_file(path))
    except Exception as error:  # of the package's own class, which torch-only installations lack
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got {type(found).__name__}; accepted: an object")
    return found


def _quantization(config: Mapping[str, Any]) -> Any:
    return config.get("quantization_config", config.get("compression_config"))


class _Scheme(NamedTuple):
    """What config.json says of a group of layers' weights."""

    targets: tuple[str, ...]
    kind: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int

    def fits(self, k: int, words: int | None, scale: Tensor) -> bool:
        """Whether a weight [N, K] of so many int32 in a row (or of int8), with these scales, can be of this scheme."""
        groups = _groups(scale)
        if words is not None and words != _words(k, self.bits):
            return False
        if self.strategy == "group":
            return groups * self.group_size == k
        return groups == 1 and (self.strategy == "channel" or scale.numel() == 1)

    def __str__(self) -> str:
        by = f"groups of {self.group_size}" if self.strategy == "group" else f"scales per {self.strategy}"
        return f"{self.bits} bits with {by}"


def _schemes(config: Mapping[str, Any]) -> list[_Scheme]:
    quantization = _quantization(config) or config
    if not isinstance(quantization, Mapping) or "config_groups" not in quantization:
        raise ValueError('config: got no "config_groups"; accepted: config.json or its "quantization_config"')
    method = quantization.get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        raise ValueError(f'config: got the quant_method "{method}"; accepted: "compressed-tensors"')
    if (quantization.get("transform_config") or {}).get("config_groups"):
        raise ValueError("config: got a transform_config; accepted: weights that are not transformed")
    sparsity = (quantization.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise ValueError(f'config: got the sparsity_config "{sparsity}"; accepted: "dense"')
    found = quantization["config_groups"]
    if not isinstance(found, Mapping):
        raise ValueError(f"config_groups: got {type(found).__name__}; accepted: an object")
    return [scheme for name, group in found.items() if (scheme := _scheme(name, group)) is not None]


def _scheme(name: str, group: Any) -> _Scheme | None:
    """None for a group that quantizes no weights. What is left out has the meaning that compressed-tensors gives it."""
    try:
        weights, targets = group["weights"], tuple(group["targets"])
        for target in targets:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        if weights is None:
            return None
        size = weights.get("group_size")
        strategy = weights.get("strategy") or ("tensor" if size is None else "group" if size > 0 else "channel")
        return _Scheme(
            targets, weights.get("type", "int"), int(weights.get("num_bits", 8)), bool(weights.get("symmetric", True)),
            strategy, int(size or 0),
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise ValueError(
            f"config_groups.{name}: got {group!r}; accepted: an object with targets and weights"
        ) from error


def _matches(layer: str, target: str) -> bool:
    return re.match(target[3:], layer) is not None if target.startswith("re:") else target == layer


def _groups(scale: Tensor) -> int:
    return scale.shape[1] if scale.dim() == 2 else 1


def _words(k: int, bits: int) -> int:
    """int32 words of k codes."""
    return (k * bits + 31) // 32


def _choose(
    prefix: str,
    layer: str,
    schemes: Iterable[_Scheme] | None,
    shape: tuple[int, int],
    words: int | None,
    scale: Tensor,
) -> tuple[int, bool]:
    """(bits, symmetric) of a layer. Targets that are classes cannot be told from a file: there the shapes decide."""
    weight = f"{prefix}weight" if words is None else f"{prefix}weight_packed"
    got = f"{weight}: got N, K = {list(shape)}{f' in rows of {words} int32' if words is not None else ''}"
    if schemes is None:
        able = [bits for bits in range(1, 9) if words == _words(shape[1], bits)] if words is not None else [8]
        if len(able) != 1:
            raise ValueError(f"{got}; accepted without a config: rows of one number of bits, 1 to 8")
        return able[0], True
    schemes = list(schemes)
    named = [scheme for scheme in schemes if any(_matches(layer, target) for target in scheme.targets)]
    fitting = [scheme for scheme in named or schemes if scheme.fits(shape[1], words, scale)]
    if not fitting or len({scheme[1:4] for scheme in fitting}) > 1:
        said = ", or ".join(dict.fromkeys(map(str, named or schemes))) or "no quantized weights"
        problem = "more than one group fits" if fitting else "accepted"
        raise ValueError(f"{got} and scales {list(scale.shape)}; {problem}: what the config says, {said}")
    if fitting[0].kind != "int":
        raise ValueError(f'{weight}: got the type "{fitting[0].kind}" in the config; accepted: "int"')
    return fitting[0].bits, fitting[0].symmetric


def _pack(prefix: str, layer: str, tensors: dict[str, Tensor], schemes: list[_Scheme] | None) -> Packed:
    """The weight of a layer, whose tensors it takes out of tensors."""
    own = {
        name: tensors.pop(prefix + name)
        for name in ("weight", *_OF_QUANTIZED, *_UNKNOWN)
        if prefix + name in tensors
    }  # fmt: skip
    for name in _UNKNOWN:
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
    if not per_row or _groups(scale) == 0 or k % _groups(scale):
        raise ValueError(
            f"{prefix}weight_scale: got shape {list(scale.shape)}; accepted: [1], [{n}, 1] or [{n}, groups] with "
            f"groups that divide K = {k}"
        )
    words = None if packed is None else packed.shape[1]
    bits, symmetric = _choose(prefix, layer, schemes, (n, k), words, scale)
    if bits not in (*layouts.BITS, 8):
        raise ValueError(f"{prefix}weight: got {bits} bits; accepted: 2, 3, 4, 8")
    zero_point = own.get("weight_zero_point")
    if zero_point is None and not symmetric:
        raise ValueError(f"{prefix}weight_zero_point: missing; accepted: zero points, as the config says asymmetric")
    if zero_point is not None:
        zero_point = _zero_points(f"{prefix}weight_zero_point", zero_point, bits, n, scale, packed is not None)
    q = own["weight"] if packed is None else _codes(packed, bits, k)
    if bits == 8:
        if _groups(scale) != 1:
            raise ValueError(
                f"{prefix}weight_scale: got {_groups(scale)} groups of int8 codes; accepted with 8 bits: a scale for "
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
    """N, K of a layer's weight, whose tensors it checks."""
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
    """int8 codes of two's complement as those that are offset by 2**(bits − 1), by their low bits; and back."""
    return q ^ -(1 << bits - 1)


def _codes(words: Tensor, bits: int, k: int) -> Tensor:
    """The codes [rows, k] int8 in rows of int32."""
    rows, row = words.shape
    # clone: contiguous() leaves the strides of dims of one element; flat: rows of none have strides that no view takes
    flat = words.clone(memory_format=torch.contiguous_format).flatten()
    octets = flat.view(torch.uint8).view(rows, 4 * row)[:, : layouts.packed_length(k, bits)].contiguous()
    return _flipped(octets.view(torch.int8) if bits == 8 else unpack_bits(octets, bits, k), bits)


def _in_words(q: Tensor, bits: int) -> Tensor:
    """Codes [rows, k] int8 in rows of int32, the bits beyond the last zeros."""
    flipped = _flipped(q, bits)
    octets = flipped.view(torch.uint8) if bits == 8 else pack_bits(flipped, bits)
    padded = torch.nn.functional.pad(octets, (0, -octets.shape[1] % 4))
    return padded.flatten().view(torch.int32).view(q.shape[0], padded.shape[1] // 4)


def _zero_points(name: str, zero_point: Tensor, bits: int, n: int, scale: Tensor, packed: bool) -> Tensor:
    """int8 in scale's shape: beside weight_packed from int32 packed along N, else as they are, of any integer dtype."""
    got, one_each = f"{name}: got {zero_point.dtype} of shape {list(zero_point.shape)}", zero_point.shape == scale.shape
    if not packed and scale.numel() == zero_point.numel() == 1:
        zero_point, one_each = zero_point.view(scale.shape), True
    if zero_point.dtype == torch.int8 and not one_each:
        raise ValueError(f"{name}: got shape {list(zero_point.shape)}; accepted: the scales', {list(scale.shape)}")
    if packed and zero_point.dtype != torch.int8:
        expected = (_words(n, bits), _groups(scale))
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


def _prefix(name: str, packed: object) -> str:
    """What stands before a packed weight's own name."""
    if not isinstance(packed, Packed):
        raise ValueError(f"{name}: got {type(packed).__name__}; accepted: PackedInt4, PackedInt8 or a tensor")
    prefix = name.removesuffix("weight")
    if prefix + "weight" != name or (prefix and not prefix.endswith(".")):
        raise ValueError(f'{name}: got a packed weight under this name; accepted: "<layer>.weight"')
    return prefix


def _parts(name: str, packed: Packed, act_bits: int, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a packed weight."""
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
        parts[f"{prefix}weight_packed"] = _in_words(q, bits)
        parts[f"{prefix}weight_shape"] = torch.tensor(packed.shape)
    if zero_point is not None:
        packed_along_n = _in_words(zero_point.t().contiguous(), bits).t() if act_bits == 16 else zero_point
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


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors writes no memory twice: tied weights get memory of their own."""
    seen: set[int] = set()
    for name, t in tensors.items():
        storage = t.untyped_storage().data_ptr()
        if storage in seen:
            tensors[name] = t.clone()
        seen.add(storage)
    return tensors
