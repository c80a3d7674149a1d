"""qkernels: fast, exact kernels for quantization-aware training, and the thin QAT layer on top of them."""

__version__ = "0.1.0"

from . import library, registry
from .library import use_kernel
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
from .ops.quantize import choose_qparams, dequantize, quantize, quantize_dynamic
from .registry import kernels, which

__all__ = [
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "fake_quantize_dynamic",
    "fake_quantize_learnable_per_channel_affine",
    "fake_quantize_learnable_per_tensor_affine",
    "fake_quantize_per_channel_affine",
    "fake_quantize_per_tensor_affine",
    "fused_moving_avg_obs_fake_quant",
    "kernels",
    "library",
    "observe_fake_quantize",
    "quantize",
    "quantize_dynamic",
    "registry",
    "use_kernel",
    "which",
]
