"""Checkpoints of compressed-tensors that are refused, and what cannot be saved as one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed import codes, scheme, weight, whole
from torch import Tensor

import qkernels as qk
from qkernels.integrations import compressed_tensors as ct


def with_(**changes: Tensor | None) -> dict[str, Tensor]:
    """The checkpoint above with other tensors in a; None takes one out."""
    made: dict[str, Tensor | None] = {**whole(), **{f"a.{name}": t for name, t in changes.items()}}
    return {name: t for name, t in made.items() if t is not None}


FP8 = torch.float8_e4m3fn
INT8 = {"weight_packed": None, "weight_shape": None, "weight_zero_point": None, "weight": torch.zeros(10, 64).char()}
CHANNEL = {**INT8, "weight_scale": torch.ones(10, 1)}

BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "no scale": (with_(weight_scale=None), "a.weight_scale: missing"),
    "no codes": (with_(weight_packed=None), "a.weight_packed: missing"),
    "no shape": (with_(weight_shape=None), "a.weight_shape: missing"),
    "int8 without scale": (with_(**{**INT8, "weight_scale": None}), "a.weight_scale: missing"),
    "int64 words": (with_(weight_packed=torch.zeros(10, 8).long()), "a.weight_packed: got torch.int64"),
    "experts": (with_(weight_packed=torch.zeros(2, 10, 8).int()), "a.weight_packed: got torch.int32 of shape [2"),
    "words too many": (with_(weight_packed=torch.zeros(10, 17).int()), "a.weight_packed: got N, K = [10, 64] in row"),
    "5 bits": (with_(weight_packed=torch.zeros(10, 10).int()), "a.weight: got 5 bits; accepted: 2, 3, 4, 8"),
    "row missing": (with_(weight_packed=torch.zeros(9, 8).int()), "a.weight_shape: got [10, 64]; accepted: 9"),
    "negative K": (with_(weight_shape=torch.tensor([10, -64])), "a.weight_shape: got [10, -64]"),
    "floating shape": (with_(weight_shape=torch.tensor([10.0, 64])), "a.weight_shape: got torch.float32"),
    "shape of three": (with_(weight_shape=torch.tensor([1, 10, 64])), "a.weight_shape: got torch.int64 of shape [3]"),
    "groups do not divide": (with_(weight_scale=torch.ones(10, 3)), "a.weight_scale: got shape [10, 3]"),
    "no groups": (with_(weight_scale=torch.ones(10, 0)), "a.weight_scale: got shape [10, 0]"),
    "scale of other rows": (with_(weight_scale=torch.ones(9, 2)), "a.weight_scale: got shape [9, 2]"),
    "group of 8": (with_(weight_scale=torch.ones(10, 8), weight_zero_point=None), "a.weight: scale: got shape [10, 8]"),
    "fp64 scale": (with_(weight_scale=torch.ones(10, 2).double()), "a.weight_scale: got torch.float64"),
    "fp8 scale": (with_(weight_scale=torch.ones(10, 2).to(FP8)), "a.weight_scale: got torch.float8_e4m3fn"),
    "zero points not packed": (with_(weight_zero_point=torch.zeros(10, 2).int()), "a.weight_zero_point: got torch.int"),
    "zero points of other groups": (with_(weight_zero_point=torch.zeros(2, 1).int()), "a.weight_zero_point: got"),
    "zero points of another shape": (with_(weight_zero_point=torch.zeros(10, 1).char()), "a.weight_zero_point: got sh"),
    "floating zero points": (with_(weight_zero_point=torch.zeros(2, 2)), "a.weight_zero_point: got torch.float32"),
    "zero points out of range": (with_(weight_zero_point=torch.full((10, 2), 9).char()), "a.weight: zero_point: got 9"),
    "g_idx": (with_(weight_g_idx=torch.arange(64).int()), "a.weight_g_idx: got a tensor"),
    "global scale": (with_(weight_global_scale=torch.ones(1)), "a.weight_global_scale: got a tensor"),
    "float beside codes": (with_(weight=torch.zeros(10, 64)), "a.weight: got a tensor beside a.weight_packed"),
    "fp8 weight": (with_(**{**CHANNEL, "weight": torch.zeros(10, 64).to(FP8)}), "a.weight: got torch.float8"),
    "int8 groups": (with_(**INT8), "a.weight_scale: got 2 groups of int8 codes"),
    "int8 zero points": (
        with_(**{**CHANNEL, "weight_zero_point": torch.ones(10, 1).char()}),
        "a.weight_zero_point: got zero points of int8 codes",
    ),
    "int8 experts": (with_(**{**CHANNEL, "weight": torch.zeros(2, 10, 64).char()}), "a.weight: got torch.int8 of sh"),
    "int8 K": (with_(**{**CHANNEL, "weight": torch.zeros(10, 131072).char()}), "a.weight: w: got K = 131072"),
}  # fmt: skip


def test_the_checkpoint_that_bad_ones_derive_from_is_good() -> None:
    assert isinstance(ct.load(whole())["a.weight"], qk.PackedInt4)
    assert isinstance(ct.load(with_(**CHANNEL))["a.weight"], qk.PackedInt8)


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors(case: str) -> None:
    tensors, message = BAD[case]
    before = dict(tensors)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        ct.load(tensors)
    assert tensors == before  # the same objects: nothing was taken out


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, 'config: got no "config_groups"'),
        ({"config_groups": {}, "quant_method": "gptq"}, 'config: got the quant_method "gptq"'),
        ({"config_groups": []}, "config_groups: got list"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16: got ['Linear']"),
        ({"config_groups": {"g": {"targets": ["Linear"]}}}, "config_groups.g: got"),
        ({"config_groups": {"g": scheme("a", num_bits="x")}}, "config_groups.g: got"),
        ({"config_groups": {"g": scheme("re:(", num_bits=4)}}, "config_groups.g: got"),
        ({"config_groups": {"g": scheme(4, num_bits=4)}}, "config_groups.g: got"),
        ({"config_groups": {}, "transform_config": {"config_groups": {"u": {}}}}, "config: got a transform_config"),
        ({"config_groups": {}, "sparsity_config": {"format": "sparse-24-bitmask"}}, "config: got the sparsity_config"),
        ({"config_groups": {}}, "a.weight_packed: got N, K = [10, 64] in rows of 8 int32 and scales [10, 2]; accepted"),
        ({"config_groups": {"g": scheme("a", num_bits=8, group_size=32)}}, "a.weight_packed: got N, K"),
        ({"config_groups": {"g": scheme("a", num_bits=4, group_size=64)}}, "a.weight_packed: got N, K"),
        ({"config_groups": {"g": scheme("a", num_bits=4, strategy="channel")}}, "a.weight_packed: got N, K"),
        ({"config_groups": {"g": scheme("a", num_bits=4, strategy="tensor")}}, "a.weight_packed: got N, K"),
        (
            {"config_groups": {"g": scheme("a", num_bits=4, group_size=32, type="float")}},
            'a.weight_packed: got the type "f',
        ),
    ],
)
def test_bad_config(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        ct.load(whole(), config)


def test_int8_codes_that_the_config_calls_int4() -> None:
    config = {"config_groups": {"g": scheme("a", num_bits=4, strategy="channel")}}
    assert isinstance(ct.load(with_(**CHANNEL), config)["a.weight"], qk.PackedInt4)
    with pytest.raises(ValueError, match=r"^a\.weight: q: got 9; accepted: the codes of 4 bits"):
        ct.load(with_(**{**CHANNEL, "weight": torch.full((10, 64), 9).char()}), config)


def test_asymmetric_layer_without_zero_points() -> None:
    config = {"config_groups": {"g": scheme("a", num_bits=4, group_size=32, symmetric=False)}}
    assert ct.load(whole(), config)["a.weight"].zero_point is not None
    with pytest.raises(ValueError, match=r"^a\.weight_zero_point: missing"):
        ct.load(with_(weight_zero_point=None), config)


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor"):
        ct.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors: no such file"):
        ct.load(tmp_path / "x.safetensors")
    ct.save(tmp_path, {"a.weight": weight(4, 8, 64, 2, torch.float32)})
    path = tmp_path / "model.safetensors"
    intact = path.read_bytes()
    for length in (0, 4, 100, len(intact) - 1):
        path.write_bytes(intact[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
            ct.load(tmp_path)
    path.write_bytes(intact)
    assert ct.load(path).keys() == {"a.weight"}  # the config.json beside a file counts
    for text in ('{"quantization_config": ', "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json: (not JSON|got list)"):
            ct.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # says nothing: the shapes do
    assert isinstance(ct.load(tmp_path)["a.weight"], qk.PackedInt4)


def with_minima() -> qk.PackedInt:
    scale = torch.ones(2, 1)
    return qk.PackedInt4.from_quantized(codes(2, 32, 4), scale, minimum=scale)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: {"a.weight": with_minima()}, {}, "a.weight: got minima"),
        (lambda: {"a": weight(4, 2, 32, 1, torch.float32)}, {}, "a: got a packed weight under this name"),
        (lambda: {"a.my_weight": weight(4, 2, 32, 1, torch.float32)}, {}, "a.my_weight: got a packed weight"),
        (lambda: {"a.weight": "x"}, {}, "a.weight: got str"),
        (lambda: {"a.weight": torch.ones(3)}, {}, "tensors: got no packed weight"),
        (lambda: {"a.weight": weight(4, 2, 32, 1, torch.float32)}, {"act_bits": 4}, "act_bits: got 4"),
        (lambda: {"a.weight": weight(8, 2, 32, 1, torch.float32)}, {"scale_dtype": torch.float64}, "scale_dtype: got"),
        (lambda: {"a.weight": weight(8, 2, 32, 1, torch.float32)}, {"scale_dtype": torch.bfloat16}, "a.weight: got sc"),
        (
            lambda: {"a.weight": qk.PackedInt8.from_quantized(codes(1, 2, 8), torch.tensor([1e6]))},
            {"scale_dtype": torch.float16},
            "a.weight: got scales",
        ),
        (
            lambda: {"a.weight": weight(4, 2, 32, 1, torch.float32), "a.weight_scale": torch.ones(2)},
            {},
            "a.weight_scale: got a tensor of this name",
        ),
        (
            lambda: {"a.weight": weight(4, 2, 32, 1, torch.float32), "a.input_scale": torch.ones(1)},
            {},
            "a.input_scale: got a tensor; accepted with act_bits 16: none",
        ),
        (
            lambda: {"a.weight": weight(4, 2, 32, 1, torch.float32), "a.input_scale": torch.ones(2)},
            {"act_bits": 8},
            "a.input_scale: got",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_saved(
    make: Callable[[], dict[str, Any]], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        ct.save(tmp_path / "new", make(), **options)
    assert not (tmp_path / "new").exists()


def test_nothing_is_written_beside_a_config_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        ct.save(tmp_path, {"a.weight": weight(4, 2, 32, 1, torch.float32)})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
