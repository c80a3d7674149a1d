"""Quantization-aware training of a whole model, from float to a file and back: six calls.

prepare, calibrate, train, convert, save, load; a convolutional classifier with 8-bit inputs and 4-bit weights.
At real size: python examples/qat_start_to_finish.py --channels 64 --size 32 --steps 2000
"""

from __future__ import annotations

import argparse
import io

import torch
from shared import at_least, below
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk


def float_model(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 4),
    )


def images(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Stripes at one of four angles, under noise."""
    target = torch.randint(0, 4, (count,))
    angle = target[:, None, None] * (torch.pi / 4)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    stripes = torch.sin(1.3 * (x * angle.cos() + y * angle.sin()))[:, None].expand(-1, 3, -1, -1)
    return stripes + 4 * torch.randn(count, 3, size, size), target


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor, steps: int) -> None:
    model.train()
    for step in range(steps):
        batch = torch.arange(64).add(64 * step) % len(x)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), target[batch]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, target: Tensor) -> float:
    return (model.eval()(x).argmax(1) == target).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=at_least(1), default=16)
    parser.add_argument("--size", type=at_least(5), default=12)
    parser.add_argument("--steps", type=at_least(1), default=60)
    options = parser.parse_args()
    small = below(options, channels=16, size=12, steps=60)

    torch.manual_seed(0)
    x, target = images(1024, options.size)
    test = images(512, options.size)
    model = float_model(options.channels)
    train(model, torch.optim.Adam(model.parameters(), lr=3e-3), x, target, options.steps)

    config = qk.QConfig(
        weight=qk.QSpec(bits=4),
        input=qk.QSpec(bits=8, symmetric=False),
        rules=[("0", {"weight": {"bits": 8}})],  # the first layer, by its name, keeps 8 bits
    )
    prepared = qk.prepare(model, config)  # a copy; model stays as it is
    qk.calibrate(prepared, [x[i : i + 64] for i in range(0, 512, 64)])
    optimizer = torch.optim.AdamW(qk.parameter_groups(prepared, lr=1e-3, weight_decay=0.01))
    train(prepared, optimizer, x, target, options.steps)
    print(qk.report(prepared.eval(), x[:64], float_model=model))

    converted = qk.convert(prepared)  # integer layers, BatchNorm folded
    file = io.BytesIO()
    torch.save(converted.state_dict(), file)
    file.seek(0)
    loaded = qk.convert(prepared)  # a model of the same config; its own numbers are replaced
    for tensor in loaded.state_dict().values():
        tensor.zero_()
    loaded.load_state_dict(torch.load(file))

    accuracies = [accuracy(m, *test) for m in (model, prepared, converted)]
    print("accuracy: float {:.1%}, prepared {:.1%}, converted {:.1%}".format(*accuracies))
    with torch.no_grad():
        assert torch.equal(loaded(test[0]), converted(test[0])), "the file lost something"
        assert torch.equal(qk.exact(prepared)(test[0]), converted(test[0])), "exact evaluates what convert makes"
    assert small or accuracies[2] > accuracies[0] - 0.05


if __name__ == "__main__":
    main()
