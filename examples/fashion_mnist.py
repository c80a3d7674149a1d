"""A CNN on Fashion-MNIST at 8, 4, 3 and 2 bits: which way of quantizing costs how much accuracy.

Without training (PTQ), with quantization-aware training (QAT), with widths that fall while it trains, with levels that
are not uniform, and with some layers trained and the others rounded (hybrid). All of them start from the same float
model, and float and QAT train for the same number of steps. Fashion-MNIST comes with `apt-get install
dataset-fashion-mnist`; without it the example takes scikit-learn's digits. What more steps, more methods and three
seeds show: docs/accuracy.md. In a few seconds: python examples/fashion_mnist.py --steps 60 --test-images 1000
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
from shared import at_least, below
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.demo import FASHION_MNIST, Data, load_digits, load_idx

BATCH, LEARNING_RATE = 64, 0.05
WIDTHS = (8, 4, 3, 2)


def load() -> Data:
    if FASHION_MNIST.is_dir():
        return load_idx(FASHION_MNIST)
    print("Fashion-MNIST is not installed (apt-get install dataset-fashion-mnist): scikit-learn's digits instead")
    return load_digits(seed=0)


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.first = block(1, 16, stride=2 if pixels > 16 else 1)
        self.body = nn.Sequential(block(16, 32, 2), block(32, 32), block(32, 64, 2), block(64, 64))
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)).mean((2, 3)))


def config(bits: int, quantizer: str = "lsq") -> qk.QConfig:
    """Weights and inputs at ``bits``; the first and the last layer at 8, as is usual."""
    eight = {"weight": qk.QSpec(8), "input": {"bits": 8}}
    return qk.QConfig(
        weight=qk.QSpec(bits, quantizer=quantizer),
        input=qk.QSpec(bits, symmetric=False),
        rules=[("first.0", eight), ("last", eight)],
    )


def train(model: nn.Module, data: Data, steps: range, total: int, widths: qk.BitSchedule | None = None) -> nn.Module:
    """SGD over ``steps`` of a cosine schedule of ``total``; the batch of a step is the same for every model."""
    images, labels = data.train
    model.train()
    optimizer = torch.optim.SGD(qk.parameter_groups(model, lr=LEARNING_RATE), momentum=0.9, nesterov=True)
    for step in steps:
        pick = torch.randint(len(labels), (BATCH,), generator=torch.Generator().manual_seed(step))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / total)) / 2
        optimizer.zero_grad()
        F.cross_entropy(model(images[pick]), labels[pick]).backward()
        optimizer.step()
        if widths is not None:
            widths.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    images, labels = data.test
    model.eval()
    return torch.cat([model(x).argmax(1) for x in images.split(500)]).eq(labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=at_least(2), default=600, help="of training in all, for each model")
    parser.add_argument("--test-images", type=at_least(1), default=10_000)
    options = parser.parse_args()
    small = below(options, steps=60, test_images=1000)

    data = load()
    data.test = data.test[0][: options.test_images], data.test[1][: options.test_images]
    first, second = range(options.steps // 2), range(options.steps // 2, options.steps)
    calibration = list(data.train[0][: 8 * BATCH].split(BATCH))
    rows: list[tuple[str, str, float]] = []

    def row(name: str, bits: str, model: nn.Module) -> float:
        rows.append((name, bits, accuracy(model, data)))
        print(f"{name:<28} {bits:<12} {rows[-1][2]:7.2%}", flush=True)
        return rows[-1][2]

    def calibrated(model: nn.Module, how: qk.QConfig) -> nn.Module:
        made = qk.prepare(model, how)
        qk.calibrate(made, calibration)
        return made

    torch.manual_seed(0)
    start = train(Net(data.train[0].shape[-1]), data, first, options.steps)
    trained = train(copy.deepcopy(start), data, second, options.steps)
    fp32 = row("float", "32", trained)

    without, within = {}, {}
    for bits in WIDTHS:
        without[bits] = row("PTQ", str(bits), calibrated(trained, config(bits)))
        prepared = train(calibrated(start, config(bits)), data, second, options.steps)
        within[bits] = row("QAT", str(bits), prepared)
        integers = qk.convert(prepared)  # integer layers, BatchNorm folded
        assert small or abs(accuracy(integers, data) - within[bits]) < 0.005, (
            "the integer model is the one that was trained"
        )

    # Widths that follow the step: weights and inputs between the first and the last layer fall from 4 bits to 2.
    lowered = calibrated(start, config(4))
    falling = qk.schedules.progressive(4, 2, steps=len(second) // 2)
    schedule = qk.BitSchedule(lowered, {"body.*": falling})
    train(lowered, data, second, options.steps, schedule)
    assert set(schedule.bits.values()) == {2}
    falls = row("QAT, falling widths", "4, 3, 2", lowered)

    # Levels that are no multiples of a scale; such weights are for storage, not for integer products.
    for quantizer, bits in (("nf4", 4), ("kmeans", 3)):
        how = config(bits, quantizer)
        row(f"PTQ, {quantizer} weights", str(bits), calibrated(trained, how))
        levels = row(f"QAT, {quantizer} weights", str(bits), train(calibrated(start, how), data, second, options.steps))
        assert small or levels > fp32 - 0.05

    # Widths by sensitivity, 2.5 bits in the mean; layers that hold 80 % of the error are trained, the others rounded.
    found = qk.hybrid(start, calibration, 2.5, cost="bits", config=qk.QConfig(input=qk.QSpec(8, symmetric=False)))
    print(found)
    rounded = row("PTQ, mixed widths", f"W{found.plan.cost:.2f} A8", calibrated(trained, found.plan.config))
    train(found.model, data, second, options.steps)
    hybrid = row("hybrid", f"W{found.plan.cost:.2f} A8", found.model)

    assert small or abs(within[8] - fp32) < 0.02, "8 bits cost nothing"
    assert small or within[2] > without[2] + 0.1, "at 2 bits training is what makes a model usable"
    assert small or falls > without[2] + 0.1
    assert small or hybrid > rounded - 0.02


if __name__ == "__main__":
    main()
