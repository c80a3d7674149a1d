"""The Triton int8 GEMM: every variant exact against int64, on the GPU or interpreted; its choice of tiles."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compare import same
from conftest import kernels_of, run_python
from int8_cases import ACTIVATIONS, OUTPUTS, codes, exact, layouts, linear_input, plain, scaled_args
from torch import Tensor

import qkernels as qk
from qkernels import gemm_checks, tune
from qkernels.ops.int8_gemm import PackedInt8
from qkernels.reference import int8_gemm as reference

if "triton" not in kernels_of("int8_mm"):
    pytest.skip(str(dict(qk.which("int8_mm"))["triton"]), allow_module_level=True)

from qkernels.triton.common import gemm, gemm_configs, tuning
from qkernels.triton.common.configs import ceil_div
from qkernels.triton.common.gemm_configs import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ARCHITECTURES = tuple(gemm_configs.GEMM_TILES)
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
VARIANTS = {
    "pointers": (Tile(16, 32, 32, 4, 3), 1),
    "swap": (Tile(32, 16, 64, 4, 3, swap=True), 1),
    "parts": (Tile(32, 32, 32, 4, 3), 3),
    "swap, parts": (Tile(16, 32, 32, 4, 3, swap=True), 2),
    "full": (Tile(64, 256, 64, 4, 3), 1),  # 128 sums in a thread: finished in 2 or 4 parts
    "tma": (Tile(32, 64, 64, 4, 3, tma=True), 1),
    "tma, halves": (Tile(64, 256, 128, 8, 3, tma=True), 1),
}
SHAPES = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1), (2, 33, 131), (17, 5, 3), (33, 48, 200), (40, 272, 80)]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each variant in turn, on a GPU that has it, with the Triton kernel forced."""
    tile, splits = VARIANTS[request.param]
    if tile.tma and DEVICE.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("TMA tiles are for sm_90")
    monkeypatch.setattr(gemm_configs, "int8_mm", lambda *args: (tile, splits))
    with qk.use_kernel("triton"):
        yield request.param


@pytest.fixture(autouse=True)
def _untuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("QKERNELS_TUNE_DIR", str(tmp_path))
    tuning.load.cache_clear()
    yield
    tuning.load.cache_clear()


def there(t: Tensor | None) -> Tensor | None:
    """On the device under test, in the same memory layout."""
    return t.to(DEVICE) if t is not None else None


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_mm_is_exact(variant: str, m: int, n: int, k: int) -> None:
    a, b = codes(m, k), codes(n, k).t()
    out = qk.int8_mm(there(a), there(b))
    assert out.dtype == torch.int32
    assert torch.equal(out.cpu().long(), exact(a, b))


@pytest.mark.parametrize(("m", "n", "k"), SHAPES[2:])
def test_scaled_mm_equals_the_reference_bit_for_bit(variant: str, m: int, n: int, k: int) -> None:
    """Two of the ways to give scales, zero points and bias, and two output dtypes, in turn."""
    turn = list(VARIANTS).index(variant) + SHAPES.index((m, n, k))
    for at in (turn, turn + 3) if m < 40 else (turn,):
        scale_a, scale_b, zero_point, bias = list(scaled_args(m, n))[at % 6]
        dtype = (torch.bfloat16, torch.float32, torch.float16)[at % 3]
        a, b = codes(m, k), codes(n, k).t()
        check_scaled(a, b, scale_a, scale_b, zero_point, None, bias, *plain(dtype))


@pytest.mark.parametrize("output", OUTPUTS)
def test_outputs_equal_the_reference_bit_for_bit(variant: str, output: tuple) -> None:
    turn = list(VARIANTS).index(variant) + OUTPUTS.index(output)
    m, n, k = ((2, 33, 131), (19, 48, 80))[turn % 2]
    a, w, scale_a, bias = codes(m, k), codes(n, k), torch.rand(m, 1) * 2e-3, torch.randn(n)
    scale_a[1] = torch.nan
    zero_point, colsum = ((None, None), (codes(m), None), (codes(m, 1).int(), w.sum(1, dtype=torch.int32)))[turn % 3]
    check_scaled(a, w.t(), scale_a, torch.rand(n), zero_point, colsum, bias, *output)


