"""calibrate: what it takes as batches, what each method makes of the values, and what errors leave behind."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections import defaultdict

import pytest
import torch
from qat_models import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, TensorDataset

import qkernels as qk
from qkernels.nn import FakeQuantize
from qkernels.qat import entropy
from qkernels.qat.calibrate import METHODS, quantizers_replaced
from qkernels.qat.histogram import RangeHistogram

MINMAX = qk.QConfig(qk.QSpec(8, quantizer="minmax"), qk.QSpec(8, quantizer="minmax"))


class Steps(nn.Module):
    """A recurrent layer: its product runs once for each step of x, ``[steps, features]``."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return sum((self.product(step) for step in x[:, None]), start=torch.zeros(1, 2))


class Experts(nn.Module):
    """The sign of a batch's sum decides which of the two layers runs; ``none`` never does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.none = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if x.sum() > 0 else self.second(x)


def span(quantizer: nn.Module) -> float:
    assert isinstance(quantizer, FakeQuantize)
    return float(quantizer.scale.max()) * 127


# ---- "entropy" ----


def codes_of(values: list[float], low: float, high: float, bits: int, symmetric: bool) -> tuple[list[int], int, float]:
    """The unclamped codes counted from zero, the largest one, and the step, in plain Python."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        largest = 2**bits - 2
        step, zero = max(-low, high) / (largest // 2), largest // 2
    else:
        largest = 2**bits - 1
        step = (high - low) / largest
        zero = round(-low / step)
    return [round(value / step) + zero for value in values], largest, step


def divergence(counts: list[int], codes: list[int], largest: int) -> float:
    """TensorRT's scheme by its words, one bin after the other."""
    inside = [0 <= code <= largest for code in codes]
    first, last = inside.index(True), len(inside) - 1 - inside[::-1].index(True)
    p = [count if ok else 0 for count, ok in zip(counts, inside, strict=True)]
    p[first] += sum(counts[:first])
    p[last] += sum(counts[last + 1 :])
    bins_of = defaultdict(list)
    for at in range(first, last + 1):
        if p[at]:
            bins_of[codes[at]].append(at)
    result, values = 0.0, sum(counts)
    for bins in bins_of.values():
        q = sum(counts[at] for at in bins) / len(bins)
        result += sum(p[at] / values * math.log(p[at] / max(q, 1e-4)) for at in bins)
    return result


def best_fraction(x: Tensor, bits: int, symmetric: bool) -> float:
    limit = 2.0 ** math.frexp(float(x.abs().max()))[1]
    width = 2 * limit / entropy.BINS
    counts = [0] * entropy.BINS
    for value in x.flatten().tolist():
        counts[math.floor((value + limit) / width)] += 1
    middle = entropy.BINS // 2
    counts[middle] = min(counts[middle], max(counts[middle - 1], counts[middle + 1]))
    middles = [(at + 0.5) * width - limit for at in range(entropy.BINS)]
    found = {}
    for fraction in (2 ** (-step / 10) for step in range(64)):
        ends = float(x.min()) * fraction, float(x.max()) * fraction
        codes, largest, step = codes_of(middles, *ends, bits, symmetric)
        if step >= width or not found:
            found[fraction] = divergence(counts, codes, largest)
    return min(found, key=lambda fraction: found[fraction])


@pytest.mark.parametrize("data", ["two-sided", "after a ReLU", "shifted"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_entropy_against_brute_force(data: str, symmetric: bool, bits: int) -> None:
    x = torch.rand(6000) ** 4 * 3 + 0.5 if data == "shifted" else torch.distributions.StudentT(4).sample((6000,))
    x = x.relu() if data == "after a ReLU" else x
    x = (x * 512).round() / 512  # on a grid that fp32 sums keep, so that both count the same
    seen = RangeHistogram((1,))
    for part in x.split(1700):
        seen.update(part, float(part.abs().max()))
    quant_min = -(2 ** (bits - 1)) + symmetric
    low, high = seen.entropy_range(x.amin().view(1), x.amax().view(1), quant_min, 2 ** (bits - 1) - 1, symmetric)
    expected = best_fraction(x, bits, symmetric)
    assert float(high / x.max()) == pytest.approx(expected, rel=1e-5)
    assert float(low) == pytest.approx(float(x.min()) * expected, rel=1e-5)
    assert expected < 1 or data == "shifted" or bits == 8


def test_divergence_of_each_row() -> None:
    counts = torch.randint(0, 5, (3, 64)) * torch.randint(0, 2, (3, 64))
    codes = torch.stack([(torch.arange(64) / step - 3).round() for step in (2.0, 7.5, 20.0)])
    got = entropy.divergence(counts.double(), codes, 6)
    expected = [divergence(counts[row].tolist(), [int(c) for c in codes[row]], 6) for row in range(3)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_entropy_has_a_range_for_each_element_of_scale() -> None:
    x = torch.distributions.StudentT(4).sample((4000, 3)) * torch.tensor([1.0, 0.01, 8.0])
    together = RangeHistogram((1, 3))
    together.update(x, float(x.abs().max()))
    low, high = together.entropy_range(x.amin(0, True), x.amax(0, True), -7, 7, True)
    largest = RangeHistogram((1,))
    largest.update(x[:, 2], float(x.abs().max()))
    alone = largest.entropy_range(x[:, 2].amin().view(1), x[:, 2].amax().view(1), -7, 7, True)
    assert (low[0, 2], high[0, 2]) == (alone[0], alone[1])
    assert high[0, 1] <= x[:, 1].max()
    nothing = RangeHistogram((1,))
    nothing.update(torch.zeros(5), 0.0)
    assert nothing.entropy_range(torch.zeros(1), torch.zeros(1), -7, 7, True) == (0, 0)


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_calibrate_by_entropy(quantizer: str, symmetric: bool) -> None:
    x = (torch.distributions.StudentT(4).sample((3000, 20)) * 512).round() / 512
    config = qk.QConfig(qk.QSpec(4), qk.QSpec(8, quantizer=quantizer, symmetric=symmetric))
    prepared, auto = (qk.prepare(nn.Linear(20, 6), config) for _ in range(2))
    auto.load_state_dict(prepared.state_dict())
    qk.calibrate(prepared, x.split(999), method="entropy")
    qk.calibrate(auto, [x])
    fraction = best_fraction(x, 8, symmetric)
    ends = (x.abs().max() / 127) if symmetric else (x.max() - x.min()) / 255
    assert prepared.input_fake_quant.scale.item() == pytest.approx(float(ends) * fraction, rel=1e-5)
    assert fraction < 1
    assert torch.equal(prepared.weight_fake_quant.scale, auto.weight_fake_quant.scale)


# ---- What is taken as batches ----


def test_every_iterable_and_no_batch_too_many() -> None:
    x = torch.arange(1.0, 13.0).view(6, 2)
    loader = DataLoader(TensorDataset(x, torch.zeros(6)), batch_size=2)
    generator = (part for part in x.split(2))
    for batches in (loader, generator, list(x.split(2)), x.split(2), [(part, "label") for part in x.split(2)]):
        prepared = qk.prepare(nn.Linear(2, 2), MINMAX)
        qk.calibrate(prepared, batches)
        assert span(prepared.input_fake_quant) == pytest.approx(12)
    with pytest.raises(ValueError, match=r"batches: got none; .*can be read once only"):
        qk.calibrate(prepared, generator)  # the loop above has read it
    taken = []
    qk.calibrate(prepared, (taken.append(n) or n * x for n in itertools.count(1)), max_batches=3)
    assert taken == [1, 2, 3]
    assert span(prepared.input_fake_quant) == pytest.approx(36)


class Endless:
    """Batches of a class that has a length but does not tell it."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self):
        return itertools.repeat(torch.full((2, 2), 5.0))


def test_the_length_of_an_iterable_is_not_needed() -> None:
    prepared = qk.prepare(nn.Linear(2, 2), MINMAX)
    qk.calibrate(prepared, Endless(), max_batches=2)
    assert span(prepared.input_fake_quant) == pytest.approx(5)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(3, 2)

    def forward(self, x: PackedSequence) -> PackedSequence:
        return x._replace(data=self.product(x.data))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(3, 2)

    def forward(self, pair: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        return self.product(pair[0] + pair[1]["more"])


def test_packed_sequences_and_nested_tuples_are_one_argument() -> None:
    sequence = pack_sequence([torch.full((4, 3), 2.0), torch.full((2, 3), -5.0)])
    nested = torch.ones(2, 3), {"more": torch.full((2, 3), 4.0)}
    for model, name, argument in ((Packed(), "x", sequence), (Pair(), "pair", nested)):
        for batch in ((argument,), [argument, torch.zeros(2)], {name: argument}):
            prepared = qk.prepare(model, MINMAX)
            qk.calibrate(prepared, [batch])
            assert span(prepared.product.input_fake_quant) == pytest.approx(5)
    prepared = qk.prepare(Packed(), MINMAX)
    qk.calibrate(prepared, [sequence])  # a tuple, but not one of arguments
    assert span(prepared.product.input_fake_quant) == pytest.approx(5)


def test_batches_without_samples_are_skipped() -> None:
    prepared = qk.prepare(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)), MINMAX)
    x = torch.tensor([[1.0, -3.0], [2.0, 3.0]])
    qk.calibrate(prepared, [x[:0], x, (x[:0],), {"input": x[:0]}])
    expected = nn.BatchNorm1d(2)(x).abs().max().item()
    assert span(prepared[1].input_fake_quant) == pytest.approx(expected)
    before = snapshot(prepared)
    with pytest.raises(ValueError, match="batches: got 2 without samples; accepted: at least one"):
        qk.calibrate(prepared, [x[:0], x[:0]])
    assert_unchanged(prepared, before)


# ---- What is kept of the values ----


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_counts_once_however_often_it_calls(method: str) -> None:
    """Two batches of three steps each, against a layer that gets all steps at once."""
    config = qk.QConfig(qk.QSpec(4), qk.QSpec(4, symmetric=False))
    batches = [
        torch.tensor([[1.0, -2.0], [4.0, 0.5], [0.1, 0.3]]),
        torch.tensor([[-8.0, 1.0], [0.2, 20.0], [1.0, 1.0]]),
    ]
    model = Steps()
    stepped, at_once = qk.prepare(model, config), qk.prepare(model.product, config)
    for model in (stepped, at_once):
        qk.calibrate(model, batches, method=method)
    for name in ("weight_fake_quant", "input_fake_quant"):
        one, other = getattr(stepped.product, name), getattr(at_once, name)
        for key, value in one.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[key], msg=key)
    if method == "moving_average":
        low, high = -2 + 0.1 * (-8 + 2), 4 + 0.1 * (20 - 4)
        assert stepped.product.input_fake_quant.scale.item() == pytest.approx((high - low) / 15)


def test_the_mean_magnitude_counts_every_value_once() -> None:
    """Batches of three and one samples, in two calls each; "lsq" starts from the mean over all of them."""
    x = torch.rand(4, 2) * 3
    prepared = qk.prepare(nn.Linear(2, 2), qk.QConfig(input=qk.QSpec(3)))
    qk.calibrate(prepared, [x[:3], x[3:]], method="lsq")
    expected = min(2 * x.mean().item() / math.sqrt(3), x.max().item() / 3)
    assert prepared.input_fake_quant.scale.item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["minmax", "moving_average", "mse", "entropy", "lsq"])
def test_integers_in_every_dtype(dtype: torch.dtype, method: str) -> None:
    """All dtypes hold these integers, so the scales are those of fp32, though the sum of magnitudes is beyond fp16."""
    x = torch.randint(-255, 200, (64, 32))
    assert x.abs().sum() > torch.finfo(torch.float16).max
    config = qk.QConfig(None, qk.QSpec(4, symmetric=False))
    scales = []
    for kind in (torch.float32, dtype):
        prepared = qk.prepare(nn.Linear(32, 2).to(kind), config)
        qk.calibrate(prepared, x.to(kind).split(40), method=method)
        scales.append(prepared.input_fake_quant.scale)
    assert torch.equal(*scales)
    if method == "minmax":
        assert scales[0].item() == pytest.approx(float(x.max() - x.min()) / 15)


def test_no_tensor_outlives_its_batch() -> None:
    inputs: list[weakref.ref[Tensor]] = []
    prepared = qk.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), MINMAX)
    for layer in (prepared[0], prepared[2]):
        layer.register_forward_pre_hook(lambda layer, args: inputs.append(weakref.ref(args[0])))

    def batches():
        for n in range(6):
            alive = sum(ref() is not None for ref in inputs)
            assert alive <= 1, n  # the loop's own batch, until it gets the next
            yield torch.randn(3, 4)

    for method in METHODS:
        gc.disable()  # cycles would hide a reference until some later collection
        try:
            qk.calibrate(prepared, batches(), method=method)
            assert not any(ref() is not None for ref in inputs)
        finally:
            gc.enable()
    assert len(inputs) == 12 * len(METHODS)


# ---- Quantizers that no batch reached ----


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "ema"])
@pytest.mark.parametrize("bits", [3, 8])
def test_fallback(quantizer: str, bits: int) -> None:
    x = torch.rand(8, 4)
    config = qk.QConfig(qk.QSpec(bits), qk.QSpec(bits, quantizer=quantizer, symmetric=False))
    model = Experts()
    unreached = r"second\.weight_fake_quant, second\.input_fake_quant, none\.weight_fake_quant, none\.input_fake_quant"
    prepared = qk.prepare(model, config)
    with pytest.warns(UserWarning, match=rf"no batch reached {unreached}: .*; fallback= gives inputs a range"):
        qk.calibrate(prepared, [x])
    assert not prepared.second.input_fake_quant.is_calibrated
    for fallback, width in ((3, 6), ((-1, 4.0), 5), ([2, 5], 5)):
        prepared = qk.prepare(model, config)
        with pytest.warns(
            UserWarning, match=rf"no batch reached {unreached}: .*; inputs got \({-3 if fallback == 3 else ''}"
        ):
            qk.calibrate(prepared, [x], method="minmax", fallback=fallback)
        for layer in (prepared.second, prepared.none):
            assert layer.input_fake_quant.scale.item() == pytest.approx(width / (2**bits - 1), rel=1e-6)
        reached = float(x.max()) / (2**bits - 1)
        assert prepared.first.input_fake_quant.scale.item() == pytest.approx(reached, rel=1e-6)
    y = prepared.eval()(-x)  # its weights start from themselves
    assert y.isfinite().all()
    assert qk.convert(prepared)(-x).isfinite().all()
    if quantizer != "minmax":  # training moves the range on
        before = prepared.second.input_fake_quant.scale.item()
        for _ in range(3):
            prepared.train()(-30 * x)
            prepared(-60 * x)
        assert prepared.second.input_fake_quant.scale.item() > 1.05 * before


def test_bad_fallbacks() -> None:
    prepared = qk.prepare(Experts())
    for bad in (0, -1.0, math.inf, math.nan, (1, 1), (2, 1), (0, math.inf), (1, 2, 3), "largest", torch.ones(2)):
        with pytest.raises(ValueError, match=r"fallback: got .*; accepted: a positive number r"):
            qk.calibrate(prepared, [torch.ones(1, 4)], fallback=bad)


# ---- Errors ----


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


GOOD = torch.randn(8, 4)
BAD = {
    "shape": (
        GOOD[:, :3],
        RuntimeError,
        r"batches\[2\]: layer 'body\.0' \(QATLinear\) failed with RuntimeError: .*shape",
    ),
    "NaN": (
        GOOD.clone().fill_(math.nan),
        ValueError,
        r"batches\[2\]: the input of layer 'body\.0' holds NaN or infinity",
    ),
    "integers": (
        GOOD.long(),
        RuntimeError,
        r"batches\[2\]: layer 'body\.0'.* got torch.int64; accepted: torch.float32",
    ),
    "sparse": (
        GOOD.to_sparse(),
        RuntimeError,
        r"batches\[2\]: layer 'body\.0'.* got a tensor of layout torch.sparse_coo",
    ),
    "type": ("text", TypeError, r"batches\[2\]: got a str; accepted: tensors, tuples"),
    "empty": ((), TypeError, r"batches\[2\]: got an empty tuple; accepted: tensors, tuples"),
    "none": (None, TypeError, r"batches\[2\]: got a NoneType; accepted: tensors, tuples"),
    "name": ({"y": GOOD}, TypeError, r"batches\[2\]: the model failed with TypeError: .*'y'"),
    "one sample": (GOOD[:1], ValueError, r"batches\[2\]: layer 'body\.1' \(BatchNorm1d\) failed .* more than 1 value"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_bad_batch_is_named_and_leaves_the_model_as_it_was(case: str, calibrated: bool) -> None:
    batch, kind, message = BAD[case]
    prepared = qk.prepare(Net())
    if calibrated:
        qk.calibrate(prepared, [GOOD])
    prepared.head.eval()
    before, random = snapshot(prepared), torch.get_rng_state()
    attributes = [{**vars(module)} for module in prepared.modules()]
    with pytest.raises(kind, match=message):
        qk.calibrate(prepared, [2 * GOOD, 3 * GOOD, batch, 4 * GOOD])
    assert_unchanged(prepared, before)
    assert torch.equal(torch.get_rng_state(), random)
    for module, attribute in zip(prepared.modules(), attributes, strict=True):
        assert vars(module) == attribute  # momentum, hooks, training, no forward of its own
    qk.calibrate(prepared, [2 * GOOD])


def test_an_overflow_midway_names_the_layer_that_gets_it() -> None:
    prepared = qk.prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    nn.init.constant_(prepared[0].weight, 10)
    message = (
        r"batches\[1\]: the input of layer '1' holds NaN or infinity; .* leave this batch out or mend the layer in"
    )
    with pytest.raises(ValueError, match=message):
        qk.calibrate(prepared, [torch.ones(2, 4), torch.full((2, 4), 1e38)])


def test_a_batch_norm_keeps_nothing_of_a_batch_that_is_refused() -> None:
    prepared = qk.prepare(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)))
    before = snapshot(prepared)
    with pytest.raises(ValueError, match=r"batches\[1\]: the input of layer '1' holds NaN"):
        qk.calibrate(prepared, [GOOD, GOOD * math.nan])
    assert prepared[0].running_mean.isfinite().all()
    assert_unchanged(prepared, before)


def test_other_errors() -> None:
    prepared = qk.prepare(Net())
    before = snapshot(prepared)
    for batches, got in ((GOOD, "Tensor"), ({"x": GOOD}, "dict"), ("x", "str"), (3, "int"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"batches: got a {got}; accepted: an iterable of batches"):
            qk.calibrate(prepared, batches)
    for most in (0, 2.5):
        with pytest.raises(ValueError, match=f"max_batches: got {most}; accepted: a whole number"):
            qk.calibrate(prepared, [GOOD], max_batches=most)
    with pytest.raises(ValueError, match=r"method: got 'kl'; accepted: auto, minmax, .*entropy"):
        qk.calibrate(prepared, [GOOD], method="kl")
    with pytest.raises(ValueError, match="model: got one without quantizers; accepted: what qk"):
        qk.calibrate(Net(), [GOOD])
    with pytest.raises(ValueError, match="group: got 'all' without torch"):
        qk.calibrate(prepared, [GOOD], group="all")

    def broken():
        yield GOOD
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):  # the loader's own error stays what it is
        qk.calibrate(prepared, broken())
    assert_unchanged(prepared, before)
    with torch.no_grad():
        prepared.head.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="model: the weight of layer 'head' holds NaN"):
        qk.calibrate(prepared, [GOOD])


def test_a_forward_that_a_quantizer_has_of_its_own_is_put_back() -> None:
    prepared = qk.prepare(nn.Linear(4, 2))
    own = prepared.input_fake_quant.forward = lambda x: 2 * x
    with quantizers_replaced(prepared, lambda quantizer, x: x):
        assert torch.equal(prepared.input_fake_quant(GOOD), GOOD)
    assert prepared.input_fake_quant.forward is own


def test_compiled_models() -> None:
    for compiled in ("whole", "in place"):
        torch._dynamo.reset()
        prepared = qk.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), MINMAX)
        qk.calibrate(prepared, [GOOD])
        model = torch.compile(prepared, fullgraph=True, backend="eager")
        if compiled == "in place":
            model = prepared
            model.compile(fullgraph=True, backend="eager")
        model(GOOD)
        qk.calibrate(model, [3 * GOOD])
        assert span(prepared[0].input_fake_quant) == pytest.approx(3 * GOOD.abs().max().item())
        torch.testing.assert_close(model(3 * GOOD), prepared[1](prepared[0](3 * GOOD)))
