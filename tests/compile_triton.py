"""Compiles what the Triton ops launch for every supported GPU, without having one; run by test_triton_compile.py.

The ops are called on meta tensors with a launcher that writes down what it is given, and each distinct launch is
compiled from that: what is checked is what runs. One run compiles for one of the GPUs, and for all with --all. Prints
the names of all kernels and the GPUs as a JSON line, then a line for each launch and GPU.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sampling import in_turn
from torch import Tensor

from qkernels import checks, layouts

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
FLOATS = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def modules() -> list[Any]:
    package = importlib.import_module("qkernels.triton")
    names = [info.name for info in pkgutil.walk_packages(package.__path__, "qkernels.triton.")]
    return [importlib.import_module(name) for name in names]


@functools.cache
def kernels() -> dict[str, Any]:
    """Every function of qkernels/triton that is launched, by its name: the @triton.jit ones that end in _kernel."""
    from triton.runtime.jit import JITFunction

    found = {}
    for module in modules():
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                assert found.setdefault(name, value) is value, f"two kernels are named {name}"
    return found


def meta(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# Shapes of x and scale that reach every way to find a scale and every cut.
GRANULARITIES = [
    ((4096, 4096), (1,)),
    ((4096, 4096), (4096, 1)),  # long runs
    ((4096, 4096), (4096, 128)),  # groups of 32
    ((4096, 4096), (1, 4096)),  # channels last
    ((256, 64, 56, 56), (1, 64, 1, 1)),
    ((256, 512, 7, 7), (1, 512, 1, 1)),  # runs of 49
    ((512, 512, 3, 3), (512, 1, 1, 1)),
    ((4096, 4096), (32, 32)),  # blocks of 128 by 128
    ((768,), (1,)),
]


def calls(dtype: torch.dtype) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(module, op, arguments) of this package's ops."""
    int8, on = (-128, 127), meta((1,), torch.int64)
    common = dtype in (torch.bfloat16, torch.float32)
    for number, (shape, scale_shape) in enumerate(GRANULARITIES if common else GRANULARITIES[:2]):
        x, scale = meta(shape, dtype), meta(scale_shape)
        zero_points = [None, meta(scale_shape, torch.int32), meta(scale_shape)]
        zero_point = zero_points[number % 3]
        params, lsq = (scale, zero_point, *int8), number % 2 == 0
        yield "fake_quantize", "fake_quantize_forward", (x, *params)
        yield "fake_quantize", "fake_quantize_forward_mask", (x, *params, lsq)
        yield "fake_quantize", "fake_quantize_backward", (x, x, *params, lsq)
        yield "fake_quantize_learnable", "fake_quantize_learnable_backward", (x, x, *params, 0.5, lsq)
        stats = [meta(scale_shape) for _ in range(3)]
        steps = (0.0, 127.0)[number % 2]
        observed = (x, on, on, *stats, meta(scale_shape, torch.int32), 0.01, *int8, steps, 0)
        yield "observe_fake_quantize", "observe_fake_quantize", observed
        yield "follow_range", "follow_range", (x, scale, zero_point, *int8, number % 2 == 0, 1.0, 1.0)
        code = (torch.int8, torch.uint8, torch.int32)[number % 3]
        yield "quantize", "quantize", (x, scale, zero_point, 0, 127, code)
        yield "quantize", "dequantize", (meta(shape, code), scale, zero_point, dtype)
        drawn = (*params, 2**40, 3, (None, on)[number % 2])
        yield "stochastic", "fake_quantize_stochastic_forward", (x, *drawn)
        yield "stochastic", "fake_quantize_stochastic_backward", (x, x, *drawn, 0.5)
        yield "stochastic", "quantize_stochastic", (x, scale, zero_point, 0, 127, *drawn[-3:], code)
        for variant in checks.WITH_TERMS:
            yield (
                "fake_quantize_learnable",
                "fake_quantize_straight_through_backward",
                (x, x, *params, variant, 1e-3, 0.5),
            )
        table = (scale, meta(((16, 256)[number % 2],)))
        op = "fake_quantize_codebook_forward"
        yield "codebook", op if number % 4 < 2 else f"{op}_mask", (x, *table)
        yield "codebook", "fake_quantize_codebook_backward", (x, x, *table)
        yield "codebook", "quantize_codebook", (x, *table)
        yield "codebook", "dequantize_codebook", (meta(shape, torch.uint8), *table, dtype)
        learnable = "fake_quantize_codebook_learnable_backward", (x, x, *table, 0.5, number % 4 < 2)
        if importlib.import_module("qkernels.triton.codebook").unsupported(learnable[0], *learnable[1]) is None:
            yield "codebook", *learnable
        yield "statistics", "histogram", (x, scale, scale, 32768)
        candidates = meta((64, *scale_shape))
        z = [None, meta(candidates.shape, torch.int32), candidates][number % 3]
        yield "statistics", "quantization_errors", (x, candidates, z, *int8)
    for bits in (2, 3, 4):
        yield "packing", "pack_bits", (meta((4096, 4096), torch.int8), bits)
        yield "packing", "unpack_bits", (meta((4096, 512 * bits), torch.uint8), bits, 4096)
    x = meta((4096, 4096), dtype)
    yield "fake_quantize", "fake_quantize_backward_mask", (x, meta((x.numel() // 8,), torch.uint8))
    for shape in ((4096, 4096), (1001, 4097)):
        for numbers in ((None, 0, None), (2**40, 3, None), (5, 0, on)):
            args = (meta(shape, dtype), 127, *numbers)
            yield "quantize_transposed", "quantize_dynamic_transposed", args
    odd, drawn = meta((1001, 4097), dtype), (2**40, 3, on)  # no row begins at four random numbers
    for scale_shape in ((1001, 1), (1, 4097)):
        args = (odd, odd, meta(scale_shape), None, *int8, *drawn, 0.5)
        yield "stochastic", "fake_quantize_stochastic_backward", args
    for op in ("forward", "forward_mask"):
        yield "fake_quantize", f"fake_quantize_{op}_scalar", (x, 0.1, 3, *int8)
    yield "fake_quantize", "fake_quantize_backward_scalar", (x, x, 0.1, 3, *int8)
    lengths = ((4096, -1), (4096, 0), (4096, 32), (128, -1), (11008, -1), (16384, -1), (65536, -1))
    for length, group in lengths if common else lengths[:2]:
        for symmetric in (True, False):
            args = (meta((8192, length), dtype), group, *int8, symmetric)
            yield "dynamic", "fake_quantize_dynamic_forward", args
            yield "dynamic", "quantize_dynamic", args


def fused_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(module, op, arguments) of the ops that norm, multiply or rectify before they quantize."""
    int8 = (-128, 127)
    for number, (shape, scale_shape) in enumerate(GRANULARITIES[:2]):
        lsq = number % 2 == 0
        x, params = meta(shape, dtype), (meta(scale_shape), meta(scale_shape, torch.int32), *int8)
        yield "relu_fake_quantize", "relu_fake_quantize_forward", (x, *params)
        yield "relu_fake_quantize", "relu_fake_quantize_forward_mask", (x, *params, lsq)
        yield "relu_fake_quantize", "relu_fake_quantize_backward", (x, x, *params, lsq)
        yield "relu_fake_quantize", "relu_fake_quantize_learnable_backward", (x, x, *params, 0.5, lsq)
    if dtype == torch.float64:
        return
    for length, group in ((4096, -1), (8192, 32), (16384, -1), (32768, -1), (20000, 50), (4097, -1)):
        x, weight, rstd = meta((8192, length), dtype), meta((length,), dtype), meta((8192, 1))
        scale = meta((8192, 1 if group == -1 else length // group))
        for symmetric in (True, False):
            norm = (x, weight, 1e-6, group, *int8, symmetric)
            product = (x, x, group, *int8, symmetric)
            clipped = (None, None) if symmetric else (scale, meta(tuple(scale.shape), torch.int32))
            yield "rms_norm_quantize", "rms_norm_fake_quantize_dynamic_forward", norm
            back = (x, x, weight, rstd, *clipped, *int8, True)
            yield "rms_norm_quantize", "rms_norm_fake_quantize_dynamic_backward", back
            yield "silu_mul_quantize", "silu_mul_fake_quantize_dynamic_forward", product
            yield "silu_mul_quantize", "silu_mul_fake_quantize_dynamic_backward", (x, x, x, *clipped, *int8)
        yield "rms_norm_quantize", "rms_norm_quantize_dynamic", norm
        yield "silu_mul_quantize", "silu_mul_quantize_dynamic", product


MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


def gemm_calls(arch: int, everything: bool) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(op, arguments) that reach every tile of an architecture's table, and on one of each kind every other variant."""
    from qkernels.triton.common import gemm_configs

    def codes(m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
        return meta((m, k), torch.int8), meta((n, k), torch.int8).t()

    seen, kinds = set(), set()
    for m in (*gemm_configs.GEMM_ROWS, 8192):
        for n in (1024, 4096, 8192, 28672):
            tile = gemm_configs.gemm_tile(arch, m, n)
            if tile in seen:
                continue
            seen.add(tile)
            per_row, per_column = meta((m, 1)), meta((n,))
            plain = None, None, "none", torch.bfloat16, None, None
            yield "int8_scaled_mm", (*codes(m, n, 4096), per_row, per_column, None, *plain)
            kind = tile.swap, tile.block_n == 256
            if not everything and kind in kinds:
                continue
            kinds.add(kind)
            bias = meta((n,), torch.bfloat16)
            zero_point = meta((m,), torch.int32)
            yield "int8_mm", codes(m, n, 4096)
            full, half = ("none", torch.float32, None, None), ("relu", torch.float16, None, None)
            yield "int8_scaled_mm", (*codes(m, n, 4096), meta((1,)), per_column, zero_point, None, bias, *full)
            yield "int8_scaled_mm", (*codes(m, n, 4112), per_row, per_column, None, None, bias, *half)
            yield "int8_scaled_mm", (*codes(m, n - 1, 65536), per_row, meta((n - 1,)), None, *plain)
            for activation in ("gelu", "silu"):
                as_codes = activation, torch.int8, meta((1,)), meta((1,), torch.int32)
                offset = meta((m,), torch.int32)
                colsum = meta((n,), torch.int32)
                yield "int8_scaled_mm", (*codes(m, n, 4096), per_row, per_column, offset, colsum, bias, *as_codes)
            x = meta((m, 4096), torch.bfloat16)
            rest = (meta((n, 4096), torch.int8), meta((n,), torch.int32), meta((n,)), bias)
            static = (meta((1,)), meta((1,), torch.int32))
            plain = "none", torch.bfloat16, None, None
            yield "int8_linear", (x, *rest, None, None, -128, 127, *plain)
            yield "int8_linear", (x, *rest, *static, -128, 127, *plain)


def int4_calls(arch: int, everything: bool) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(op, arguments) that reach every tile, every loop along K, and every kind of weight and input."""
    from qkernels.triton.common import gemm_configs

    def weight(n: int, k: int, group_size: int, kind: str = "symmetric", dtype: torch.dtype = torch.float32) -> Any:
        groups = (k // group_size, n)
        zero_point = meta(groups, torch.int8) if kind == "zero points" else None
        minimum = meta(groups, dtype) if kind == "minimum" else None
        data = meta(layouts.int4_shape(layouts.HALVES, n, k, group_size), torch.uint8)
        return data, meta(groups, dtype), zero_point, minimum, meta((n,))

    def call(x: Tensor, of: Any, group_size: int, act_bits: int, bias: Tensor | None = None, *given: Any) -> Any:
        static = given or (None, None)
        out_dtype = torch.bfloat16 if x.dtype == torch.int8 else x.dtype
        return "int4_linear", (x, *of, bias, group_size, act_bits, *static, -128, 127, out_dtype)

    n, k = 14336, 4096
    for m in (*gemm_configs.INT4_ROWS, 8192) if everything else (16, 64, 8192):
        for group_size in (k, 128, 64, 32):
            x = meta((m, k), torch.bfloat16)
            yield call(x, weight(n, k, group_size), group_size, 8)
            if m < gemm_configs.INT4_DEQUANTIZED:
                yield call(x, weight(n, k, group_size), group_size, 16)
                if everything:
                    yield call(meta((m, k)), weight(n, k, group_size), group_size, 16)
    x = meta((16, k), torch.float16)
    kinds = "symmetric", "zero points", "minimum"
    for number, group_size in enumerate((k, 512, 256, 128, 64, 32, 16, 40)):
        for kind in kinds if everything else kinds[number % 3 : number % 3 + 1]:
            for act_bits in (8, 16):
                for length in (k + group_size, 2 * k) if group_size < k else (k, k - 24):
                    length = length // group_size * group_size if group_size < k else length
                    size = group_size if group_size < k else length
                    of = weight(1024, length, size, kind, torch.bfloat16)
                    yield call(meta((16, length), x.dtype), of, size, act_bits, meta((1024,)))
    codes = meta((16, k), torch.int8), meta((16,)), meta((16,), torch.int32)
    yield call(codes[0], weight(n, k, 128), 128, 8, None, *codes[1:])
    yield call(meta((1, k), torch.bfloat16), weight(n, k, 128, "zero points"), 128, 16)
    for act_bits, group_size in itertools.product((8, 16), (128, 32768)):  # in parts
        yield call(meta((16, 32768), torch.bfloat16), weight(1024, 32768, group_size), group_size, act_bits)
    yield call(meta((1, k), torch.float32), weight(n, k, 32), 32, 16)
    yield call(meta((1024, k), torch.float16), weight(n, k, 32, "minimum"), 32, 16)


def launches(everything: bool) -> list[tuple[str, tuple[Any, ...], dict[str, Any], list[int]]]:
    """(kernel, arguments, options, GPUs that it is for) of every distinct launch that the calls make."""
    found: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], list[int]]] = {}
    gpus = list(ARCHITECTURES)

    def record(kernel: Any, grid: Any, *args: Any, num_warps: int = 4, **constexprs: Any) -> None:
        options = {"num_warps": num_warps, "enable_fp_fusion": False, **constexprs}
        *_, signature, attributes = specialized(kernel.__name__, args, options)
        key = f"{kernel.__name__} {signature} {attributes} {options}"
        launched_on = found.setdefault(key, (kernel.__name__, args, options, []))[-1]
        launched_on += [arch for arch in gpus if arch not in launched_on]

    for module in modules():
        if hasattr(module, "launch"):
            module.launch = record
    for dtype in FLOATS:
        for module, op, args in (*calls(dtype), *fused_calls(dtype)):
            getattr(importlib.import_module(f"qkernels.triton.{module}"), op)(*args)
    gemms = {"int8_gemm": gemm_calls, "int4_gemm": int4_calls}
    for arch, (stem, of_arch) in itertools.product(ARCHITECTURES, gemms.items()):
        gpus[:] = [arch]
        module = importlib.import_module(f"qkernels.triton.{stem}")
        module.gpu = lambda device, arch=arch: (arch, MULTIPROCESSORS[arch], "")
        for op, args in of_arch(arch, everything):
            getattr(module, op)(*args)
    return list(found.values())


def specialized(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton makes of a launch's arguments: options, constexprs, signature, attributes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = kernels()[name]
    backend = make_backend(GPUTarget("cuda", 80, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = binder(*args, **options)
    _, signature, constexprs, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    return {k: v for k, v in options.items() if k not in signature}, constexprs, signature, attributes


def compiled(job: tuple[str, tuple[Any, ...], dict[str, Any], int]) -> str:
    import sass
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, args, options, arch = job
    options, constexprs, signature, attributes = specialized(name, args, options)
    source = ASTSource(kernels()[name], signature, constexprs, attributes)
    start = time.process_time()
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = binary.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        (usage,) = sass.kernels(Path(file.name)).values()
        gemm = sass.instructions(Path(file.name)) if name.endswith("mm_kernel") else Counter()
    kinds = (kind for value in signature.values() for kind in (value if isinstance(value, tuple) else (value,)))
    pointers = [str(kind) for kind in kinds if str(kind).startswith("*")]
    return json.dumps(
        {
            "kernel": name,
            "arch": arch,
            "dtype": pointers[0][1:] if pointers else "",
            "pointers": pointers,
            "x_sums": any(getattr(arg, "x_sums", None) is not None for arg in args),
            "constexprs": {key: value for key, value in job[2].items() if key not in options},
            "warps": options["num_warps"],
            "stages": options.get("num_stages"),
            "mma": {key: count for key, count in gemm.items() if "MMA" in key},
            "copies": {key: count for key, count in gemm.items() if key.startswith(("LDGSTS", "UTMA"))},
            "bytewise": [key for key in gemm if ".U8" in key or (".S8" in key and "MMA" not in key)],
            "instructions": sum(gemm.values()),
            "prmt": gemm["PRMT"],
            "conversions": sum(count for key, count in gemm.items() if key.startswith("I2F")),
            "registers": usage.registers,
            "spills": usage.spills,
            "local": usage.stack + usage.local,
            "odd": any(isinstance(arg, int) and arg > 16 and arg % 16 for arg in args),
            "widest_load": usage.widths.get("LDG", 0),
            "shared": binary.metadata.shared,
            "approximate": [op for op in ("div.full", "div.approx", "rcp.approx", "fma.rn.f32", ".ftz") if op in ptx],
            "seconds": round(time.process_time() - start, 2),
        }
    )


def jobs(everything: bool, arches: Sequence[int]) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any], int]]:
    """Each launch for each of these GPUs; or a few of each kernel for each GPU, other ones for the next."""
    by_kernel: dict[str, list[Any]] = {}
    for launch in launches(everything):
        by_kernel.setdefault(launch[0], []).append(launch)
    for own in by_kernel.values():
        for number, arch in enumerate(ARCHITECTURES):
            if arch not in arches:
                continue
            able = [launch for launch in own if arch in launch[-1]]
            few = 3 if own[0][0].endswith("mm_kernel") else 1
            first = few * number % max(1, len(able))
            for *launch, _ in able if everything else (able[first:] + able[:first])[:few]:
                yield (*launch, arch)


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "the interpreter compiles nothing"
    everything = "--all" in sys.argv
    arches = ARCHITECTURES if everything else in_turn(ARCHITECTURES)
    print(json.dumps([sorted(kernels()), arches]))
    with multiprocessing.get_context("fork").Pool(min(2, os.cpu_count() or 1)) as pool:
        for line in pool.imap_unordered(compiled, jobs(everything, arches), chunksize=4):
            print(line, flush=True)


if __name__ == "__main__":
    main()
