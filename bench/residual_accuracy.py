"""Accuracy at 8 bits with and without ``QConfig(residual=QSpec(8))``: python bench/residual_accuracy.py [--record]

Small networks of residual blocks and of inverted residuals on Fashion-MNIST (Debian's dataset-fashion-mnist): trained
in fp32, then calibrated alone (PTQ), and trained further with quantizers for a fifth of the steps (QAT). Beside the
latter the same steps without quantizers, so that what training alone gains is not counted. Accuracy is the converted
model's, on the 10,000 test images.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]
from laps import record  # noqa: E402
from models import BasicBlock, InvertedResidual, conv_bn_relu6  # noqa: E402

import qkernels as qk  # noqa: E402
from qkernels.demo import FASHION_MNIST, Data, accuracy, load_idx, predict  # noqa: E402

BATCH, STEPS, SEEDS = 64, 500, (0, 1, 2)


class Small(nn.Module):
    """A stem, blocks, the mean of all pixels, a classifier."""

    def __init__(self, *blocks: nn.Module, channels: int) -> None:
        super().__init__()
        self.stem, self.blocks = conv_bn_relu6(1, 16, 3, 2), nn.Sequential(*blocks)
        self.last = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.stem(x)).mean((2, 3)))


def residual() -> nn.Module:
    """Three blocks: 78k parameters."""
    blocks, channels = list[nn.Module](), 16
    for outputs in (16, 32, 64):
        down = None
        if outputs != channels:
            down = nn.Sequential(nn.Conv2d(channels, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))
        blocks.append(BasicBlock(channels, outputs, 1 if down is None else 2, down))
        channels = outputs
    return Small(*blocks, channels=channels)


def inverted() -> nn.Module:
    """Six blocks, four of them with a sum: 50k parameters."""
    blocks, channels = list[nn.Module](), 16
    for outputs, stride in ((16, 1), (24, 2), (24, 1), (40, 2), (40, 1), (40, 1)):
        blocks.append(InvertedResidual(channels, outputs, 3, stride, 4))
        channels = outputs
    return Small(*blocks, channels=channels)


NETWORKS = {"residual": residual, "inverted residual": inverted}
CONFIGS = {
    "off": qk.presets["w8a8"],
    "on": qk.QConfig(qk.QSpec(8), qk.QSpec(8, symmetric=False), residual=qk.QSpec(8)),
}


def train(model: nn.Module, data: Data, steps: int, lr: float, seed: int) -> nn.Module:
    images, labels = data.train
    model.train()
    optimizer = torch.optim.SGD(qk.parameter_groups(model, lr=lr), momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        pick = torch.randint(len(labels), (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images[pick]), labels[pick]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def tested(model: nn.Module, data: Data) -> float:
    return accuracy(predict(model, data.test[0]), data.test[1])


def figures(make: Any, data: Data, seed: int) -> dict[str, float]:
    """Accuracies of one network and seed."""
    torch.manual_seed(seed)
    fp32 = train(make(), data, STEPS, 0.1, seed)
    found = {"fp32": tested(fp32, data)}
    further = seed + len(SEEDS)
    found["fp32, trained further"] = tested(train(copy.deepcopy(fp32), data, STEPS // 5, 0.01, further), data)
    for name, config in CONFIGS.items():
        prepared = qk.prepare(fp32, config)
        qk.calibrate(prepared, data.train[0][: 8 * BATCH].split(BATCH))
        found[f"PTQ, residual {name}"] = tested(qk.convert(prepared.eval()), data)
        trained = train(prepared, data, STEPS // 5, 0.01, further)
        found[f"QAT, residual {name}"] = tested(qk.convert(trained), data)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--record", action="store_true", help="add the rows to bench/results/<device>, to be committed")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data, rows = load_idx(FASHION_MNIST), []
    for network, make in NETWORKS.items():
        seeds = [figures(make, data, seed) for seed in SEEDS]
        for name in seeds[0]:
            values = [found[name] for found in seeds]
            means = f"{statistics.mean(values):.2%} ({', '.join(f'{value:.2%}' for value in values)})"
            print(f"{network:<18} {name:<22} {means}", flush=True)
            accuracies = {f"seed {seed}": value for seed, value in zip(SEEDS, values, strict=True)}
            rows.append({"op": "residual_accuracy", "case": f"{network}, {name}", "figures": accuracies})
    if args.record:
        print(record("residual_accuracy", rows))


if __name__ == "__main__":
    main()
