"""Small prepared models, and what a training loop leaves in them, to compare loops by values."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from qat_models import config
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk

WAYS = ["lsq", "minmax", "ema", "dynamic"]


class Transformer(nn.Module):
    """Two layers of attention made of Linear layers alone."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.embed, self.heads = nn.Linear(8, width), heads
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "q": nn.Linear(width, width),
                    "k": nn.Linear(width, width),
                    "v": nn.Linear(width, width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 2 * width),
                    "down": nn.Linear(2 * width, width),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            y = block["norm1"](x)  # one tensor for three layers
            q, k, v = (block[name](y).unflatten(-1, (self.heads, -1)).transpose(-3, -2) for name in "qkv")
            y = F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)
            x = x + block["out"](y)
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x))))
        return self.head(x.mean(-2))


class Text(nn.Module):
    """An embedding, an LSTM and a head; a sample is a row of floats, of which token numbers are made."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(20, 8), nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.embedding((4 * x + 10).long().clamp(0, 19)))
        return self.head(y[:, -1])


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, groups=4),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 9, 5),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(11, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 5))


MAKERS: dict[str, Callable[[], nn.Module]] = {"cnn": cnn, "mlp": mlp, "transformer": Transformer, "text": Text}
MODELS = list(MAKERS)
SHAPES = {"cnn": (3, 8, 8), "mlp": (11,), "transformer": (6, 8), "text": (7,)}


def batches_of(name: str, count: int = 3, size: int = 12, seed: int = 7) -> list[Tensor]:
    """Batches of growing spread, so that every range that observes moves at each of them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, *SHAPES[name], generator=generator) * (1 + i) for i in range(count)]


def prepared(name: str, way: str = "lsq", bits: int = 8, seed: int = 0) -> nn.Module:
    """A prepared model in training mode, calibrated on less than ``batches_of`` will give."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = qk.prepare(MAKERS[name](), config(bits, way))
    if way != "dynamic":
        qk.calibrate(model, [0.5 * batches_of(name)[0]])
    return model.train()


def targets_of(y: Tensor) -> Tensor:
    return torch.arange(y.shape[0], device=y.device) % y.shape[-1]


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = model(x)
    return F.cross_entropy(y.float() if y.dtype != torch.float64 else y, targets_of(y))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, their gradients and all buffers, those that no state_dict holds too."""
    found = {key: t.detach().clone() for key, t in (*model.named_parameters(), *model.named_buffers())}
    for key, p in model.named_parameters():
        if p.grad is not None:
            found[f"{key}.grad"] = p.grad.clone()
    return found


def quantizer_state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: t for key, t in state_of(model).items() if "_fake_quant." in key}


def scales_of(model: nn.Module) -> list[Tensor]:
    return [t for key, t in model.named_buffers() if key.rpartition(".")[2] in ("_scale", "running_min", "running_max")]


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit; what is NaN (a scale that is not known yet) is so in both."""
    assert got.keys() == expected.keys()
    for key, value in got.items():
        assert value.dtype == expected[key].dtype, key
        assert torch.equal(value.nan_to_num(7), expected[key].nan_to_num(7)), key


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """To ``tolerance`` of each tensor's largest element."""
    assert got.keys() == expected.keys()
    for key, value in got.items():
        scale = max(float(expected[key].double().abs().max()), 1e-3) if value.numel() else 1.0
        torch.testing.assert_close(
            value, expected[key], rtol=0, atol=tolerance * scale, msg=lambda m, k=key: f"{k}: {m}"
        )


def optimizer_of(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(qk.parameter_groups(model, lr=0.01, weight_decay=0.01), **options)


def train(
    model: nn.Module,
    batches: Iterable[Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[nn.Module, Tensor], Tensor] = loss_of,
) -> list[Tensor]:
    """The plain loop; the losses of all steps."""
    optimizer = optimizer_of(model) if optimizer is None else optimizer
    losses = []
    for x in batches:
        optimizer.zero_grad()
        value = loss(model, x)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return losses


def after(model: nn.Module, batches: Iterable[Tensor], **options: Any) -> dict[str, Tensor]:
    """What the plain loop leaves in a copy of the model, with the losses."""
    model = copy.deepcopy(model)
    losses = train(model, batches, **options)
    return {**state_of(model), "losses": torch.stack(losses)}
