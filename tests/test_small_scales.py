"""Scales at the ends of what their dtype holds: the nearest that it does hold, with the codes of that one."""

import pytest
import torch

import qkernels as qk

SMALLEST = 2.0**-24  # of fp16


def error(packed, w):
    return float((packed.dequantize() - w).norm() / w.norm())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("magnitude", [1e-7, 1e-6, 1e-5, 1e-4, 1.0, 1e4])
def test_fp16_scales_are_the_nearest(magnitude, bits, symmetric):
    torch.manual_seed(0)
    w = torch.randn(64, 256) * magnitude
    packed = qk.PackedInt.from_float(w, bits, group_size=32, symmetric=symmetric, scale_dtype=torch.float16)
    exact = qk.PackedInt.from_float(w, bits, group_size=32, symmetric=symmetric)
    q, scale, zero_point, _ = packed.unpack()
    assert scale.dtype == torch.float16
    assert torch.equal(scale, exact.unpack()[1].half().clamp(min=SMALLEST))
    steps, low, high = scale.float().repeat_interleave(32, 1), -(1 << bits - 1), (1 << bits - 1) - 1
    zero = 0
    if not symmetric:
        least = w.view(64, 8, 32).amin(2)
        own = (low - (least / scale.float()).round()).clamp(low, high)
        subnormal = scale < torch.finfo(torch.float16).tiny
        assert torch.equal(zero_point.float(), torch.where(subnormal, own, exact.unpack()[2].float()))
        zero = zero_point.float().repeat_interleave(32, 1)
    assert torch.equal(q.float(), ((w * (1 / steps)).round() + zero).clamp(low, high))
    # A step off by its own rounding, half of the smallest at most, moves the largest values by as much for each code.
    off = min(0.5 * SMALLEST / float(exact.unpack()[1].min()), 1.0) * (1 << bits - 1)
    assert error(packed, w) < error(exact, w) * (1.02 + 2 * off)


def test_the_smallest_weights():
    torch.manual_seed(0)
    w = torch.randn(64, 256) * 1e-5
    assert error(qk.PackedInt4.from_float(w, group_size=32, scale_dtype=torch.float16), w) < 0.1
    layer = qk.nn.Int4Linear.from_float(linear_of(w), scale_dtype=torch.float16)
    assert float((layer.dequantize() - w).norm() / w.norm()) < 0.1
    table = torch.nn.Embedding(64, 256, _weight=w)
    table = qk.nn.Int4Embedding.from_float(table, scale_dtype=torch.float16)
    assert float((table(torch.arange(64)) - w).norm() / w.norm()) < 0.1
    below = torch.full((1, 32), SMALLEST / 4)
    assert qk.PackedInt4.from_float(below, scale_dtype=torch.float16).dequantize().abs().max() == 0


def linear_of(w):
    linear = torch.nn.Linear(*reversed(w.shape), bias=False)
    linear.weight.data = w
    return linear


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_zeros(dtype, symmetric):
    packed = qk.PackedInt4.from_float(torch.zeros(2, 64), symmetric=symmetric, scale_dtype=dtype)
    assert torch.equal(packed.dequantize(), torch.zeros(2, 64))
    for act_bits in (8, 16):
        assert torch.equal(qk.int4_linear(torch.randn(3, 64), packed, act_bits=act_bits), torch.zeros(3, 2))


def test_the_largest_weights():
    most = 65504 * 7.0
    packed = qk.PackedInt4.from_float(torch.tensor([[most, -most, 0, 65504] * 8]), scale_dtype=torch.float16)
    assert torch.equal(packed.dequantize()[0, :4], torch.tensor([most, -most, 0, 65504]))
    with pytest.raises(ValueError, match=r"w: got scales up to 71428\.6; accepted: what torch\.float16 holds"):
        qk.PackedInt4.from_float(torch.full((1, 32), 5e5), scale_dtype=torch.float16)


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("kind", ["zero_point", "minimum"])
def test_products_with_subnormal_scales_and_minima(kind, act_bits):
    torch.manual_seed(0)
    q = torch.randint(-8, 8, (40, 64), dtype=torch.int8)
    scale = (torch.randint(1, 600, (40, 2)) * SMALLEST).half()
    minimum = (torch.randint(-900, 900, (40, 2)) * SMALLEST).half()
    extra = {"minimum": minimum} if kind == "minimum" else {"zero_point": torch.randint(-8, 8, (40, 2))}
    packed = qk.PackedInt4.from_quantized(q, scale, **extra)
    wide, steps = q.view(40, 2, 32).double(), scale.double()[..., None]
    offset = extra[kind].double()[..., None]
    w = (wide + 8) * steps + offset if kind == "minimum" else (wide - offset) * steps
    assert torch.equal(packed.dequantize(), w.view(40, 64).float())
    x = torch.randint(-127, 128, (3, 64)).float()
    x[:, 0] = 127  # whose codes are x itself
    y = qk.int4_linear(x, packed, act_bits=act_bits)
    torch.testing.assert_close(y.double(), x.double() @ w.view(40, 64).t(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ends", [(0.0, 0.0), (-1e-6, 2e-6), (-6e4, 6e4), (0.1, 3.0), (-2.0, -1.0)])
def test_choose_qparams(ends, dtype, symmetric):
    low, high = (torch.tensor([end], dtype=dtype) for end in ends)
    scale, zero_point = qk.choose_qparams(low, high, quant_min=-8, quant_max=7, symmetric=symmetric)
    exact = max(-float(low), float(high)) / 7 if symmetric else (max(float(high), 0.0) - min(float(low), 0.0)) / 15
    assert scale.dtype == dtype
    least = SMALLEST if dtype == torch.float16 else torch.finfo(torch.float32).tiny
    assert float(scale) == max(float(torch.tensor(exact, dtype=torch.float32).to(dtype)), least)
    if not symmetric:
        assert int(zero_point) == max(-8 - round(min(float(low), 0.0) / float(scale)), -8)


def test_checkpoints_keep_subnormal_scales(tmp_path):
    pytest.importorskip("safetensors")
    from qkernels.integrations import compressed_tensors

    torch.manual_seed(0)
    w = torch.randn(16, 64) * 1e-5
    for symmetric in (True, False):
        packed = qk.PackedInt4.from_float(w, symmetric=symmetric, scale_dtype=torch.float16)
        compressed_tensors.save(tmp_path, {"a.weight": packed})
        assert torch.equal(compressed_tensors.load(tmp_path)["a.weight"].dequantize(), packed.dequantize())
