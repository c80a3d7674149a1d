"""What the compiler made of the CUDA kernels, read without a GPU: no spills, wide accesses, no contraction, no waiting.

Reads the library that test_cuda_library.py compiles.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import sass
from test_cuda_library import ARCHES, compiled  # noqa: F401

pytestmark = pytest.mark.skipif(sass.tool("cuobjdump") is None, reason="needs cuobjdump, of CUDA or of Triton")
ARCHITECTURES = [f"sm_{arch.partition('+')[0].replace('.', '')}" for arch in ARCHES.split(";")]
# fp64 is here to be right, not fast: its division is a function call, and what is live across it may be spilled.
MAY_SPILL = re.compile(r"<double\b")
# One access per 16 bytes of floating input, and of floating output where there is one.
READ = re.compile(r"\b(ForwardOp|BackwardOp|BackwardMaskOp|QuantizeOp|LearnableOp|RangeOp)<|foreach_(pieces_)?kernel<")
WRITTEN = re.compile(
    r"\b(ForwardOp|BackwardOp|BackwardMaskOp|LearnableOp)<|foreach_(pieces_)?kernel<|DequantizeOp<.*(float|BFloat16|Half)>"
)
NO_ELEMENTS = re.compile(r"combine_kernel<")  # these read what the kernel before left
INT4 = re.compile(r"int4_linear_kernel<(\w+), (\d+), (\d+), (\w+)>")  # x, half, rows, minimum


def threads_of(name: str) -> int:
    """As in the kernel's __launch_bounds__."""
    if found := INT4.search(name):
        return 256 if found[3] == "64" else 128
    return 768 if re.search(r"rows_kernel<.*, 4>", name) else 256


@pytest.fixture(scope="module")
def dumps(compiled: Path) -> dict[str, dict[str, sass.Kernel]]:  # noqa: F811
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHITECTURES, pool.map(partial(sass.kernels, compiled), ARCHITECTURES), strict=True))


@pytest.fixture(params=ARCHITECTURES)
def kernels(request: pytest.FixtureRequest, dumps: dict[str, dict[str, sass.Kernel]]) -> dict[str, sass.Kernel]:
    found = dumps[request.param]
    shown = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout
    names = [re.sub(r"qkernels::|\(anonymous namespace\)::", "", line) for line in shown.splitlines()]
    named = dict(zip(names, found.values(), strict=True))
    assert len(named) == len(found) > 100
    for family in ("sweep", "pieces", "columns", "combine", "rows", "foreach", "int4_linear"):
        assert any(f"{family}_kernel" in name for name in named)
    return named


def test_nothing_is_spilled(kernels: dict[str, sass.Kernel]) -> None:
    assert [name for name, kernel in kernels.items() if kernel.spills and not MAY_SPILL.search(name)] == []


