"""sensitivity: which layers a narrow width hurts, and how much."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .. import layouts
from ..nn.fake_quantize import FakeQuantize
from ..nn.qat_layer import QATLayer
from ..nn.qat_lora import QATAdapted
from ..nn.quantized_parameters import QATParameters
from ..nn.quantizer_rules import nearest
from .calibrate import check_shapes, unwrapped
from .config import QConfig
from .prepare import prepare
from .repeated_batches import batches_of, random_state_kept
from .scores import Scores, fisher_scores, hessian_scores, output_scores
from .sensitivity_table import METRICS, Sensitivity, SensitivityRow, Specs
from .spec import QSpec, check_type
from .trials import KINDS, Group, Trials

WITH_LOSS = ("loss", "fisher", "hessian")


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    metric: str = "sqnr",
    bits: Sequence[int] = (8, 4, 3, 2),
    loss: Callable[[Any, Any], Any] | None = None,
    config: QConfig | str | None = None,
    max_batches: int | None = None,
) -> Sensitivity:
    """How much worse the model gets when one layer's weights, or its inputs, are quantized to each width.

    All else computes in float meanwhile. Layers that get the same tensor or hold the same weight are tried together,
    as one row. Each width has ranges of its own, calibrated on the batches (``calibrate``, method "auto"). Scores add
    up while they are small: ``assign`` finds the widths whose sum is smallest under a budget.

    The model stays exactly as it was, and so do the random generators; two calls give equal numbers. It works on a copy
    in eval mode, draws the same random numbers in every pass, and holds the outputs of all batches. If tqdm is
    installed, a terminal shows the progress.

    Args:
        model: a float model, or what ``prepare`` returns. Quantizers switched off count as switched on.
        batches: as for ``calibrate``. They are taken as a list, because each is run several times; a few hundred
            samples do (AIMET takes 128 for "sqnr", Model-Optimizer 512 and 128 for calibration and "fisher").
        metric: how a score is measured; the larger, the worse.
            - "sqnr": power of the difference at the model's output over that of the float output; the table shows it in
              dB. A pass over the batches for each row and width.
            - "kl": the mean divergence (Kullback and Leibler) between softmax of the float output and of the quantized
              one, over the last dim of the first floating tensor. As many passes.
            - "loss": by how much ``loss`` grows. As many passes.
            - "fisher": Σ (dL/dy·Δy)² at the layer's output y, as in Nvidia's Model-Optimizer; one forward and one
              backward pass over the batches, and each layer alone once for each width.
            - "hessian": the mean trace of the Hessian by the weights times the squared change of the weights (HAWQ-V2,
              arXiv 1911.03852), by 8 random probes for each batch. Weights only.
        bits: the widths to try, 2 to 8.
        loss: a function of the model's output and the batch that gives one number, for "loss", "fisher", "hessian".
        config: how a float model is prepared, as for ``prepare``. It must be None for a prepared one.
        max_batches: how many batches to take at most; None: all.

    Raises:
        ValueError: an unknown metric; widths that no quantizer takes; no batches; a metric without its ``loss``; NaN or
            infinity in the model's output, in the loss or in a gradient.
        TypeError: another type of an argument, or an output without floating tensors.
        RuntimeError: the model has no second derivatives ("hessian").
        What ``prepare`` and ``calibrate`` raise.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: got {metric!r}; accepted: {', '.join(METRICS)}{nearest(metric, METRICS)}")
    widths = widths_of(bits)
    if loss is None and metric in WITH_LOSS:
        raise ValueError(f"loss: got None with metric={metric!r}; accepted: a function of (output, batch) to a number")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss: got a {type(loss).__name__}; accepted: a function of (output, batch) to a number")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}; accepted: a torch.nn.Module")
    with random_state_kept(model):
        trials = trials_of(model, batches, widths, config, max_batches)
        kinds = KINDS if metric != "hessian" else KINDS[:1]
        wanted = [
            (place, kind, width)
            for place, group in enumerate(trials.groups)
            for kind in kinds
            for width in group_widths(trials, group, kind, widths)
        ]
        if not wanted:
            raise ValueError(f"bits: got {tuple(bits)}, which no quantizer of the model takes; accepted: some that do")
        if metric == "hessian":
            assert loss is not None
            scores = hessian_scores(trials, wanted, loss)
        elif metric == "fisher":
            assert loss is not None
            scores = fisher_scores(trials, wanted, loss)
        else:
            scores = output_scores(trials, wanted, metric, loss)
    if trials.unreached:
        warnings.warn(f"qk.sensitivity: no batch reached {', '.join(trials.unreached)}", stacklevel=2)
    return _table(metric, trials, scores)


