"""prepare: replaces float layers by QAT layers."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..nn.fake_quantize import FakeQuantize
from ..nn.last_result import LastResult
from ..nn.learned_scale import MSE_BITS
from ..nn.own_forward import QATForward, Trial, product_weight
from ..nn.qat_classes import qat_class_of
from ..nn.qat_layer import SUFFIX, QATLayer, Role
from ..nn.qat_lazy import QATLazy
from ..nn.qat_lora import QATAdapted, has_adapters
from ..nn.qat_sequential import join
from ..nn.quantized import QuantizedLayer
from ..nn.quantized_parameters import VALUES, QATParameters
from .adapters import Adapters, deciding, find_adapters
from .config import QConfig, Rule, matches
from .copying import become, copy_of, is_sharded_model, replace_modules
from .equal_ranges import send_ranges
from .fold import eval_mode
from .presets import presets
from .selection import float_reason, unsupported
from .sharing import find_inputs
from .spec import QSpec, nearest
from .states import check_state
from .weight_readers import WeightReaders, find_weight_readers

Specs = dict[str, QSpec | None]
# The attribute by which torch's Transformer modules take their fused path, and where its value is kept.
FUSED_PATHS: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
SWITCHED_OFF = "fused_path_of_the_float_model"


@dataclass
class _Plan:
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


def prepare(model: nn.Module, config: QConfig | str | None = None, *, inplace: bool = False) -> nn.Module:
    """A copy of ``model`` whose layers train with fake quantization.

    Parameters keep their names. Weight quantizers start from the weights; input quantizers of kind "lsq" and "minmax"
    need ``calibrate`` before the first forward pass.

    Where torch.fx can trace the model, layers that get the same tensor and the same spec share its quantizer, which
    then computes once. A layer that gets an input of the model itself has a "minmax" quantizer for "lsq" above 4 bits,
    unless a rule for the layer gives "input": at these widths a learned range gains nothing, and to learn it costs the
    gradient of the data (a tenth of a ResNet-18's training step).

    In a Sequential, a ReLU in front of a layer is computed in one pass with the layer's input quantizer, with the same
    bits, unless a hook could see what is between them. RMSNorm stays apart, as its fused op rounds otherwise, and
    SiLU·mul is no module of torch: ``qk.rms_norm_fake_quantize_dynamic`` and ``qk.silu_mul_fake_quantize_dynamic`` are
    for a model's own forward.

    A subclass of a layer keeps its class as a base. Where it has its own forward, that must call the parent's by
    ``super().forward``. A subclass of Linear or a convolution may also compute its product itself: ``prepare`` tries it
    on the meta device, and quantizes it if its forward uses its weight in one product alone. The quantizers then act at
    each such product; if for another input the forward does something else with its weight, it gets the quantized
    values. A rule that names the type also takes a layer that cannot be tried, and one whose forward computes the
    product's weight from its own (standardizes it, say): the computed weight is then quantized. So is the weight that
    ``weight_norm``, ``spectral_norm``, pruning or another parametrization computes.

    A layer stays in float if its parent reads its weight instead of calling it; a rule that names the parameter
    (``("read.weight", {"weight": {}})``) quantizes it wherever it is read. nn.MultiheadAttention does so with its
    ``out_proj``, which is therefore quantized only if the attention is. nn.TransformerEncoderLayer and
    nn.TransformerEncoder call their layers, except on their fused paths, which the prepared model has switched off.

    Low-rank adapters (LoRA) stay in float, and what they adapt is quantized; or both are quantized as one weight
    (``QConfig(adapters="sum")``). A frozen weight keeps its quantizer's learned scale, which trains; set its
    requires_grad too to freeze it.

    A lazy layer gets the quantizers of its weight when its first batch, or a state_dict, shows the weight's shape;
    ``calibrate`` gives it one. Make the optimizer after that, as for every lazy layer.

    A warning names, with the reasons, the layers that config selects but that stay in float, and the other modules
    whose weights stay in float unless a rule leaves them there. ``report`` lists every layer.

    Args:
        model: a float model.
        config: which layers are quantized, and how: a ``QConfig``, a name of ``presets``, or None: ``QConfig()``.
        inplace: True: changes ``model`` itself, each module of which stays the same object, and returns it. False: the
            model stays as it was.

    Raises:
        ValueError: nothing to quantize, a model that is prepared already, a name in the rules that matches nothing,
            weights that are not finite, or a spec that a layer cannot take (the text names the layer). The model then
            stays as it was.
        TypeError: model is not a module, or config has another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}; accepted: a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: got a ScriptModule; accepted: the torch.nn.Module that it was made from")
    if isinstance(config, str):
        if config not in presets:
            raise ValueError(f"config: got {config!r}; accepted: {', '.join(presets)}{nearest(config, presets)}")
        config = presets[config]
    if config is not None and not isinstance(config, QConfig):
        hint = f"QConfig(weight={config})" if isinstance(config, QSpec) else "a QConfig such as QConfig(QSpec(bits=4))"
        raise TypeError(f"config: got {config!r}; accepted: {hint}, None")
    config = QConfig() if config is None else config
    done = [name for name, module in model.named_modules() if isinstance(module, FakeQuantize)]
    if done:
        raise ValueError(f"model: got one that is prepared already (it holds {done[0]!r}); accepted: a float model")
    shapeless = [name for name, buffer in model.named_buffers() if is_lazy(buffer)]
    if shapeless:  # torch cannot copy it
        raise ValueError(
            f"model: got one whose buffer {shapeless[0]!r} has no shape yet; accepted: a model whose BatchNorms know "
            "theirs, so call the model once, then prepare it"
        )
    if inplace and is_sharded_model(model):
        raise ValueError("inplace: got True with a model under fully_shard; accepted: False, or a call before sharding")
    _check_rules(model, config)
    readers = find_weight_readers(model)
    with eval_mode(model):  # in training mode, to read a weight under spectral_norm would change it
        plan = _plan(model, config, readers)
    if not plan.specs and not plan.parameters:
        integers = [name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]
        if integers:
            raise ValueError(f"model: got one that is converted already ({integers[0]!r}); accepted: a float model")
        raise ValueError(
            "model: holds no layer that config selects; accepted: a model with layers such as Linear or Conv2d that "
            "the rules do not leave in float" + (f" ({_named(plan.floats)})" if plan.floats else "")
        )
    prepared = model if inplace else copy_of(model)
    made = _quantized_layers(prepared, plan)
    _warn(model, plan, {name: reader for name, reader in readers.too.items() if name in plan.specs})
    if inplace:
        for layer, qat in made.items():
            become(layer, qat)
    else:
        prepared = replace_modules(prepared, made.get)
    leave_fused_paths(prepared)
    join(prepared)
    prepared.register_forward_hook(send_ranges)
    prepared.register_load_state_dict_pre_hook(check_state)
    return prepared


