"""qkernels: fast, exact kernels for quantization-aware training, and the thin QAT layer on top of them."""

from . import codebooks, library, nn, ops, qat, reference, registry
from .integrations.aten import override_torch
from .library import use_kernel
from .nn import PerChannel, PerGroup, PerTensor, PerToken
from .ops.aten_fake_quantize import (
    fake_quantize_learnable_per_channel_affine,
    fake_quantize_learnable_per_tensor_affine,
    fake_quantize_per_channel_affine,
    fake_quantize_per_tensor_affine,
    fused_moving_avg_obs_fake_quant,
)
from .ops.codebook import dequantize_codebook, fake_quantize_codebook, quantize_codebook
from .ops.dynamic import fake_quantize_dynamic, quantize_dynamic
from .ops.fake_quantize import fake_quantize
from .ops.foreach_fake_quantize import foreach_fake_quantize
from .ops.int4_gemm import PackedInt, PackedInt4, int4_linear
from .ops.int8_conv2d import PackedInt8Conv2d, int8_conv2d
from .ops.int8_gemm import PackedInt8, int8_linear, int8_mm, int8_scaled_mm
from .ops.int8_training import int8_training_linear
from .ops.observe_fake_quantize import observe_fake_quantize
from .ops.packing import pack_bits, pack_int4, unpack_bits, unpack_int4
from .ops.quantize import choose_qparams, dequantize, quantize
from .ops.quantize_transposed import quantize_dynamic_transposed
from .ops.relu_fake_quantize import relu_fake_quantize
from .ops.rms_norm_quantize import rms_norm_fake_quantize_dynamic, rms_norm_quantize_dynamic
from .ops.silu_mul_quantize import silu_mul_fake_quantize_dynamic, silu_mul_quantize_dynamic
from .ops.statistics import histogram, quantization_errors
from .ops.stochastic import fake_quantize_stochastic, quantize_stochastic
from .qat import (
    BitSchedule,
    OscillationTracker,
    QConfig,
    QSpec,
    QuantLoss,
    TrainingLog,
    adaround,
    advise,
    assign,
    calibrate,
    compare,
    convert,
    correct_bias,
    enable_fake_quant,
    equalize,
    exact,
    freeze_bn,
    freeze_observers,
    gptq,
    hybrid,
    load,
    losses,
    measure_latency,
    parameter_groups,
    prepare,
    presets,
    reestimate_bn,
    report,
    save,
    schedules,
    sensitivity,
    set_bits,
    smoothquant,
    unprepare,
)
from .registry import kernels, which
from .version import __version__ as __version__

__all__ = [
    "BitSchedule",
    "OscillationTracker",
    "PackedInt",
    "PackedInt4",
    "PackedInt8",
    "PackedInt8Conv2d",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QConfig",
    "QSpec",
    "QuantLoss",
    "TrainingLog",
    "adaround",
    "advise",
    "assign",
    "calibrate",
    "choose_qparams",
    "codebooks",
    "compare",
    "convert",
    "correct_bias",
    "dequantize",
    "dequantize_codebook",
    "enable_fake_quant",
    "equalize",
    "exact",
    "fake_quantize",
    "fake_quantize_codebook",
    "fake_quantize_dynamic",
    "fake_quantize_learnable_per_channel_affine",
    "fake_quantize_learnable_per_tensor_affine",
    "fake_quantize_per_channel_affine",
    "fake_quantize_per_tensor_affine",
    "fake_quantize_stochastic",
    "foreach_fake_quantize",
    "freeze_bn",
    "freeze_observers",
    "fused_moving_avg_obs_fake_quant",
    "gptq",
    "histogram",
    "hybrid",
    "int4_linear",
    "int8_conv2d",
    "int8_linear",
    "int8_mm",
    "int8_scaled_mm",
    "int8_training_linear",
    "kernels",
    "library",
    "load",
    "losses",
    "measure_latency",
    "nn",
    "observe_fake_quantize",
    "ops",
    "override_torch",
    "pack_bits",
    "pack_int4",
    "parameter_groups",
    "prepare",
    "presets",
    "qat",
    "quantization_errors",
    "quantize",
    "quantize_codebook",
    "quantize_dynamic",
    "quantize_dynamic_transposed",
    "quantize_stochastic",
    "reestimate_bn",
    "reference",
    "registry",
    "relu_fake_quantize",
    "report",
    "rms_norm_fake_quantize_dynamic",
    "rms_norm_quantize_dynamic",
    "save",
    "schedules",
    "sensitivity",
    "set_bits",
    "silu_mul_fake_quantize_dynamic",
    "silu_mul_quantize_dynamic",
    "smoothquant",
    "unpack_bits",
    "unpack_int4",
    "unprepare",
    "use_kernel",
    "which",
]
