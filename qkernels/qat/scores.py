"""The metrics of ``sensitivity``: how much worse a model gets by one quantizer, or by a few of equal width."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..nn.fake_quantize import FakeQuantize
from .calibrate import progress, tensors_in
from .trials import Trials, first_float

PROBES = 8  # random vectors for each batch, by which Hutchinson's method estimates the trace of a Hessian
Loss = Callable[[Any, Any], Any]
Trial = tuple[int, str, int]  # a group's place, the kind of its quantizers, their width
Scores = dict[Trial, float]


def output_scores(trials: Trials, wanted: list[Trial], metric: str, loss: Loss | None) -> Scores:
    """One pass over the batches for each trial; what the quantized outputs are worth beside the float ones.

    "sqnr": power of the difference over that of the float output. "kl": the mean divergence of softmax over the last
    dim. "loss": by how much the loss grows.
    """
    measure: Callable[[Any, Any, Any], tuple[float, float]]
    if metric == "loss":
        assert loss is not None
        measure = _loss_growth(loss)
    else:
        measure = _noise if metric == "sqnr" else _divergence
    scores = {}
    with torch.no_grad(), trials.running():
        # A model may return a tensor that it writes to in the next call, or a view of its input.
        reference = [copy.deepcopy(output) for output in trials.outputs()]
        for at, output in enumerate(reference):
            _check_finite(output, f"batches[{at}]: the model's output in float")
        for trial in progress(wanted, f"sensitivity: {metric}", len(wanted)):
            place, kind, bits = trial
            worse = of = 0.0
            with trials.quantized(trials.groups[place].quantizers[kind], bits):
                for at, output in enumerate(trials.outputs()):
                    name = trials.groups[place].names[0]
                    _check_finite(output, f"batches[{at}]: the model's output with {bits} bits in {name!r}")
                    more, weight = measure(reference[at], output, trials.batches[at])
                    worse, of = worse + more, of + weight
            scores[trial] = worse / of if of else 0.0
    return scores


def _noise(reference: Any, output: Any, batch: Any) -> tuple[float, float]:
    noise = signal = 0.0
    for y, quantized in zip(_floats(reference), _floats(output), strict=True):
        if y.shape != quantized.shape:
            raise ValueError(
                f"metric: got 'sqnr' for a model whose output changes its shape from {list(y.shape)} to "
                f"{list(quantized.shape)}; accepted: 'loss'"
            )
        noise += float((y.double() - quantized.double()).square().sum())
        signal += float(y.double().square().sum())
    return noise, signal


def _divergence(reference: Any, output: Any, batch: Any) -> tuple[float, float]:
    y, quantized = (F.log_softmax(next(_floats(value)).double(), -1) for value in (reference, output))
    rows = y.numel() // max(y.shape[-1], 1)
    return float(F.kl_div(quantized, y, reduction="sum", log_target=True)), float(rows)


def _loss_growth(loss: Loss) -> Callable[[Any, Any, Any], tuple[float, float]]:
    def growth(reference: Any, output: Any, batch: Any) -> tuple[float, float]:
        return float(loss_of(loss, output, batch)) - float(loss_of(loss, reference, batch)), 1.0

    return growth


def loss_of(loss: Loss, output: Any, batch: Any) -> Any:
    value = loss(output, batch)
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"loss: got a tensor of shape {list(value.shape)}; accepted: one number for a batch")
    if not isinstance(value, Tensor | int | float):
        raise TypeError(f"loss: got a {type(value).__name__}; accepted: a function of (output, batch) to one number")
    number = float(value.detach() if isinstance(value, Tensor) else value)
    if not math.isfinite(number):
        raise ValueError(f"loss: got {number}; accepted: finite numbers")
    return value


def fisher_scores(trials: Trials, wanted: list[Trial], loss: Loss) -> Scores:
    """Σ (dL/dy · (quantized y − y))² over the elements of the layers' outputs y, as a mean over the batches.

    One backward pass for each batch serves all trials: when the gradient of a layer's output arrives, the layer is
    computed once more for each of them. The diagonal of the Fisher matrix in Nvidia's Model-Optimizer has this form.
    """
    scores = dict.fromkeys(wanted, 0.0)
    layers = dict(trials.model.named_modules())
    places = {layers[name]: place for place, group in enumerate(trials.groups) for name in group.names}

    def hook(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        y = first_float(output)
        if y is None:
            return
        if not y.requires_grad:
            y.requires_grad_()
        own = {quantizer for _, _, quantizer in layer.own_quantizers()}

        def arrived(gradient: Tensor) -> None:
            with torch.no_grad():
                before = first_float(layer.forward(*args, **kwargs))
                for trial in wanted:
                    place, kind, bits = trial
                    chosen = own.intersection(trials.groups[place].quantizers[kind])
                    if place != places[layer] or not chosen:
                        continue
                    with trials.quantized(chosen, bits):
                        after = first_float(layer.forward(*args, **kwargs))
                    assert before is not None
                    assert after is not None
                    scores[trial] += float((gradient * (after - before)).double().square().sum())

        y.register_hook(arrived)

    # Before the user's hooks, which may change what the layer itself returns.
    handles = [layer.register_forward_hook(hook, with_kwargs=True, prepend=True) for layer in places]
    try:
        with torch.enable_grad(), trials.running():
            outputs = progress(trials.outputs(), "sensitivity: fisher", len(trials.batches))
            for batch, output in zip(trials.batches, outputs, strict=True):
                differentiable(loss_of(loss, output, batch)).backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    return _finite({trial: score / len(trials.batches) for trial, score in scores.items()}, "fisher")


def hessian_scores(trials: Trials, wanted: list[Trial], loss: Loss) -> Scores:
    """Mean trace of the Hessian by the weights times Σ (quantized weight − weight)²: HAWQ-V2 (arXiv 1911.03852).

    Hutchinson's estimate: the mean of v·Hv over random signs v. A negative estimate counts as none.
    """
    quantizers = {quantizer for group in trials.groups for _, quantizer in group.weights}
    traces = dict.fromkeys(quantizers, 0.0)
    taken: dict[FakeQuantize, Tensor] = {}

    def take(quantizer: FakeQuantize, x: Tensor) -> Tensor:
        if quantizer not in quantizers:
            return x
        if quantizer not in taken:
            taken[quantizer] = x.detach().requires_grad_()
        return taken[quantizer]

    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad(), _twice_differentiable(), trials.running(take):
        outputs = progress(trials.outputs(), "sensitivity: hessian", len(trials.batches))
        for batch, output in zip(trials.batches, outputs, strict=True):
            value = differentiable(loss_of(loss, output, batch))
            keys, weights = list(taken), list(taken.values())
            taken.clear()
            try:
                gradients = torch.autograd.grad(value, weights, create_graph=True, allow_unused=True)
                used = [at for at, gradient in enumerate(gradients) if gradient is not None and gradient.requires_grad]
                for _ in range(PROBES if used else 0):
                    signs = [_signs(weights[at], generator) for at in used]
                    products = torch.autograd.grad(
                        [gradients[at] for at in used],
                        [weights[at] for at in used],
                        signs,
                        retain_graph=True,
                        allow_unused=True,
                    )
                    for at, sign, product in zip(used, signs, products, strict=True):
                        if product is not None:
                            traces[keys[at]] += float((sign * product).double().sum()) / PROBES
            except RuntimeError as error:
                raise RuntimeError(
                    f"metric: got 'hessian' for a model without second derivatives ({error}); accepted: 'fisher', "
                    "'loss', 'kl', 'sqnr'"
                ) from error
    scores = {}
    with torch.no_grad():
        for trial in wanted:
            place, _, bits = trial
            scores[trial] = 0.0
            for weight, quantizer in trials.groups[place].weights:
                moved = trials.at[bits][quantizer](weight).double() - weight.double()
                mean = max(traces[quantizer], 0.0) / len(trials.batches) / max(weight.numel(), 1)
                scores[trial] += mean * float(moved.square().sum())
    return _finite(scores, "hessian")


def _twice_differentiable() -> Any:
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


def _signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Drawn on the CPU, so that they are the same on every device."""
    return (torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1).to(weight)


def differentiable(value: Any) -> Tensor:
    if not (isinstance(value, Tensor) and value.requires_grad):
        raise TypeError("loss: got a value without a gradient; accepted: a tensor computed from the model's output")
    return value


def _finite(scores: Scores, metric: str) -> Scores:
    if not all(map(math.isfinite, scores.values())):
        raise ValueError(f"metric: got NaN or infinity for {metric!r}; accepted: batches whose gradients are finite")
    return scores


def _floats(value: Any) -> Iterator[Tensor]:
    found = [t for t in tensors_in(value) if t.is_floating_point()]
    if not found:
        raise TypeError(
            f"model: returns a {type(value).__name__} without floating tensors; accepted: tensors, or tuples, lists "
            "and dicts of them"
        )
    return iter(found)


def _check_finite(output: Any, what: str) -> None:
    tensors: Iterable[Tensor] = (t for t in tensors_in(output) if t.is_floating_point())
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise ValueError(f"{what} holds NaN or infinity; accepted: batches with finite outputs")
