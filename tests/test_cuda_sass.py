"""What the compiler made of the CUDA kernels, read without a GPU: no spills, wide accesses, no contraction, no waiting.

Of sm_90a also what its speed was planned by: blocks that fit a multiprocessor, and what is read before what.

Reads the library that test_cuda_library.py compiles, for the architectures of this run.
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


ARCHITECTURES = [f"sm_{arch.replace('.', '')}" for arch in ARCHES]
# fp64 is here to be right, not fast: its division is a function call, and what is live across it may be spilled.
MAY_SPILL = re.compile(r"<double\b")
# One access per 16 bytes of floating input, and of floating output where there is one.
READ = re.compile(r"\b(ForwardOp|BackwardOp|BackwardMaskOp|QuantizeOp|LearnableOp|RangeOp)<|foreach_(pieces_)?kernel<")
WRITTEN = re.compile(
    r"\b(ForwardOp|BackwardOp|BackwardMaskOp|LearnableOp)<|foreach_(pieces_)?kernel<|DequantizeOp<.*(float|BFloat16|Half)>"
)
NO_ELEMENTS = re.compile(r"combine_kernel<")  # these read what the kernel before left
ROWS = ["(RowKind)0", "(RowKind)1", "(RowKind)2"]  # symmetric, asymmetric, ragged
INT4 = re.compile(r"int4_linear_kernel<(\w+), (\d+), (\d+), (\w+)>")  # x, half, rows, minimum


def threads_of(name: str) -> int:
    """As in the kernel's __launch_bounds__."""
    if found := INT4.search(name):
        return 256 if found[3] == "64" else 128
    if "rows_kernel" in name and ", 4, " in name:
        return 768 if ROWS[2] in name else 1024
    return 256


@pytest.fixture(scope="module")
def dumps(compiled: Path) -> dict[str, dict[str, sass.Kernel]]:  # noqa: F811
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHITECTURES, pool.map(partial(sass.kernels, compiled), ARCHITECTURES), strict=True))


def named(found: dict[str, sass.Kernel]) -> dict[str, sass.Kernel]:
    shown = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout
    names = [re.sub(r"qkernels::|\(anonymous namespace\)::", "", line) for line in shown.splitlines()]
    return dict(zip(names, found.values(), strict=True))


@pytest.fixture(params=ARCHITECTURES)
def kernels(request: pytest.FixtureRequest, dumps: dict[str, dict[str, sass.Kernel]]) -> dict[str, sass.Kernel]:
    found = named(dumps[request.param])
    assert len(found) == len(dumps[request.param]) > 100
    for family in ("sweep", "elements", "pieces", "columns", "combine", "rows", "foreach", "int4_linear"):
        assert any(f"{family}_kernel" in name for name in found)
    return found


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
                least = 64 if re.search(r"columns_kernel<LearnableOp<(BFloat16|Half)", name) else 128  # four elements
                assert kernel.widths.get(kind, 0) >= least, (
                    f"{name}: {kind} of {kernel.widths.get(kind, 0)} bits at most"
                )
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


@pytest.fixture
def hopper(dumps: dict[str, dict[str, sass.Kernel]]) -> dict[str, sass.Kernel]:
    """The kernels of sm_90a but for those of fp64, which are there to be right."""
    if "sm_90a" not in dumps:
        pytest.skip(f"this run compiles for {', '.join(dumps)}")
    return {name: kernel for name, kernel in named(dumps["sm_90a"]).items() if not MAY_SPILL.search(name)}


def of(kernels: dict[str, sass.Kernel], pattern: str, least: int) -> dict[str, sass.Kernel]:
    found = {name: kernel for name, kernel in kernels.items() if re.search(pattern, name)}
    assert len(found) >= least, f"{len(found)} of {pattern}"
    return found


