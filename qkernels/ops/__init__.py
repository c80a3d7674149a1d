"""Schemas, fakes, autograd and public functions of every op; importing this defines them and loads the kernels."""

from .. import library
from . import fake_quantize, int8_conv2d, int8_gemm, quantize, relu_fake_quantize, rms_norm_quantize, silu_mul_quantize

library.load()

__all__ = [
    "fake_quantize",
    "int8_conv2d",
    "int8_gemm",
    "quantize",
    "relu_fake_quantize",
    "rms_norm_quantize",
    "silu_mul_quantize",
]
