"""What the README's example does."""

from __future__ import annotations

import re

import torch
from conftest import ROOT

import qkernels as qk


def test_example() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    w, scale = names["w"], names["scale"]
    assert isinstance(w, torch.Tensor)
    assert isinstance(scale, torch.Tensor)
    assert w.grad.abs().sum() > 0
    assert scale.grad.shape == (8, 1)
    assert isinstance(names["int8_model"][0], qk.nn.Int8Linear)
    assert names["int8_model"](names["x"]).shape == (32, 10)
