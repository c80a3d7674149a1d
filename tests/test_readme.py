"""What the README says is what the package does."""

from __future__ import annotations

import re

import torch
from conftest import ROOT

import qkernels as qk

README = (ROOT / "README.md").read_text()


def kernel_table() -> str:
    """op, device and kernels, best first, with ops that have the same kernels in one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for op in sorted({kernel.op for kernel in qk.kernels()}):
        names = [kernel.name for kernel in qk.kernels(op)]
        cpu = ", ".join(name.removeprefix("cpu_") for name in names if name.startswith("cpu_") or name == "reference")
        gpu = ", ".join(name for name in names if not name.startswith("cpu_"))
        rows.setdefault((cpu, gpu), []).append(f"`{op}`")
    lines = [f"| {', '.join(ops)} | {cpu} | {gpu} |" for (cpu, gpu), ops in rows.items()]
    return "\n".join(["| op | CPU | NVIDIA GPU |", "|---|---|---|", *lines])


def test_kernel_table() -> None:
    (found,) = re.findall(r"<!-- kernels: begin .*?-->\n(.*?)\n?<!-- kernels: end -->", README, re.DOTALL)
    assert found == kernel_table(), f"the table should be:\n{kernel_table()}"


def test_examples_run() -> None:
    """One after the other, as a reader would type them."""
    names: dict[str, object] = {}
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(example, names)
    w, scale = names["w"], names["scale"]
    assert isinstance(w, torch.Tensor)
    assert isinstance(scale, torch.Tensor)
    assert w.grad.abs().sum() > 0
    assert scale.grad.shape == (8, 1)
    assert isinstance(names["int8_model"][0], qk.nn.Int8Linear)
    assert names["int8_model"](names["x"]).shape == (32, 10)
    assert names["y"].shape == (32, 128)
    assert isinstance(names["model"][0], qk.nn.Int8TrainingLinear)
    assert names["z"].shape == (32, 256)


def test_public_names_of_the_readme_exist() -> None:
    for name in re.findall(r"\bqk\.([a-zA-Z_0-9]+)", README):
        assert hasattr(qk, name), f"README names qk.{name}"
