"""A part of a converted network in one call: activations stay int8 codes from layer to layer.

``qkernels::int8_program(inputs, constants, plan)`` runs a plan on the inputs, fp32 [N, C], [N, C, L], [N, C, H, W] or
[N, C, D, H, W] with one N. ``qat/lowering.py`` writes plans; nobody else should have to.

A plan is text with a step on each line: ``name key=value key=value``, where a value is a number, a list of numbers with
commas, or the name of what an earlier step made: ``f0`` for floats, ``q0`` for codes. Constants are named by their
places in ``constants``. Everything has three spatial dims: kernel=1,3,3 is a 2-D kernel. A missing key means "none".

- ``quantizer id scale [zero_point] low high``: a per-tensor quantizer; ``q=id`` means it. ``equal a b``: the call is
  refused unless two constants of one element are equal.
- ``input out index``, ``output x index [channels_last=input]``: the latter has the first input's memory format.
- ``quantize out x q``, ``dequantize out x``, ``requantize codes x q``.
- ``conv x data colsum scale [bias] in out_channels kernel stride padding padding_after dilation groups [out] [codes q]
  [first] [residual] [second]``: second(first(product + bias) + residual), as floats (out), as codes, or both.
  ``conv_transpose``: the same with output_padding instead of padding_after. ``linear``: the same on [N, C], without the
  geometry.
- ``activate x first``, ``binary kind a b [first]`` (add, sub, mul; a or b may be [N, C] in every pixel), ``batch_norm x
  mean var [weight] [bias] eps [first]``, ``layer_norm x [weight] [bias] channels eps`` and ``rms_norm x [weight]
  channels eps`` (of the channels of each pixel), ``avg_pool x kernel stride padding ceil include_pad [divisor]``,
  ``adaptive_avg_pool x size``, ``mean x keep``, ``resize x mode=linear [align_corners]``: each with [out] and
  [codes q].
- ``max_pool out x kernel stride padding dilation ceil``, ``cat out xs``, ``slice out x begin end``, ``shuffle out x
  groups``, ``pixel_shuffle out x factor``, ``pixel_unshuffle out x factor``, ``upsample out x`` (the nearest pixels),
  ``flatten out x``: they move values, floats or codes.

``upsample`` and ``resize`` take the size of their result from one of three keys: scale, by which x's size is
multiplied, size, or like, another value that has it.

Activations: relu, clamp:low:high, leaky_relu:slope, hardswish, hardsigmoid, silu, gelu, gelu_tanh, sigmoid, tanh.

An image that holds a NaN gives NaN in all its outputs, and so does one whose norm is NaN, as that of an infinity is. So
do all images if a scale, a bias or a tensor of a norm is not finite: codes could not carry it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import layouts, library, samples
from ..reference import int8_program as reference

_SAMPLE = """\
quantizer id=0 scale=0 zero_point=1 low=-128 high=127
input out=f0 index=0
quantize out=q0 x=f0 q=0
conv x=q0 data=2 colsum=3 scale=4 bias=5 in={c} out_channels=6 kernel=1,1,1 stride=1,1,1 padding=0,0,0 \
padding_after=0,0,0 dilation=1,1,1 groups=1 codes=q1 q=0 first=clamp:0.0:6.0
activate out=f1 x=q1 first=hardswish
output x=f1 index=0 channels_last=input"""


def _samples(x: Tensor) -> Iterator[tuple[Any, ...]]:
    if 2 <= x.dim() <= 5 and x.dtype == torch.float32 and x.shape[1] > 0:
        q = samples.codes(6, x.shape[1])
        data, colsum = layouts.int8_pack(q), q.sum(1, dtype=torch.int32)
        quantizer = torch.tensor([0.03]), torch.tensor([-4], dtype=torch.int32)
        constants = [*quantizer, data, colsum, torch.rand(6) / 100, torch.randn(6)]
        yield [x], constants, _SAMPLE.format(c=x.shape[1])


int8_program = library.define(
    "int8_program",
    "(Tensor[] inputs, Tensor[] constants, str plan) -> Tensor[]",
    reference.int8_program,
    partial(reference.int8_program, shapes_only=True),
    cpu=("amx", "avx512vnni", "avx2", "scalar"),
    samples=_samples,
)
