"""Models in files of qk.save, and what a loaded one has to be like."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from converting import SameConv
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import qkernels as qk
from qkernels.nn import PerGroup, PerToken
from qkernels.qat import QConfig, QSpec


def description_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["qkernels"])


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def rewrite(path: Path, held: dict[str, torch.Tensor] | None = None, /, **changes: Any) -> None:
    """Writes the file again with other tensors or another description, and with a digest that fits."""
    from qkernels.qat import model_file

    described = {**description_of(path), **changes}
    held = tensors_of(path) if held is None else held
    save_file(held, path, metadata={"qkernels": json.dumps({**described, "digest": "0" * 64})})
    digest = model_file._digest(path, "0" * 64)
    save_file(held, path, metadata={"qkernels": json.dumps({**described, "digest": digest})})


def assert_same(loaded: nn.Module, model: nn.Module, *inputs: Any) -> None:
    """Modules, tensors, memory shared by tensors, and outputs, bit for bit."""
    for kinds in (lambda m: [(name, type(each).__name__) for name, each in m.named_modules(remove_duplicate=False)],
                  lambda m: [(name, p.requires_grad, p.dtype) for name, p in m.named_parameters()],
                  lambda m: [name for name, _ in m.named_buffers()]):  # fmt: skip
        assert kinds(loaded) == kinds(model)
    own, wanted = loaded.state_dict(), model.state_dict()
    assert list(own) == list(wanted)
    for name, t in wanted.items():
        assert own[name].dtype == t.dtype, name
        assert own[name].stride() == t.stride(), name
        assert torch.equal(own[name].nan_to_num(7), t.nan_to_num(7)), name
    with torch.no_grad():
        for y, expected in zip(flat(loaded(*inputs)), flat(model(*inputs)), strict=True):
            assert y.stride() == expected.stride()
            assert torch.equal(y, expected)


def flat(value: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


@dataclass(frozen=True)
class Case:
    """A float model, an input, and how it is prepared."""

    make: Callable[[], nn.Module]
    x: Callable[[], torch.Tensor]
    config: QConfig = field(default_factory=QConfig)

    def prepared(self) -> nn.Module:
        prepared = qk.prepare(self.make(), self.config)
        qk.calibrate(prepared, [self.x()])
        return prepared.eval()


class Norms(nn.Module):
    """BatchNorms behind convolutions on integers, in float and of a class of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = SameConv(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False, groups=8), nn.BatchNorm2d(8)
        self.up, self.norm3 = nn.ConvTranspose2d(8, 6, 2, bias=False), nn.BatchNorm2d(6)
        for norm in (self.norm1, self.norm2, self.norm3):
            nn.init.normal_(norm.weight)
            norm.running_mean.normal_()

    def forward(self, x):
        x = F.relu(self.norm1(self.first(x)))
        return self.norm3(self.up(F.relu(self.norm2(self.second(x)))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(32, 32, bias=i < 2) for i in range(3))
        self.second.weight = self.third.weight = self.first.weight

    def forward(self, x):
        return self.third(self.second(self.first(x)))


class Language(nn.Module):
    """A table that is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.body(self.table(ids)))


class Twice(nn.Module):
    """One layer under two names, beside a buffer that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = self.again = nn.Linear(16, 16)
        self.rest = nn.ModuleDict({"own": nn.Linear(16, 4), "same": self.layer})
        self.register_buffer("factor", torch.arange(16.0), persistent=False)

    def forward(self, x):
        return self.rest["own"](self.again(self.layer(x * self.factor)))


class Computed(nn.Module):
    """Weights that parametrizations, hooks and a maximal norm compute."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 16, max_norm=1.0)
        self.first = parametrizations.weight_norm(nn.Linear(16, 16))
        self.second = nn.utils.spectral_norm(nn.Linear(16, 16))
        self.third = prune.random_unstructured(nn.Linear(16, 16), "weight", 0.5)
        self.left = parametrizations.weight_norm(nn.Conv1d(5, 4, 3))

    def forward(self, ids):
        x = self.third(self.second(self.first(self.table(ids))))
        return self.left(x)


class Adapted(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.scaling = base, 0.5
        self.lora_A, self.lora_B = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, False)

    def forward(self, x):
        return self.base_layer(x) + self.scaling * self.lora_B(self.lora_A(x))


class Experts(nn.Module):
    """A module that reads a parameter of its own, below the root and at it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 16, 16))
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        return self.out(torch.einsum("enk,bk->bn", self.experts, x))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(16, 2, batch_first=True, add_bias_kv=True)
        self.cross = nn.MultiheadAttention(16, 2, batch_first=True, kdim=8, vdim=12, bias=False)
        self.layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)

    def forward(self, x):
        x = self.own(x, x, x)[0]
        return self.layer(self.cross(x, x[..., :8], x[..., :12])[0])


def rows() -> torch.Tensor:
    return torch.randn(5, 16)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 7, 7)


def ids() -> torch.Tensor:
    return torch.randint(16, (2, 5))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def recurrent() -> nn.Module:
    return nn.LSTM(16, 8, num_layers=2, bidirectional=True, batch_first=True)


def sequences() -> torch.Tensor:
    return torch.randn(2, 4, 16)


