"""Which layers can be quantized, why others cannot, and which weights ``convert`` takes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from .. import gemm_checks, layouts
from ..nn.granularity import PerGroup
from ..nn.int4 import Int4Linear
from ..nn.int8 import Int8Conv2d, Int8Linear
from ..nn.own_forward import Trial, has_own_forward, try_forward
from ..nn.qat import QATConv2d, QATLinear, bake_weight
from .config import QUANTIZABLE
from .weight_readers import WeightReaders


def to_int4(layer: nn.Module) -> bool:
    """Whether ``convert`` turns the layer into an Int4Linear."""
    if not isinstance(layer, QATLinear) or layer.weight_fake_quant is None:
        return False
    return layer.weight_fake_quant.bits in layouts.BITS


def check_convertible(name: str, layer: QATLinear | QATConv2d) -> None:
    """Refuses a QAT layer whose weight no integer layer can hold.

    Raises:
        ValueError: no integer layer holds the weight. The text names the layer, its weight and what is accepted.
    """
    weight, input = layer.weight_fake_quant, layer.input_fake_quant
    if weight is None or (input is None and not to_int4(layer)):
        return  # the layer stays in float or gets a float product
    k = layer.weight[0].numel()
    granularity = weight.granularity
    try:
        gemm_checks.max_k("weight", k)
        if to_int4(layer):
            gemm_checks.weight_group_size(granularity.size if isinstance(granularity, PerGroup) else k, k)
    except RuntimeError as error:
        raise ValueError(f"model: the weight of {name!r} has {granularity}; {error}") from None
    if to_int4(layer):
        return
    if isinstance(granularity, PerGroup):
        raise ValueError(
            f"model: the weight of {name!r} has {granularity}; accepted by the int8 layers: PerChannel(0), PerTensor()"
        )
    if not weight.symmetric:
        raise ValueError(
            f"model: the weight of {name!r} is quantized with a zero point; accepted by the int8 layers: symmetric=True"
        )


def float_reason(name: str, layer: nn.Module, readers: WeightReaders) -> tuple[str | None, Trial]:
    """Why a Linear or Conv2d layer cannot be quantized (None: it can), and what the trial of its own forward showed."""
    reason, trial = _outer_reason(name, layer, readers), Trial(returns_product=True)
    if reason is None and has_own_forward(_class_without_parametrizations(layer)):
        trial = try_forward(_twin_on_meta(layer))
        reason = trial.reason
    return reason, trial


def _outer_reason(name: str, layer: nn.Module, readers: WeightReaders) -> str | None:
    if name in readers.instead:
        return f"{readers.instead[name]} reads its weight instead of calling it"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "its weight is read by the module that holds it"
    if any(is_lazy(parameter) for parameter in layer.parameters()):
        return "its shape is not known before the first batch; call the model once, then prepare it"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if not weight.is_floating_point() or weight.layout != torch.strided:
        return f"its weight is {weight.dtype}, {weight.layout}; accepted: a dense tensor of floats"
    kind = _class_without_parametrizations(layer)
    if kind not in QUANTIZABLE:
        taken = _taken_names(layer, kind)
        if taken:
            return f"its attribute {taken[0]!r} is also one of the quantized layer's"
    return None


def _twin_on_meta(layer: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for t in (*layer.parameters(), *layer.buffers(), *(t for t in vars(layer).values() if isinstance(t, Tensor))):
        meta = torch.empty_like(t, device="meta")
        memo[id(t)] = nn.Parameter(meta, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else meta
    twin = copy.deepcopy(layer, memo).eval()
    bake_weight(twin)
    return twin


def unsupported(module: nn.Module) -> str:
    """Why ``prepare`` passes over a module other than Linear and Conv2d."""
    return f"{type(module).__name__}, where Linear and Conv2d are quantized"


def _class_without_parametrizations(layer: nn.Module) -> type[nn.Module]:
    kind = type(layer)
    return kind.__bases__[0] if nn.utils.parametrize.is_parametrized(layer) else kind


def _taken_names(layer: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Names to which both the subclass and the QAT or integer layers give a meaning."""
    plain: nn.Module
    made: tuple[nn.Module, ...]
    if issubclass(kind, nn.Linear):
        plain, made = nn.Linear(1, 1, device="meta"), (Int8Linear(1, 1), Int4Linear(1, 1, group_size=-1))
    else:
        plain, made = nn.Conv2d(1, 1, 1, device="meta"), (Int8Conv2d(1, 1, 1),)
    own = {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules, *dir(kind)}
    own -= {*vars(plain), *plain._parameters, *dir(type(plain)), "from_float", "like"}
    return sorted(name for name in own if name in QATLinear.__annotations__ or any(hasattr(new, name) for new in made))
