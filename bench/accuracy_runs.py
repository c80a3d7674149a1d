"""What `python -m qkernels bench accuracy` trains: two small CNNs on Fashion-MNIST, in float, quantized, in both ways.

Every run of a seed sees the same batches at the same learning rates. The float model trains for all steps; QAT starts
from the float model of half the steps and trains for the other half; quantization without training takes the float
model of all steps. So all have been trained for as long.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.demo import Data

STEPS, BATCH, LEARNING_RATE = 800, 64, 0.05
SHORT_STEPS, SHORT_LEARNING_RATE = 100, 0.005
CALIBRATION_BATCHES = 16


def block(inputs: int, outputs: int, stride: int = 1, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def separable(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A depthwise and a pointwise convolution, as in MobileNet (arXiv 1704.04861)."""
    return nn.Sequential(block(inputs, inputs, stride, groups=inputs), block(inputs, outputs, kernel=1))


class Net(nn.Module):
    """Five layers between the image and ten classes: 3×3 convolutions (69k weights), or separable ones (9k)."""

    def __init__(self, depthwise: bool) -> None:
        super().__init__()
        make: Callable[..., nn.Sequential] = separable if depthwise else block
        self.first = block(1, 16, stride=2)
        self.body = nn.Sequential(make(16, 32, 2), make(32, 32), make(32, 64, 2), make(64, 64))
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)).mean((2, 3)))


def config(weight: int, given: int, *, quantizer: str = "lsq", ends: bool = True) -> qk.QConfig:
    """Weights and inputs at so many bits; with ``ends`` the first and the last layer at 8, as is usual."""
    body = qk.QConfig(qk.QSpec(weight, quantizer=quantizer), qk.QSpec(given, symmetric=False))
    if not ends:
        return body
    eight = {"weight": qk.QSpec(8), "input": {"bits": 8}}
    return qk.QConfig(body.weight, body.input, rules=[("first.0", eight), ("last", eight)])


@dataclass(frozen=True)
class Qat:
    """How a run trains beside the loss of the task; each function gets the prepared model and the number of steps."""

    penalty: Callable[[nn.Module, int, Study], qk.QuantLoss] | None = None
    others: Sequence[Callable[[nn.Module, int], Any]] = ()
    """What is to ``step`` after the optimizer: a BitSchedule, an OscillationTracker."""


PLAIN = Qat()


def train(
    model: nn.Module,
    data: Data,
    seed: int,
    steps: range,
    rate: Callable[[int], float],
    penalty: qk.QuantLoss | None = None,
    others: Sequence[Any] = (),
) -> None:
    """SGD over ``steps``; a step's batch depends on the seed and its number alone."""
    images, labels = data.train
    model.train()
    optimizer = torch.optim.SGD(qk.parameter_groups(model, lr=LEARNING_RATE), momentum=0.9, nesterov=True, fused=True)
    for step in steps:
        pick = torch.randint(len(labels), (BATCH,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        x, y = images[pick], labels[pick]
        output = model(x)
        loss = F.cross_entropy(output, y)
        if penalty is not None:
            loss = loss + penalty(x, output)
            penalty.step()
        loss.backward()
        optimizer.step()
        for other in others:
            other.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """In percent, over the test images."""
    images, labels = data.test
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return 100 * right / len(labels)


@dataclass
class Study:
    """One network and one seed: float models, made when they are first wanted, and what is made of them."""

    data: Data
    depthwise: bool
    seed: int
    steps: int = STEPS
    plans: dict[str, qk.qat.Assignment] = field(default_factory=dict)

    def rate(self, step: int) -> float:
        return LEARNING_RATE * (1 + math.cos(math.pi * step / self.steps)) / 2

    @property
    def second_half(self) -> range:
        return range(self.steps // 2, self.steps)

    @cached_property
    def half(self) -> nn.Module:
        torch.manual_seed(self.seed)
        model = Net(self.depthwise).to(memory_format=torch.channels_last)
        train(model, self.data, self.seed, range(self.steps // 2), self.rate)
        return model

    @cached_property
    def full(self) -> nn.Module:
        model = copy.deepcopy(self.half)
        train(model, self.data, self.seed, self.second_half, self.rate)
        return model

    @cached_property
    def calibration(self) -> list[Tensor]:
        pick = torch.randperm(len(self.data.train[1]), generator=torch.Generator().manual_seed(self.seed))
        return list(self.data.train[0][pick[: CALIBRATION_BATCHES * BATCH]].split(BATCH))

    def prepared(self, model: nn.Module, how: qk.QConfig) -> nn.Module:
        torch.manual_seed(self.seed)
        made = qk.prepare(model, how)
        qk.calibrate(made, self.calibration)
        return made

    def post_training(self, how: qk.QConfig, rounding: Callable[..., object] | None = None) -> float:
        made = self.prepared(self.full, how)
        if rounding is not None:
            rounding(made, self.calibration)
        return accuracy(made, self.data)

    def trained(self, made: nn.Module, qat: Qat = PLAIN) -> float:
        """The accuracy of a prepared model after the second half of the steps."""
        count = len(self.second_half)
        penalty = None if qat.penalty is None else qat.penalty(made, count, self)
        others = [make(made, count) for make in qat.others]
        train(made, self.data, self.seed, self.second_half, self.rate, penalty, others)
        return accuracy(made, self.data)

    def qat(self, how: qk.QConfig, qat: Qat = PLAIN) -> float:
        return self.trained(self.prepared(self.half, how), qat)

    def converted(self, how: qk.QConfig) -> tuple[float, float]:
        """The accuracy of the trained model and of what ``convert`` makes of it."""
        made = self.prepared(self.half, how)
        return self.trained(made), accuracy(qk.convert(made), self.data)

    def short(self, made: nn.Module, others: Sequence[Any] = (), penalty: qk.QuantLoss | None = None) -> float:
        """The accuracy after a short training behind all steps, at a tenth of the first learning rate."""
        steps = range(self.steps, self.steps + min(SHORT_STEPS, self.steps))
        train(
            made,
            self.data,
            self.seed,
            steps,
            lambda step: SHORT_LEARNING_RATE * (1 + math.cos(math.pi * (step - steps.start) / len(steps))) / 2,
            penalty,
            others,
        )
        return accuracy(made, self.data)

    def plan(self, start: str, cost: str) -> qk.qat.Assignment:
        """The widths that cost what 3 bits everywhere cost, for the model of half or of all steps."""
        key = f"{start} {cost}"
        if key not in self.plans:
            given = 3 if cost == "bitops" else 8
            found = qk.sensitivity(getattr(self, start), self.calibration[:4], config=config(8, given, ends=False))
            budget = qk.assign(found, math.inf, cost=cost).uniform[3][0]
            self.plans[key] = qk.assign(found, budget, cost=cost)
        return self.plans[key]
