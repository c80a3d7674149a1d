"""What config.json says about the weights of a checkpoint, and which part of it holds for a layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor


def quantization_of(config: Mapping[str, Any]) -> Any:
    return config.get("quantization_config", config.get("compression_config"))


class Scheme(NamedTuple):
    """What config.json says about the weights of a group of layers."""

    targets: tuple[str, ...]
    kind: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int

    def fits(self, k: int, words: int | None, scale: Tensor) -> bool:
        """Whether a weight [N, K] with ``words`` int32 in a row (None: int8) and this scale can have this scheme."""
        groups = groups_of(scale)
        if words is not None and words != words_of(k, self.bits):
            return False
        if self.strategy == "group":
            return groups * self.group_size == k
        return groups == 1 and (self.strategy == "channel" or scale.numel() == 1)

    def __str__(self) -> str:
        by = f"groups of {self.group_size}" if self.strategy == "group" else f"scales per {self.strategy}"
        return f"{self.bits} bits with {by}"


def schemes_of(config: Mapping[str, Any]) -> list[Scheme]:
    quantization = quantization_of(config) or config
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


def _scheme(name: str, group: Any) -> Scheme | None:
    """The scheme of a group; None if it quantizes no weights. Missing keys have compressed-tensors' defaults."""
    try:
        weights, targets = group["weights"], tuple(group["targets"])
        for target in targets:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        if weights is None:
            return None
        size = weights.get("group_size")
        strategy = weights.get("strategy") or ("tensor" if size is None else "group" if size > 0 else "channel")
        return Scheme(
            targets, weights.get("type", "int"), int(weights.get("num_bits", 8)), bool(weights.get("symmetric", True)),
            strategy, int(size or 0),
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise ValueError(
            f"config_groups.{name}: got {group!r}; accepted: an object with targets and weights"
        ) from error


def _matches(layer: str, target: str) -> bool:
    return re.match(target[3:], layer) is not None if target.startswith("re:") else target == layer


def groups_of(scale: Tensor) -> int:
    return scale.shape[1] if scale.dim() == 2 else 1


def words_of(k: int, bits: int) -> int:
    """How many int32 words k codes take."""
    return (k * bits + 31) // 32


def choose(
    prefix: str,
    layer: str,
    schemes: Iterable[Scheme] | None,
    shape: tuple[int, int],
    words: int | None,
    scale: Tensor,
) -> tuple[int, bool]:
    """(bits, symmetric) of a layer. A file names no classes of layers: if targets are classes, the shapes decide."""
    weight = f"{prefix}weight" if words is None else f"{prefix}weight_packed"
    got = f"{weight}: got N, K = {list(shape)}{f' in rows of {words} int32' if words is not None else ''}"
    if schemes is None:
        able = [bits for bits in range(1, 9) if words == words_of(shape[1], bits)] if words is not None else [8]
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