def upwards() -> nn.Module:
    first = nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2, bias=False)
    last = nn.ConvTranspose3d(6, 3, (1, 2, 2), (1, 2, 1), dilation=(1, 1, 2))
    return nn.Sequential(first, nn.BatchNorm1d(6), nn.ReLU(), nn.Unflatten(2, (2, 4, 2)), last)


def video() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 4, 3, bias=False), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, 1))


ALL = {"output": QSpec(8)}  # beside weight and input
ZERO_POINTS = {"weight": {"symmetric": False}}  # which no int8 kernel takes
CASES = {
    "mlp": Case(mlp, rows),
    "mlp, 4 bits": Case(mlp, rows, QConfig(QSpec(4), QSpec(8, symmetric=False))),
    "mlp, groups and zero points": Case(mlp, rows, QConfig(QSpec(3, PerGroup(16), symmetric=False))),
    "mlp, weight only": Case(mlp, rows, QConfig(QSpec(5, PerGroup(8), symmetric=False), None)),
    "mlp, 4 bits weight only": Case(mlp, rows, QConfig(QSpec(4), None)),
    "mlp, dynamic": Case(mlp, rows, QConfig(QSpec(8), QSpec(8, quantizer="dynamic"))),
    "mlp, tokens": Case(mlp, rows, QConfig(QSpec(8), QSpec(6, PerToken(), quantizer="dynamic"))),
    "mlp, outputs": Case(mlp, rows, QConfig(rules=[("*", ALL)])),
    "mlp, averages": Case(mlp, rows, QConfig(QSpec(8, quantizer="ema"), QSpec(8, quantizer="ema"))),
    "mlp, lsq+": Case(mlp, rows, QConfig(QSpec(3, quantizer="minmax"), QSpec(4, quantizer="lsq+"))),
    "mlp, nf4": Case(mlp, rows, QConfig(QSpec(4, quantizer="nf4"), QSpec(4, quantizer="apot"))),
    "mlp, kmeans": Case(mlp, rows, QConfig(QSpec(2, quantizer="kmeans"), QSpec(2, quantizer="midrise"))),
    "mlp, inputs alone": Case(mlp, rows, QConfig(None, QSpec(8))),
    "mlp, bf16": Case(lambda: mlp().bfloat16(), lambda: rows().bfloat16(), QConfig(QSpec(4), QSpec(8))),
    "mlp, fp64": Case(lambda: mlp().double(), lambda: rows().double()),
    "one layer": Case(lambda: nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect"), images),
    "BatchNorms": Case(Norms, images, QConfig(rules=[("up", ZERO_POINTS)])),
    "BatchNorms, float inputs": Case(Norms, images, QConfig(QSpec(8), None)),
    "channels_last": Case(lambda: Norms().to(memory_format=torch.channels_last), images),
    "transposed": Case(upwards, lambda: torch.randn(2, 4, 7)),
    "transposed, float inputs": Case(upwards, lambda: torch.randn(2, 4, 7), QConfig(QSpec(3, symmetric=False), None)),
    "video": Case(lambda: video().to(memory_format=torch.channels_last_3d), lambda: torch.randn(1, 2, 4, 5, 5)),
    "tied": Case(Tied, lambda: torch.randn(3, 32)),
    "tied, 4 bits": Case(Tied, lambda: torch.randn(3, 32), QConfig(QSpec(4), QSpec(8))),
    "language": Case(Language, ids, QConfig(QSpec(8), None)),
    "language, 4 bits": Case(Language, ids, QConfig(QSpec(4), QSpec(8))),
    "two names": Case(Twice, rows),
    "computed weights": Case(Computed, ids),
    "computed weights, 4 bits": Case(Computed, ids, QConfig(QSpec(4), None)),
    "sums": Case(lambda: nn.Sequential(Adapted(nn.Linear(16, 16)), nn.ReLU(), Adapted(nn.Linear(16, 4, bias=False))),
                 rows, QConfig(adapters="sum")),
    "adapters apart": Case(lambda: nn.Sequential(Adapted(nn.Linear(16, 16)), nn.Linear(16, 4)), rows),
    "experts": Case(Experts, rows, QConfig(rules=[("experts", {"weight": {}})])),
    "experts inside": Case(lambda: nn.Sequential(nn.Linear(16, 16), Experts()), rows,
                           QConfig(rules=[("1.experts", {"weight": {}}), ("1", {"input": QSpec(8)})])),
    "attention": Case(Attending, lambda: torch.randn(2, 5, 16), QConfig(rules=[("*", {"attention": QSpec(8)})])),
    "attention, 4 bits": Case(Attending, lambda: torch.randn(2, 5, 16), QConfig(QSpec(4))),
    "recurrent": Case(recurrent, sequences, QConfig(rules=[("*", {"hidden": QSpec(8), "cell": QSpec(8), **ALL})])),
    "recurrent, states in float": Case(recurrent, sequences, QConfig(QSpec(4))),
    "recurrent, weight only": Case(lambda: nn.GRU(16, 8, bias=False), sequences, QConfig(QSpec(8), None)),
    "recurrent, projected": Case(lambda: nn.LSTM(16, 8, proj_size=4), sequences),
    "recurrent, float weights": Case(recurrent, sequences, QConfig(QSpec(4, quantizer="nf4"))),
    "recurrent, ReLU": Case(lambda: nn.Sequential(nn.RNN(16, 8, nonlinearity="relu")), sequences),
}  # fmt: skip
