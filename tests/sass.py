"""What the compiler made of the CUDA kernels, read from a library or a cubin without a GPU: for the gates on them.

python tests/sass.py qkernels/_cuda.so sm_90a      # one line per kernel
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Kernel:
    """Resources and memory instructions of one kernel on one architecture; sizes in bytes."""

    name: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    widths: dict[str, int] = field(default_factory=dict)  # widest access in bits by kind: LDG, STG, LDL, STL, …
    counts: Counter[str] = field(default_factory=Counter)  # FFMA, HMMA.16816.F32, …; LOP3 by its table, 0x6a, …
    code: list[tuple[int, str]] = field(default_factory=list)  # address and text of what is read here, in order

    @property
    def spills(self) -> bool:
        return self.stack > 0 or self.local > 0 or "LDL" in self.widths or "STL" in self.widths

    def path(self, last: str) -> list[str]:
        """What is executed at least before an instruction that matches `last`: the shortest way there, it included."""
        at = {address: index for index, (address, _) in enumerate(self.code)}
        came_from: dict[int, int] = {0: -1}
        for index in (queue := [0]):
            text = self.code[index][1]
            if re.match(last, text):
                way = []
                while index >= 0:
                    way.append(self.code[index][1])
                    index = came_from[index]
                return way[::-1]
            kind = text.split()[0].partition(".")[0]
            to = []
            if kind == "BRA" and (target := re.search(r"\b0x[0-9a-f]+", text)):
                to.append(next(at[a] for a in sorted(at) if a >= int(target[0], 16)))
            if kind not in ("BRA", "EXIT") or CONDITIONAL.search(text):
                to.append(index + 1)
            for following in to:
                if following < len(self.code) and following not in came_from:
                    came_from[following] = index
                    queue.append(following)
        raise AssertionError(f"{self.name}: nothing matches {last}")

    def in_loops(self, wanted: str) -> list[str]:
        """The instructions that match and lie between a branch backwards and its target."""
        loops = [
            (int(target[0], 16), address)
            for address, text in self.code
            if text.startswith("BRA") and (target := re.search(r"\b0x[0-9a-f]+", text))
        ]
        return [
            text
            for address, text in self.code
            if re.match(wanted, text) and any(start <= address <= end for start, end in loops)
        ]


ACCESSES = "LDG|STG|LDL|STL|LDS|STS|LDGSTS"
ARITHMETIC = "FFMA|DADD|HMMA|HMNMX2|LOP3|PRMT|SHF|I2F|I2FP|HADD2|HFMA2|MUFU|SHFL|FMNMX|CALL|IMAD\\.WIDE\\.U32\\.X"
FLOW = "BRA|EXIT|ACQBULK|PREEXIT"  # the last two: wait for the kernel before, let the next one start
LINE = re.compile(
    rf"/\*([0-9a-f]{{4,}})\*/\s+(@!?U?P\w+)?\s*((?:{ACCESSES}|{ARITHMETIC}|{FLOW})(?!\w).*?)\s*(?:;|/\*|$)"
)
CONDITIONAL = re.compile(r"^BRA[.\w]* !?U?P\d| if @")
WIDTHS = {"256": 256, "128": 128, "64": 64, "U8": 8, "S8": 8, "U16": 16, "S16": 16}


def tool(name: str) -> str | None:
    """cuobjdump from PATH, or the one that Triton's wheel brings."""
    if found := shutil.which(name):
        return found
    try:
        import triton
    except ImportError:
        return None
    packed = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(packed) if packed.exists() else None


def _cuobjdump(path: Path, arch: str | None, *options: str, only: str = "") -> str:
    """What cuobjdump prints; `only`: the lines with one of these words, few of the 80 MB of an architecture."""
    command = [tool("cuobjdump") or "cuobjdump", *options, *(["-arch", arch] if arch else []), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as dump:
        done = subprocess.run(["grep", "-E", only], stdin=dump.stdout, capture_output=True, text=True, check=False)
    if dump.returncode:
        raise subprocess.CalledProcessError(dump.returncode, command)
    return done.stdout


def kernels(path: Path, arch: str | None = None) -> dict[str, Kernel]:
    """The kernels of a cubin, or of a library for one architecture ("sm_90a"), by mangled name."""
    found: dict[str, Kernel] = {}
    for name, resources in re.findall(r"Function (\S+):\s*\n\s*(.*)", _cuobjdump(path, arch, "-res-usage")):
        usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", resources)}
        found[name] = Kernel(name, usage["REG"], usage["STACK"], usage["LOCAL"], usage["SHARED"])
    kernel = None
    for line in _cuobjdump(path, arch, "-sass", only=f"Function : |{ACCESSES}|{ARITHMETIC}|{FLOW}").splitlines():
        if "Function : " in line:
            name = line.split("Function : ")[1].strip()
            kernel = found.setdefault(name, Kernel(name))
        elif kernel is not None and (listed := LINE.search(line)):
            address, guard, text = listed.groups()
            kernel.code.append((int(address, 16), text + (f" if {guard}" if guard else "")))
            if (match := re.match(rf"({ACCESSES}|{ARITHMETIC})((?:\.\w+)*) ", text)) is None:
                continue
            kind, modifiers = match.groups()
            parts = modifiers.split(".")
            if kind not in ACCESSES.split("|"):
                table = re.search(r" 0x[0-9a-f]+(?=, !U?PT)", line) if kind == "LOP3" else None
                kernel.counts[table[0].strip() if table else kind + modifiers * (kind == "HMMA")] += 1
                continue
            bits = next((width for part, width in WIDTHS.items() if part in parts), 32)
            kernel.widths[kind] = max(kernel.widths.get(kind, 0), bits)
    return found


def instructions(path: Path) -> Counter[str]:
    """How often each instruction stands in the code of a cubin, modifiers included."""
    lines = _cuobjdump(path, None, "-sass", only=r"^\s+/\*[0-9a-f]{4,}\*/")
    return Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", lines, re.MULTILINE))


def short(name: str) -> str:
    """A mangled name as a person would write it."""
    shown = subprocess.run(["c++filt", name], capture_output=True, text=True, check=False).stdout.strip() or name
    return re.sub(r"qkernels::|\(anonymous namespace\)::|\(.*", "", shown)


if __name__ == "__main__":
    for kernel in kernels(Path(sys.argv[1]), sys.argv[2]).values():
        widths = " ".join(f"{kind}.{bits}" for kind, bits in sorted(kernel.widths.items()))
        print(
            f"{short(kernel.name):<90} {kernel.registers:>3} registers, stack {kernel.stack}, local {kernel.local}, "
            f"shared {kernel.shared}, {widths}"
        )
