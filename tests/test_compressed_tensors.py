"""Checkpoints of compressed-tensors: its bytes, exact round trips, and refusal of what packed forms cannot hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed import DTYPES, codes, scales, scheme, weight, whole
from conftest import run_python
from safetensors.torch import load_file, save_file
from torch import Tensor

import qkernels as qk
from qkernels.integrations import compressed_tensors as ct

# What PackedQuantizationCompressor of compressed-tensors 0.20.0 made of the weights (q − zero_point)·scale with the
# codes, zero points and scales above; with 8 bits without zero points. By bits: group size, zero points, weight_packed.
GOLDEN = {
    4: (
        16,
        [[440163952, -1280068685], [8, 3]],
        [
            [1392285232, -629924168, 1392285232, -629924168],
            [1068974007, 1068974007, 1068974007, 1068974007],
            [477288510, -1795534666, 477288510, -1795534666],
            [-113413707, -113413707, -113413707, -113413707],
            [-688383428, 1584435892, -688383428, 1584435892],
            [-1280068685, -1280068685, -1280068685, -1280068685],
            [-1870767046, 418829490, -1870767046, 418829490],
            [2100950449, 2100950449, 2100950449, 2100950449],
            [1525980728, -763619664, 1525980728, -763619664],
        ],
    ),
    3: (
        40,
        [[56]],
        [[-1733573736, -1013404733, -1413244757, 11256728], [-545392673, -136348169, 2113396605, 8255455]],
    ),
    8: (6, None, [[151388928, 3852], [319752967, 6935], [488117006, 10018]]),
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_bytes_are_those_of_compressed_tensors(bits: int, tmp_path: Path) -> None:
    group_size, zero_points, words = GOLDEN[bits]
    n, k = len(words), {4: 32, 3: 40, 8: 6}[bits]
    q, scale = codes(n, k, bits), scales(n, k // group_size)
    zero_point = codes(n, k // group_size, bits) if zero_points else None
    expected = {
        "a.weight_packed": torch.tensor(words, dtype=torch.int32),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([n, k]),
    }
    if zero_points:
        expected["a.weight_zero_point"] = torch.tensor(zero_points, dtype=torch.int32)

    layer = scheme(
        "a", num_bits=bits, strategy="group" if bits == 4 else "channel", group_size=16 if bits == 4 else None
    )
    packed: Any = ct.load(expected, {"config_groups": {"g": layer}})["a.weight"]
    assert type(packed) is {3: qk.PackedInt, 4: qk.PackedInt4, 8: qk.PackedInt8}[bits]
    assert_same(packed.unpack(), (q, scale[:, 0].float()) if bits == 8 else (q, scale, zero_point, None))

    ct.save(tmp_path, {"a.weight": packed}, scale_dtype=torch.bfloat16)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == expected.keys()
    assert_same([written[name] for name in expected], expected.values())


def assert_same(got: Any, expected: Any) -> None:
    """Bit for bit, and of the same dtypes and shapes."""
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
            assert torch.equal(a.view(bits), b.view(bits))


@pytest.mark.parametrize("act_bits", [16, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(act_bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every form, rows and columns that fill no whole word, and empty weights, in one checkpoint."""
    tensors = {
        "a.q.weight": weight(4, 33, 64, 4, dtype),
        "a.k.weight": weight(4, 33, 64, 2, dtype, asymmetric=True),
        "a.v.weight": weight(4, 5, 37, 1, dtype),
        "a.o.weight": weight(4, 1, 7, 1, dtype, asymmetric=True),
        "b.two.weight": weight(2, 9, 48, 3, dtype, asymmetric=True),
        "b.three.weight": weight(3, 11, 43, 1, dtype),
        "b.eight.weight": weight(8, 13, 6, 1, dtype),
        "b.none.weight": weight(4, 0, 16, 1, dtype, asymmetric=True),
        "b.empty.weight": weight(4, 3, 0, 1, dtype),
        "b.empty8.weight": weight(8, 3, 0, 1, dtype),
        "weight": weight(8, 2, 3, 1, dtype),
        "a.norm.weight": torch.randn(7).to(dtype),
        "a.q.bias": torch.randn(3, 66).t()[::2],
    }
    ct.save(tmp_path / "new", tensors, act_bits=act_bits, scale_dtype=dtype)
    loaded = ct.load(tmp_path / "new")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        got: Any = loaded[name]
        assert type(got) is type(value), name
        if isinstance(value, Tensor):
            assert torch.equal(got, value)
        else:
            assert_same(got.unpack(), value.unpack())
            assert got.shape == value.shape
            assert getattr(got, "group_size", None) == getattr(value, "group_size", None)


