"""What a training loop needs of a prepared model: parameter groups, and switches of its quantizers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.fake_quantize import FakeQuantize
from ..nn.learned_scale import keep_inside
from ..nn.qat_layer import QATLayer, effective_weight
from .calibrate import check_module, check_shapes, quantizers_of
from .fold import eval_mode
from .spec import check_frozen, check_type
from .where import Where, chosen


def parameter_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Two groups for a torch optimizer: the model's own parameters, and those of its quantizers without weight decay.

    ``torch.optim.AdamW(qk.parameter_groups(model, lr=1e-4, weight_decay=0.01))``. Weight decay would pull a learned
    scale back to its start and a zero point to zero. Both groups have the learning rate lr, of which a scale moves by a
    fraction (see ``FakeQuantize``); a schedule acts on both. Parameters that need no gradient are in neither group.

    Args:
        model: from ``prepare``; a float model gives an empty second group.
        lr: learning rate of both groups.
        weight_decay: weight decay of the model's own parameters.

    Returns:
        Two dicts, as any torch optimizer takes them.

    Raises:
        TypeError: model is not a module.
    """
    check_module(model, "a torch.nn.Module")
    own = {id(p) for module in model.modules() if isinstance(module, FakeQuantize) for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in own], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in own], "lr": lr, "weight_decay": 0.0},
    ]


def freeze_observers(model: nn.Module, frozen: bool = True, where: Where = "*") -> list[str]:
    """Stops everything that moves the ranges of a prepared model in training, in place.

    This stops the averages of "ema" quantizers, the ranges of followed weights, the growth of input ranges with a
    learned scale, and starts from a first batch. A followed weight keeps its present range, so the model computes the
    same in eval mode. Learned scales go on learning; ``freeze_scales`` stops that too. ``calibrate`` leaves what is
    frozen as it is, and ``set_bits`` keeps its range.

    Args:
        model: from ``prepare``.
        frozen: False undoes it; ranges that were set by hand, and not frozen here, move then too. A state_dict holds
            the switch.
        where: as in ``set_bits``.

    Returns:
        The names of the quantizers that changed.

    Raises:
        ValueError: the model has no quantizers, lazy layers that have not run yet, or none of the names that where
            asks for.
        TypeError: frozen is no bool, or where no text or list of texts.
    """
    check_frozen(frozen)
    quantizers = _chosen_quantizers(model, where)
    changed = {name: q for name, q in quantizers.items() if q.observes == frozen or q.frozen != frozen}
    if frozen:  # the weights may have changed since a forward pass in training mode
        _on_weights(model, set(changed.values()), FakeQuantize.follow)
    for quantizer in changed.values():
        quantizer.freeze(frozen)
    return list(changed)


def freeze_scales(model: nn.Module, frozen: bool = True, where: Where = "*") -> list[str]:
    """Fixes the grid of the quantizers of a prepared model, in place, while the weights train on.

    This is ``freeze_observers``, and learned scales, zero points and levels get no gradient any more, so that an
    optimizer that already has them leaves them alone. The usual end of a training at few bits: what the last steps
    learn then fits the very grid that ``convert`` stores. With ``enable_fake_quant(model, False)`` as well the weights
    train in float, and ``enable_fake_quant(model)`` rounds them to the frozen grid.

    A "dynamic" quantizer has no scale that could be frozen: it goes on taking the range of the tensor at hand.

    Args:
        model: from ``prepare``.
        frozen: False undoes it. A state_dict holds the observers' switches, and not which parameters get gradients; a
            file of ``save`` holds both.
        where: as in ``set_bits``.

    Returns:
        The names of the quantizers that changed.

    Raises:
        ValueError, TypeError: as ``freeze_observers``.
    """
    changed = set(freeze_observers(model, frozen, where))
    quantizers = _chosen_quantizers(model, where)
    for name, quantizer in quantizers.items():
        if quantizer.learns:  # the optimizer's last step may have moved it out
            keep_inside(quantizer.zero_point, quantizer.quant_min, quantizer.quant_max)
        for parameter in quantizer.parameters():
            if parameter.requires_grad == frozen:
                parameter.requires_grad_(not frozen)
                parameter.grad = None  # with one that is left over an optimizer would go on moving it
                changed.add(name)
    return [name for name in quantizers if name in changed]


