"""Resizing and pixel shuffles between integer layers: in one program, with the numbers of the prepared model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk


class Net(nn.Module):
    """Half the size, a quarter, and back as ``middle(small, large, x)`` says."""

    def __init__(self, middle: Any, channels: int = 16) -> None:
        super().__init__()
        self.large, self.small = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)
        self.last, self.middle = nn.Conv2d(channels, 8, 3), middle

    def forward(self, x: Tensor) -> Tensor:
        large = self.large(x).relu()
        return self.last(self.middle(self.small(large).relu(), large, x)).relu()


class Upsampled(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.up = nn.Upsample(**options)

    def forward(self, small: Tensor, large: Tensor, x: Tensor) -> Tensor:
        return self.up(small)


CASES: dict[str, tuple[Any, int, list[str]]] = {
    "size": (lambda small, large, x: F.interpolate(small, (11, 9)), 16, ["upsample"]),
    "smaller": (lambda small, large, x: F.interpolate(small, size=[3, 5]), 16, ["upsample"]),
    "module": (Upsampled(size=(13, 17)), 16, ["upsample"]),
    "bilinear module": (Upsampled(size=12, mode="bilinear", align_corners=True), 16, ["resize"]),
    "shape": (lambda small, large, x: large + F.interpolate(small, size=large.shape[-2:]), 16, ["upsample"]),
    "sizes": (
        lambda small, large, x: F.interpolate(small, size=(large.size(2), large.shape[-1]), mode="nearest"),
        16,
        ["upsample"],
    ),
    "bilinear": (
        lambda small, large, x: large + F.interpolate(small, large.size()[2:], mode="bilinear", align_corners=False),
        16,
        ["resize"],
    ),
    "input": (lambda small, large, x: F.interpolate(small, x.shape[2:], mode="bilinear"), 16, ["resize"]),
    "pixel shuffle": (lambda small, large, x: F.pixel_shuffle(small, 2), 4, ["pixel_shuffle"]),
    "both": (
        lambda small, large, x: torch.cat([F.pixel_unshuffle(large, 2), small], 1),
        80,
        ["pixel_unshuffle"],
    ),
}


def steps_of(model: Any) -> list[str]:
    (plan,) = model.forward.plans
    return [line.partition(" ")[0] for line in plan.splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_one_program(name: str) -> None:
    """For the size that was traced and for others; nearest pixels and shuffles keep the codes of their input."""
    middle, channels, wanted = CASES[name]
    torch.manual_seed(0)
    prepared = qk.prepare(Net(middle, channels))
    qk.calibrate(prepared, [torch.randn(2, 3, 24, 32)])
    converted = qk.convert(prepared.eval())
    steps = steps_of(converted)
    assert [step for step in steps if step in ("upsample", "resize", "pixel_shuffle", "pixel_unshuffle")] == wanted
    for x in (torch.randn(2, 3, 24, 32), torch.randn(1, 3, 40, 48), torch.randn(2, 3, 32, 24)):
        with torch.no_grad():
            got, own = converted(x), prepared(x)
        assert converted.forward.refused is None
        assert got.shape == own.shape
        # A sum that differs in its last bit may flip a code at a near tie.
        assert float((got - own).abs().max()) <= 0.02 * float(own.abs().max())
        assert float((got - own).abs().quantile(0.9)) <= 1e-5 * float(own.abs().max())
    if wanted[0] != "resize" and name not in ("shape", "both"):
        assert "dequantize" not in steps


@pytest.mark.parametrize(
    "middle",
    [
        lambda small, large, x: F.interpolate(small, scale_factor=1.5),
        lambda small, large, x: F.interpolate(small, size=(large.shape[3], large.shape[2])),
        lambda small, large, x: F.interpolate(small, size=(9, 9), mode="bicubic"),
        lambda small, large, x: F.interpolate(small, size=(9, 9), mode="bilinear", antialias=True),
    ],
)
def test_what_no_program_runs(middle: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    prepared = qk.prepare(Net(middle))
    qk.calibrate(prepared, [torch.randn(2, 3, 24, 32)])
    converted = qk.convert(prepared.eval())
    assert not any(step in plan for plan in converted.forward.plans for step in ("upsample", "resize"))
    x = torch.randn(2, 3, 24, 32)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), prepared(x), rtol=1e-3, atol=2e-2)
