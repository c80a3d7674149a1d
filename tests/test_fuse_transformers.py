"""Programs of converted transformers: one from each attention to the next, with what the prepared model computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fuse import made, own, tensors
from torch import Tensor, nn
from torch.nn import functional as F

from qkernels.qat.fuse import fused_parts

WIDTH, HEADS = 36, 4


def attended(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    q, k, v = (t.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1])
    return y.transpose(1, 2).flatten(2)


class PreNorm(nn.Module):
    """As in GPT and ViT."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down, self.act = nn.Linear(WIDTH, 75), nn.Linear(75, WIDTH), nn.GELU(approximate)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(attended(q, k, v, causal=True))
        return x + self.down(self.act(self.up(self.norm2(x))))


class Own(nn.Module):
    """A norm that calls torch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(WIDTH)), None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class PostNorm(nn.Module):
    """As in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 70), nn.Linear(70, WIDTH)
        self.norm1, self.norm2, self.drop = Own(), nn.LayerNorm(WIDTH, bias=False), nn.Dropout(0.1)

    def forward(self, x):
        x = self.norm1(x + self.drop(self.out(attended(self.q(x), self.k(x), self.v(x)))))
        return self.norm2(self.drop(self.down(F.gelu(self.up(x)))) + x)


class Gated(nn.Module):
    """As in Llama: RMSNorm, rotated positions, fewer heads of keys, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, 1e-6), nn.RMSNorm(WIDTH)
        self.q, self.out = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = nn.Linear(WIDTH, WIDTH // 2, bias=False), nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 90, bias=False), nn.Linear(WIDTH, 90, bias=False)
        self.down = nn.Linear(90, WIDTH, bias=False)

    def forward(self, x):
        y = self.norm1(x)
        turn = torch.arange(x.shape[1]).cos()[:, None]
        q, k = (t * turn + t.flip(-1) * (1 - turn) for t in (self.q(y), self.k(y)))
        x = x + self.out(attended(q, k, self.v(y), causal=True))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Embedded(nn.Module):
    """Words and positions, the latter without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, WIDTH), nn.Embedding(40, WIDTH)
        self.norm, self.block, self.head = nn.LayerNorm(WIDTH), PostNorm(), nn.Linear(WIDTH, 7)

    def forward(self, ids):
        return self.head(self.block(self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1])))))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position, self.blocks = nn.Parameter(torch.randn(1, 17, WIDTH)), nn.Sequential(PreNorm(), PreNorm())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 50, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def sequences(batch: int = 3, length: int = 11) -> Tensor:
    return torch.randn(batch, length, WIDTH)


# The model, its input, and the numbers of programs of each module that is traced.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], list[int]]] = {
    "GPT": (lambda: nn.Sequential(PreNorm(), PreNorm("tanh")), sequences, [3]),
    "BERT": (lambda: nn.Sequential(PostNorm(), PostNorm()), sequences, [3]),
    "embedded": (Embedded, lambda: torch.randint(0, 50, (3, 11)), [2]),
    "Llama": (lambda: nn.Sequential(Gated(), Gated()), sequences, [3]),
    "ViT": (Images, lambda: torch.randn(3, 3, 16, 16), [3]),
    "encoder": (encoder, sequences, [2, 2]),
    "encoder, norm first": (lambda: encoder(norm_first=True, activation="gelu", bias=False), sequences, [2, 2]),
}


