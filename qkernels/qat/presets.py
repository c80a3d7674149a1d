"""presets: configs by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..nn.granularity import PerGroup
from ..nn.quantizer_rules import nearest
from .config import QConfig
from .spec import QSpec

_INPUT = QSpec(8, symmetric=False)
_CONFIGS = {
    "w8a8": QConfig(QSpec(8), _INPUT),
    "w4a8": QConfig(QSpec(4), _INPUT),
    "w4a4": QConfig(QSpec(4), QSpec(4, symmetric=False)),
    "w2a2": QConfig(QSpec(2), QSpec(2, symmetric=False)),
    "w4a16-g128": QConfig(QSpec(4, PerGroup(128), symmetric=False), None),
    "weight-only": QConfig(QSpec(8), None),
    "activation-only": QConfig(None, _INPUT),
}


class Presets(Mapping[str, QConfig]):
    """A mapping from names to configs: ``qk.presets["w4a8"]``. ``prepare`` takes such a name as well.

    - "w8a8", "w4a8", "w4a4", "w2a2": weights of so many bits with a scale per output channel, and inputs of so many
      bits with a zero point, one scale for the tensor; all scales are learned. At 4 bits and less it is usual to give
      the first and the last layer 8 bits by rules. States of recurrent layers stay in float, and are multiplied in
      integers all the same (see ``Int8LSTM``), unless a rule gives "hidden".
    - "w4a16-g128": 4-bit weights in groups of 128 with zero points; inputs stay in float. Every layer's last dim has to
      be a multiple of 128; rules take the others.
    - "weight-only": 8-bit weights; inputs stay in float. "activation-only": 8-bit inputs; weights stay in float.
    """

    def __getitem__(self, name: str) -> QConfig:
        if name not in _CONFIGS:
            raise KeyError(f"preset: got {name!r}; accepted: {', '.join(_CONFIGS)}{nearest(name, _CONFIGS)}")
        return _CONFIGS[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_CONFIGS)

    def __len__(self) -> int:
        return len(_CONFIGS)


presets = Presets()
