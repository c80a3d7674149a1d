"""What the compiled CPU library says of the machine and of itself, and which of its paths the kernels take.

Plain C functions (csrc/cpu/common/host.cpp) through ctypes, so that a library is bound to no version of Python.
"""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path


class Host:
    def __init__(self, library: Path) -> None:
        """Raises OSError or AttributeError where ``library`` is not one of qkernels."""
        c = ctypes.CDLL(str(library))
        c.qkernels_isa_name.restype = c.qkernels_compiler.restype = c.qkernels_build_torch.restype = ctypes.c_char_p
        self._c = c
        self._names = [name.decode() for name in iter(map(c.qkernels_isa_name, itertools.count()).__next__, None)]

    def isa_names(self) -> list[str]:
        """Every path, the plainest first."""
        return list(self._names)

    def supported_isa(self) -> str:
        """The best path that this CPU can take."""
        return self._names[self._c.qkernels_supported_isa()]

    def active_isa(self) -> str:
        """The best path that kernels may take."""
        return self._names[self._c.qkernels_active_isa()]

    def set_isa(self, isa: str) -> None:
        """Caps the path that kernels take. Raises ValueError for one that this CPU does not run."""
        accepted = self._names[: self._c.qkernels_supported_isa() + 1]
        if isa not in accepted:
            raise ValueError(f"isa: got {isa!r}; this CPU runs {', '.join(accepted)}")
        self._c.qkernels_set_active_isa(accepted.index(isa))

    def last_isa(self) -> str | None:
        """The path that the last kernel took; None since ``clear_last_isa()``."""
        last = self._c.qkernels_last_isa()
        return None if last < 0 else self._names[last]

    def clear_last_isa(self) -> None:
        self._c.qkernels_clear_last_isa()

    def build_info(self) -> dict[str, str]:
        """The compiler, and the torch whose headers it was given."""
        return {
            "compiler": self._c.qkernels_compiler().decode().strip(),
            "torch": self._c.qkernels_build_torch().decode(),
        }
