"""What a compiled kernel uses, read from its cubin with NVIDIA's own tools."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

# Widths in bits of the loads that SASS names by suffix; without one it is 32.
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


class Usage(NamedTuple):
    registers: int
    spills: int  # loads and stores of local memory in the code
    local: int  # bytes per thread: stack frame and local memory
    shared: int  # bytes per block, static
    widest_load: int  # bits, of global memory


def tool(name: str) -> str:
    """cuobjdump or nvdisasm: of the CUDA toolkit, or the copy in Triton."""
    found = shutil.which(name)
    if found is None:
        import triton

        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    return found


def usage(cubin: Path) -> dict[str, Usage]:
    """Usage by kernel name."""

    def run(*arguments: str) -> str:
        return subprocess.run(
            [tool("cuobjdump"), *arguments, str(cubin)], capture_output=True, text=True, check=True
        ).stdout

    code = {}
    for part in re.split(r"^\s*Function : ", run("-sass"), flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        code[name.strip()] = body
    found = {}
    pattern = r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, registers, stack, shared, local in re.findall(pattern, run("-res-usage")):
        body = code[name]
        loads = [
            max([_WIDTHS.get(part, 0) for part in suffixes.split(".")] or [0]) or 32
            for suffixes in re.findall(r"\bLDG((?:\.\w+)*)", body)
        ]
        found[name] = Usage(
            int(registers), len(re.findall(r"\b(?:LDL|STL)\b", body)), int(stack) + int(local), int(shared),
            max(loads, default=0),
        )  # fmt: skip
    return found
