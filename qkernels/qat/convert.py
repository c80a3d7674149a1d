"""convert: replaces QAT layers by int8 and int4 layers that compute the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.fake_quantize import FakeQuantize
from ..nn.int8_stateful import Int8Stateful
from ..nn.integer_attention import IntegerMultiheadAttention
from ..nn.own_forward import QATForward, has_own_forward, with_forward_of
from ..nn.qat import QATConvolution, QATLinear
from ..nn.qat_attention import QATMultiheadAttention, projection_weights
from ..nn.qat_conv_transpose import QATConvTranspose
from ..nn.qat_embedding import QATTable
from ..nn.qat_layer import SUFFIX, QATLayer, bake_weight
from ..nn.qat_recurrent import QATStateful
from ..nn.qat_sequential import part
from ..nn.quantized import QuantizedLayer
from ..nn.replacing import take_over
from .calibrate import check_shapes, quantizers_of
from .copying import copy_of, replace_modules
from .equal_ranges import remove_sending
from .fold import Folds, factor_and_bias, find_folds
from .fuse import fuse
from .integer_convolution import integer_convolution, times
from .integer_layers import integer_attention, integer_embedding, integer_linear, integer_recurrent
from .selection import no_integers, to_int4
from .spec import listed
from .states import check_state, remove_check

BURNT_IN = "why_float"  # attribute of a converted layer whose float weights hold the quantized values, for report
FOLDED = "batch_norm_class"  # attribute of the Identity in place of a folded BatchNorm: the name of that one's class


def convert(model: nn.Module) -> nn.Module:
    """A copy of a prepared model, in eval mode, whose QAT layers run on the int8 and int4 kernels.

    Each layer computes what it computes in ``model`` in eval mode, up to the rounding of its final float sum. At a near
    tie such a last bit may flip a code of a later layer, which is a step of that layer's input. This is rare, and equal
    noise at the input does as much to ``model`` itself. Over 41 architectures the largest difference of any output was
    2e-2 of the largest output; the perplexity of a language model with 135M parameters went from 18.72 to 19.12.
    ``exact(model)`` evaluates the prepared model on the integers, with the numbers of the converted model.

    - A Linear layer whose weight has 4 bits or less becomes an ``Int4Linear``, at every granularity, with or without
      zero points; if its input is not quantized, the input stays in float (act_bits 16).
    - Linear layers of 5 to 8 bits and convolutions of 2 to 8, transposed ones too, become ``Int8Linear``,
      ``Int8Conv1d``, ``Int8ConvTranspose2d`` and so on, on int8 codes; if the input is not quantized (act_bits 16),
      they compute in float with the dequantized weight. If such a layer shares its weight with a float layer, it keeps
      that weight and quantizes it at each call, so that the file holds it once; if it shares it with a layer that gets
      the quantized values, both hold these as one Parameter.
    - An Embedding becomes an ``Int4Embedding`` if its weight has 4 bits or less, else an ``Int8Embedding``; an
      EmbeddingBag becomes an ``Int8EmbeddingBag``.
    - These layers keep the quantizers of their outputs.
    - An LSTM, GRU or RNN becomes an ``Int8LSTM``, ``Int8GRU`` or ``Int8RNN``, and their cells likewise. The product of
      the inputs runs on int8 codes if they are quantized; so does that of the hidden state, which a spec for "hidden"
      rounds to codes, and which else keeps 24 bits. Gates are computed in float.
    - A MultiheadAttention becomes an ``IntegerMultiheadAttention``, whose projections are such layers; softmax and
      products are computed in float.
    - Layers of one weight that get the same codes share them, in memory and in the file.
    - All other layers stay float layers, with the quantized values as their weights and with the quantizers of their
      inputs and states. ``report`` says why: no integer kernel for such a layer, values that are no integers times a
      scale, or a granularity that the kernels do not take (with int8 codes and a quantized input they take no groups
      and no zero point; at 4 bits or less they take groups that are a multiple of 8 and at least 16, or a whole row).
    - A BatchNorm (1d, 2d, 3d, SyncBatchNorm) that alone follows a convolution, transposed or not, is folded: in an
      integer layer into scales and bias (see ``QATConvolution``), in a float one into the quantized weights and the
      bias, where each weight is rounded once, to half a unit of its last place. It is not folded into a layer whose
      output is quantized, or whose input is not where there is an integer layer.

    In fp32 on the CPU activations stay int8 codes from layer to layer. ``convert`` traces the model with torch.fx, or
    the largest modules in it that can be traced, and gives them a ``forward`` that runs integer layers together with
    what lies between them (activations, BatchNorm, sums, pools, concatenations and moves), in one call of
    ``qkernels::int8_program`` each; ``report`` says what could not be traced. The module's own forward runs where
    somebody looks inside: with hooks, in training mode, in other dtypes, under autocast (see ``FusedForward``).

    Layers keep their names, hooks and whatever else was set on them. An Identity replaces a folded BatchNorm and
    takes over its hooks. These hooks see the BatchNorm's output as before, but also as their input; a hook of the
    convolution sees the normalized result. ``model`` itself is never changed.

    Raises:
        ValueError: not a prepared model; quantizers that are not calibrated (the text names some); weights that are not
            finite; or fake quantization that is switched off.
    """
    check_calibrated(model)
    converted = copy_of(model).eval()
    remove_sending(converted)
    remove_check(converted)
    bake_weights(converted)
    converted = fuse(replace_layers(converted, find_folds(converted)))
    converted.register_load_state_dict_pre_hook(check_state)
    return converted


def check_calibrated(model: nn.Module, weights_only: bool = False) -> None:
    check_shapes(model)
    quantizers = {name: q for name, q in quantizers_of(model).items() if q.is_weight or not weights_only}
    off = [name for name, quantizer in quantizers.items() if not quantizer.quantizes]
    if off:
        raise ValueError(
            f"model: fake quantization is switched off in {listed(off)}; accepted: one behind "
            "qk.enable_fake_quant(model)"
        )
    unknown = [repr(name) for name, quantizer in quantizers.items() if not quantizer.is_calibrated]
    if unknown:
        raise ValueError(
            f"model: {unknown[0]} is not calibrated"
            + (f", nor are {listed(unknown[1:])}" if unknown[1:] else "")
            + "; accepted: one behind qk.calibrate(model, batches) with batches that reach all of them; a rule of the "
            "QConfig leaves a layer in float"
        )


def bake_weights(model: nn.Module) -> None:
    """Makes plain weights in the QAT layers of a copy in eval mode (see ``bake_weight``)."""
    for layer in list(model.modules()):
        if isinstance(layer, QATLayer):
            bake_weight(layer)


def replace_layers(model: nn.Module, folds: Folds) -> nn.Module:
    """Replaces the QAT layers of ``model``, which is in eval mode, by integer layers and returns the model's root."""
    made: dict[nn.Module, nn.Module] = {}
    found = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, QATLayer) and any(layer.quantized_weights())
    ]
    for name, layer in found:
        for parameter, _ in layer.quantized_weights():
            weight = layer.unquantized(parameter)
            if not weight.is_meta and not bool(weight.isfinite().all()):  # integer codes cannot hold a NaN
                raise ValueError(f"model: the {parameter} of {name!r} holds NaN or infinity; accepted: finite weights")
    layers = [(name, layer) for name, layer in found if no_integers(layer) is None]
    reasons = {layer: reason for _, layer in found if (reason := no_integers(layer)) is not None}
    burnt = {_weight_and_quantizer(layer): name for name, layer in found if layer in reasons}
    shared = _float_weights(model, {layer for _, layer in found})
    for name, layer in layers:
        if isinstance(layer, QATMultiheadAttention):
            made[layer] = integer_attention(layer).eval()
            continue
        if isinstance(layer, QATStateful):
            made[layer] = integer_recurrent(layer).eval()
            continue
        if isinstance(layer, QATTable):
            made[layer] = integer_embedding(layer)
            continue
        assert isinstance(layer, QATLinear | QATConvolution | QATConvTranspose)
        if layer.input_fake_quant is None and not to_int4(layer):
            other = burnt.get(_weight_and_quantizer(layer))
            if other is not None:  # both hold one Parameter
                reasons[layer] = f"its weight is that of {other!r}, which stays in float"
                continue
            if id(layer.weight) in shared:
                continue
        if isinstance(layer, QATLinear):
            made[layer] = integer_linear(layer)
        else:
            norm = None
            if layer.input_fake_quant is not None:
                norm = _folded_norm(model, folds, name, made)
            made[layer] = integer_convolution(layer, norm)
            if isinstance(layer, QATForward):
                made[layer].__dict__["folded"] = norm is not None
    _tie(layers, made, _float_weights(model, {layer for _, layer in layers}))
    for source, new in made.items():
        if isinstance(source, QATLinear | QATConvolution | QATConvTranspose | QATTable):
            if source.output_fake_quant is not None:
                new.quantize_output(source.output_fake_quant)  # type: ignore[operator]
            made[source] = with_forward_of(take_over(new, source, own_names(source)).eval(), source)
    norms: dict[QATLayer, nn.Module | None] = {}
    for name, layer in found:
        if layer in reasons and isinstance(layer, QATConvolution | QATConvTranspose) and not _runs_own_forward(layer):
            norms[layer] = _folded_norm(model, folds, name, made)
    for layer, new in burnt_in(list(reasons), norms).items():
        made[layer] = new
        new.__dict__[BURNT_IN] = reasons[layer]
    for left in model.modules():
        if isinstance(left, QATLayer) and left not in made:
            for _, role, quantizer in left.own_quantizers():
                if role.kind != "weight":  # the range of a weight may follow it to the end
                    quantizer.disable_observer()
    part(model)
    return replace_modules(model, made.get)