def check_scaled(*args: object) -> None:
    got = torch.ops.qkernels.int8_scaled_mm(*(there(arg) if isinstance(arg, Tensor) else arg for arg in args))
    same(got, reference.int8_scaled_mm(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["panels", "k-major"])
def test_linear_equals_the_reference_bit_for_bit(
    layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm_configs, "int8_mm", lambda *args: VARIANTS["swap"])
    for m, n, k in [(1, 5, 7), (7, 24, 130)] + [(2, 3, 9000)] * (layout == "k-major" and dtype == torch.bfloat16):
        w = codes(n, k)
        data, colsum = reference.int8_pack(w)
        if layout == "k-major":
            data = torch.nn.functional.pad(w, (0, -k % 16))
        for activation, bias in zip(ACTIVATIONS, itertools.cycle((None, torch.randn(n))), strict=False):
            check_linear(linear_input(m, k, dtype), data, colsum, torch.rand(n), bias, *activation, *plain(dtype))
        output = OUTPUTS[k % len(OUTPUTS)]
        zero_point = (None, codes(m), codes(m, 1).int())[k % 3]
        check_linear(
            codes(m, k), data, colsum, torch.rand(n), None, torch.rand(m, 1) / k, zero_point, -128, 127, *output
        )
        wrong = map(there, (torch.randn(m, k + 16), data, colsum, torch.rand(n)))
        with qk.use_kernel("triton"), pytest.raises(RuntimeError, match=rf"data: got shape .*K = {k + 16}, "):
            torch.ops.qkernels.int8_linear(*wrong, None, None, None, -8, 7, *plain(dtype))


def check_linear(*args: object) -> None:
    with qk.use_kernel("triton"):
        got = torch.ops.qkernels.int8_linear(*(there(arg) if isinstance(arg, Tensor) else arg for arg in args))
    same(got, reference.int8_linear(*args))


def test_a_packed_layer_follows_the_device() -> None:
    """Weights packed for a GPU are repacked where the layer comes to the CPU, and keep their codes."""
    q = codes(9, 35)
    layer = qk.nn.Int8Linear(35, 9)
    layer.set_weight(q, torch.ones(9), None)
    panels = layer.data
    layer.data = torch.nn.functional.pad(q, (0, 13))
    assert torch.equal(layer.codes, q)
    layer = layer.to(torch.device("cpu"))
    assert torch.equal(layer.data, panels)
    x = torch.randn(4, 35)
    if DEVICE.type == "cuda":
        expected = layer(x)
        layer = layer.cuda()
        assert layer.data.shape == (9, 48)
        same(layer(x.cuda()), expected)
        assert torch.equal(PackedInt8.from_quantized(q.cuda(), torch.ones(1)).unpack()[0].cpu(), q)


def test_every_layout_is_taken_and_a_copy_is_said_once() -> None:
    gemm.say_once.cache_clear()
    m, n, k = 5, 7, 48
    with warnings.catch_warnings(record=True) as said, qk.use_kernel("triton"):
        warnings.simplefilter("always")
        plain = codes(m, k), codes(n, k).t()
        assert torch.equal(qk.int8_mm(*map(there, plain)).cpu().long(), exact(*plain))
        assert not said
        for a, b in itertools.product(layouts(m, k).values(), layouts(k, n).values()):
            assert torch.equal(qk.int8_mm(there(a), there(b)).cpu().long(), exact(a, b))
    assert sorted(str(w.message).split(":")[2].split()[0] for w in said) == ["a", "b"]
    assert "multiples of 16" in str(said[0].message)


@pytest.mark.parametrize("splits", [1, 8])
def test_the_longest_k(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_configs, "int8_mm", lambda *args: (Tile(16, 16, 512, 4, 2), splits))
    k = gemm_checks.MAX_K
    one = torch.ones(1)
    with qk.use_kernel("triton"):
        for low, high in [(-128, -128), (-128, 127)]:
            a, w = torch.full((1, k), low, dtype=torch.int8), torch.full((3, k), high, dtype=torch.int8)
            assert qk.int8_mm(there(a), there(w).t()).unique().tolist() == [low * high * k]
            for z in (torch.tensor(127, dtype=torch.int8), torch.tensor(-(2**31)))[high < 0 :]:
                check_scaled(a, w.t(), one, one, z, None, None, *plain(torch.float32))


def test_errors_are_those_of_the_reference() -> None:
    with qk.use_kernel("triton"):
        with pytest.raises(RuntimeError, match="got K = 131072; accepted: K <= 131071"):
            qk.int8_mm(there(codes(1, 131072)), there(codes(131072, 1)))
        with pytest.raises(RuntimeError, match=r"b: got shape \[4, 5\]"):
            qk.int8_mm(there(codes(2, 3)), there(codes(4, 5)))
        with pytest.raises(RuntimeError, match=r"scale_a: got shape \[3\]"):
            qk.int8_scaled_mm(*map(there, (codes(2, 3), codes(3, 5), torch.ones(3), torch.ones(5))))


# The choice of tiles.


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_tile_of_the_table_is_legal(arch: int) -> None:
    table = gemm_configs.GEMM_TILES[arch]
    assert len(table) == len(gemm_configs.GEMM_ROWS) + 1
    for row in table:
        assert len(row) == len(gemm_configs.GEMM_COLUMNS) + 1
        for tile in row:
            assert gemm_configs.gemm_fault(arch, tile) is None, (tile, gemm_configs.gemm_fault(arch, tile))
    for m, n, k in itertools.product((1, 17, 300, 9000), (1, 1000, 4097, 30000), (16, 4096, 131072)):
        tile, splits = gemm_configs.int8_mm(arch, m, n, k, MULTIPROCESSORS[arch])
        assert gemm_configs.gemm_fault(arch, tile) is None
        share = gemm_configs.share_of_k(k, splits, tile.block_k)
        assert share * splits >= k
        assert splits == 1 or share % tile.block_k == 0


def test_every_gpu_has_a_table() -> None:
    for arch in (80, 86, 87, 88, 89, 90, 100, 101, 103, 110, 120, 121):
        assert gemm_configs.gemm_arch(arch) in gemm_configs.GEMM_TILES


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (Tile(48, 64, 64, 4, 3), "block_m: got 48"),
        (Tile(64, 512, 64, 4, 3), "block_n: got 512"),
        (Tile(64, 64, 16, 4, 3), "block_k: got 16"),
        (Tile(64, 64, 64, 3, 3), "warps: got 3"),
        (Tile(64, 64, 64, 4, 1), "stages: got 1"),
        (Tile(128, 256, 64, 4, 3), "warps: got 4; accepted: at most 128 sums"),
        (Tile(128, 128, 128, 8, 4), "stages: got 4, 131072 bytes of shared memory; accepted: up to 101376"),
        (Tile(64, 64, 64, 4, 3, tma=True), "tma: got True"),
    ],
)
def test_illegal_tiles_are_named(tile: Tile, message: str) -> None:
    assert message in str(gemm_configs.gemm_fault(89, tile))


