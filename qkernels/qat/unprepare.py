"""unprepare: the float model back from a prepared one."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..nn.qat_layer import QATLayer
from ..nn.qat_lazy import lazy_hooks
from ..nn.qat_sequential import part
from .batch_norm import freeze_bn
from .calibrate import quantizers_of
from .convert import bake_weights, burnt_in, check_calibrated
from .copying import become, copy_of, replace_modules
from .equal_ranges import remove_sending
from .prepare import FUSED_PATHS, SWITCHED_OFF, UNTRACED
from .states import remove_check


def unprepare(model: nn.Module, *, burn_in: bool = False, inplace: bool = False) -> nn.Module:
    """The float model that ``model`` was prepared from, with the weights as they are now.

    Layers have their former classes, names, hooks and modes; their parameters are the trained ones. BatchNorms that
    ``freeze_bn`` froze are ordinary ones again.

    Args:
        model: from ``prepare``.
        burn_in: True: the parameters hold the values to which the quantizers of the weights round them; what
            weight_norm, pruning and the like compute becomes a plain parameter. Inputs and states are not quantized any
            more. False: the parameters are those that the optimizer trains.
        inplace: True: changes ``model`` itself, each module of which stays the same object, and returns it; with
            burn_in the quantized parameters are new tensors. False: a copy; ``model`` stays as it was.

    Raises:
        ValueError: the model has no quantizers; with burn_in: its fake quantization is switched off.
    """
    quantizers_of(model)
    if burn_in:
        check_calibrated(model, weights_only=True)
    result = model if inplace else copy_of(model)
    remove_sending(result)
    remove_check(result)
    part(result)
    freeze_bn(result, frozen=False)
    modes = [(module, module.training) for module in result.modules()]
    if burn_in:
        result.eval()  # so that weights are quantized without moving a range
        bake_weights(result)
        burnt_in([layer for layer in result.modules() if isinstance(layer, QATLayer)])
    made: dict[nn.Module, nn.Module] = {
        layer: layer.to_float() for layer in result.modules() if isinstance(layer, QATLayer)
    }
    if inplace:
        for layer, float_layer in made.items():
            become(layer, float_layer)
            if isinstance(layer, LazyModuleMixin):
                lazy_hooks(layer)
    else:
        result = replace_modules(result, made.get)
    for module, training in modes:
        made.get(module, module).training = training
    for module in result.modules():
        module.__dict__.pop(UNTRACED, None)
        for kind, name in FUSED_PATHS.items():
            if isinstance(module, kind) and SWITCHED_OFF in vars(module):
                setattr(module, name, vars(module).pop(SWITCHED_OFF))
    return result
