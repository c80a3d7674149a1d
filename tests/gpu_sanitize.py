"""A small set of calls of every GPU kernel, for compute-sanitizer to watch: odd sizes, all ops, both backends."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from qkernels import registry, selfcheck


def main() -> int:
    """The only argument: seconds after which no further kernel is begun; those left out are counted."""
    if not torch.cuda.is_available():
        print("no GPU that torch can use")
        return 2
    end = time.monotonic() + float(sys.argv[1])
    able = [k for k in registry.kernels() if selfcheck.device_of(k) == "cuda" and k.unsupported() is None]
    faults, cases, begun = [], 0, 0
    for kernel in sorted(able, key=lambda kernel: kernel.name):  # compiled kernels first, then those made on the way
        if time.monotonic() > end:
            break
        begun += 1
        for outcome in selfcheck.check_op(kernel.op, [kernel], quick=True):
            cases += outcome.cases
            if outcome.fault is not None:
                faults.append(f"{outcome.op} {outcome.kernel}: {outcome.fault}")
    torch.cuda.synchronize()
    print("\n".join([*faults, f"{begun} of {len(able)} kernels, {cases} calls, {len(faults)} faults"]))
    return 1 if faults or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