def _weight_and_quantizer(layer: QATLayer) -> tuple[int, int]:
    """What tells whether two layers have the same quantized weight."""
    return id(getattr(layer, "weight", None)), id(layer.quantizer_of("weight"))


def _folded_norm(model: nn.Module, folds: Folds, conv: str, made: dict[nn.Module, nn.Module]) -> nn.Module | None:
    """The BatchNorm to fold into a convolution, if there is one; an Identity is made to replace it."""
    if conv not in folds.batch_norm_of:
        return None
    norm = model.get_submodule(folds.batch_norm_of[conv])
    made[norm] = identity_for(norm)
    return norm


def identity_for(norm: nn.Module) -> nn.Module:
    """What takes the place of a folded BatchNorm."""
    identity = take_over(nn.Identity(), norm, own_names(norm)).eval()
    identity.__dict__[FOLDED] = type(norm).__name__
    return identity


def _runs_own_forward(layer: QATLayer) -> bool:
    return isinstance(layer, QATForward) and has_own_forward(layer.own_class)


@torch.no_grad()
def burnt_in(
    layers: Sequence[QATLayer], norms: Mapping[QATLayer, nn.Module | None] | None = None
) -> dict[QATLayer, nn.Module]:
    """The layers with the values of the quantized weights in their float parameters; inputs stay quantized.

    norms: the BatchNorms behind convolutions, which are folded into the weight and bias. Each weight is the product of
    the quantized value and the factor, rounded once.
    """
    values: dict[tuple[int, int, int], nn.Parameter] = {}
    for layer in layers:
        for name, role, quantizer in list(layer.own_quantizers()):
            if role.kind != "weight":
                quantizer.disable_observer()
                continue
            weight, norm = layer.unquantized(role.parameter), (norms or {}).get(layer)
            key = id(weight), id(quantizer), id(norm)
            if key not in values:  # a quantizer that follows the weight takes its present range here
                value = quantizer(weight) if norm is None else _folded_weight(layer, weight, quantizer, norm)
                values[key] = nn.Parameter(value.detach().clone(), weight.requires_grad)
            layer._parameters[role.parameter] = values[key]
            del layer._modules[name + SUFFIX]
            layer.__dict__[name + SUFFIX] = None
    return {layer: layer.to_float() if layer.is_float() else layer for layer in layers}