def test_a_block_fits(kernels: dict[str, sass.Kernel]) -> None:
    assert [name for name, kernel in kernels.items() if kernel.shared > 48 << 10] == []
    for name, kernel in kernels.items():
        registers = -(-kernel.registers // 8) * 8 * threads_of(name)  # warps get them by the 256
        assert kernel.registers <= 255, name
        assert registers <= 65536, f"{name}: {kernel.registers} registers for each of {threads_of(name)} threads"


def test_accesses_are_wide(kernels: dict[str, sass.Kernel]) -> None:
    checked = set()
    for name, kernel in kernels.items():
        if "double" in name or NO_ELEMENTS.search(name):
            continue
        for kind, pattern in (("LDG", READ), ("STG", WRITTEN)):
            if found := pattern.search(name):
                checked.add((kind, found[0]))
                assert kernel.widths.get(kind, 0) >= 128, f"{name}: {kind} of {kernel.widths.get(kind, 0)} bits at most"
    assert len(checked) >= 10


def test_int4_kernels_do_what_they_must_and_little_more(kernels: dict[str, sass.Kernel]) -> None:
    """Of 128 k: copies past registers, tensor cores, and for 8 codes three shifts, four LOP3 and four subtractions."""
    checked = 0
    for name, kernel in kernels.items():
        if (found := INT4.search(name)) is None:
            continue
        checked += 1
        half, minimum = int(found[2]), found[4] == "true"
        parts = 2 if minimum and half == 32 else 1  # in which the code goes through a tile
        strips, tiles = 2, min(int(found[3]), 32) // 8
        words = strips * 2 * 4 // parts
        assert kernel.widths["LDGSTS"] == 128, name
        assert kernel.widths["LDS"] == 128, name
        mma = Counter({kind: count for kind, count in kernel.counts.items() if kind.startswith("HMMA")})
        assert set(mma) == {"HMMA.16816.F32" + (".BF16" if found[1] == "BFloat16" else "")}, name
        assert mma.total() == tiles * (strips + minimum) * 8 // parts, name
        counts = kernel.counts
        assert counts["0x6a"] == words * 4, f"{name}: {counts['0x6a']} LOP3 of (a & b) ^ c"
        assert counts["HADD2"] + counts["HFMA2"] >= words * 4, name
        for kind, least, beside in (("SHF", 0, words * 3 + 64), ("PRMT", tiles * 16 // parts, 32), ("I2F", 0, 24)):
            count = counts[kind] + counts[kind + "P"]
            assert least <= count <= least + beside, f"{name}: {count} {kind}"
    assert checked == 32


@pytest.fixture(scope="module")
def ptx(compiled: Path) -> str:  # noqa: F811
    return sass._cuobjdump(compiled, None, "-ptx")


def test_no_multiplication_is_contracted(ptx: str) -> None:
    """ptxas contracts only what carries no rounding; the fused operations are those of reciprocal(), and no others.

    The int4 layer's are asked for: its sums have a bound, and no bits that anything else should have.
    """
    operations = re.findall(r"\b((?:add|sub|mul|mad|fma)(?:\.\w+)*\.f(?:32|64))\s", ptx)
    assert set(operations) == {f"{op}.rn.f{bits}" for op in ("add", "sub", "mul", "fma") for bits in (32, 64)}
    for part in ptx.split(".entry ")[1:]:
        if "int4_linear_kernel" in part.split("(")[0]:
            continue
        reciprocals = part.count("rcp.approx.ftz.f32")  # two each, for normal results and for subnormal ones
        assert part.count("fma.rn.f32") == reciprocals, part.split("(")[0]
        assert part.count("fma.rn.f64") == 2 * reciprocals, part.split("(")[0]


# What host code may call: launches, the stream, allocation by torch, and questions about tensors' metadata.
MAY_CALL = re.compile(
    r"__cuda(RegisterFatBinary|RegisterFatBinaryEnd|UnregisterFatBinary|RegisterFunction|RegisterVar|GetKernel|"
    r"LaunchKernel|PopCallConfiguration)"
    r"|cuda(LaunchKernelExC|DeviceGetAttribute|FuncSetAttribute|GetLastError|GetErrorString)"
    r"|aoti_torch_(abi_version|get_(dim|numel|sizes|strides|dtype|device_type|device_index|current_device_index|"
    r"current_cuda_stream)|is_contiguous|is_defined|empty_strided|dtype_\w+|device_type_(cpu|cuda)|(create|delete)_device_guard|"
    r"new_tensor_handle|new_uninitialized_tensor|delete_tensor_object|library_init_impl|delete_library_object)"
    r"|torch_(get_mutable_data_ptr|get_const_data_ptr|library_impl|call_dispatcher|delete_list|list_get_item|"
    r"list_push_back|list_size|new_list_reserve_size)"
)
MAY_DISPATCH = {b"aten::copy_", b"aten::empty_like"}  # on one device: neither waits


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_nothing_waits_for_the_gpu(compiled: Path) -> None:  # noqa: F811
    """Every function of the runtimes that our host code calls is in the list above: none that waits or copies."""
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-j", ".text", str(compiled)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    called: set[str] = set()
    ours = False
    for line in code.splitlines():
        if line.endswith(">:"):  # the linked-in CUDA runtime has functions of its own: C names
            name = line.split("<", 1)[1][:-2]
            ours = name.startswith(("_Z", "_GLOBAL__"))
        elif ours and (
            found := re.search(r"\b(?:call|jmp)\s+[0-9a-f]+ <((?:__cuda|cuda|cu[A-Z]|aoti_|torch_)\w+)", line)
        ):
            called.add(found[1])
    assert {"cudaLaunchKernelExC", "aoti_torch_get_current_cuda_stream", "aoti_torch_empty_strided"} <= called
    assert {name for name in called if not MAY_CALL.fullmatch(name)} == set()
    assert set(re.findall(rb"aten::\w+", compiled.read_bytes())) == MAY_DISPATCH
