"""prepare: replaces float layers by QAT layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..nn.fake_quantize import FakeQuantize
from ..nn.last_result import LastResult
from ..nn.own_forward import QATForward, Trial, product_weight
from ..nn.qat_layer import SUFFIX, QATLayer, Role
from ..nn.qat_lazy import QATLazy
from ..nn.qat_sequential import join
from ..nn.quantized import QuantizedLayer
from ..nn.quantized_parameters import QATParameters
from ..nn.quantizer_rules import nearest
from .config import QConfig
from .copying import become, copy_of, is_sharded_model, replace_modules
from .equal_ranges import send_ranges
from .fold import eval_mode
from .plan import Plan, check_rules, plan_of
from .presets import presets
from .residual import may_hold_sums
from .selection import unsupported
from .spec import QSpec
from .states import check_state
from .weight_readers import find_weight_readers

# The attribute by which torch's Transformer modules take their fused path, and where its value is kept.
FUSED_PATHS: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
UNTRACED = "why_sums_are_float"  # attribute of a module whose own forward could not be traced, for report
SWITCHED_OFF = "fused_path_of_the_float_model"


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

    With ``QConfig(residual=…)`` the tensors between layers are quantized too. ``prepare`` traces the own forward of
    each module that is not torch's (its children are nodes) and lets it pass these through quantizers, its children
    ``add_fake_quant``, ``add_1_fake_quant``, ``cat_fake_quant``, …:

    - a sum of two activations or more, once for all its terms, behind the activation function that alone reads it
      (``relu(x + y)``); sums with parameters, buffers and numbers, and scores that a softmax reads, stay as they are;
    - of its operands all but the last computed one, unless they are quantized already (``add_input_fake_quant``);
    - a concatenation of activations; the input of an average pool or of a mean over several dims
      (``pool_input_fake_quant``; an average pool in a Sequential has ``input_fake_quant``).

    All that reads such a tensor gets the quantized one. A Linear or convolution behind it has the same quantizer and
    does not call it again; that quantizer then has the spec of the layer's input. A layer whose input has another
    width or granularity, or is "dynamic", keeps its own behind it. The forward is traced anew when a number, text or
    switch among the module's attributes, or the kind of an argument, is one that it has not had before. Where it
    cannot be traced, or a trace would not do what it does (it asks for types, sets attributes, draws random numbers,
    switches autocast or gradients, checkpoints activations), the module stays as it is, and a warning and ``report``
    name it with the reason.

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
    check_rules(model, config)
    readers = find_weight_readers(model)
    with eval_mode(model):  # in training mode, to read a weight under spectral_norm would change it
        plan = plan_of(model, config, readers)
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
    for name, reason in plan.residuals.reasons.items():
        prepared.get_submodule(name).__dict__[UNTRACED] = reason
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


def _quantized_layers(model: nn.Module, plan: Plan) -> dict[nn.Module, QATLayer]:
    """The QAT layers that replace layers of ``model``, which stays as it is."""
    made: dict[nn.Module, QATLayer] = {}
    tied: dict[tuple[int, QSpec], FakeQuantize] = {}  # by the Parameter's id: one weight has one scale
    inputs: dict[tuple[int, QSpec, Role], FakeQuantize] = {}  # one tensor has one scale
    made_before: dict[str, FakeQuantize] = {}  # the layer's quantizer acts where its input is made
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
            tensor = plan.residuals.layers.get(name) if key == "input" else None
            tensor = plan.residuals.same.get(tensor or "", tensor)
            if tensor is not None:
                if tensor not in made_before:
                    made_before[tensor] = _quantizer(*tensor.rpartition(".")[::2], layer, role, spec, None, tied)
                    made_before[tensor].at_source = True
                quantizers[key] = made_before[tensor]
                continue
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
    for name in dict.fromkeys((*plan.parameters, *plan.residuals.own, *plan.residuals.pools)):
        module = model.get_submodule(name)
        found = {}
        for parameter, spec in plan.parameters.get(name, {}).items():
            role = QATParameters.role_of(module, parameter)
            weight = _weight(module, QATParameters, role, Trial())
            found[parameter] = _quantizer(name, parameter, module, role, spec, weight, tied)
        for key in plan.residuals.roles_of(name):
            own = f"{name}.{key}".removeprefix(".")
            tensor = plan.residuals.same.get(own, own)
            if tensor not in made_before:
                dims = plan.residuals.feature_dims.get(tensor, 1)
                role, spec = Role("residual", feature_dims=dims, per_token=dims == 1), plan.residuals.specs[tensor]
                made_before[tensor] = _quantizer(name, key, module, role, spec, None, tied)
            if tensor != own:
                made_before[tensor].last = LastResult()
            found[key] = made_before[tensor]
        made[module] = QATParameters.of(module, found, plan.residuals.traced_forward(name, module))
    tensors = (*model.parameters(), *model.buffers())
    like = next((t for t in tensors if t.is_floating_point()), None)
    for module, layer in made.items():
        if like is not None and not any(True for _ in (*module.parameters(), *module.buffers())):
            for _, _, quantizer in layer.own_quantizers():
                quantizer.to(like.device, like.dtype)
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


def _warn(model: nn.Module, plan: Plan, too: dict[str, str]) -> None:
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
    reasons = {n: r for n, r in plan.residuals.reasons.items() if may_hold_sums(model.get_submodule(n))}
    if reasons:
        said.append(f"sums and pools in the forward of {_count(reasons, 'module')} stay in float: {_named(reasons)}")
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


def _count(layers: Mapping[str, str], what: str = "layer") -> str:
    return f"{len(layers)} {what}{'s' if len(layers) > 1 else ''}"


def _named(reasons: Mapping[str, str]) -> str:
    """All names; those with one reason together."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name or "(model)")
    return ", ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
