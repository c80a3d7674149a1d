"""qkernels: fast, exact kernels for quantization-aware training, and the thin QAT layer on top of them."""

__version__ = "0.1.0"

from . import library, nn, registry
from .library import use_kernel
from .nn import PerChannel, PerGroup, PerTensor, PerToken
from .ops.fake_quantize import (
    fake_quantize,
    fake_quantize_dynamic,
    fake_quantize_learnable_per_channel_affine,
    fake_quantize_learnable_per_tensor_affine,
    fake_quantize_per_channel_affine,
    fake_quantize_per_tensor_affine,
    fused_moving_avg_obs_fake_quant,
    observe_fake_quantize,
)
from .ops.int8_gemm import PackedInt8, int8_linear, int8_mm, int8_scaled_mm
from .ops.quantize import choose_qparams, dequantize, quantize, quantize_dynamic
from .qat import QConfig, QSpec, calibrate, convert, prepare, report
from .registry import kernels, which

__all__ = [
    "PackedInt8",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QConfig",
    "QSpec",
    "calibrate",
    "choose_qparams",
    "convert",
    "dequantize",
    "fake_quantize",
    "fake_quantize_dynamic",
    "fake_quantize_learnable_per_channel_affine",
    "fake_quantize_learnable_per_tensor_affine",
    "fake_quantize_per_channel_affine",
    "fake_quantize_per_tensor_affine",
    "fused_moving_avg_obs_fake_quant",
    "int8_linear",
    "int8_mm",
    "int8_scaled_mm",
    "kernels",
    "library",
    "nn",
    "observe_fake_quantize",
    "prepare",
    "quantize",
    "quantize_dynamic",
    "registry",
    "report",
    "use_kernel",
    "which",
]
