"""What ``prepare`` is going to do to each layer: the rules of the config, applied to a model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ..nn.granularity import PerTensor, PerToken
from ..nn.learned_scale import MSE_BITS
from ..nn.own_forward import Trial
from ..nn.qat import QATConv1d, QATConv2d, QATConv3d, QATLinear
from ..nn.qat_classes import qat_class_of
from ..nn.qat_conv_transpose import QATConvTranspose1d, QATConvTranspose2d, QATConvTranspose3d
from ..nn.qat_layer import QATLayer, Role
from ..nn.qat_lora import QATAdapted, has_adapters
from ..nn.quantized_parameters import VALUES
from ..nn.quantizer_rules import nearest
from .adapters import Adapters, deciding, find_adapters
from .config import QConfig, Rule, matches
from .residual import Residuals, find_residuals, tensor_name
from .selection import float_reason
from .sharing import find_inputs
from .spec import QSpec
from .weight_readers import WeightReaders

Specs = dict[str, QSpec | None]
# Layers whose forward hands its input to the quantizer, and does nothing else with it.
TAKERS = (
    *(QATLinear, QATConv1d, QATConv2d, QATConv3d),
    *(QATConvTranspose1d, QATConvTranspose2d, QATConvTranspose3d),
)


@dataclass
class Plan:
    """What ``prepare`` is going to do, found before anything changes."""

    specs: dict[str, Specs] = field(default_factory=dict)  # layer -> the spec of each kind of tensor
    classes: dict[str, type[QATLayer]] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)  # layer -> number of the tensor that it shares as its input
    parameters: dict[str, dict[str, QSpec]] = field(default_factory=dict)  # module -> parameter -> spec
    floats: dict[str, str] = field(default_factory=dict)  # layer that the config selects -> why it stays in float
    excluded: set[str] = field(default_factory=set)
    alone: dict[str, str] = field(default_factory=dict)  # layer -> its parameters that a rule names instead of it
    results: set[str] = field(default_factory=set)  # layers whose result is that of their parent, which quantizes it
    adapters: Adapters = field(default_factory=Adapters)
    residuals: Residuals = field(default_factory=Residuals)  # of sums, concatenations and pools in other modules


def check_rules(model: nn.Module, config: QConfig) -> None:
    """Refuses rules that would do nothing.

    Raises:
        ValueError: a name that matches nothing, a layer's second name alone, or a container instead of its layers.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in config.idle_rules(modules, parameters):
        if isinstance(pattern, str):
            raise ValueError(
                f"rules: {pattern!r} matches no module and no parameter of the model"
                + nearest(pattern, (*modules, *parameters))
            )
        warnings.warn(f"rules: {pattern.__name__} matches no module of the model", stacklevel=3)
    first = {module: name for name, module in model.named_modules()}
    for pattern, overrides in config.rules:
        found = {name: module for name, module in modules.items() if matches(pattern, name, module)}
        others = {name: first[module] for name, module in found.items() if first[module] != name}
        if found and len(others) == len(found):
            name = next(iter(others))
            raise ValueError(
                f"rules: {pattern!r} matches {name!r}, another name of {others[name]!r}; accepted: that one"
            )
        inside = [_idle_inside(name, module, found) for name, module in found.items()]
        if overrides is None and inside and all(inside):
            text = (
                f"rules: {pattern if isinstance(pattern, type) else repr(pattern)} leaves no layer in float, as it "
                f"matches {next(iter(found))!r} and not the layers inside, such as {inside[0]!r}"
            )
            if isinstance(pattern, str):
                raise ValueError(f"{text}; accepted: a pattern for these, such as {pattern + '.*'!r}")
            warnings.warn(text, stacklevel=3)


def _idle_inside(name: str, module: nn.Module, found: Mapping[str, nn.Module]) -> str | None:
    """A layer inside a mere container that a rule for the container does not reach; None: there is none."""
    if qat_class_of(module) is not None or any(p.dim() > 1 for p in module.parameters(recurse=False) if not is_lazy(p)):
        return None
    if has_adapters(module):
        return None
    layers = (inner for inner, layer in module.named_modules(prefix=name) if qat_class_of(layer) is not None)
    return next((inner for inner in layers if inner not in found), None)


