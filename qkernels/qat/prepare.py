"""prepare: replaces float layers by QAT layers, in a copy of the model."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..nn.fake_quantize import FakeQuantize
from ..nn.own_forward import QATForward, Trial, product_weight
from ..nn.qat import QATConv2d, QATLinear, effective_weight
from .config import QUANTIZABLE, QConfig, QSpec
from .selection import check_convertible, float_reason, unsupported
from .weight_readers import find_weight_readers

NAMED = 5  # how many layers a warning names; report lists all


def prepare(model: nn.Module, config: QConfig | None = None) -> nn.Module:
    """A copy of ``model`` whose Linear and Conv2d layers train with fake quantization.

    Parameters keep their names. Weight quantizers start from the weights; input quantizers of kind "lsq" and "minmax"
    need ``calibrate`` before the first forward pass. ``model`` itself is never changed.

    A subclass of Linear or Conv2d keeps its class as a base. ``prepare`` tries a subclass with its own forward (which
    pads its input, say) on the meta device, and quantizes it if the forward uses its weight in one F.linear or F.conv2d
    alone. The quantizers then act at each such product; if for another input the forward does something else with its
    weight, it gets the quantized values. A rule that names the type also takes a layer that cannot be tried, and one
    whose forward computes the product's weight from its own (standardizes it, say): the computed weight is then
    quantized. So is the weight that ``weight_norm``, ``spectral_norm``, pruning or another parametrization computes.

    A layer stays in float if its parent reads its weight instead of calling it, as nn.MultiheadAttention does with
    ``out_proj``. nn.TransformerEncoderLayer and nn.TransformerEncoder call their layers, except on their fused paths;
    the copy has these switched off.

    A warning names the layers that config selects but that stay in float, with the reasons. If config selects less than
    half of the model's weights, it also names the largest other layers. ``report`` lists every layer.

    Args:
        model: a float model.
        config: which layers are quantized, and how; None: ``QConfig()``.

    Raises:
        ValueError: nothing to quantize, weights that are not finite, or a spec that a layer or ``convert`` cannot take
            (the text names the layer).
        TypeError: model is not a module, or config not a ``QConfig``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}; accepted: a torch.nn.Module")
    if config is not None and not isinstance(config, QConfig):
        hint = f"QConfig(weight={config})" if isinstance(config, QSpec) else "a QConfig such as QConfig(QSpec(bits=4))"
        raise TypeError(f"config: got {config!r}; accepted: {hint}, None")
    config = QConfig() if config is None else config
    if any(isinstance(module, FakeQuantize) for module in model.modules()):
        raise ValueError("model: got one that is prepared already; accepted: a float model")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZABLE)}
    config.warn_of_idle_rules(layers)
    readers = find_weight_readers(model)
    chosen: dict[str, tuple[QSpec | None, QSpec | None]] = {}
    trials: dict[str, Trial] = {}
    floats: dict[str, str] = {}
    excluded = set()
    for name, module in layers.items():
        specs = config.specs(name, module)
        if not any(specs):
            excluded.add(name)
            continue
        reason, trial = float_reason(name, module, readers)
        asked = trial.reason is not None and not trial.refused and config.names_type_of(name, module)
        if reason is None or asked:
            chosen[name], trials[name] = specs, trial
        else:
            floats[name] = reason
    if not chosen:
        raise ValueError(
            "model: holds no layer that config selects; accepted: a model with Linear or Conv2d layers that the rules "
            "do not leave in float" + (f" ({_named(floats)})" if floats else "")
        )
    prepared = copy_of(model)
    made: dict[nn.Module, nn.Module] = {}
    tied: dict[tuple[int, QSpec], FakeQuantize] = {}  # by the Parameter's id: one weight has one scale
    for name, (weight_spec, input_spec) in chosen.items():
        layer = prepared.get_submodule(name)
        trial = trials[name]
        with torch.no_grad():
            effective = product_weight(layer) if trial.derives_weight else effective_weight(layer)
        if not effective.is_meta and not bool(effective.isfinite().all()):
            raise ValueError(f"model: the weight of {name!r} holds NaN or infinity; accepted: finite weights")
        try:
            weight = None if weight_spec is None else weight_spec.for_weight(layer)
            input = None if input_spec is None else input_spec.for_input(layer)
        except ValueError as error:
            raise ValueError(f"config, layer {name!r}: {error}") from None
        if weight is not None and weight_spec is not None and effective is layer.weight:
            weight = tied.setdefault((id(effective), weight_spec), weight)
        new = weight is not None and not weight.name
        if weight is not None and new and weight.quantizer != "dynamic" and not effective.is_meta:
            weight.to(effective.device).start(effective)
        for quantizer, kind in ((weight, "weight"), (input, "input")):
            if quantizer is not None and not quantizer.name:
                quantizer.name = f"{name}.{kind}_fake_quant".removeprefix(".")
        qat = (QATLinear if isinstance(layer, nn.Linear) else QATConv2d).from_float(layer, weight=weight, input=input)  # type: ignore[arg-type]
        if isinstance(qat, QATForward):
            qat.trial = trial
        check_convertible(name, qat)
        made[layer] = qat
    prepared = replace_modules(prepared, made.get)
    leave_fused_paths(prepared)
    too = {name: reader for name, reader in readers.too.items() if name in chosen}
    _warn(model, chosen, excluded, floats, too)
    return prepared