# Threads of a block, and blocks of them that a multiprocessor holds at once: what a bound on registers is there for.
RESIDENT = [
    (r"rows_kernel<\w+, [\w ]+, 4, \(RowKind\)[01]>", 512, 2, 12),
    (r"rows_kernel<\w+, [\w ]+, 1, \(RowKind\)0>", 256, 4, 6),
    (r"rows_kernel<\w+, [\w ]+, 1, \(RowKind\)1>", 256, 3, 6),
    (r"sweep_kernel<(ForwardOp|QuantizeOp|DequantizeOp<\w+ char|BackwardMaskOp).*, false>\(", 256, 5, 24),
    (r"sweep_kernel<(BackwardOp<|DequantizeOp<int).*, false>\(", 256, 4, 6),
    (r"sweep_kernel<.*, true>\(", 256, 3, 27),
    (r"elements_kernel<", 256, 3, 27),
    (r"pieces_kernel<(Learnable|Range)Op<", 256, 3, 9),
    (r"columns_kernel<(Learnable|Range)Op<", 256, 3, 9),
    (r"foreach_kernel<", 256, 4, 6),
]


@pytest.mark.parametrize(("pattern", "threads", "blocks", "least"), RESIDENT)
def test_so_many_blocks_fit(
    hopper: dict[str, sass.Kernel], pattern: str, threads: int, blocks: int, least: int
) -> None:
    for name, kernel in of(hopper, pattern, least).items():
        registers = -(-kernel.registers // 8) * 8
        assert registers * threads * blocks <= 65536, f"{name}: {kernel.registers} registers"


SWEEPS = r"sweep_kernel<(ForwardOp|BackwardOp|QuantizeOp)<"


def test_x_is_read_before_its_parameters(hopper: dict[str, sass.Kernel]) -> None:
    """On the way to the first wide load nothing else is loaded; all of them come before scale, and that before 1/scale.

    What a kernel reads it waits for by the first use: a parameter used first is a latency in which x is not on its way.
    """
    for name, kernel in of(hopper, SWEEPS, 36).items():
        way = kernel.path(r"LDG\S*\.128 ")
        assert [text for text in way[:-1] if text.startswith(("LDG", "MUFU"))] == [], name
        code = [text for _, text in kernel.code]
        code = code[code.index(way[-1]) :]
        upto = next(at for at, text in enumerate(code) if text.startswith("MUFU"))
        loads = [text.split()[0] for text in code[:upto] if text.startswith("LDG")]
        wide = 8 if "BackwardOp" in name else 4
        assert [width.endswith(".128") for width in loads[: wide + 1]] == [True] * wide + [False], f"{name}: {loads}"


def test_parameters_are_made_once_for_a_channel(hopper: dict[str, sass.Kernel]) -> None:
    """One reciprocal, of two kinds, where a block has one channel, and one more for its ragged vectors.

    Where runs are short it is one for each of four vectors, whose runs follow from that of the first by addition.
    """
    for name, kernel in of(hopper, SWEEPS, 36).items():
        short_runs = ", true>(" in name
        assert kernel.counts["CALL"] == 0, name
        assert kernel.counts["MUFU"] <= (10 if short_runs else 4), name
        assert kernel.counts["I2F"] <= (5 if short_runs else 2), f"{name}: of the zero points alone"
        if short_runs:
            way = kernel.path(r"LDG\S*\.128 ")
            code = [text for _, text in kernel.code]
            following = code[code.index(way[-1]) :]
            following = following[: next(at for at, text in enumerate(following) if text.startswith("MUFU"))]
            # A division is one of these; there are five in the loops over levels of granularity.
            divisions = sum(text.startswith("IMAD.WIDE.U32.X") for text in following)
            assert divisions <= 1 + 4 + 4, f"{name}: {divisions}"
        else:
            assert kernel.counts["IMAD.WIDE.U32.X"] <= 2, name


def test_dynamic_rows_know_their_range_and_their_alignment(hopper: dict[str, sass.Kernel]) -> None:
    for name, kernel in of(hopper, r"rows_kernel<", 36).items():
        loads = {text.split()[0] for _, text in kernel.code if text.startswith("LDG")}
        assert (loads == {"LDG.E.128"}) == (ROWS[2] not in name), f"{name}: {loads}"
        rows = 4 if ", 1, (RowKind)" in name else 1
        if ROWS[0] in name:
            assert kernel.counts["SHFL"] == rows, f"{name}: one value is reduced, the largest"
            assert kernel.counts["CALL"] == rows, f"{name}: one division, amax / steps, outside its usual range"
        if ROWS[0] in name and "float" not in name:
            packed = sum(text.startswith("HMNMX2") for _, text in kernel.code)
            assert packed >= 16, f"{name}: {packed} maxima of two halves at once"


def test_an_observers_flag_is_one_load(hopper: dict[str, sass.Kernel]) -> None:
    """Of one, two, four or eight bytes; never byte by byte."""
    for name, kernel in of(hopper, r"RangeOp<\w+, Observe>", 9).items():
        assert kernel.in_loops(r"LDG\S*\.U8") == [], name
        assert sum(text.startswith("LDG.E.U8") for _, text in kernel.code) == 1, name
    for name, kernel in of(hopper, r"sweep_kernel<ForwardOp<\w+, true>", 6).items():
        assert sum(text.startswith("LDG.E.U8") for _, text in kernel.code) == 2, name  # and for ragged vectors


def test_second_stages_start_early(kernels: dict[str, sass.Kernel]) -> None:
    """From sm_90 on: the first stage lets them, and nothing is read before the wait."""
    early = any(text.startswith("PREEXIT") for kernel in kernels.values() for _, text in kernel.code)
    seen = Counter[str]()
    for name, kernel in kernels.items():
        kinds = [text.split()[0] for _, text in kernel.code]
        first = re.search(r"(pieces|columns|int4_linear)_kernel", name)
        second = re.search(r"combine_kernel|int4_sum_kernel", name)
        assert kinds.count("PREEXIT") == (1 if first and early else 0), name
        assert kinds.count("ACQBULK") == (1 if second and early else 0), name
        if second and early:
            way = [text.split()[0] for text in kernel.path("LDG|STG|EXIT")]
            assert "ACQBULK" in way, name
        seen.update(found[0] for found in (first, second) if found and early)
    assert not early or len(seen) == 5


def test_early_starts_are_where_the_instructions_are(dumps: dict[str, dict[str, sass.Kernel]]) -> None:
    early = {
        arch
        for arch, kernels in dumps.items()
        if any(text.startswith("PREEXIT") for kernel in kernels.values() for _, text in kernel.code)
    }
    assert early == {arch for arch in ARCHITECTURES if int(re.sub(r"\D", "", arch)) >= 90}


def test_int4_divides_by_multiplication(hopper: dict[str, sass.Kernel]) -> None:
    for name, kernel in of(hopper, r"int4_(linear|sum)_kernel", 33).items():
        assert kernel.counts["CALL"] == 0, name


def test_reads_of_the_second_stage_overlap(hopper: dict[str, sass.Kernel]) -> None:
    """Four pairs are on their way before the first is added."""
    for name, kernel in of(hopper, r"combine_kernel<LearnableOp", 6).items():
        code = [text.split()[0] for _, text in kernel.code]
        upto = code.index("DADD")
        assert sum(kind.startswith("LDG") for kind in code[:upto]) >= 4, name


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
    r"|cuda(LaunchKernelExC|DeviceGetAttribute|Func(SetAttribute|GetAttributes)|GetLastError|GetErrorString)"
    r"|aoti_torch_(abi_version|get_(data_ptr|dim|numel|sizes|strides|dtype|device_type|device_index|current_device_index|"
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
    assert {
        "cudaLaunchKernelExC",
        "cudaFuncGetAttributes",
        "aoti_torch_get_current_cuda_stream",
        "aoti_torch_empty_strided",
    } <= called
    assert {name for name in called if not MAY_CALL.fullmatch(name)} == set()
    assert set(re.findall(rb"aten::\w+", compiled.read_bytes())) == MAY_DISPATCH