def modelled(arch: int, m: int, n: int, k: int) -> float:
    """Microseconds by waves of blocks, each as long as its bytes or its products take."""
    multiprocessors = MULTIPROCESSORS[arch]
    tile, splits = gemm_configs.int8_mm(arch, m, n, k, multiprocessors)
    blocks = ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n) * splits
    share = gemm_configs.share_of_k(k, splits, tile.block_k)
    time = max((tile.block_m + tile.block_n) * share / 60e3, tile.block_m * tile.block_n * share / 3e6)
    return ceil_div(blocks, multiprocessors) * time + 3.0 * (splits > 1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_cliff_between_classes_of_m(arch: int) -> None:
    """One row more never costs more than a bigger tile for it has to: twice, and the wave it may begin."""
    for edge, n in itertools.product(gemm_configs.GEMM_ROWS, (1024, 4096, 6144, 14336, 28672)):
        before, after = modelled(arch, edge, n, 4096), modelled(arch, edge + 1, n, 4096)
        assert after <= 2.0 * before + 1e-9, (edge, n, before, after)


def test_parts_of_k_only_where_they_save_time() -> None:
    assert gemm_configs.int8_mm(90, 16, 4096, 4096, 132)[1] == 1  # a tile for every multiprocessor
    assert gemm_configs.int8_mm(90, 16, 1024, 65536, 132)[1] == 4
    assert gemm_configs.int8_mm(90, 16, 1024, 256, 132)[1] == 1
    assert gemm_configs.int8_mm(90, 8192, 4096, 131072, 132)[1] == 1


def row(**changes: object) -> dict[str, object]:
    tile = Tile(16, 32, 32, 4, 2)._asdict()
    return {"m_up_to": 16, "n": 33, "k": 48, "tile": tile, "splits": 2, "microseconds": 1.0} | changes


def test_tuned_tiles_are_used() -> None:
    path = tuning.save("NVIDIA Some GPU", [row()], {})
    assert path.name == "tune-some-gpu.json"
    tuning.save("NVIDIA Some GPU", [row(splits=3), row(m_up_to=None)], {})
    assert len(json.loads(path.read_text())["int8_mm"]) == 2
    assert tuning.measured("NVIDIA Some GPU", 80, 7, 33, 48) == (Tile(16, 32, 32, 4, 2), 3)
    assert tuning.measured("NVIDIA Some GPU", 80, 5000, 33, 48) is not None
    assert tuning.measured("NVIDIA Some GPU", 80, 17, 33, 48) is None
    assert tuning.measured("NVIDIA Other GPU", 80, 7, 33, 48) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSONDecodeError"),
        ("{}", "KeyError: 'int8_mm'"),
        (json.dumps({"int8_mm": [row(tile=Tile(16, 32, 32, 5, 2)._asdict())]}), "warps: got 5; accepted: 4 or 8"),
        (json.dumps({"int8_mm": [row(splits=0)]}), "splits: got 0"),
        (json.dumps({"int8_mm": [row(tile={"block_m": 16})]}), "TypeError"),
        (json.dumps({"int8_mm": [row(m_up_to=17)]}), "ValueError"),
    ],
)
def test_a_bad_file_is_named_and_not_used(content: str, message: str) -> None:
    tuning.path_of("GPU").write_text(content)
    with pytest.warns(UserWarning, match=r"tune-gpu.json is not used .*make it anew") as said:
        assert tuning.measured("GPU", 80, 7, 33, 48) is None
    assert message in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.measured("GPU", 80, 7, 33, 48) is None