def case(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    make, inputs, _ = CASES[name]
    prepared, converted = made(make(), (inputs(),))
    return prepared, converted, inputs()


def assert_close(got: Tensor, want: Tensor) -> None:
    """Last bits of sums may change a code by a step, here and there: few rows differ by more, and by little."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if got.numel() == 0:
        return
    largest = float(want.abs().max())
    far = ((got - want).abs() > 1e-5 * largest).any(-1)
    assert float((got - want).abs().max()) <= 0.05 * largest
    assert int(far.sum()) <= max(1, 0.2 * far.numel())


def assert_ran(converted: nn.Module) -> None:
    parts = fused_parts(converted)
    assert parts
    assert [(part.reason, part.refused) for part in parts.values()] == [(None, None)] * len(parts)


@pytest.mark.parametrize("name", CASES)
def test_one_program_from_attention_to_attention(name: str) -> None:
    prepared, converted, x = case(name)
    parts = fused_parts(converted)
    assert [len(part.plans) for part in parts.values()] == CASES[name][2]
    with torch.no_grad():
        got = converted(x)
        assert_close(got, *own(converted, x))
        assert_close(got, prepared(x))
    assert_ran(converted)


@pytest.mark.parametrize("name", ["GPT", "BERT", "Llama"])
def test_what_stands_between(name: str) -> None:
    """Norms and activations hand codes to the layers behind them, and floats to sums alone."""
    middle = next(iter(fused_parts(case(name)[1]).values())).plans[1].splitlines()
    steps = [line.split(" ")[0] for line in middle]
    assert steps.count("quantize") == 1  # of what the attention gives
    norms = [line for line in middle if "_norm" in line]
    assert len(norms) == 2
    assert all("codes=" in line and (" out=" in line) == (name == "BERT") for line in norms)
    acts = ["binary"] if name == "Llama" else ["first=gelu"]
    assert all(any(act in line and "codes=" in line for line in middle) for act in acts)


@pytest.mark.parametrize("name", ["GPT", "BERT", "Llama", "encoder"])
def test_other_lengths_and_batches(name: str) -> None:
    _, converted, _ = case(name)
    with torch.no_grad():
        for batch, length in ((1, 1), (2, 30), (1, 101), (0, 5), (2, 0)):
            x = sequences(batch, length)
            if length == 0:
                assert converted(x).shape == x.shape
            else:
                assert_close(converted(x), *own(converted, x))
            assert_ran(converted)


@pytest.mark.parametrize("name", ["GPT", "BERT", "Llama", "encoder"])
def test_strided_input(name: str) -> None:
    _, converted, _ = case(name)
    with torch.no_grad():
        for x in (
            sequences(11, 3).transpose(0, 1),
            torch.randn(3, WIDTH, 11).mT,
            sequences(1, 11).expand(3, 11, WIDTH),
        ):
            assert_close(converted(x), *own(converted, x))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_own_forward(name: str) -> None:
    _, converted, x = case(name)
    apart = copy.deepcopy(converted)
    for module in apart.modules():
        vars(module).pop("forward", None)
    wanted = []
    for model in (converted, apart):
        given = x.clone().requires_grad_() if x.is_floating_point() else x
        y = model(given)
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
        (y * weights).sum().backward()
        biases = [p.grad for p in model.parameters() if p.grad is not None]
        wanted.append([*([given.grad] if x.is_floating_point() else []), *biases])
    assert len(wanted[0]) == len(wanted[1]) > 1
    for a, b in zip(*wanted, strict=True):
        # Of two modules with programs the second one's input differs in last bits.
        assert torch.equal(a, b) or (len(CASES[name][2]) > 1 and (a - b).abs().max() < 0.02 * b.abs().max() + 1e-7)


@pytest.mark.parametrize("name", ["GPT", "BERT", "Llama", "encoder"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_the_output(name: str, value: float) -> None:
    """All later rows see it in the attention, and its own row everywhere."""
    prepared, converted, x = case(name)
    x[1, 4, 3] = value
    with torch.no_grad():
        got, want = converted(x), prepared(x)
    assert got[1, 4].isnan().all()
    assert torch.equal(got[0].isnan(), want[0].isnan())
    assert bool((want.isnan() <= got.isnan()).all())


def test_bf16_models_run_as_before() -> None:
    _, converted, x = case("GPT")
    low = copy.deepcopy(converted).to(torch.bfloat16)
    with torch.no_grad():
        y = low(x.to(torch.bfloat16))
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, *own(low, x.to(torch.bfloat16)))


@pytest.mark.parametrize("name", ["encoder", "encoder, norm first"])
def test_masks(name: str) -> None:
    """Programs run with masks of either kind, bool and float, and a causal one with its hint."""
    prepared, converted, x = case(name)
    padding = torch.zeros(3, 11, dtype=torch.bool)
    padding[1, 8:] = True
    hidden = torch.ones(11, 11, dtype=torch.bool).triu(1)
    causal = torch.zeros(11, 11).masked_fill(hidden, -torch.inf)
    kept = copy.deepcopy(converted)
    for module in kept.modules():
        vars(module).pop("forward", None)
    calls: list[dict[str, Any]] = [
        {"src_key_padding_mask": padding},
        {"mask": hidden},
        {"mask": causal, "src_key_padding_mask": torch.zeros(3, 11).masked_fill(padding, -torch.inf)},
        {"mask": causal, "is_causal": True},
    ]
    with torch.no_grad():
        plain = converted(x)
        for masks in calls:
            got = converted(x, **masks)
            assert_close(got, kept(x, **masks))
            assert_close(got, prepared(x, **masks))
            assert not torch.allclose(got[1], plain[1])
            assert_ran(converted)
    for part in fused_parts(converted).values():
        assert len(part._built) == 4  # torch finds that the last two masks are causal
        assert all(built is not None and len(built.parts) == 2 for built in part._built.values())


def test_attention_layers_with_masks() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, x, padding, weights=False):
            y = self.norm(x)
            y, found = self.attn(y, y, y, padding, need_weights=weights)
            return self.head(x + y), found

    padding = torch.zeros(3, 11, dtype=torch.bool)
    padding[1, 8:] = True
    prepared, converted = made(Model(), (sequences(), padding))
    x = sequences()
    with torch.no_grad():
        for weights in (False, True):
            got = tensors(converted(x, padding, weights))
            for want in (own(converted, x, padding, weights), tensors(prepared(x, padding, weights))):
                for a, b in zip(got, want, strict=True):
                    assert_close(a, b)
        assert_ran(converted)
        with pytest.raises(RuntimeError, match="key_padding_mask: got shape"):
            converted(x, padding[:, :5])


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_layers_in_a_model(need_weights: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True)
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, x):
            y = self.norm(x)
            y, weights = self.attn(y, y, y, need_weights=need_weights)
            return self.head(x + y), weights

    prepared, converted = made(Model(), (sequences(),))
    (part,) = fused_parts(converted).values()
    assert len(part.plans) == 2
    x = sequences()
    with torch.no_grad():
        for got, want in zip(tensors(converted(x)), own(converted, x), strict=True):
            assert_close(got, want)
        for got, want in zip(tensors(converted(x)), tensors(prepared(x)), strict=True):
            assert_close(got, want)
        assert_ran(converted)
        with pytest.raises(RuntimeError, match="normalized_shape"):
            converted(torch.randn(2, 3, WIDTH + 1))


def test_a_norm_over_two_dims_is_no_step() -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.LayerNorm((5, WIDTH)), nn.Linear(WIDTH, 4))
    _, converted = made(net, (sequences(2, 5),))
    assert not any("norm" in plan for part in fused_parts(converted).values() for plan in part.plans)
