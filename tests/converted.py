"""Converted models and layers on integers beside the float ones that they were made of."""

from __future__ import annotations

import torch
import torch.multiprocessing
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.nn import (
    Int4Embedding,
    Int4Linear,
    Int8Conv1d,
    Int8Conv2d,
    Int8Conv3d,
    Int8ConvTranspose1d,
    Int8ConvTranspose2d,
    Int8Linear,
)
from qkernels.qat import QConfig, QSpec, calibrate, convert, prepare

CONFIGS = {
    "int8": QConfig(),
    "int4": QConfig(QSpec(4), QSpec(8, symmetric=False)),
    "int8 weight only": QConfig(QSpec(8), None),
    "5 bits weight only": QConfig(QSpec(5, symmetric=False), None),
    "int4 weight only": QConfig(QSpec(4), None),
    "dynamic": QConfig(QSpec(8), QSpec(8, quantizer="dynamic")),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, bias=bias)
        self.fc = nn.Linear(6 * 4 * 4, 5, bias=bias)

    def forward(self, x):
        x = F.relu(self.conv(x.to(self.conv.weight.dtype)))
        return self.fc(x.flatten(1).to(self.fc.weight.dtype))


def batch(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(3, 4, 4, 4).to(dtype)


def made(config: str, dtype=torch.float32, bias: bool = True) -> tuple[nn.Module, nn.Module]:
    """A prepared model and what it converts to."""
    prepared = prepare(Net(bias).to(dtype), CONFIGS[config])
    calibrate(prepared, [batch(dtype)])
    return prepared.eval(), convert(prepared)


def layers() -> dict[str, tuple[nn.Module, nn.Module, torch.Tensor]]:
    """Each integer layer beside the float one that it was made of, and an input."""
    linear, conv, table = nn.Linear(32, 7), nn.Conv2d(4, 6, 3, groups=2), nn.Embedding(9, 32)
    images, sound, conv1d = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 9), nn.Conv1d(4, 6, 3, groups=2)
    conv3d, video = nn.Conv3d(4, 6, 2, groups=2), torch.randn(2, 4, 3, 4, 3)
    up1d, up2d = nn.ConvTranspose1d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3, 2, groups=2)
    return {
        "Int8Linear": (linear, Int8Linear.from_float(linear), torch.randn(3, 32)),
        "Int8Linear, float input": (linear, Int8Linear.from_float(linear, act_bits=16), torch.randn(3, 32)),
        "Int4Linear": (linear, Int4Linear.from_float(linear), torch.randn(3, 32)),
        "Int4Linear, float input": (linear, Int4Linear.from_float(linear, act_bits=16), torch.randn(3, 32)),
        "Int4Linear, zero points": (linear, Int4Linear.from_float(linear, symmetric=False), torch.randn(3, 32)),
        "Int8Conv2d": (conv, Int8Conv2d.from_float(conv), images),
        "Int8Conv2d, float input": (conv, Int8Conv2d.from_float(conv, act_bits=16), images),
        "Int8Conv1d": (conv1d, Int8Conv1d.from_float(conv1d), sound),
        "Int8Conv1d, float input": (conv1d, Int8Conv1d.from_float(conv1d, act_bits=16), sound),
        "Int8Conv3d": (conv3d, Int8Conv3d.from_float(conv3d), video),
        "Int8ConvTranspose1d": (up1d, Int8ConvTranspose1d.from_float(up1d), sound),
        "Int8ConvTranspose2d": (up2d, Int8ConvTranspose2d.from_float(up2d), images),
        "Int8ConvTranspose2d, float input": (up2d, Int8ConvTranspose2d.from_float(up2d, act_bits=16), images),
        "Int4Embedding": (table, Int4Embedding.from_float(table), torch.randint(9, (2, 3))),
    }


KINDS = list(layers())


def ready(model: nn.Module, config: str) -> nn.Module:
    """Prepared, with some range where only a calibration would tell."""
    prepared = prepare(model, CONFIGS[config])
    for quantizer in prepared.modules():
        if isinstance(quantizer, qk.nn.FakeQuantize) and not quantizer.is_calibrated:
            quantizer.set_range(-torch.ones_like(quantizer.scale), torch.ones_like(quantizer.scale))
    return prepared
