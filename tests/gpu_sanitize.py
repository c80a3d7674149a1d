"""A small set of calls of every GPU kernel, for compute-sanitizer to watch: odd sizes, all ops, both backends."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from qkernels import registry, selfcheck


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU that torch can use")
        return 2
    faults, cases = [], 0
    for op in sorted({kernel.op for kernel in registry.kernels()}):
        able = [k for k in registry.kernels(op) if selfcheck.device_of(k) == "cuda" and k.unsupported() is None]
        for outcome in selfcheck.check_op(op, able, quick=True):
            cases += outcome.cases
            if outcome.fault is not None:
                faults.append(f"{outcome.op} {outcome.kernel}: {outcome.fault}")
    torch.cuda.synchronize()
    print("\n".join([*faults, f"{cases} calls, {len(faults)} faults"]))
    return 1 if faults or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
