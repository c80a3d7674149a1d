"""The tables of docs/layers.md, found by trying each QAT class: prepared, trained, converted and called.

python docs/layers.py     # writes them into the page
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qkernels as qk
from qkernels.nn import QATLayer
from qkernels.qat.convert import BURNT_IN

# By the float class: a layer and the arguments of a call.
SAMPLES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "Linear": (lambda: nn.Linear(32, 8), lambda: (torch.randn(4, 32),)),
    "Conv1d": (lambda: nn.Conv1d(4, 8, 3), lambda: (torch.randn(2, 4, 8),)),
    "Conv2d": (lambda: nn.Conv2d(4, 8, 3), lambda: (torch.randn(2, 4, 8, 8),)),
    "Conv3d": (lambda: nn.Conv3d(4, 8, 3), lambda: (torch.randn(2, 4, 4, 4, 4),)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 8, 3), lambda: (torch.randn(2, 4, 8),)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 8, 3), lambda: (torch.randn(2, 4, 8, 8),)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 8, 3), lambda: (torch.randn(2, 4, 4, 4, 4),)),
    "Bilinear": (lambda: nn.Bilinear(8, 8, 4), lambda: (torch.randn(4, 8), torch.randn(4, 8))),
    "Embedding": (lambda: nn.Embedding(16, 32), lambda: (torch.arange(4),)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(16, 32), lambda: (torch.arange(4)[None],)),
    "LSTM": (lambda: nn.LSTM(8, 8), lambda: (torch.randn(5, 2, 8),)),
    "GRU": (lambda: nn.GRU(8, 8), lambda: (torch.randn(5, 2, 8),)),
    "RNN": (lambda: nn.RNN(8, 8), lambda: (torch.randn(5, 2, 8),)),
    "LSTMCell": (lambda: nn.LSTMCell(8, 8), lambda: (torch.randn(2, 8),)),
    "GRUCell": (lambda: nn.GRUCell(8, 8), lambda: (torch.randn(2, 8),)),
    "RNNCell": (lambda: nn.RNNCell(8, 8), lambda: (torch.randn(2, 8),)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(32, 2), lambda: (torch.randn(3, 2, 32),) * 3),
    "NonDynamicallyQuantizableLinear": (lambda: nn.MultiheadAttention(32, 2), lambda: (torch.randn(3, 2, 32),) * 3),
    "MatMul": (qk.nn.MatMul, lambda: (torch.randn(4, 8), torch.randn(8, 4))),
    "ScaledDotProductAttention": (qk.nn.ScaledDotProductAttention, lambda: (torch.randn(1, 2, 4, 8),) * 3),
    "Add": (qk.nn.Add, lambda: (torch.randn(4, 8), torch.randn(4, 8))),
    "Cat": (qk.nn.Cat, lambda: ([torch.randn(4, 8), torch.randn(4, 8)],)),
    "FloatFunctional": (lambda: Sum(), lambda: (torch.randn(4, 8), torch.randn(4, 8))),
}
LABELS = {
    "NonDynamicallyQuantizableLinear": "`out_proj` of MultiheadAttention",
    "MatMul": "`qk.nn.MatMul`",
    "ScaledDotProductAttention": "`qk.nn.ScaledDotProductAttention`",
    "Add": "`qk.nn.Add`",
    "Cat": "`qk.nn.Cat`",
    "FloatFunctional": "FloatFunctional of torch.ao",
}


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.functional = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.functional.add(left, right)


class Calls(TorchDispatchMode):
    """The ops of qkernels that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "qkernels":
            self.ops[func._schema.name.partition("::")[2]] = None
        return func(*args, **(kwargs or {}))


def tried(kind: type[QATLayer], bits: int) -> tuple[QATLayer, nn.Module, list[str], list[str]]:
    """A layer of the class, what it converts to, and the ops of a training step and of the converted layer."""
    make, arguments = SAMPLES[kind.float_class.__name__]
    x = arguments()
    # A default config selects no sum of a residual connection, and then finds nothing in some of the samples.
    prepared = qk.prepare(make(), qk.QConfig(qk.QSpec(bits), residual=qk.QSpec()))
    name, layer = next((name, module) for name, module in prepared.named_modules() if isinstance(module, kind))
    qk.calibrate(prepared, [x])
    with Calls() as training:
        y = prepared.train()(*x)
        while not isinstance(y, Tensor):
            y = y[0]
        if y.requires_grad:
            y.sum().backward()
    converted = qk.convert(prepared)
    with Calls() as after, torch.no_grad():
        converted(*x)
    return layer, converted.get_submodule(name), list(training.ops), list(after.ops)


def listed(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def label(kind: type[QATLayer]) -> str:
    name = kind.float_class.__name__
    return LABELS.get(name, name)


def tensors(layer: QATLayer) -> tuple[str, str]:
    """The kinds of tensors that a default config quantizes, and those that one has to ask for."""
    roles = type(layer).roles(layer)
    given = [roles[name].kind for name, _, _ in layer.own_quantizers()]
    default = [kind for kind in given if kind != "residual"]
    return listed(default), listed([role.kind for role in roles.values() if role.kind not in default])


def becomes(converted: nn.Module, ops: list[str]) -> str:
    if hasattr(converted, BURNT_IN):
        return "float, weights rounded"
    if isinstance(converted, QATLayer):
        return "as prepared"
    return f"`{type(converted).__name__}`: {listed(ops)}"


def layers() -> tuple[str, list[str]]:
    """The table of layers, and the ops in it and in training."""
    lines = [
        "| layer | quantized | when asked for | converted, weights of 5 to 8 bits | of 2 to 4 bits |",
        "|---|---|---|---|---|",
    ]
    called: list[str] = []
    for kind in sorted(qk.nn.QAT_CLASSES, key=lambda kind: list(SAMPLES).index(kind.float_class.__name__)):
        cells = []
        for bits in (8, 4):
            layer, converted, training, after = tried(kind, bits)
            cells.append(becomes(converted, after))
            called += training + after
        lines.append(f"| {' | '.join((label(kind), *tensors(layer), *cells))} |")
    return "\n".join(lines), list(dict.fromkeys(called))


def kernels(ops: list[str]) -> str:
    """The table of the kernels of these ops. Each has a reference beside them, for every device."""
    lines = ["| op | CPU | CUDA | Triton |", "|---|---|---|---|"]
    for op in ops:
        names = [kernel.name for kernel in qk.kernels(op)]
        paths = ", ".join(name.removeprefix("cpu_") for name in names if name.startswith("cpu_"))
        lines.append(f"| {op} | {paths} | {' | '.join('yes' if n in names else '–' for n in ('cuda', 'triton'))} |")
    return "\n".join(lines)


def tables() -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about layers that stay in float beside the one that is tried
        table, ops = layers()
    return [table, kernels(ops)]


def write(page: Path) -> None:
    """Puts the tables in the place of those with the same first line."""
    text = page.read_text()
    for table in tables():
        first = table.partition("\n")[0]
        text = re.sub(re.escape(first) + r"(\n\|.*)*", lambda found, new=table: new, text)
    page.write_text(text)


if __name__ == "__main__":
    write(Path(__file__).with_suffix(".md"))
