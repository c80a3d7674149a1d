"""Int4 layers of every form."""

from __future__ import annotations

import torch
import torch._dynamo.testing
from torch import nn

from qkernels.nn import FakeQuantize, Int4Embedding, Int4Linear, Int8Conv2d, Int8Linear, PerTensor, PerToken

FORMS = [(bits, symmetric) for bits in (4, 3, 2) for symmetric in (True, False)]
SCALES = (torch.float32, torch.bfloat16, torch.float16)


def static(symmetric: bool, bits: int = 8) -> FakeQuantize:
    quantizer = FakeQuantize(bits=bits, quantizer="minmax", symmetric=symmetric)
    quantizer.set_range(torch.tensor([-1.0]), torch.tensor([2.0]))
    return quantizer


INPUTS = {
    "per token": lambda: FakeQuantize(granularity=PerToken(), quantizer="dynamic"),
    "per tensor": lambda: FakeQuantize(granularity=PerTensor(), quantizer="dynamic"),
    "per tensor, zero point": lambda: FakeQuantize(quantizer="dynamic", symmetric=False),
    "static": lambda: static(True),
    "static, zero point": lambda: static(False),
    "static, 4 bits": lambda: static(False, 4),
}


def filled(kind: str = "zero_point", bits: int = 4, input: str | None = "static, zero point", **options) -> Int4Linear:
    """A layer of groups of 16 with random codes, scales and what else it holds."""
    n, k = 37, 48
    offset = {"symmetric": kind == "symmetric", "minimum": kind == "minimum"}
    quantizer = None if input is None else INPUTS[input]()
    layer = Int4Linear(k, n, weight_bits=bits, group_size=16, **offset, input=quantizer, **options)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    dtype = layer.scale_dtype
    layer.set_weight(
        torch.randint(low, high + 1, (n, k), dtype=torch.int8),
        torch.rand(n, 3).to(dtype),
        torch.randn(n),
        torch.randint(low, high + 1, (n, 3)) if kind == "zero_point" else None,
        minimum=torch.randn(n, 3).to(dtype) if kind == "minimum" else None,
    )
    if quantizer is not None:
        layer.set_input(quantizer)
    return layer


def state_bytes(state: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in state.values())


def embedding(kind: str = "zero_point", bits: int = 4, **options) -> Int4Embedding:
    return Int4Embedding.from_float(
        nn.Embedding(19, 48, padding_idx=3), 16, kind == "symmetric", weight_bits=bits, **options
    )  # fmt: skip


def conv() -> Int8Conv2d:
    layer = Int8Conv2d(4, 6, 3, groups=2, input=static(False))
    layer.set_weight(torch.randint(-127, 128, (6, 2, 3, 3), dtype=torch.int8), torch.rand(6), torch.randn(6))
    return layer


LAYERS = {
    "linear": lambda: filled("symmetric"),
    "linear, zero points": filled,
    "linear, minima, bf16 scales": lambda: filled("minimum", scale_dtype=torch.bfloat16),
    "linear, 3 bits": lambda: filled(bits=3, input="per token"),
    "linear, 2 bits, fp16 scales": lambda: filled(bits=2, scale_dtype=torch.float16),
    "linear, weight only": lambda: filled(input=None, act_bits=16),
    "embedding": lambda: embedding("symmetric"),
    "embedding, 3 bits, zero points": lambda: embedding(bits=3, scale_dtype=torch.float16),
    "int8 linear": lambda: Int8Linear.from_float(nn.Linear(48, 37)),
    "int8 convolution": conv,
}


def example(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, Int4Embedding):
        return torch.randint(19, (2, 7))
    return torch.randn(2, 4, 5, 5) if isinstance(layer, Int8Conv2d) else torch.randn(5, 48)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Equal state, private buffers and results."""
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for key in first:
        assert first[key].dtype == second[key].dtype, key
        assert torch.equal(first[key], second[key]), key
    for (name, one), (_, two) in zip(
        (*a.named_parameters(), *a.named_buffers()), (*b.named_parameters(), *b.named_buffers()), strict=True
    ):
        assert torch.equal(one, two), name
    x = example(a)
    assert torch.equal(a(x), b(x))
