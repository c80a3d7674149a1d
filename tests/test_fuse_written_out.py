"""Programs of transformers as users write them: norms in single operations, rotary positions, SwiGLU, causal masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fuse import made, own, tensors
from test_fuse_transformers import assert_close, assert_ran
from torch import Tensor, nn
from written_transformers import LONGEST, VOCABULARY, Bert, BertNorm, HuggingFaceNorm, Llama, MetaNorm

from qkernels.qat.fuse import fused_parts

WIDTH = 12
MODELS: dict[str, Any] = {"Llama, Meta": Llama, "Llama, Hugging Face": lambda: Llama(HuggingFaceNorm), "BERT": Bert}


def ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length))


@pytest.mark.parametrize("name", MODELS)
def test_one_program_from_attention_to_attention(name: str) -> None:
    torch.manual_seed(0)
    prepared, converted = made(MODELS[name](), (ids(3, 11),))
    (part,) = fused_parts(converted).values()
    assert len(part.plans) == (4 if name == "BERT" else 3)  # BERT's last program is the pooler behind a slice
    middle = part.plans[1].splitlines()
    norms = [line for line in middle if "_norm " in line]
    assert len(norms) == 2
    # The norms hand codes to the layers behind, and floats to sums alone: nobody needs them for their size.
    assert all("codes=" in line and (" out=" in line) == (name == "BERT") for line in norms)
    gated = [line for line in middle if line.startswith("binary kind=mul")]
    assert len(gated) == (name != "BERT")
    assert all("codes=" in line and " out=" not in line for line in gated)
    with torch.no_grad():
        for batch, length in ((2, 7), (1, 1), (3, LONGEST)):
            x = ids(batch, length)
            for got, want, whole in zip(tensors(converted(x)), own(converted, x), tensors(prepared(x)), strict=True):
                assert_close(got, want)
                assert_close(got, whole)
            assert_ran(converted)


class Written(nn.Module):
    """A norm between two layers, as ``norm`` writes it: a function of x, weight and bias."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5), norm
        self.weight, self.bias = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return self.b(self.norm(self.a(x), self.weight, self.bias))


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


@torch.fx.wrap
def square(x: Tensor) -> Tensor:  # another one than torch's
    return x.square() * 2


RMS = {
    "rsqrt": lambda x, w, b: x * torch.rsqrt(mean(x**2) + 1e-3) * w,
    "weight first": lambda x, w, b: w * (torch.rsqrt((x * x).mean([-1], True) + 1e-3) * x),
    "method": lambda x, w, b: x.mul((1e-3 + torch.mean(x.square(), dim=-1, keepdim=True)).rsqrt()).mul(w),
    "quotient": lambda x, w, b: w * (x / torch.sqrt(mean(x.pow(2)) + 1e-3)),
    "power": lambda x, w, b: x * (mean(torch.square(x)) + 1e-3) ** -0.5 * w,
    "root as a power": lambda x, w, b: x / (mean(x * x) + 1e-3).pow(0.5) * w,
    "reciprocal": lambda x, w, b: x * (mean(x * x) + 1e-3).sqrt().reciprocal() * w,
    "one over": lambda x, w, b: x * (1 / torch.sqrt(mean(x * x) + 1e-3)) * w,
    "casts": lambda x, w, b: (x.float() * torch.rsqrt(mean(x.float() ** 2) + 1e-3)).to(dtype=x.dtype) * w.type_as(x),
}
LAYER = {
    "variance": lambda x, w, b: (x - mean(x)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-3) * w + b,
    "correction": lambda x, w, b: (
        b + w * ((x - mean(x)) * torch.rsqrt(torch.var(x, dim=-1, correction=0, keepdim=True) + 1e-3))
    ),
    "squares": lambda x, w, b: w * ((x - mean(x)) / (mean((x - mean(x)) ** 2) + 1e-3).sqrt()) + b,
    "no bias": lambda x, w, b: w * ((x - mean(x)) / (mean((x - mean(x)) ** 2) + 1e-3).sqrt()),
}
OTHERS = {
    "another dim": lambda x, w, b: x * torch.rsqrt((x * x).mean(-2, keepdim=True) + 1e-3) * w,
    "no eps": lambda x, w, b: x * torch.rsqrt(mean(x * x)) * w,
    "eps outside of the root": lambda x, w, b: x / (torch.sqrt(mean(x * x)) + 1e-3) * w,
    "another tensor's root": lambda x, w, b: x * torch.rsqrt(mean((x + 1) ** 2) + 1e-3) * w,
    "cubes": lambda x, w, b: x * torch.rsqrt(mean(x.abs() ** 3) + 1e-3) * w,
    "the root, not its inverse": lambda x, w, b: x * torch.sqrt(mean(x * x) + 1e-3) * w,
    "no weight": lambda x, w, b: x * torch.rsqrt(mean(x * x) + 1e-3),
    "a bias on RMS": lambda x, w, b: x * torch.rsqrt(mean(x * x) + 1e-3) * w + b,
    "variance of a sample": lambda x, w, b: (x - mean(x)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-3) * w + b,
    "squares of what is not centered": lambda x, w, b: (x - mean(x)) / torch.sqrt(mean(x * x) + 1e-3) * w + b,
    "a mean of something else": lambda x, w, b: (x - mean(x * 2)) / torch.sqrt(mean((x - mean(x)) ** 2) + 1e-3) * w,
    "a user's square": lambda x, w, b: x * torch.rsqrt(mean(square(x)) + 1e-3) * w,
    "a norm that is an integer's": lambda x, w, b: (x * torch.rsqrt(mean(x * x) + 1e-3)).to(torch.int32) * w,
}


