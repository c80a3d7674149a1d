"""Schemas, fakes, autograd and public functions of every op; the import defines the ops and loads their kernels."""

from .. import library
from . import (
    aten_fake_quantize,
    codebook,
    dynamic,
    fake_quantize,
    fake_quantize_learnable,
    foreach_fake_quantize,
    int4_gemm,
    int8_conv2d,
    int8_gemm,
    int8_training,
    observe_fake_quantize,
    packing,
    quantize,
    quantize_transposed,
    relu_fake_quantize,
    rms_norm_quantize,
    silu_mul_quantize,
    statistics,
    stochastic,
)

library.load()

__all__ = [
    "aten_fake_quantize",
    "codebook",
    "dynamic",
    "fake_quantize",
    "fake_quantize_learnable",
    "foreach_fake_quantize",
    "int4_gemm",
    "int8_conv2d",
    "int8_gemm",
    "int8_training",
    "observe_fake_quantize",
    "packing",
    "quantize",
    "quantize_transposed",
    "relu_fake_quantize",
    "rms_norm_quantize",
    "silu_mul_quantize",
    "statistics",
    "stochastic",
]