def plan_of(model: nn.Module, config: QConfig, readers: WeightReaders) -> Plan:
    """What the config makes of each layer of a model in eval mode, which stays as it is."""
    plan = Plan(adapters=find_adapters(model, config))
    adapters = plan.adapters
    bases = (set(adapters.sums.values()) - set(adapters.sums)) | adapters.left
    cross = {layer.multihead_attn for layer in model.modules() if isinstance(layer, nn.TransformerDecoderLayer)}
    left: dict[str, set[str]] = {}  # module -> parameters that rules leave in float
    for name, spec in config.parameter_specs(model).items():
        owner, _, parameter = name.rpartition(".")
        if spec is not None:
            plan.parameters.setdefault(owner, {})[parameter] = spec
        else:
            left.setdefault(owner, set()).add(parameter)
    for name, module in model.named_modules():
        cls: type[QATLayer] | None = QATAdapted if name in adapters.sums else qat_class_of(module)
        own_name = (config.rule_of(name, module) or ("",))[0] == name
        if name in bases or (name in adapters.parts and not own_name):
            plan.excluded.add(name)
            continue
        if cls is None or name in plan.parameters:
            if cls is not None and name not in readers.too and float_reason(name, module, cls, readers)[0] is None:
                plan.alone[name] = ", ".join(plan.parameters[name])
            _plan_values(plan, config, name, module, known=cls is not None)
            continue
        known_as = deciding(config, model, name, adapters.sums[name]) if name in adapters.sums else (name, module)
        like = {role.kind: role.like for role in cls.roles(module).values()}
        specs = {kind: spec for kind, spec in config.specs(known_as[0], known_as[1], like).items() if kind in like}
        _check_kinds(name, set(like), config.rule_of(*known_as))
        if _leaves_weights(name, cls.roles(module), left.get(name, set())):
            specs["weight"] = None
        if isinstance(module, nn.MultiheadAttention) and not (
            module in cross or not module._qkv_same_embed_dim or config.asks_for("memory", name, module)
        ):
            specs["memory"] = None
        if name in plan.results:
            specs["output"] = None
        if not any(specs.values()):
            plan.excluded.add(name)
            continue
        reason, trial = float_reason(name, module, cls, readers)
        asked = trial.reason is not None and not trial.refused and config.names_type_of(name, module)
        if reason is None or asked:
            plan.specs[name], plan.classes[name], plan.trials[name] = specs, cls, trial
            if isinstance(module, nn.MultiheadAttention):
                called = f"{name}.out_proj".removeprefix(".")
                readers.calls(called)
                if specs["output"] is not None:
                    plan.results.add(called)
        else:
            plan.floats[name] = reason
    # A forward of its own may hand its product another input than it got.
    modules = {name: model.get_submodule(name) for name in plan.specs if plan.specs[name].get("input")}
    plain = [name for name, module in modules.items() if type(module).forward is plan.classes[name].float_class.forward]
    plan.residuals = residuals = _residuals_of(plan, config, model, plain)
    inputs = find_inputs(residuals.marked(model), [*plain, *residuals.quantizer_names()])
    for number, group in enumerate(inputs.groups):
        plan.groups.update({name: number for name in group if name in modules})
        _share(plan, [tensor_name(name) for name in group if name not in modules])
    for name in inputs.given:
        tensor = tensor_name(name)
        if tensor in residuals.specs:
            residuals.specs[tensor] = _calibrated(residuals.specs[tensor])
        elif not config.asks_for("input", name, modules[name]):
            plan.specs[name]["input"] = _calibrated(plan.specs[name]["input"])
    return plan


def _calibrated(spec: Any) -> Any:
    """The spec for an input of the model, which needs no gradient: to learn its scale would ask for one."""
    if spec is None or spec.quantizer != "lsq" or spec.bits <= MSE_BITS:
        return spec
    if isinstance(spec.granularity, PerToken):
        return spec  # which is refused, in the user's words
    return dataclasses.replace(spec, quantizer="minmax", straight_through=None)