@torch.no_grad()
def _on_weights(
    model: nn.Module, quantizers: Collection[FakeQuantize], change: Callable[[FakeQuantize, Tensor], None]
) -> None:
    """Calls change on those that are of weights with what they get; twice if two layers share them."""
    with eval_mode(model):
        for layer in model.modules():
            if isinstance(layer, QATLayer):
                for name, quantizer in layer.quantized_weights():
                    if quantizer in quantizers:
                        change(quantizer, effective_weight(layer, name))


def enable_fake_quant(
    model: nn.Module, enabled: bool | None = None, *, weights: bool | None = None, inputs: bool | None = None
) -> list[str]:
    """Switches quantizers of a prepared model on or off, in place; a quantizer that is off still observes.

    ``enable_fake_quant(model, False)`` switches all off, ``enable_fake_quant(model, weights=False)`` those of weights.

    Args:
        model: from ``prepare``.
        enabled: whether the quantizers quantize; if not, they return their input. None: True, unless weights or inputs
            is given. A state_dict holds the switches.
        weights: the same for the quantizers of weights alone; None: as ``enabled``, which leaves them as they are if it
            is None beside ``inputs``.
        inputs: the same for all other quantizers: of inputs, outputs and states.

    Returns:
        The names of the quantizers that changed.

    Raises:
        ValueError: the model has no quantizers, or lazy layers that have not run yet.
        TypeError: an argument of another type.
    """
    check_shapes(model)
    for name, value in (("enabled", enabled), ("weights", weights), ("inputs", inputs)):
        if value is not None:
            check_type(name, value, bool, "True, False or None")
    if enabled is None and weights is None and inputs is None:
        enabled = True
    changed = []
    for name, quantizer in quantizers_of(model).items():
        wanted = weights if quantizer.is_weight else inputs
        wanted = enabled if wanted is None else wanted
        if wanted is not None and wanted != quantizer.quantizes:
            quantizer.enable_fake_quant(wanted)
            changed.append(name)
    return changed


def set_bits(model: nn.Module, bits: int, where: Where = "*") -> list[str]:
    """Changes the width of quantizers of a prepared model in place, and the ranges of learned scales with it.

    A range that is good at 8 bits is too wide at 2. Where a scale is learned, and neither frozen nor set by hand,

    - a weight's range at 4 bits and less becomes the one with the smallest squared error, one search over its values as
      in ``calibrate``, and above 4 bits that of the values;
    - an input's range changes by the ratio that the best ranges of Gaussian values have at the two widths, for which
      see ``FakeQuantize.set_bits``: behind a ReLU by 0.69 from 8 to 4 bits, and by 0.68 from 4 to 2. The way back
      undoes it.

    All other ranges stay. Nothing is compiled for it or moves in memory.

    Args:
        model: from ``prepare``.
        bits: 2 to 8.
        where: a glob, or a list of globs, on the names of quantizers, such as ``"*.weight_fake_quant"`` or
            ``"layer1.*"``.

    Returns:
        The names of the quantizers that changed.

    Raises:
        TypeError: bits is no int, or where no text or list of texts.
        ValueError: lazy layers that have not run yet, bits other than 2 to 8, a width that a quantizer does not take,
            or a glob that no quantizer's name matches. The model then stays as it was.
    """
    quantizers = _chosen_quantizers(model, where)
    check_type("bits", bits, int, "2 to 8")
    check_widths(quantizers, dict.fromkeys(quantizers, bits))
    changed = {name: quantizer for name, quantizer in quantizers.items() if quantizer.bits != bits}
    change_widths(model, dict.fromkeys(changed.values(), bits))
    return list(changed)


def _chosen_quantizers(model: nn.Module, where: Where) -> dict[str, FakeQuantize]:
    check_shapes(model)
    quantizers = quantizers_of(model)
    return {name: quantizers[name] for name in chosen(where, quantizers, "quantizers")}


def check_widths(quantizers: Mapping[str, FakeQuantize], widths: Mapping[str, int]) -> None:
    """Raises ValueError if a quantizer does not take its width, before any changes.

    The way back would lose what is rounded or forgotten.
    """
    for name, bits in widths.items():
        try:
            quantizers[name].check_width(bits)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def change_widths(model: nn.Module, widths: Mapping[FakeQuantize, int]) -> None:
    """Gives quantizers of the model widths that they take."""

    def change(quantizer: FakeQuantize, weight: Tensor) -> None:
        quantizer.follow(weight)
        quantizer.set_bits(widths[quantizer], weight)

    _on_weights(model, widths.keys(), change)
    for quantizer, bits in widths.items():
        quantizer.set_bits(bits)