def _folded_weight(layer: Any, weight: Tensor, quantizer: FakeQuantize, norm: nn.Module) -> Tensor:
    """The quantized weight of a convolution times the BatchNorm's factor; the layer gets the folded bias."""
    factor, bias = factor_and_bias(norm, layer.bias)
    wants_gradient = layer.bias is None or layer.bias.requires_grad
    layer._parameters["bias"] = nn.Parameter(bias.to(weight.dtype), wants_gradient)
    # The values that a quantizer gives for a half-precision tensor are rounded; those for its fp32 copy are not yet.
    half = weight.dtype in (torch.float16, torch.bfloat16)
    values = quantizer(weight.float() if half else weight).double()
    return times(layer, values, factor).to(weight.dtype)


def _tie(layers: Sequence[tuple[str, nn.Module]], made: dict[nn.Module, nn.Module], shared: set[int]) -> None:
    """Lets layers of one float weight share equal tensors; ``shared``: ids of weights that float layers hold too."""
    first: dict[tuple[int, int], QuantizedLayer] = {}
    for _, source in layers:
        for key, new in _weights(source, made.get(source)):
            new.weight_elsewhere = key[0] in shared or key in first
            if key in first:
                new.tie(first[key])
            first.setdefault(key, new)


def _weights(source: nn.Module, new: nn.Module | None) -> Iterator[tuple[tuple[int, int], QuantizedLayer]]:
    """The layers on integers made of ``source``, each with the id of its float weight and its place among its rows."""
    if isinstance(new, QuantizedLayer):
        yield (id(source.weight), 0), new
    elif isinstance(new, IntegerMultiheadAttention):
        names = projection_weights(source)
        for i, part in enumerate(new.projections):
            yield (id(getattr(source, names[i % len(names)])), i), part
    elif isinstance(new, Int8Stateful):
        for name, part in new.parts.items():
            yield (id(getattr(source, f"weight_{name}")), 0), part


def _float_weights(model: nn.Module, layers: set[nn.Module]) -> set[int]:
    """Ids of the parameters that modules other than ``layers`` and their quantizers hold."""
    return {
        id(p)
        for module in model.modules()
        if module not in layers and not isinstance(module, FakeQuantize)
        for p in module._parameters.values()
        if p is not None
    }


def own_names(layer: nn.Module) -> set[str]:
    """Names that every module of the layer's class has."""
    tensors = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    quantizers = {name + SUFFIX for name in type(layer).roles(layer)} if isinstance(layer, QATLayer) else set()
    return tensors | quantizers | set(getattr(layer, "__constants__", ()))