def _check_rules(model: nn.Module, config: QConfig) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in config.idle_rules(modules, parameters):
        if isinstance(pattern, str):
            raise ValueError(
                f"rules: {pattern!r} matches no module and no parameter of the model{nearest(pattern, modules)}"
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


def _plan(model: nn.Module, config: QConfig, readers: WeightReaders) -> _Plan:
    plan = _Plan(adapters=find_adapters(model, config))
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
    inputs = find_inputs(model, plain)
    for number, group in enumerate(inputs.groups):
        plan.groups.update(dict.fromkeys(group, number))
    for name in inputs.given:
        spec = plan.specs[name]["input"]
        if (
            spec is not None
            and spec.quantizer == "lsq"
            and spec.bits > MSE_BITS
            and not config.asks_for("input", name, modules[name])
        ):
            plan.specs[name]["input"] = dataclasses.replace(spec, quantizer="minmax", straight_through=None)
    return plan


def _plan_values(plan: _Plan, config: QConfig, name: str, module: nn.Module, known: bool) -> None:
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
        _check_kinds(name, {*VALUES, "weight"} if adapted else set(VALUES), rule)
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


def _quantized_layers(model: nn.Module, plan: _Plan) -> dict[nn.Module, QATLayer]:
    """The QAT layers that replace layers of ``model``, which stays as it is."""
    made: dict[nn.Module, QATLayer] = {}
    tied: dict[tuple[int, QSpec], FakeQuantize] = {}  # by the Parameter's id: one weight has one scale
    inputs: dict[tuple[int, QSpec, Role], FakeQuantize] = {}  # one tensor has one scale
    for name, specs in plan.specs.items():
        layer, cls, trial = model.get_submodule(name), plan.classes[name], plan.trials[name]
        quantizers: dict[str, FakeQuantize | None] = {}
        later = {}
        for key, role in cls.roles(layer).items():
            spec = specs[role.kind]
            if spec is None:
                continue
            if role.parameter and issubclass(cls, QATLazy):
                later[key] = f"{name}.{key}{SUFFIX}".removeprefix("."), spec.for_weight
                continue
            weight = _weight(layer, cls, role, trial)
            if key != "input" or name not in plan.groups:
                quantizers[key] = _quantizer(name, key, layer, role, spec, weight, tied)
                continue
            same = plan.groups[name], spec, role
            if same not in inputs:
                inputs[same] = _quantizer(name, key, layer, role, spec, None, tied)
            elif inputs[same].last is None:
                inputs[same].last = LastResult()
            quantizers[key] = inputs[same]
        try:
            made[layer] = cls.from_float(layer, **quantizers)
        except ValueError as error:
            raise ValueError(f"config, layer {name!r}: {error}") from None
        if isinstance(made[layer], QATForward):
            made[layer].trial = trial  # type: ignore[assignment]
        if later:
            made[layer].later = later  # type: ignore[assignment]
    for name, parameters in plan.parameters.items():
        module = model.get_submodule(name)
        found = {}
        for parameter, spec in parameters.items():
            role = QATParameters.role_of(module, parameter)
            weight = _weight(module, QATParameters, role, Trial())
            found[parameter] = _quantizer(name, parameter, module, role, spec, weight, tied)
        made[module] = QATParameters.of(module, found)
    return made


def _weight(layer: nn.Module, cls: type[QATLayer], role: Role, trial: Trial) -> Tensor | None:
    """The weight that a role's quantizer is for; None: it is for another tensor."""
    if not role.parameter:
        return None
    with torch.no_grad(), eval_mode(layer):
        return product_weight(layer) if trial.derives_weight else cls.float_weight(layer, role.parameter)


def _quantizer(
    name: str,
    key: str,
    layer: nn.Module,
    role: Role,
    spec: QSpec,
    weight: Tensor | None,
    tied: dict[tuple[int, QSpec], FakeQuantize],
) -> FakeQuantize:
    """The quantizer for one tensor of the layer; layers of one weight and one spec share the weight's."""
    parameter = shared = None
    if weight is not None:
        if not weight.is_meta and not bool(weight.isfinite().all()):
            raise ValueError(f"model: the {role.parameter} of {name!r} holds NaN or infinity; accepted: finite weights")
        parameter = layer._parameters.get(role.parameter)
        shared = tied.get((id(parameter), spec)) if weight is parameter else None
    if shared is not None:
        return shared
    try:
        quantizer = spec.for_values(role) if weight is None else spec.for_weight(weight, role.channel)
    except ValueError as error:
        raise ValueError(
            f"config, layer {name!r} ({type(layer).__name__}): {error}; a rule gives a layer its own spec, or None"
        ) from None
    quantizer.name = f"{name}.{key}{SUFFIX}".removeprefix(".")
    if weight is not None and quantizer.quantizer != "dynamic" and not weight.is_meta:
        quantizer.to(weight.device).start(weight)
    if weight is not None and weight is parameter:
        tied[id(parameter), spec] = quantizer
    return quantizer


def leave_fused_paths(model: nn.Module) -> None:
    """Makes torch's Transformer layers call their QAT layers in eval mode too, instead of reading their weights.

    torch itself sets both attributes when its fused path cannot serve; ``convert`` and copies keep them.
    """
    for module in model.modules():
        if not any(isinstance(inner, QATLayer) for inner in module.modules()):
            continue
        for kind, name in FUSED_PATHS.items():
            if isinstance(module, kind) and getattr(module, name):
                module.__dict__.setdefault(SWITCHED_OFF, getattr(module, name))
                setattr(module, name, type(getattr(module, name))(0))


def _warn(model: nn.Module, plan: _Plan, too: dict[str, str]) -> None:
    """Gives at most one warning: which layers stay in float, and why."""
    said = []
    if plan.floats:
        said.append(f"{_count(plan.floats)} that config selects stay in float: {_named(plan.floats)}")
    if too:
        reasons = {name: f"{reader} also reads its weight, and gets it in float" for name, reader in too.items()}
        said.append(f"{_count(too)} quantized only where called: {_named(reasons)}")
    if plan.alone:
        said.append(
            f"{_count(plan.alone)} whose parameter alone is quantized, because a rule names it and not the layer, so "
            f"that inputs and products stay in float: {_named(plan.alone)}"
        )
    apart = plan.adapters.apart
    if apart:
        said.append(f"{_count(apart)} with adapters that stay in float beside the base: {_named(apart)}")
    without = plan.adapters.without_dropout
    if without:
        said.append(f"the dropout of the adapters does not act, as it cannot in a sum: {', '.join(without)}")
    known = [model.get_submodule(name) for name in (*plan.specs, *plan.excluded, *plan.floats)]
    # What a parametrization computes a layer's weight from is the layer's own.
    parts = [layer.parametrizations for layer in known if parametrize.is_parametrized(layer)]
    counted = {id(p) for layer in known for p in layer.parameters(recurse=False)}
    counted |= {id(p) for part in parts for p in part.parameters()}  # type: ignore[union-attr, operator]
    others = {}
    for name, module in model.named_modules():
        left = {key: p for key, p in module._parameters.items() if p is not None and id(p) not in counted}
        left = {key: p for key, p in left.items() if key not in plan.parameters.get(name, ())}
        if any(is_lazy(p) or (p.dim() > 1 and p.is_floating_point()) for p in left.values()):
            others[name] = unsupported(module)
    if others:
        said.append(f"{_count(others)} that config does not select stay in float: {_named(others)}")
    if said:
        warnings.warn("prepare: " + "; ".join(said) + ". report lists every layer.", stacklevel=3)


def _count(layers: Mapping[str, str]) -> str:
    return f"{len(layers)} layer{'s' if len(layers) > 1 else ''}"


def _named(reasons: Mapping[str, str]) -> str:
    """All names; those with one reason together."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name or "(model)")
    return ", ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
