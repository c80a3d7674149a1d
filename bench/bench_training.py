"""A QAT training step (W8A8, learned scales) against the fp32 step of the same model, ours and others' side by side."""

from __future__ import annotations

import copy
import ctypes
import warnings
from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from mobilenet import MobileNet
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk

Step = Callable[[], Tensor]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


@pytest.fixture(scope="module", autouse=True)
def _memory_kept() -> None:
    """Free memory stays with the process, as the allocators of torch's tuning guide keep it.

    Otherwise glibc hands it back after each step and each step's page faults are paid anew: which model pays for more
    of them depends on the calls before, by up to half of a step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class Block(nn.Module):
    """The basic block of CIFAR ResNets (arXiv 1512.03385, section 4.2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Sequential):
    """ResNet-8: three stages of one block, 16, 32 and 64 channels."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP, with every matmul of a weight in an nn.Linear."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ResNet18(nn.Sequential):
    """ResNet-18 (arXiv 1512.03385, table 1) for ten classes."""

    def __init__(self) -> None:
        stages = ((64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1))
        super().__init__(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
            *[Block(*stage) for stage in (*stages, (256, 512, 2), (512, 512, 1))],
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(512, 512, 2, batch_first=True), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Words(nn.Sequential):
    """A table of 30,000 words in front of a small network."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(30_000, 256), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def transformer(blocks: int) -> nn.Module:
    return nn.Sequential(*[TransformerBlock(256, 4) for _ in range(blocks)], nn.Linear(256, 10))


def words() -> Tensor:
    return torch.randint(30_000, (32, 128))


# name -> the model, its input, and whether torch.ao and eager formulas are timed too
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], bool]] = {
    "resnet-8, batch 32 of 3x32x32": (ResNet, lambda: torch.randn(32, 3, 32, 32), True),
    "resnet-18, batch 8 of 3x112x112": (ResNet18, lambda: torch.randn(8, 3, 112, 112), False),
    "mobilenet-v2, batch 16 of 3x64x64": (MobileNet, lambda: torch.randn(16, 3, 64, 64), False),
    "2-layer transformer, width 256, batch 8 of 128": (lambda: transformer(2), lambda: torch.randn(8, 128, 256), True),
    "4-layer transformer, width 256, batch 8 of 128": (lambda: transformer(4), lambda: torch.randn(8, 128, 256), False),
    "lstm 2x512, batch 16 of 128 steps": (Lstm, lambda: torch.randn(16, 128, 512), False),
    "embedding 30000x256, batch 32 of 128": (Words, words, False),
}


class Fake(nn.Module):
    """A layer with a fake quantizer on its input and one on its weight, as QAT tools build it."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, make: Callable[[Tensor | None], nn.Module]) -> None:
        super().__init__()
        self.layer, self.input, self.weight = layer, make(None), make(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.layer, {"weight": self.weight(self.layer.weight)}, (self.input(x),))


class EagerLsq(nn.Module):
    def __init__(self, weight: Tensor | None) -> None:
        super().__init__()
        shape = [1] if weight is None else [weight.shape[0], *[1] * (weight.dim() - 1)]
        self.scale = nn.Parameter(torch.full(shape, 0.02))
        self.factor = 0.01

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale * self.factor + (self.scale - self.scale * self.factor).detach()
        return peers.lsq(x, scale, -128, 127)


def torch_ao(fake_quantize: Any, **options: Any) -> Callable[[Tensor | None], nn.Module]:
    """torch.ao's module for an input (per tensor) or a weight (per channel)."""
    from torch.ao.quantization import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver

    def make(weight: Tensor | None) -> nn.Module:
        if weight is None:
            return fake_quantize(
                observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8, **options
            )
        return fake_quantize(
            observer=MovingAveragePerChannelMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric, ch_axis=0, **options,
        )  # fmt: skip

    return make


def torch_ao_learnable(weight: Tensor | None) -> nn.Module:
    from torch.ao.quantization import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

    if weight is None:
        module = _LearnableFakeQuantize(
            MovingAverageMinMaxObserver, -128, 127, scale=0.02, zero_point=0.0, use_grad_scaling=True, dtype=torch.qint8
        )
    else:
        module = _LearnableFakeQuantize(
            MovingAveragePerChannelMinMaxObserver, -128, 127, scale=0.02, zero_point=0.0, channel_len=weight.shape[0],
            use_grad_scaling=True, dtype=torch.qint8, qscheme=torch.per_channel_symmetric, ch_axis=0,
        )  # fmt: skip
    return module.enable_param_learning()


def with_fakes(model: nn.Module, make: Callable[[Tensor | None], nn.Module]) -> nn.Module:
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Fake(layer, make))
    return model


def step_of(model: nn.Module, x: Tensor, kind: type[torch.optim.Optimizer] = torch.optim.SGD) -> Step:
    """Forward, backward and an update; returns the loss."""
    model.train()
    count = model(x).shape[:-1].numel()  # modules that size themselves by their first input do so before the optimizer
    target = torch.randint(0, 10, (count,))
    momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=1e-4, **momentum)  # type: ignore[call-arg]

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).reshape(-1, 10), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def fused() -> Any:
    from torch.ao.quantization import FusedMovingAvgObsFakeQuantize

    return torch_ao(FusedMovingAvgObsFakeQuantize)


def unfused() -> Any:
    from torch.ao.quantization import FakeQuantize

    return torch_ao(FakeQuantize)


OTHERS: dict[str, Callable[[], Callable[[Tensor | None], nn.Module]]] = {
    "torch.ao FakeQuantize": unfused,
    "torch.ao fused": fused,
    "torch.ao learnable": lambda: torch_ao_learnable,
    "eager LSQ": lambda: EagerLsq,
}


@pytest.mark.parametrize("name", MODELS)
def test_training_step(compare: Callable[..., None], overheads: Callable[[str], None], name: str) -> None:
    """Ratios are to our QAT step, as everywhere; the printed overheads are to the fp32 step."""
    make, inputs, with_others = MODELS[name]
    model, x = make(), inputs()
    prepared = qk.prepare(model)
    qk.calibrate(prepared, [x])

    def other(build: Callable[[], Callable[[Tensor | None], nn.Module]]) -> Step:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao's deprecation notes
            torch.manual_seed(0)
            return step_of(with_fakes(model, build()), x)

    torch.manual_seed(0)
    fp32 = step_of(copy.deepcopy(model), x)
    loss = fp32()
    torch.manual_seed(0)
    others = OTHERS if with_others else {}
    competitors = {label: peers.find(label, lambda build=build: other(build)) for label, build in others.items()}
    # The losses agree to what 8 bits allow; scales learned from 0.02 clip more than calibrated ones.
    torch.manual_seed(0)
    compare(step_of(prepared, x), {"fp32": fp32, **competitors}, loss, tolerance=0.1, peer_tolerance=0.5, blocks=6)
    overheads("fp32")


def test_training_step_of_a_table_under_adam(compare: Callable[..., None], overheads: Callable[[str], None]) -> None:
    """What embeddings are trained with: the optimizer's own work on the table is then most of the step."""
    model, x = Words(), words()
    prepared = qk.prepare(model)
    qk.calibrate(prepared, [x])
    torch.manual_seed(0)
    fp32 = step_of(copy.deepcopy(model), x, torch.optim.Adam)
    loss = fp32()
    torch.manual_seed(0)
    compare(step_of(prepared, x, torch.optim.Adam), {"fp32": fp32}, loss, tolerance=0.1, blocks=6)
    overheads("fp32")