def copy_of(model: nn.Module, memo: dict[int, Tensor] | None = None) -> nn.Module:
    """A deep copy; it copies tensors that a forward pass left on a module without their graph.

    The copy holds whole tensors where ``fully_shard`` has sharded the model's, and gathers nothing at a call. Every
    process that holds a shard has to take part.

    ``memo``: id of a tensor -> the tensor that replaces it.
    """
    copies: dict[int, Any] = {} if memo is None else memo  # type: ignore[assignment]
    sharded = [module for module in model.modules() if _is_sharded(module)]
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                copies.setdefault(id(value), value.detach().clone())
        for t in module._parameters.values():
            if t is not None and hasattr(t, "full_tensor"):
                copies[id(t)] = nn.Parameter(t.detach().full_tensor().clone(), t.requires_grad)  # type: ignore[attr-defined]
    for module in sharded:
        kind: Any = type(module).__bases__[1]
        copies[id(module)] = kind.__new__(kind)
    for module in sharded:
        state = {k: _without_gathering(k, v) for k, v in vars(module).items() if not k.startswith("__composable_api")}
        copies[id(module)].__dict__.update(copy.deepcopy(state, copies))
    return copy.deepcopy(model, copies)


def whole(model: nn.Module) -> nn.Module:
    """The model, or if parts of it are sharded, a copy that is not (see ``copy_of``)."""
    parts = any(hasattr(t, "full_tensor") for t in model.parameters()) or any(map(_is_sharded, model.modules()))
    return copy_of(model) if parts else model


def _is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` gave the module a new class, whose second base is the original one."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever shards has imported it; nobody else needs it
    return fsdp is not None and hasattr(fsdp, "FSDPModule") and isinstance(module, fsdp.FSDPModule)


def _without_gathering(name: str, value: Any) -> Any:
    """An attribute of a sharded module, without the hooks that torch.distributed has set."""
    if "hook" not in name or not isinstance(value, dict):
        return value
    makers = {key: getattr(getattr(hook, "hook", hook), "__module__", None) or "" for key, hook in value.items()}
    kept = [(key, hook) for key, hook in value.items() if not makers[key].startswith("torch.distributed")]
    return type(value)(kept)


def leave_fused_paths(model: nn.Module) -> None:
    """Makes torch's Transformer layers call their QAT layers in eval mode too, instead of reading their weights.

    torch itself sets both attributes when its fused path cannot serve; ``convert`` and copies keep them.
    """
    for module in model.modules():
        if not any(isinstance(inner, QATLinear) for inner in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _warn(
    model: nn.Module, chosen: Mapping[str, object], excluded: set[str], floats: dict[str, str], too: dict[str, str]
) -> None:
    """Gives at most one warning: which selected layers stay in float, and which large ones config does not select."""
    said = []
    if floats:
        said.append(f"{_count(floats)} that config selects stay in float: {_named(floats)}")
    if too:
        reasons = {name: f"{reader} also reads its weight, and gets it in float" for name, reader in too.items()}
        said.append(f"{_count(too)} quantized only where called: {_named(reasons)}")
    owners: dict[Tensor, str] = {}
    for name, module in model.named_modules():
        for tensor in module.parameters(recurse=False):
            owners.setdefault(tensor, name)
    apart = {p for name in (*chosen, *excluded) for p in model.get_submodule(name).parameters()}
    left: dict[str, int] = {}
    for tensor, name in owners.items():
        if tensor not in apart and not is_lazy(tensor):
            left[name] = left.get(name, 0) + tensor.numel()
    selected = sum(p.numel() for p in {p for name in chosen for p in model.get_submodule(name).parameters()})
    total = selected + sum(left.values())
    if selected < total / 2:
        largest = sorted(left, key=lambda name: -left[name])
        reasons = {
            name: f"{left[name] / total:.0%}: {floats.get(name) or unsupported(model.get_submodule(name))}"
            for name in largest
        }
        said.append(f"only {selected / total:.0%} of the weights are selected; the largest others: {_named(reasons)}")
    if said:
        warnings.warn("prepare: " + "; ".join(said) + ". report lists every layer.", stacklevel=3)


def _count(layers: Mapping[str, str]) -> str:
    return f"{len(layers)} layer{'s' if len(layers) > 1 else ''}"


def _named(reasons: Mapping[str, str]) -> str:
    names = list(reasons)
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f"{name or '(model)'} ({reasons[name]})" for name in names[:NAMED]) + more


def replace_modules(model: nn.Module, substitute: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Replaces each module, under all its names, by ``substitute(module)`` unless that is None; returns the root."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            new = None if child is None else substitute(child)
            if new is not None:
                parent._modules[name] = new
    root = substitute(model)
    return model if root is None else root