def test_config_names_every_layer() -> None:
    tensors = {
        "a.weight": weight(4, 4, 64, 2, torch.float32),
        "b.weight": weight(8, 4, 64, 1, torch.float32),
        "c.weight": weight(4, 4, 64, 2, torch.float32),
        "d.weight": weight(4, 4, 64, 1, torch.float32, asymmetric=True),
        "norm.weight": torch.ones(4),
    }
    config = ct.quantization_config(tensors)
    assert (config["quant_method"], config["format"], config["ignore"]) == ("compressed-tensors", "pack-quantized", [])
    weights = {"type": "int", "dynamic": False}
    groups = config["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["a", "c"], ["b"], ["d"]]
    assert [group["weights"] for group in groups.values()] == [
        {**weights, "num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32},
        {**weights, "num_bits": 8, "symmetric": True, "strategy": "channel", "group_size": None},
        {**weights, "num_bits": 4, "symmetric": False, "strategy": "channel", "group_size": None},
    ]
    assert {group["input_activations"] for group in groups.values()} == {None}

    static = {"b.input_scale": torch.ones(1), "c.input_scale": torch.ones(1), "c.input_zero_point": torch.ones(1)}
    config = ct.quantization_config({**tensors, **static}, act_bits=8)
    assert config["format"] == "int-quantized"
    dynamic = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    inputs = {tuple(group["targets"]): group["input_activations"] for group in config["config_groups"].values()}
    per_tensor = {**dynamic, "strategy": "tensor", "dynamic": False}
    assert inputs == {("a",): dynamic, ("b",): per_tensor, ("c",): {**per_tensor, "symmetric": False}, ("d",): dynamic}


def test_config_json_keeps_what_else_it_says(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"old": 1}}')
    ct.save(tmp_path, {"a.weight": weight(4, 2, 32, 1, torch.float32)})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"]["config_groups"]["group_0"]["targets"] == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_over_the_checkpoint_that_was_loaded_and_with_tied_tensors(tmp_path: Path) -> None:
    table = torch.randn(300, 400)
    tied = {
        "tok.weight": table,
        "head.weight": torch.nn.Parameter(table),
        "part": table[1:3],
        "other.weight": table.t(),
    }
    ct.save(tmp_path, {"a.weight": weight(4, 8, 32, 1, torch.float32), **tied})
    first = ct.load(tmp_path)
    ct.save(tmp_path, {"tok.weight": first["tok.weight"], "a.weight": first["a.weight"]})
    for name, t in tied.items():
        assert torch.equal(torch.as_tensor(first[name]), t)
    second = ct.load(tmp_path)
    assert second.keys() == {"a.weight", "tok.weight"}
    assert torch.equal(torch.as_tensor(second["tok.weight"]), table)


def test_shards(tmp_path: Path) -> None:
    tensors = {"a.weight": weight(4, 9, 64, 2, torch.float16, asymmetric=True), "norm.weight": torch.randn(5)}
    ct.save(tmp_path, tensors)
    parts = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = ["one.safetensors", "two.safetensors"]
    where = {name: names[i % 2] for i, name in enumerate(sorted(parts))}  # a layer's tensors in both
    for shard in names:
        save_file({name: parts[name] for name in parts if where[name] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    loaded: dict[str, Any] = ct.load(tmp_path)
    assert_same(loaded["a.weight"].unpack(), tensors["a.weight"].unpack())
    assert torch.equal(loaded["norm.weight"], tensors["norm.weight"])

    index.write_text(json.dumps({"weight_map": {**where, "b.weight": "two.safetensors"}}))
    with pytest.raises(ValueError, match=r"b\.weight: missing in .*two\.safetensors, where .*index\.json says it is"):
        ct.load(tmp_path)
    index.write_text(json.dumps({"weight_map": {**where, "b.weight": "three.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"three\.safetensors: missing; .* says that b\.weight is in it"):
        ct.load(tmp_path)
    index.write_text(json.dumps({"weight_map": list(where)}))
    with pytest.raises(ValueError, match="weight_map: got list"):
        ct.load(tmp_path)


def test_scales_and_zero_points_of_a_tensor() -> None:
    q = codes(3, 32, 4)
    parts = {
        "weight": q,
        "weight_scale": torch.tensor([0.5]),
        "weight_zero_point": torch.tensor([-3], dtype=torch.int8),
    }
    config = {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "symmetric": False}}}}
    packed: Any = ct.load(parts, config)["weight"]
    zero_point = torch.full((3, 1), -3, dtype=torch.int8)
    assert_same(packed.unpack(), (q, torch.full((3, 1), 0.5), zero_point, None))
    packed = ct.load({"weight": q, "weight_scale": torch.tensor(0.5)})["weight"]
    assert_same(packed.unpack(), (q, torch.full((3,), 0.5)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_zero_points_beside_an_int8_weight(dtype: torch.dtype, bits: int) -> None:
    """They are not packed, whatever their dtype is."""
    q, scale = codes(9, 32, bits), torch.rand(9, 1)
    zero_point = torch.arange(9).remainder(8)[:, None] * (bits == 4)
    args = {"num_bits": bits, "symmetric": False, "strategy": "channel"}
    config = {"config_groups": {"g": {"targets": ["a"], "weights": args}}}

    def load(zero_point: torch.Tensor, scale: torch.Tensor = scale) -> object:
        parts = {"a.weight": q, "a.weight_scale": scale, "a.weight_zero_point": zero_point}
        return ct.load(parts, config)["a.weight"]

    packed = load(zero_point.to(dtype))
    assert_same(packed.unpack()[:3], (q, scale[:, 0]) if bits == 8 else (q, scale, zero_point.to(torch.int8)))
    one = torch.rand(1)
    assert load(torch.tensor(0, dtype=dtype), one).unpack()[1].unique() == one
    beside = (
        r"^a\.weight_zero_point: got torch\.int32 of shape \[{}\]; accepted beside an int8 weight: integers in the "
    )
    for shape in ((2, 1), (9, 2)):
        with pytest.raises(
            ValueError, match=beside.format(", ".join(map(str, shape))) + r"shape of the scales, \[9, 1\]"
        ):
            load(torch.zeros(shape, dtype=torch.int32))
    with pytest.raises(
        ValueError, match=r"^a\.weight_zero_point: got torch\.float32 of shape \[9, 1\]; accepted beside an"
    ):
        load(zero_point.float())
    if dtype not in (torch.int8, torch.uint8):
        with pytest.raises(ValueError, match=rf"^a\.weight_zero_point: got 200; accepted: what {bits} bits hold"):
            load((zero_point + 200).to(dtype))
    if bits == 8:
        with pytest.raises(ValueError, match=r"^a\.weight_zero_point: got zero points of int8 codes; accepted with 8"):
            load((zero_point + 1).to(dtype))


def test_int8_with_zero_points_of_0_is_symmetric() -> None:
    parts = {"weight": codes(3, 4, 8), "weight_scale": torch.ones(3, 1), "weight_zero_point": torch.zeros(3, 1).char()}
    assert_same(ct.load(parts)["weight"].unpack(), (parts["weight"], torch.ones(3)))


def test_config_decides_where_shapes_leave_it_open() -> None:
    """One int32 holds eight codes of 4 bits and of 3; an int8 tensor 4-bit codes as well as 8-bit ones."""
    parts = {
        "a.weight_packed": torch.tensor([[0x76543210]], dtype=torch.int32),
        "a.weight_scale": torch.ones(1, 1),
        "a.weight_shape": torch.tensor([1, 8]),
        "b.weight": codes(2, 64, 4),
        "b.weight_scale": torch.ones(2, 2),
    }
    with pytest.raises(ValueError, match=r"a\.weight_packed: got N, K = \[1, 8\].*accepted without a config"):
        ct.load(parts)
    groups = {
        "other": scheme("Linear", num_bits=8, strategy="channel"),
        "by_name": scheme("a", num_bits=4, group_size=-1),
        "by_pattern": scheme("re:b.*", num_bits=4, group_size=32),
        "activations": {"targets": ["LlamaAttention"], "weights": None},
    }
    for config in ({"quantization_config": {"config_groups": groups}}, {"config_groups": groups}):
        loaded: dict[str, Any] = ct.load(parts, config)
        assert loaded["a.weight"].unpack()[0].tolist() == [[-8, -7, -6, -5, -4, -3, -2, -1]]
        assert_same(loaded["b.weight"].unpack(), (parts["b.weight"], torch.ones(2, 2), None, None))
    # classes only: what fits the shapes is taken, if it is one
    classes = [scheme("Linear", num_bits=4, group_size=32), scheme("Embedding", num_bits=8, strategy="channel")]
    layer = {name: t for name, t in parts.items() if name.startswith("b")}
    assert isinstance(ct.load(layer, {"config_groups": dict(enumerate(classes))})["b.weight"], qk.PackedInt4)
    layer["b.weight_scale"] = torch.ones(2, 1)
    classes.append(scheme("Conv1d", num_bits=4, strategy="channel"))
    with pytest.raises(ValueError, match=r"b\.weight: got .* more than one group fits"):
        ct.load(layer, {"config_groups": dict(enumerate(classes))})


def test_loaded_weights_compute(tmp_path: Path) -> None:
    linear = torch.nn.Linear(64, 16)
    packed = qk.PackedInt4.from_float(linear.weight, symmetric=False)
    ct.save(tmp_path, {"fc.weight": packed, "fc.bias": linear.bias})
    loaded: dict[str, Any] = ct.load(tmp_path)
    x = torch.randn(3, 64)
    y = qk.int4_linear(x, loaded["fc.weight"], loaded["fc.bias"])
    assert torch.equal(y, qk.int4_linear(x, packed, linear.bias))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"safetensors package; .*: pip install 'qkernels\[checkpoints\]'"):
        ct.load(tmp_path)
    with pytest.raises(ImportError, match="safetensors package"):
        ct.save(tmp_path, {"a.weight": weight(4, 2, 32, 1, torch.float32)})
    assert isinstance(ct.load(whole())["a.weight"], qk.PackedInt4)  # tensors need no file format


def test_imports_neither_package() -> None:
    done = run_python(
        "import sys, qkernels.integrations.compressed_tensors, qkernels.integrations.gguf as g\n"
        "assert 'safetensors' not in sys.modules and 'gguf' not in sys.modules, g"
    )
    assert done.returncode == 0, done.stderr
