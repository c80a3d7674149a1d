"""Schemas, fakes, autograd and public functions of every op; importing this defines them and loads the kernels."""

from .. import library
from . import (
    aten_fake_quantize,
    codebook,
    fake_quantize,
    foreach_fake_quantize,
    int4_gemm,
    int8_conv2d,
    int8_gemm,
    int8_training,
    packing,
    quantize,
    quantize_transposed,
    relu_fake_quantize,
    rms_norm_quantize,
    silu_mul_quantize,
    statistics,
    stochastic,
    straight_through,
)

library.load()

__all__ = [
    "aten_fake_quantize",
    "codebook",
    "fake_quantize",
    "foreach_fake_quantize",
    "int4_gemm",
    "int8_conv2d",
    "int8_gemm",
    "int8_training",
    "packing",
    "quantize",
    "quantize_transposed",
    "relu_fake_quantize",
    "rms_norm_quantize",
    "silu_mul_quantize",
    "statistics",
    "stochastic",
    "straight_through",
]
