"""GGUF files: exactly the values that the gguf package reads, the bytes back, and refusal of what is no such file."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compare import same
from gguf import GGMLQuantizationType as Type
from torch import Tensor

import qkernels as qk
from qkernels.integrations import gguf as integration

BLOCK = {Type.Q4_0: 18, Type.Q4_1: 20, Type.Q8_0: 34}  # bytes of 32 codes


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Type | None]], **options: Any) -> Path:
    """A file of these tensors, as bytes of quantized types [..., bytes of a row] or as plain arrays."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_uint32("general.quantization_version", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind: Type, *shape: int) -> np.ndarray:
    """Any codes; scales and minima of any sign, among them both zeros, subnormal and the largest numbers."""
    *rows, k = shape
    made = torch.randint(0, 256, (*rows, k // 32, BLOCK[kind]), dtype=torch.uint8)
    params = torch.randn(*rows, k // 32, 2 if kind == Type.Q4_1 else 1).half()
    special = torch.tensor([0.0, -0.0, 6e-8, -6e-8, 65504.0, -65504.0, 1e-5]).half()
    chosen = torch.rand(params.shape) < 0.3
    params[chosen] = special[torch.randint(0, len(special), params.shape)][chosen]
    made[..., : 2 * params.shape[-1]] = params.view(torch.uint8)
    return made.flatten(-2).numpy()


def to_bytes(packed: qk.PackedInt) -> Tensor:
    """The blocks of Q4_0 or Q4_1, from the bits that ggml defines: [N, bytes of a row]."""
    q, scale, zero_point, minimum = packed.unpack()
    assert zero_point is None
    params = [scale] if minimum is None else [scale, minimum]
    low, high = (q + 8).to(torch.uint8).unflatten(1, (-1, 2, 16)).unbind(2)
    return torch.cat((torch.stack(params, -1).view(torch.uint8), low | high << 4), -1).flatten(1)


@pytest.mark.parametrize("shape", [(3, 32), (37, 96), (1, 320)])
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1])
def test_q4(kind: Type, shape: tuple[int, int], tmp_path: Path) -> None:
    data = random_blocks(kind, *shape)
    packed: Any = integration.load(write(tmp_path / "m.gguf", {"w": (data, kind)}))["w"]
    assert isinstance(packed, qk.PackedInt4)
    assert (packed.shape, packed.group_size, packed.scale.dtype) == (shape, 32, torch.float16)
    assert (packed.minimum is None) == (kind == Type.Q4_0)
    assert torch.equal(to_bytes(packed), torch.from_numpy(data))
    same(packed.dequantize(), torch.from_numpy(gguf.quants.dequantize(data, kind)), exact=True)


def test_a_block_by_hand(tmp_path: Path) -> None:
    """Codes 0…15 in the low bits of the 16 bytes, 16…31 in the high; d = −0.5, m = 3."""
    codes = bytes(i | (15 - i) << 4 for i in range(16))
    d, m = np.float16(-0.5).tobytes(), np.float16(3).tobytes()
    path = write(
        tmp_path / "m.gguf",
        {
            "zero": (np.frombuffer(d + codes, np.uint8)[None], Type.Q4_0),
            "one": (np.frombuffer(d + m + codes, np.uint8)[None], Type.Q4_1),
            "eight": (np.frombuffer(d + bytes(range(240, 256)) + bytes(range(16)), np.uint8)[None], Type.Q8_0),
        },
    )
    loaded: dict[str, Any] = integration.load(path)
    order = [*range(16), *range(15, -1, -1)]
    assert loaded["zero"].unpack()[0].tolist() == [[code - 8 for code in order]]
    assert loaded["zero"].dequantize().tolist() == [[-0.5 * (code - 8) for code in order]]
    assert loaded["one"].dequantize().tolist() == [[-0.5 * code + 3 for code in order]]
    assert loaded["eight"].q.tolist() == [list(range(-16, 16))]
    assert loaded["eight"].dequantize().tolist() == [[-0.5 * code for code in range(-16, 16)]]


@pytest.mark.parametrize("shape", [(64,), (5, 96), (2, 3, 32)])
def test_q8(shape: tuple[int, ...], tmp_path: Path) -> None:
    data = random_blocks(Type.Q8_0, *shape)
    got: Any = integration.load(write(tmp_path / "m.gguf", {"w": (data, Type.Q8_0)}))["w"]
    assert (got.q.dtype, got.q.shape) == (torch.int8, shape)
    assert (got.scale.dtype, got.scale.shape) == (torch.float16, (*shape[:-1], shape[-1] // 32))
    assert got.scale.is_contiguous()
    again = torch.cat(
        (got.scale.view(torch.uint8).unflatten(-1, (-1, 2)), got.q.unflatten(-1, (-1, 32)).view(torch.uint8)), -1
    )
    assert torch.equal(again.flatten(-2), torch.from_numpy(data))
    same(got.dequantize(), torch.from_numpy(gguf.quants.dequantize(data, Type.Q8_0)), exact=True)


def test_experts(tmp_path: Path) -> None:
    data = {kind: random_blocks(kind, 3, 5, 64) for kind in (Type.Q4_0, Type.Q4_1)}
    loaded: dict[str, Any] = integration.load(write(tmp_path / "m.gguf", {k.name: (d, k) for k, d in data.items()}))
    for kind, blocks in data.items():
        assert [packed.shape for packed in loaded[kind.name]] == [(5, 64)] * 3
        values = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
        same(torch.stack([packed.dequantize() for packed in loaded[kind.name]]), values, exact=True)


def test_not_finite(tmp_path: Path) -> None:
    """Scales of infinity and NaN stay what they are."""
    data = random_blocks(Type.Q4_0, 1, 96)
    data[0, [0, 1, 18, 19]] = np.array([np.inf, np.nan], np.float16).view(np.uint8)
    packed: Any = integration.load(write(tmp_path / "m.gguf", {"w": (data, Type.Q4_0)}))["w"]
    assert torch.equal(to_bytes(packed), torch.from_numpy(data))


def test_plain_types(tmp_path: Path) -> None:
    """Shapes as in torch, which GGUF stores reversed; a process may write to them."""
    w = torch.randn(3, 5)
    arrays = {
        "f32": w.numpy(),
        "f16": w.half().numpy(),
        "f64": w.double().numpy(),
        "i8": np.arange(-3, 4, dtype=np.int8),
        "i16": np.arange(-3, 4, dtype=np.int16),
        "i32": np.arange(-3, 4, dtype=np.int32),
        "i64": np.arange(-3, 4, dtype=np.int64),
    }
    tensors: dict[str, tuple[np.ndarray, Type | None]] = {name: (array, None) for name, array in arrays.items()}
    tensors["bf16"] = (w.bfloat16().view(torch.uint8).numpy(), Type.BF16)
    loaded: dict[str, Any] = integration.load(write(tmp_path / "m.gguf", tensors))
    assert list(loaded) == list(tensors)
    for name, array in arrays.items():
        assert loaded[name].dtype == torch.from_numpy(array).dtype
        assert torch.equal(loaded[name], torch.from_numpy(array))
    same(loaded["bf16"], w.bfloat16(), exact=True)
    (tmp_path / "m.gguf").unlink()
    loaded["f32"].zero_()


def test_other_types(tmp_path: Path) -> None:
    q5 = gguf.quants.quantize(np.random.default_rng(0).standard_normal((4, 64), np.float32), Type.Q5_0)
    q6 = np.arange(2 * 210, dtype=np.uint8).reshape(2, 210)
    path = write(
        tmp_path / "m.gguf",
        {"w": (random_blocks(Type.Q4_0, 2, 32), Type.Q4_0), "q5": (q5, Type.Q5_0), "q6": (q6, Type.Q6_K)},
    )
    with pytest.raises(ValueError, match=r"^q5: got the type Q5_0; accepted: Q4_0, Q4_1, Q8_0, .*dequantize_others"):
        integration.load(path)
    loaded: dict[str, Any] = integration.load(path, dequantize_others=True)
    assert isinstance(loaded["w"], qk.PackedInt4)
    same(loaded["q5"], torch.from_numpy(gguf.quants.dequantize(q5, Type.Q5_0)), exact=True)
    assert loaded["q6"].shape == (2, 256)
    same(loaded["q6"], torch.from_numpy(gguf.quants.dequantize(q6, Type.Q6_K)), exact=True)
    path = write(tmp_path / "m.gguf", {"q8": (np.zeros((1, 292), np.uint8), Type.Q8_K)})
    with pytest.raises(ValueError, match=r"^q8: got the type Q8_K; the gguf package cannot dequantize it"):
        integration.load(path, dequantize_others=True)


def test_dims_of_int4(tmp_path: Path) -> None:
    for shape in ((64,), (1, 2, 3, 32)):
        path = write(tmp_path / "m.gguf", {"blk.0.w": (random_blocks(Type.Q4_1, *shape), Type.Q4_1)})
        with pytest.raises(ValueError, match=re.escape(f"blk.0.w: got Q4_1 of shape {list(shape)}; accepted: [N, K]")):
            integration.load(path)


def test_k_too_large(tmp_path: Path) -> None:
    data = np.zeros((1, 131072 // 32 * 18), np.uint8)
    with pytest.raises(ValueError, match=r"^w: q: got K = 131072"):
        integration.load(write(tmp_path / "m.gguf", {"w": (data, Type.Q4_0)}))


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.gguf: no such file"):
        integration.load(tmp_path / "x.gguf")
    data = random_blocks(Type.Q4_0, 4, 32)
    path = write(tmp_path / "m.gguf", {"norm": (np.ones(7, np.float32), None), "w": (data, Type.Q4_0)})
    intact = path.read_bytes()
    start = intact.index(data.tobytes())
    for length in [*range(0, start, 3), start, start + data.nbytes // 2, start + data.nbytes - 1]:
        path.write_bytes(intact[:length])
        with pytest.raises(ValueError, match=r"m\.gguf: not a whole GGUF file"):
            integration.load(path)
    path.write_bytes(intact[: start + data.nbytes])  # what follows is padding
    assert integration.load(path).keys() == {"norm", "w"}
    path.write_bytes(b"GGML" + intact[4:])
    with pytest.raises(ValueError, match=r"m\.gguf: not a whole GGUF file \(ValueError: GGUF magic invalid\)"):
        integration.load(path)
    kind = intact.index(b"w" + (2).to_bytes(4, "little")) + 1 + 4 + 2 * 8
    assert intact[kind] == Type.Q4_0
    path.write_bytes(intact[:kind] + b"\xee" + intact[kind + 1 :])
    with pytest.raises(ValueError, match=r"m\.gguf: not a whole GGUF file .*238"):
        integration.load(path)
    rows = kind - 16
    path.write_bytes(intact[:rows] + b"\x21" + intact[rows + 1 :])  # K = 33
    with pytest.raises(ValueError, match=r"m\.gguf: not a whole GGUF file .*33"):
        integration.load(path)


def test_big_endian(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"norm": (np.ones(3, np.float32), None)}, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(ValueError, match=r"m\.gguf: got a big-endian file; accepted: little-endian"):
        integration.load(path)


def test_loaded_weights_compute(tmp_path: Path) -> None:
    data = random_blocks(Type.Q4_1, 16, 64)
    packed: Any = integration.load(write(tmp_path / "m.gguf", {"w": (data, Type.Q4_1)}))["w"]
    x = torch.randn(3, 64)
    exact = x.double() @ packed.dequantize().double().t()
    _, scale, _, minimum = packed.unpack()
    largest = (15 * scale.double().abs() + minimum.double().abs()).repeat_interleave(32, 1)
    bound = (64 + 4) * 2.0**-23 * (x.double().abs() @ largest.t())
    assert bool(((qk.int4_linear(x, packed, act_bits=16).double() - exact).abs() <= bound).all())


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"gguf package; install it with: pip install 'qkernels\[checkpoints\]'"):
        integration.load(tmp_path / "m.gguf")
