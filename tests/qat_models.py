"""Models for quantization-aware training, and how a converted one compares with the prepared one."""

import math

import torch
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.nn import FakeQuantize


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, groups=4)
        self.norm2 = nn.BatchNorm2d(12, affine=False)
        self.fc = nn.Linear(12 * 4 * 4, 5)
        randomize(self)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.fc(x.flatten(1))


def randomize(model: nn.Module) -> None:
    """BatchNorm statistics of a trained model, with gammas of both signs."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                with torch.no_grad():
                    norm.weight.normal_()
                    norm.bias.normal_()


def images(n: int = 16) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8) + 0.3


def snapshot(model: nn.Module):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return state, [(name, type(module), module.training) for name, module in model.named_modules()]


def assert_unchanged(model: nn.Module, before) -> None:
    state, modules = snapshot(model)
    assert modules == before[1]
    assert list(state) == list(before[0])
    for key, value in state.items():
        assert torch.equal(value.nan_to_num(7), before[0][key].nan_to_num(7)), key


def assert_same_numbers(
    converted: nn.Module, prepared: nn.Module, x: torch.Tensor, tolerance: float = 1e-5, flips: float = 0.0
) -> None:
    """Equal to ``tolerance`` of the largest output; where layers follow each other, the share ``flips`` of the outputs
    may see a code of a later layer fall on the other side of a tie, a step of 1/255 of its input's range."""
    prepared.eval()
    with torch.no_grad():
        expected, y = prepared(x), converted(x)
    assert y.dtype == expected.dtype
    largest = max(1.0, float(expected.abs().max()))
    error = (y.double() - expected.double()).abs() / largest
    assert error.isfinite().all()
    assert (error > tolerance).double().mean() <= flips
    assert error.max() <= max(tolerance, 0.01 * bool(flips))


def one_layer(kind: str) -> tuple[nn.Module, torch.Tensor]:
    return {
        "linear": lambda: (nn.Linear(33, 7), torch.randn(4, 5, 33)),
        "linear without bias": lambda: (nn.Linear(16, 8, bias=False), torch.randn(9, 16)),
        "conv": lambda: (nn.Conv2d(3, 5, 3), images()),
        "conv groups": lambda: (nn.Conv2d(6, 9, (3, 2), (2, 1), (1, 2), groups=3), torch.randn(4, 6, 9, 7)),
        "conv depthwise dilated": lambda: (
            nn.Conv2d(4, 8, 3, dilation=2, padding=2, groups=4),
            torch.randn(3, 4, 9, 9),
        ),
        "conv same": lambda: (nn.Conv2d(3, 4, 5, padding="same"), images()),
        "conv reflect": lambda: (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), images()),
        "conv unbatched": lambda: (nn.Conv2d(3, 4, 3), images()[0]),
    }[kind]()


def sqnr(x, y):
    return 10 * math.log10(float(x.double().square().sum() / (x - y).double().square().sum()))


def config(bits, quantizer="lsq"):
    return qk.QConfig(qk.QSpec(bits, quantizer=quantizer), qk.QSpec(bits, symmetric=False, quantizer=quantizer))


def quantizers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantize)}