@pytest.mark.parametrize("how", [*RMS, *LAYER, *OTHERS])
def test_ways_to_write_a_norm(how: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 9, WIDTH)
    prepared, converted = made(Written({**RMS, **LAYER, **OTHERS}[how]), (x,))
    steps = [line for part in fused_parts(converted).values() for line in "\n".join(part.plans).splitlines()]
    found = [line.split(" ")[0] for line in steps if "_norm " in line]
    inner = ["rms_norm"] if how == "a bias on RMS" else []  # a program has it without the bias
    assert found == (["rms_norm"] if how in RMS else ["layer_norm"] if how in LAYER else inner)
    with torch.no_grad():
        got, (want,) = converted(x), own(converted, x)
        assert_close(got, want)
        assert_close(got, prepared(x))


@pytest.mark.parametrize("norm", [MetaNorm, HuggingFaceNorm, BertNorm])
def test_what_a_norm_cannot_be(norm: type[nn.Module]) -> None:
    """Another weight's size, dtype or values at a later call: what the own forward says, or gives."""
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), norm(WIDTH), nn.Linear(WIDTH, 3))
    _, converted = made(net, (torch.randn(4, WIDTH),))
    x = torch.randn(5, WIDTH)
    with torch.no_grad():
        assert [len(part.plans) for part in fused_parts(converted).values()] == [1]
        before = converted(x)
        converted[1].weight.mul_(2)
        assert not torch.equal(converted(x), before)
        assert_close(converted(x), *own(converted, x))
        converted[1].weight.data = torch.full((1,), 2.0)  # broadcast
        assert_close(converted(x), *own(converted, x))
        if norm is not BertNorm:
            low = converted.to(torch.bfloat16)
            assert torch.equal(low(x.bfloat16()), *own(low, x.bfloat16()))


def test_a_weight_of_one_element_is_a_factor() -> None:
    """As in ScaleNorm: the layers around it run in programs, which take it for no norm of one channel."""
    torch.manual_seed(1)
    x = torch.randn(4, 9, WIDTH)
    net = Written(RMS["rsqrt"])
    net.weight = nn.Parameter(torch.tensor([0.7]))
    _, converted = made(nn.Sequential(net, nn.ReLU(), nn.Linear(5, 5)), (x,))
    with torch.no_grad():
        assert_close(converted(x), *own(converted, x))
    assert_ran(converted)
