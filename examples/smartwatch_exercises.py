"""Recognizing movements on a watch: the small CNN of keyword spotting, on sequences of another sensor.

seglearn ships recordings of a smartwatch (arXiv 1802.01489): ten people, seven exercises of the shoulder, acceleration
and rotation 50 times a second. A depthwise separable 1-D CNN, as in "Hello Edge" (arXiv 1711.07128), names the exercise
in a window of 2.56 s; three people are held out. Weights and activations at 8, 4, 3 and 2 bits, the first and the last
layer at 8; quantized after training (PTQ) and in training (QAT); then integers, a file and back. Takes a minute.
At real size: python examples/smartwatch_exercises.py --channels 128 --steps 3000
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import torch
from shared import at_least, below, bytes_of, microseconds, study
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk

BITS = (8, 4, 3, 2)
WINDOW = 128
HELD_OUT = 3  # of ten people


def recordings() -> tuple[list[Tensor], list[int], list[int]]:
    """140 recordings [samples, 6], the exercise and the person of each."""
    found = importlib.util.find_spec("seglearn")  # located, not imported: its import needs pandas
    if found is None or found.origin is None:
        raise SystemExit("this example needs seglearn; install with: pip install 'qkernels[examples]'")
    import numpy

    data = numpy.load(Path(found.origin).parent / "data" / "watch_dataset.npy", allow_pickle=True).item()
    signals = [torch.from_numpy(signal).float() for signal in data["X"]]
    return signals, data["y"].tolist(), data["subject"].tolist()


def windows(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """For training and for testing: x [N, 6, WINDOW], overlapping by half, and exercises [N]. No person is in both."""
    signals, exercises, people = recordings()
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed)) + 1
    held_out = set(order[:HELD_OUT].tolist())
    parts: list[tuple[list[Tensor], list[Tensor]]] = [([], []), ([], [])]
    for signal, exercise, person in zip(signals, exercises, people, strict=True):
        x, y = parts[person in held_out]
        cut = signal.unfold(0, WINDOW, WINDOW // 2)
        x.append(cut)
        y.append(torch.full((len(cut),), exercise))
    train, test = ((torch.cat(x), torch.cat(y)) for x, y in parts)
    mean, deviation = train[0].mean((0, 2), keepdim=True), train[0].std((0, 2), keepdim=True)
    return ((train[0] - mean) / deviation, train[1]), ((test[0] - mean) / deviation, test[1])


def float_model(channels: int) -> nn.Module:
    def conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        layer = nn.Conv1d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
        return [layer, nn.BatchNorm1d(outputs), nn.ReLU()]

    separable = [
        layer
        for stride in (2, 1, 2)
        for layer in (*conv(channels, channels, 5, stride, groups=channels), *conv(channels, channels, 1))
    ]
    pool = [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, 7)]
    return nn.Sequential(*conv(6, channels, 9, stride=2), *separable, *pool)


def config(model: nn.Sequential, bits: int) -> qk.QConfig:
    ends = {"weight": {"bits": 8}, "input": {"bits": 8}}
    rules = [("0", ends), (str(len(model) - 1), ends)]
    return qk.QConfig(qk.QSpec(bits), qk.QSpec(bits, symmetric=False), rules=rules)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float, seed: int) -> None:
    model.train()
    optimizer = torch.optim.AdamW(qk.parameter_groups(model, lr=lr, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model.eval()(part) for part in x.split(256)])


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (logits(model, x).argmax(1) == y).float().mean().item()


def main() -> None:
    parser = study(__doc__, 300, "of the float model; all then take half as many more", least_steps=2)
    parser.add_argument("--channels", type=at_least(1), default=48)
    options = parser.parse_args()
    if options.quick:
        options.channels, options.steps = 16, 10
    small = below(options, channels=48, steps=300)

    torch.manual_seed(options.seed)
    fit, test = windows(options.seed)
    model = float_model(options.channels)
    train(model, *fit, options.steps, 3e-3, options.seed)
    calibration = fit[0][torch.randperm(len(fit[0]))[:512]].split(64)
    score: dict[str, float] = {}
    converted: dict[int, nn.Module] = {}
    for bits in BITS:
        prepared = qk.prepare(model, config(model, bits))
        qk.calibrate(prepared, calibration)
        score[f"PTQ {bits}"] = accuracy(qk.convert(prepared), *test)
        train(prepared, *fit, options.steps // 2, 1e-3, options.seed + 1)
        converted[bits] = qk.convert(prepared)
        score[f"QAT {bits}"] = accuracy(converted[bits], *test)
        assert torch.equal(logits(converted[bits], test[0]), logits(qk.exact(prepared), test[0])), "other integers"
        simulated, real = logits(prepared, test[0]).argmax(1), logits(converted[bits], test[0]).argmax(1)
        assert small or (simulated == real).float().mean() > 0.99, "fake quantization promised another model"
    train(model, *fit, options.steps // 2, 1e-3, options.seed + 1)  # as many steps as the quantized models
    score["float"] = accuracy(model, *test)

    size, micros = bytes_of(model), microseconds(model, test[0][:1])
    print(f"accuracy on {len(test[1])} windows of {HELD_OUT} people that no model has seen")
    print("bits     PTQ    QAT       kB  µs a window")
    print(f"float      {score['float']:11.1%} {size / 1e3:8.1f} {micros:12.0f}")
    for bits in BITS:
        size, micros = bytes_of(converted[bits]), microseconds(converted[bits], test[0][:1])
        print(f"{bits:<6} {score[f'PTQ {bits}']:.1%}  {score[f'QAT {bits}']:.1%} {size / 1e3:8.1f} {micros:12.0f}")

    with tempfile.TemporaryDirectory() as folder:
        qk.save(converted[4], Path(folder) / "model.safetensors")
        loaded = qk.load(Path(folder) / "model.safetensors", float_model(options.channels))
    assert torch.equal(logits(loaded, test[0]), logits(converted[4], test[0])), "the file lost something"
    if small:
        return
    assert abs(score["PTQ 8"] - score["float"]) < 0.05, "8 bits need no training"
    assert score["QAT 3"] >= score["PTQ 3"] - 0.01, "3 bits lose nothing by training"
    assert score["QAT 2"] > score["PTQ 2"] + 0.1, "2 bits need it"


if __name__ == "__main__":
    main()
