"""Layerwise: what methods of post-training quantization share, which change one layer after the other."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.fake_quantize import FakeQuantize
from ..nn.qat import QATConvolution, QATLinear
from ..nn.qat_layer import QATLayer, effective_weight
from ..nn.ranges import per_element, write
from .calibrate import call, check_module, quantizers_replaced, run_batches, unwrapped
from .convert import check_calibrated
from .copying import copy_of, is_sharded_model
from .fold import eval_mode
from .repeated_batches import batches_of, random_state_kept, seed
from .spec import listed
from .where import Where, chosen

# Their codes are integers times a scale that stays where it is set.
ROUNDED = ("lsq", "lsq+", "ewgs", "minmax", "stochastic")
PLAIN_FORWARDS = (QATLinear.forward, QATConvolution.forward)


class _Reached(BaseException):
    """The layer has had its last call of this batch; no model takes it for an error of its own."""


class Layerwise:
    """A copy of a prepared model, whose layers are changed one by one, and the float model beside it.

    The model itself changes in ``commit`` alone, so that it stays as it was on every error before.

    Attributes:
        model: the copy, in eval mode.
        names: of the layers that can be changed, in the order in which the model calls them first.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        where: Where,
        max_batches: int | None,
        float_model: nn.Module | None,
    ) -> None:
        check_module(model)
        if is_sharded_model(model):
            raise ValueError("model: got one under fully_shard; accepted: a call before sharding")
        check_calibrated(model)
        self.batches = batches_of(batches, max_batches)
        self.source = model = unwrapped(model)
        self.float_model = model if float_model is None else _with_weights_of(float_model, copy_of(model))
        self.model = copy_of(model).eval()
        found = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, QATLayer)}
        self.calls = self._count_calls(found)
        able = set(roundable(self.model))
        names = [name for name in self.calls if name in able]
        if not names:
            raise ValueError(
                "model: got one in which the batches reach no Linear layer or convolution with an own weight that "
                f"becomes integers times a fixed scale; accepted: one with some, of the quantizers {', '.join(ROUNDED)}"
            )
        self.names = chosen(where, names, "layers that can be changed")
        self.changed: dict[str, nn.Module] = {}
        if float_model is None and all(map(self._is_on_grid, self.names)):
            warnings.warn(
                f"{listed(self.names)}: the weights hold quantized values already, as behind qk.gptq, "
                "so that there is no error to make up for; begin with the trained weights, or give float_model, the "
                "model before qk.prepare, to a method that takes it",
                stacklevel=3,
            )

    @torch.no_grad()
    def _is_on_grid(self, name: str) -> bool:
        layer = self.layer(name)
        weight = layer.weight
        return bool(weight.any()) and torch.equal(layer.weight_fake_quant(weight), weight)

    def _count_calls(self, layers: dict[str, QATLayer]) -> dict[str, list[int]]:
        """How often each layer is called in each batch, in the order of the first calls."""
        calls: dict[str, list[int]] = {}
        batch = 0

        def hook_of(name: str) -> Callable[..., None]:
            def hook(layer: Any, args: Any) -> None:
                calls.setdefault(name, [0] * len(self.batches))[batch] += 1

            return hook

        handles = [layer.register_forward_pre_hook(hook_of(name)) for name, layer in layers.items()]
        try:
            with torch.no_grad(), random_state_kept(self.model):
                seed(_device(self.model))
                for _ in run_batches(self.model, self.batches, None, ""):
                    batch += 1
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def layer(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def inputs(self, name: str) -> list[Tensor]:
        """What the layer's product gets, all layers before it quantized, of each call."""
        layer = self.layer(name)
        found = []
        for x, _ in _record(self.model, name, self.batches, self.calls[name]):
            found.append(layer.passed("input", x))
            _check_finite(found[-1], f"batches: the input of layer {name!r}")
        return found

    def outputs(self, name: str) -> list[Tensor]:
        """What the layer returns, all layers up to it quantized, of each call."""
        return [y for _, y in _record(self.model, name, self.batches, self.calls[name])]

    def targets(self, name: str) -> list[Tensor]:
        """What the layer returns in the float model, of each call."""
        model = self.float_model
        with eval_mode(model), quantizers_replaced(model, lambda quantizer, x: x):
            found = [y for _, y in _record(model, name, self.batches, self.calls[name])]
        for y in found:
            _check_finite(y, f"batches: the output of layer {name!r} in float")
        return found

    @torch.no_grad()
    def set_weight(self, name: str, weight: Tensor) -> None:
        """Gives the copy's layer a weight on the grid of its quantizer, which stays where it is from here on."""
        set_weight(self.layer(name), weight, *self.layer(name).weight_fake_quant.qparams(self.layer(name).weight))
        self.changed[name] = self.layer(name)

    @torch.no_grad()
    def commit(self) -> None:
        """Changes the layers of the model as those of the copy were changed."""
        for name, layer in self.changed.items():
            own: Any = self.source.get_submodule(name)
            set_weight(own, layer.weight, *layer.weight_fake_quant.qparams())  # type: ignore[arg-type, union-attr, operator]


@torch.no_grad()
def _with_weights_of(float_model: nn.Module, prepared: nn.Module) -> nn.Module:
    """The prepared model with the parameters and buffers of the float one.

    The float model itself may compute without calling its layers, as torch's attention does.
    """
    check_module(float_model, "the model before qk.prepare, or None", "float_model")
    float_model = unwrapped(float_model)
    held = dict([*prepared.named_parameters(remove_duplicate=False), *prepared.named_buffers(remove_duplicate=False)])
    every = prepared.named_modules(remove_duplicate=False)  # layers that read one tensor share its quantizer
    quantizers = tuple(f"{name}." for name, module in every if isinstance(module, FakeQuantize))
    given = dict(
        [*float_model.named_parameters(remove_duplicate=False), *float_model.named_buffers(remove_duplicate=False)]
    )
    for key, t in held.items():
        if key.startswith(quantizers):
            continue
        if key not in given or given[key].shape != t.shape:
            got = f"of shape {list(given[key].shape)}" if key in given else "missing"
            raise ValueError(f"float_model: its {key!r} is {got}; accepted: the model before qk.prepare")
        t.copy_(given[key])
    return prepared


def set_weight(layer: Any, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
    quantizer: FakeQuantize = layer.weight_fake_quant
    scale = scale.clone()
    zero_point = None if zero_point is None else zero_point.clone()
    layer.weight.copy_(weight)
    quantizer.scale = scale
    if zero_point is not None:
        assert quantizer.zero_point is not None
        write(quantizer.zero_point, zero_point)


def grid_of(layer: Any) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each element of the layer's weight, fp32."""
    weight, quantizer = layer.weight.detach(), layer.weight_fake_quant
    scale, zero_point = quantizer.qparams(weight)
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point.float()
    return per_element(scale, weight).expand_as(weight), per_element(zero_point, weight).expand_as(weight)


def product(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's product with another weight, and its bias."""
    x = x.to(weight.dtype)  # under an autocast of the model's own they differ
    if isinstance(layer, QATLinear):
        return F.linear(x, weight, layer.bias)
    return layer._conv_forward(x, weight, layer.bias)  # type: ignore[no-any-return]


def _record(
    model: nn.Module, name: str, batches: Sequence[Any], calls: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(input, output) of each call of a layer; the model runs no further than to the last one in each batch."""
    layer = model.get_submodule(name)
    found: list[tuple[Tensor, Tensor]] = []
    left = 0

    def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal left
        x = args[0] if args else kwargs["input"]
        found.append((x.detach().clone(), output.detach().clone()))
        left -= 1
        if not left:
            raise _Reached

    # Before the user's hooks, which may change what the layer itself returns.
    handle = layer.register_forward_hook(hook, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad(), random_state_kept(model):
            seed(_device(model))
            for batch, left in zip(batches, calls, strict=True):  # the hook counts it down
                if left:
                    with contextlib.suppress(_Reached):
                        call(model, batch)
    finally:
        handle.remove()
    return iter(found)


def roundable(model: nn.Module) -> list[str]:
    """The layers of a prepared model whose weights can be rounded in another way than to the nearest."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QATLayer)}
    held = holders_of(model)
    return [name for name, layer in layers.items() if _is_roundable(layer) and held[id(layer.weight)] == 1]


def holders_of(model: nn.Module) -> Counter[int]:
    """How many modules, quantized or not, hold each parameter, by its id."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)


def _is_roundable(layer: QATLayer) -> bool:
    """Whether its one product is with its own parameter, which is rounded to integers times a fixed scale."""
    if not isinstance(layer, QATLinear | QATConvolution) or type(layer).forward not in PLAIN_FORWARDS:
        return False
    quantizer = layer.weight_fake_quant
    if quantizer is None or quantizer.quantizer not in ROUNDED:
        return False
    return effective_weight(layer) is layer._parameters.get("weight")


def _device(model: nn.Module) -> torch.device:
    return next((t.device for t in model.parameters()), torch.device("cpu"))


def _check_finite(x: Tensor, what: str) -> None:
    if not bool(x.isfinite().all()):
        raise ValueError(f"{what} holds NaN or infinity; accepted: batches whose values are finite")
