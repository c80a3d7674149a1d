"""Makes linear, embedding, recurrent and attention layers on integers of QAT layers."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import layouts
from ..nn.fake_quantize import FakeQuantize
from ..nn.granularity import PerGroup
from ..nn.int4 import Int4Linear
from ..nn.int8 import Int8Linear
from ..nn.int8_cells import Int8GRUCell, Int8LSTMCell, Int8RNNCell
from ..nn.int8_recurrent import Int8GRU, Int8LSTM, Int8RNN
from ..nn.int8_stateful import Int8Stateful
from ..nn.integer_attention import PROJECTIONS, IntegerMultiheadAttention
from ..nn.integer_embedding import Int4Embedding, Int8Embedding, Int8EmbeddingBag, IntegerEmbedding
from ..nn.qat import QATLinear
from ..nn.qat_attention import QATMultiheadAttention, projection_weights
from ..nn.qat_embedding import QATEmbeddingBag, QATTable
from ..nn.qat_recurrent import QATStateful

Linear = TypeVar("Linear", Int8Linear, Int4Linear, Int8Linear | Int4Linear)

RECURRENT: tuple[type[Int8Stateful], ...] = (Int8LSTM, Int8GRU, Int8RNN, Int8LSTMCell, Int8GRUCell, Int8RNNCell)


def group_size(quantizer: FakeQuantize) -> int:
    """How many weights share a scale; −1: a whole output channel."""
    return quantizer.granularity.size if isinstance(quantizer.granularity, PerGroup) else -1


@torch.no_grad()
def integer_linear(layer: QATLinear) -> Int8Linear | Int4Linear:
    weight = layer.weight_fake_quant
    assert weight is not None
    codes = weight.quantize(layer.weight)
    return _linear(_kind(weight), codes, layer.bias, weight, layer.input_fake_quant, layer.weight.dtype)


@torch.no_grad()
def integer_embedding(layer: QATTable) -> IntegerEmbedding:
    weight = layer.weight_fake_quant
    assert weight is not None
    codes, scale, zero_point = weight.quantize(layer.weight)  # type: ignore[arg-type]
    kind: Any = Int4Embedding if weight.bits in layouts.BITS else Int8Embedding
    if isinstance(layer, QATEmbeddingBag):
        kind = Int8EmbeddingBag
    options = {"weight_bits": weight.bits, "group_size": group_size(weight), "symmetric": weight.symmetric}
    new: IntegerEmbedding = kind.like(layer, **options)
    groups = new.scale.shape

    def by_row(t: Tensor) -> Tensor:
        return t.reshape(-1, groups[1]).expand(groups)

    new.set_weight(codes, by_row(scale.float()), None if zero_point is None else by_row(zero_point.to(torch.int8)))
    return new


@torch.no_grad()
def integer_attention(layer: QATMultiheadAttention) -> IntegerMultiheadAttention:
    """Each projection becomes a layer of its own, since query, key and value may be three tensors."""
    weights = []
    for name in projection_weights(layer):
        quantizer = layer.quantizer_of(name)
        assert quantizer is not None
        parts = 3 if name == "in_proj_weight" else 1
        quantized = [_rows(t, parts) for t in quantizer.quantize(getattr(layer, name))]
        weights += [(codes, quantizer) for codes in zip(*quantized, strict=True)]
    bias, dtype = layer.in_proj_bias, getattr(layer, projection_weights(layer)[0]).dtype
    biases: tuple[Tensor | None, ...] = (None, None, None)
    if bias is not None:
        biases = tuple(nn.Parameter(part, bias.requires_grad) for part in bias.chunk(3))
    inputs = projection_inputs(layer)
    made = {}
    for name, (codes, quantizer), b, input in zip(PROJECTIONS, weights, biases, inputs, strict=True):
        made[name] = _linear(_kind(quantizer), codes, b, quantizer, input, dtype)
    return IntegerMultiheadAttention(layer, made)


@torch.no_grad()
def integer_recurrent(layer: QATStateful) -> Int8Stateful:
    """Each weight becomes an Int8Linear, whose files pack codes of 4 bits or less."""
    parts = {}
    for name, input in layer.products():
        weight, bias = getattr(layer, name), getattr(layer, name.replace("weight", "bias"), None)
        quantizer = layer.quantizer_of(name)
        assert quantizer is not None
        parts[name.removeprefix("weight_")] = _linear(
            Int8Linear, quantizer.quantize(weight), bias, quantizer, input, weight.dtype
        )
    kept = {name: q for name, role, q in layer.own_quantizers() if role.kind in ("cell", "output")}
    kind = next(kind for kind in RECURRENT if isinstance(layer, kind.float_class))
    return kind(layer, parts, kept)


def projection_inputs(layer: QATMultiheadAttention) -> tuple[FakeQuantize | None, ...]:
    """The quantizers of what goes into the three projections."""
    input, memory = layer.quantizer_of("input"), layer.quantizer_of("memory")
    source = input if memory is None else memory
    return input, source, source


def _rows(t: Tensor | None, parts: int) -> tuple[Tensor | None, ...]:
    """Codes, scales or zero points, of which each of the parts of a weight has its rows, or all have one."""
    if t is None or t.dim() == 0 or t.shape[0] == 1:
        return (t,) * parts
    return t.chunk(parts)


def _kind(weight: FakeQuantize) -> type[Int8Linear | Int4Linear]:
    return Int4Linear if weight.bits in layouts.BITS else Int8Linear


def _linear(
    kind: type[Linear],
    quantized: tuple[Any, ...],
    bias: Tensor | None,
    weight: FakeQuantize,
    input: FakeQuantize | None,
    dtype: torch.dtype,
) -> Linear:
    """``quantized``: codes [N, K], their scales and zero points."""
    codes, scale, zero_point = quantized
    new = kind(
        codes.shape[1],
        codes.shape[0],
        bias is not None,
        weight_bits=weight.bits,
        group_size=group_size(weight),
        symmetric=weight.symmetric,
        act_bits=16 if input is None else 8,
        input=input,
        dtype=dtype,
    ).to(codes.device)
    new.set_weight(codes, scale.float(), bias, zero_point)
    if input is not None:
        new.set_input(input)
    return new
