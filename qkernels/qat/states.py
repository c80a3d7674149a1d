"""Refuses the state of another model before any of it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..nn.fake_quantize import FakeQuantize
from ..nn.qat_layer import QATLayer
from ..nn.quantized import QuantizedLayer
from .spec import listed

# Modules with a loading of their own may take other shapes than they hold.
PLAIN = (nn.Module._load_from_state_dict, QATLayer._load_from_state_dict)


def check_state(model: nn.Module, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
    """A hook of prepared and converted models: torch itself would load what fits and raise afterwards.

    Raises:
        RuntimeError: a tensor of another shape, a quantizer of another width, or no key that the model has.
    """
    if prefix or not state:
        return
    known = {name.partition(".")[0] for name, _ in (*model.named_parameters(), *model.named_modules()) if name}
    if not isinstance(model, QuantizedLayer) and not any(key.partition(".")[0] in known for key in state):
        raise RuntimeError(
            f"state_dict: got one whose keys begin with {next(iter(state))!r}; accepted: that of this model, whose "
            f"keys begin with {next(iter(model.state_dict()))!r}. Nothing was loaded"
        )
    wrong = list(_differences(model, state))
    if wrong:
        raise RuntimeError(
            f"state_dict: got one of another model or config: {listed(wrong, '; ')}. Nothing was loaded; "
            "prepare (and convert) a model like the one that was saved, with its config"
        )


def _differences(model: nn.Module, state: Mapping[str, Any]) -> Iterator[str]:
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, FakeQuantize):
            bits, scale = state.get(prefix + "bits"), state.get(prefix + "scale")
            if bits is not None and int(bits) != module.bits:
                yield f"{prefix}bits: got a state of {int(bits)} bits; accepted: {module.bits} (qk.set_bits changes it)"
            if module.quantizer != "dynamic" and scale is not None and scale.shape != module.scale.shape:
                yield f"{prefix}scale: got shape {list(scale.shape)}; accepted: {list(module.scale.shape)}"
            elif module.quantizer != "dynamic" and scale is not None:
                own = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
                if fault := module.fault_of_state(own, scale):
                    yield f"{prefix}scale: {fault}"
        elif module is not model and module._load_state_dict_pre_hooks:
            continue  # which may change the state
        elif isinstance(module, QuantizedLayer):
            yield from module.given_in(state, prefix)[2]
        elif isinstance(module, QATLayer) and prefix + "codes_form" in state:
            yield f"{prefix}codes: got those of a converted layer; accepted: the state of a prepared or a float one"
        elif type(module)._load_from_state_dict in PLAIN:
            for key, own in (*module._parameters.items(), *module._buffers.items()):
                given = state.get(prefix + key)
                if own is None or not isinstance(given, Tensor) or is_lazy(own) or own.dim() == 0:
                    continue
                if key not in module._non_persistent_buffers_set and given.shape != own.shape:
                    yield f"{prefix}{key}: got shape {list(given.shape)}; accepted: {list(own.shape)}"


def remove_check(model: nn.Module) -> None:
    """Takes the hook off, from a model that has no quantizers any more."""
    for module in model.modules():  # a prepared model may be a part of this one
        hooks = module._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is check_state]:
            del hooks[key]
