"""ScaleTuning: trains the few floats of a converted model, while its weights stay integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.fake_quantize import FakeQuantize
from ..nn.int4 import Int4Linear
from ..nn.int8 import Int8Convolution, Int8Linear
from ..nn.int8_stateful import Int8Stateful
from ..nn.own_forward import ConvertedForward
from ..nn.qat_layer import QATLayer
from ..nn.quantized import QuantizedLayer
from .calibrate import unwrapped
from .layerwise import holders_of
from .spec import listed

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class ScaleTuning:
    """Final fine-tuning of a converted model: scales, biases and norms train, the weights stay the integers they are.

    ```
    tuning = qk.ScaleTuning(converted)
    optimizer = torch.optim.Adam(tuning.parameters(), lr=1e-3)
    for x, target in batches:
        optimizer.zero_grad()
        loss(converted(x), target).backward()
        optimizer.step()
        tuning.step()
    tuning.finish()
    ```

    Each output channel n of a Linear layer or a convolution on integers gets a parameter g: its weights' scales become
    start·exp(g), so that a step of Adam changes them by the share lr, whatever they are. The gradient is that of the
    layer, Σ dy·(y − bias); it goes on straight through the quantizers of the inputs, whose ranges stay, and through the
    dequantized weights. ``step``, called after each step of the optimizer, puts the new scales into the model, which
    then computes, saves, reports and runs in programs with them. Train in train or in eval mode: only dropout and
    BatchNorms that were not folded differ.

    Attributes:
        fixed: names of layers on integers whose scales stay: embeddings, the parts of recurrent layers, layers with a
            forward of their own, and those that share their weight.

    Args:
        model: from ``convert``. Biases and norms are the floating parameters of at most one dim, and those of torch's
            norms, that want a gradient; until ``finish``, no other parameter gets one.

    Raises:
        ValueError: the model is not converted, or is being tuned already.
        TypeError: model is not a module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrapped(checked(model))
        modules = list(self.model.modules())
        recurrent = {part for module in modules if isinstance(module, Int8Stateful) for part in module.modules()}
        holders = holders_of(self.model)
        sources = {id(other) for module in modules for other in getattr(module, "tied_to", ())}
        self._layers: dict[str, Any] = {}
        self.fixed: tuple[str, ...] = ()
        for name, layer in self.model.named_modules():
            if not isinstance(layer, QuantizedLayer):
                continue
            shares = bool(layer.tied_to) or id(layer) in sources or any(holders[id(t)] > 1 for t in scales_in(layer))
            if takes_gain(layer) and layer not in recurrent and not shares:
                self._layers[name] = layer
            else:
                self.fixed += (name,)
        self._starts = {name: layer.scale.detach().clone() for name, layer in self._layers.items()}
        self._trained = list(dict.fromkeys(p for module in self.model.modules() for p in small_parameters(module)))
        kept = set(self._trained)
        self._stopped = [p for p in self.model.parameters() if p.requires_grad and p not in kept]
        for parameter in self._stopped:
            parameter.requires_grad_(False)
            parameter.grad = None
        for layer in self._layers.values():
            layer.log_gain = nn.Parameter(torch.zeros(layer.scale.shape[0], device=layer.scale.device))

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer gets: the logarithms of the scales' factors, then biases and norms; it raises nothing."""
        return [*(layer._parameters["log_gain"] for layer in self._layers.values()), *self._trained]

    @torch.no_grad()
    def step(self) -> None:
        """Puts the scales that the optimizer's step has made into the model; it raises nothing."""
        for name, layer in self._layers.items():
            start, log_gain = self._starts[name], layer._parameters["log_gain"]
            layer.set_scale(start.float() * log_gain.exp().view(-1, *[1] * (start.dim() - 1)))

    def finish(self) -> None:
        """Ends the tuning: the model keeps the scales that it has, and its other parameters get gradients as before."""
        for layer in self._layers.values():
            del layer.log_gain
        for parameter in self._stopped:
            parameter.requires_grad_(True)
        self._layers, self._stopped = {}, []

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Of each layer the scales at the start, and the logarithms of their factors; it raises nothing."""
        return {
            name: {"start": self._starts[name].clone(), "log_gain": layer._parameters["log_gain"].detach().clone()}
            for name, layer in self._layers.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Goes on from a ``state_dict``; biases and norms are in the model's own.

        Raises:
            ValueError: state is that of other layers; nothing is loaded then.
        """
        for name, start in self._starts.items():
            given = state.get(name, {}) if isinstance(state, Mapping) else {}
            shapes = [tuple(given.get(key, torch.empty(0)).shape) for key in ("start", "log_gain")]
            if shapes != [tuple(start.shape), (start.shape[0],)]:
                raise ValueError(
                    f"state: got one without {name!r} as it is here; accepted: that of {listed(self._starts)}"
                )
        for name, layer in self._layers.items():
            self._starts[name].copy_(state[name]["start"])
            layer._parameters["log_gain"].copy_(state[name]["log_gain"])
        self.step()


def checked(model: Any) -> nn.Module:
    accepted = "accepted: what qk.convert(prepared) returns"
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}; {accepted}")
    if any(isinstance(m, QATLayer) and any(m.quantized_weights()) for m in model.modules()):
        raise ValueError(f"model: got one that is prepared and not converted; {accepted}")
    if not any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise ValueError(f"model: got one without layers on integers; {accepted}")
    if any("log_gain" in module._parameters for module in model.modules()):
        raise ValueError(f"model: got one that is being tuned; {accepted}, after finish()")
    return model


def takes_gain(layer: nn.Module) -> bool:
    """Whether the layer's result is its weight's product, plus the bias, with a scale for each output channel."""
    if isinstance(layer, ConvertedForward) or not isinstance(layer, Int8Linear | Int8Convolution | Int4Linear):
        return False
    return not (isinstance(layer, Int4Linear) and layer.offset == "minimum")


def scales_in(layer: nn.Module) -> list[Tensor]:
    return [t for name in ("scale", "packed_scale") if (t := layer._parameters.get(name)) is not None]


def small_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The biases, and the parameters of a norm, that a module itself holds and that want a gradient."""
    if isinstance(module, FakeQuantize):  # the ranges of activations
        return []
    names = ("bias",) if isinstance(module, QuantizedLayer) else tuple(module._parameters)
    held = [p for name in names if (p := module._parameters.get(name)) is not None and p.requires_grad]
    return [p for p in held if p.dim() <= 1 or isinstance(module, NORMS)]