def test_candidates_of_tuning_are_legal_and_hold_the_table() -> None:
    for arch, (m, n, k) in itertools.product(ARCHITECTURES, ((1, 4096, 4096), (64, 1024, 4096), (8192, 8192, 64))):
        found = list(tune.candidates(arch, m, n, k, MULTIPROCESSORS[arch]))
        assert len(found) == len(set(found))
        assert all(gemm_configs.gemm_fault(arch, tile) is None for tile, _ in found)
        assert gemm_configs.gemm_tile(arch, m, n) in {tile for tile, _ in found}


def test_tune_runs_to_its_end(tmp_path: Path) -> None:
    code = """
import sys
sys.path.append(sys.argv[1])
import pretend_gpu
pretend_gpu.pretend()
from qkernels import __main__, tune
from qkernels.triton.common import tuning
every = tune.candidates
tune.candidates = lambda *args: list(every(*args))[::40]
assert __main__.main(["tune", "--shapes", "48x40,33x64", "--rows", "3,20"]) == 0
assert __main__.main(["tune", "--shapes", "48x40", "--rows", "3", "--minutes", "0", "--print"]) == 0
print(len(tuning.load("NVIDIA Pretend", 90)))
"""
    done = run_python(code, str(Path(__file__).parent), QKERNELS_TUNE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "4"
    assert "4 of 4 shapes" in done.stdout
    assert "0 of 1 shapes" in done.stdout  # in no time
    done = run_python("import sys; from qkernels.__main__ import main; sys.exit(main(['tune', '--shapes', '48']))")
    assert done.returncode == 2
    assert "--shapes: invalid shapes value: '48'" in done.stderr


def test_tune_without_a_gpu_says_so() -> None:
    if DEVICE.type == "cuda":
        pytest.skip("there is one")
    done = run_python("import sys; from qkernels.__main__ import main; sys.exit(main(['tune']))")
    assert done.returncode == 2
    assert "no GPU" in done.stdout