def trials_of(
    model: nn.Module, batches: Any, widths: Sequence[int], config: QConfig | str | None, max_batches: int | None
) -> Trials:
    """The model's copy to try widths on."""
    kept, model = batches_of(batches, max_batches), unwrapped(model)
    if any(isinstance(module, FakeQuantize) for module in model.modules()):
        if config is not None:
            raise ValueError("config: got one with a prepared model; accepted: None, as the model has its own")
        check_shapes(model)
    else:
        model = prepare(model, config)
    return Trials(model, kept, widths)


def widths_of(bits: Sequence[int]) -> list[int]:
    """The widths, the widest first."""
    if not isinstance(bits, Sequence) or isinstance(bits, str) or not bits:
        raise TypeError(f"bits: got {bits!r}; accepted: one or more of 2 to 8, as a tuple or list")
    for width in bits:
        check_type("bits", width, int, "2 to 8")
        if not 2 <= width <= 8:
            raise ValueError(f"bits: got {width}; accepted: 2 to 8")
    return sorted(set(bits), reverse=True)


def group_widths(trials: Trials, group: Group, kind: str, widths: Sequence[int]) -> list[int]:
    """The widths that all quantizers of this kind take."""
    quantizers = group.quantizers[kind]
    return [width for width in widths if quantizers and all(q in trials.at[width] for q in quantizers)]


def _table(metric: str, trials: Trials, scores: Scores) -> Sensitivity:
    rows = []
    for place, group in enumerate(trials.groups):
        counts = group.multiplications.values()
        known = [count for count in counts if count is not None]
        each = sum(known) / trials.samples if len(known) == len(counts) else None
        for kind in KINDS:
            own = {bits: score for (at, of, bits), score in scores.items() if (at, of) == (place, kind)}
            if not own:
                continue
            weights = group.weights if kind == "weight" else []
            sizes = {bits: sum(stored_bytes(*weight, bits) for weight in weights) for bits in own}
            elements = sum(weight.numel() for weight, _ in weights)
            rows.append(SensitivityRow(tuple(group.names), kind, own, elements, sizes, each))
    layers = {name: layer for name, layer in trials.model.named_modules() if isinstance(layer, QATLayer)}
    specs = {name: _specs(name, layer, trials.own) for name, layer in layers.items()}
    adapters = "sum" if any(isinstance(layer, QATAdapted) for layer in layers.values()) else "base"
    return Sensitivity(metric, tuple(rows), specs, tuple(trials.unreached), adapters)


def stored_bytes(weight: Tensor, quantizer: FakeQuantize, bits: int) -> int:
    """What a file of the converted model holds for a weight: codes (8 bits each above 4), scales, zero points."""
    codes = (weight.numel() * (bits if bits in layouts.BITS else 8) + 7) // 8
    scales = 0 if quantizer.quantizer == "dynamic" else quantizer.scale.numel()
    return codes + 4 * scales * (1 if quantizer.symmetric else 2)


def _specs(name: str, layer: QATLayer, own: dict[FakeQuantize, int]) -> dict[str, Specs]:
    """Patterns of rules for a layer, with the specs of its kinds of tensors; None: it has none of that kind."""
    roles = type(layer).roles(layer)
    found: dict[str, dict[str, QSpec | None]] = {}
    for role_name, role in roles.items():
        pattern = name
        if isinstance(layer, QATParameters) and role.kind == "weight":
            pattern = f"{name}.{role.parameter}".removeprefix(".")
        quantizer = layer.quantizer_of(role_name)
        spec = None if quantizer is None else _spec(quantizer, own[quantizer])
        if spec is not None or role.kind not in found.get(pattern, {}):
            found.setdefault(pattern, {})[role.kind] = spec
    return dict(found)


def _spec(quantizer: FakeQuantize, bits: int) -> QSpec:
    return QSpec(bits, quantizer.granularity, quantizer.symmetric, quantizer.quantizer, quantizer.straight_through)