def _residuals_of(plan: Plan, config: QConfig, model: nn.Module, plain: list[str]) -> Residuals:
    """The tensors between layers that the config quantizes. A layer that reads one of them leaves that to its maker.

    A layer whose input has another width, or a range of its own at every call, quantizes it again.
    """
    wanted = config.residual is not None or any("residual" in (overrides or {}) for _, overrides in config.rules)
    if not wanted:
        return Residuals()
    known = {*plan.specs, *plan.excluded, *plan.floats, *plan.adapters.parts, *plan.adapters.parts.values()}

    def spec_of(name: str, module: nn.Module) -> QSpec | None:
        return None if name in known else config.specs(name, module)["residual"]

    takers = [name for name in plain if plan.classes[name] in TAKERS]
    own_inputs = {name for name, specs in plan.parameters.items() if "input" in specs}
    residuals = find_residuals(model, spec_of, takers, lambda name: name not in own_inputs)
    for name, tensor in list(residuals.layers.items()):
        spec, other = plan.specs[name]["input"], residuals.specs[tensor]
        first = next(each for each, source in residuals.layers.items() if source == tensor)
        if spec is None or not _is_alike(spec, other) or spec != plan.specs[first]["input"]:
            del residuals.layers[name]
    return residuals


def _share(plan: Plan, tensors: list[str]) -> None:
    """Gives a tensor that enters several modules one quantizer, if all of them give it the same spec."""
    residuals = plan.residuals

    def specs(tensor: str) -> tuple[QSpec, QSpec | None]:
        layer = next((name for name, source in residuals.layers.items() if source == tensor), None)
        return residuals.specs[tensor], None if layer is None else plan.specs[layer]["input"]

    alike = [tensor for tensor in tensors if specs(tensor) == specs(tensors[0])]
    residuals.same.update(dict.fromkeys(alike[1:], "".join(alike[:1])))


def _is_alike(spec: QSpec, other: QSpec) -> bool:
    plain = all(each.granularity in (None, PerTensor()) and each.quantizer != "dynamic" for each in (spec, other))
    return plain and spec.bits == other.bits


def _plan_values(plan: Plan, config: QConfig, name: str, module: nn.Module, known: bool) -> None:
    """Adds the input and the output of a module of another class, if the rule that decides names it or its class.

    Of one with adapters and a weight of its own, adds the weight too, as the config says for all layers.
    """
    rule = config.rule_of(name, module)
    adapted = name in plan.adapters.own_weight
    if adapted and name not in plan.parameters:
        weight = config.specs(name, module)["weight"]
        if weight is None:
            plan.excluded.add(name)
        else:
            plan.parameters[name] = {"weight": weight}
    if rule is None or rule[1] is None or not (rule[0] == name or rule[0] is type(module)):
        return
    if not known:
        _check_kinds(name, {*VALUES, "residual", *(("weight",) if adapted else ())}, rule)
    specs = config.specs(name, module)
    for kind in VALUES:
        spec = specs[kind]
        if kind in rule[1] and spec is not None:
            plan.parameters.setdefault(name, {})[kind] = spec


def _check_kinds(name: str, kinds: set[str], rule: Rule | None) -> None:
    """Refuses a rule for this very layer, or for layers of its class, that names a tensor which the layer has not."""
    if rule is None or rule[1] is None or not (rule[0] == name or isinstance(rule[0], type)):
        return
    for kind in rule[1]:
        if kind not in kinds:
            raise ValueError(
                f"config, layer {name!r}: a rule gives {kind!r}; accepted for this layer: {', '.join(sorted(kinds))}"
            )


def _leaves_weights(name: str, roles: Mapping[str, Role], left: set[str]) -> bool:
    """Whether rules leave the layer's weights in float by their own names; they have one spec, so it is all or none."""
    weights = [role.parameter for role in roles.values() if role.kind == "weight"]
    kept = [parameter for parameter in weights if parameter not in left]
    if kept and len(kept) < len(weights):
        raise ValueError(
            f"config, layer {name!r}: a rule leaves {min(left & set(weights))!r} in float and not {kept[0]!r}; "
            'accepted: all weights of the layer, or a rule for the layer such as {"weight": None}'
        )
    return bool(weights) and not kept
