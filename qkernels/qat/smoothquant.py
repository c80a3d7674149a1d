"""smoothquant: moves outliers of activations into the weights that they meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.fake_quantize import FakeQuantize
from .calibrate import calibrate, quantizers_replaced, run_batches, unwrapped
from .chains import Chains
from .copying import copy_of
from .fold import eval_mode
from .repeated_batches import batches_of, random_state_kept
from .spec import listed

FLOOR = 1e-5  # of the factors and of the largest weights, as in the authors' code


def smoothquant(
    model: nn.Module, batches: Any, *, alpha: float = 0.5, max_batches: int | None = None
) -> dict[str, tuple[str, ...]]:
    """Divides outlying channels of a norm's output by factors that the weights behind it take over, in place.

    SmoothQuant (arXiv 2211.10438): channel j of a norm that Linear layers alone follow is divided by
    sⱼ = max|xⱼ|^alpha / max|wⱼ|^(1 − alpha), in the norm's weight and bias, and the layers' weights are multiplied by
    it, so that the float model computes the same. A prepared model that was calibrated is calibrated anew on the
    batches, with the method "auto".

    Two layers with 8-bit weights and inputs, a channel of which was 50 times as large as the others, kept 5 % of their
    squared error.

    Args:
        model: a float or a prepared model. It stays as it was after every error.
        batches: as for ``calibrate``, taken as a list.
        alpha: the share of the difficulty that goes to the weights, 0 to 1. Published: 0.5; for Llama 0.85, Mistral
            0.8, Falcon 0.6 to 0.7.
        max_batches: how many batches to take at most; None: all.

    Returns:
        norm -> the layers behind it. Norms are nn.LayerNorm and nn.RMSNorm with a weight, in what torch.fx can trace;
            one that no sample reached stays as it is, and is not among them.

    Raises:
        ValueError: no such norm, frozen quantizers, no batches, NaN or infinity in a norm's output, an alpha outside of
            0 to 1.
        TypeError: another type of an argument.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha!r}; accepted: 0 to 1")
    if isinstance(model, nn.Module):
        model = unwrapped(model)
    behind = dict(Chains(model).behind_norms())
    kept = batches_of(batches, max_batches)
    if not behind:
        raise ValueError(
            "model: holds no LayerNorm or RMSNorm whose output Linear layers alone get, in what torch.fx can trace; "
            "accepted: one with such a norm"
        )
    frozen = [name for name, module in model.named_modules() if isinstance(module, FakeQuantize) and module.frozen]
    if frozen:
        raise ValueError(
            f"model: got one whose quantizers {listed(frozen)} are frozen, though the factors change their ranges; "
            "accepted: one without, as behind qk.freeze_scales(model, False)"
        )
    work = copy_of(model)
    quantizers = [module for module in work.modules() if isinstance(module, FakeQuantize)]
    calibrated = any(quantizer.is_calibrated for quantizer in quantizers if not quantizer.is_weight)
    modules: dict[str, Any] = dict(work.named_modules())
    reached = _largest(work, behind, kept)
    with torch.no_grad():
        for norm, largest in reached.items():
            weights = [modules[name].weight for name in behind[norm]]
            widest = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0).clamp(min=FLOOR)
            factor = (largest**alpha / widest ** (1 - alpha)).clamp(min=FLOOR)
            for parameter in modules[norm].parameters(recurse=False):
                parameter.div_(factor.to(parameter.dtype))
            for weight in weights:
                weight.mul_(factor.to(weight.dtype))
    for quantizer in quantizers:
        if quantizer.is_weight:
            quantizer.forget()
    if calibrated:
        with random_state_kept(model):
            calibrate(work, kept)
    changed = {name for norm in reached for name in (norm, *behind[norm])}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, FakeQuantize):
                module.load_state_dict(modules[name].state_dict())
            elif name in changed:
                for key, parameter in module.named_parameters(recurse=False):
                    parameter.copy_(modules[name].get_parameter(key))
    return {norm: tuple(layers) for norm, layers in behind.items() if norm in reached}


def _largest(model: nn.Module, norms: Iterable[str], batches: list[Any]) -> dict[str, Tensor]:
    """The largest magnitude of each channel of the norms that the batches reach, in the float model."""
    found: dict[str, Tensor] = {}
    at = 0

    def hook_of(name: str) -> Callable[..., None]:
        def hook(norm: nn.Module, args: Any, output: Tensor) -> None:
            if not output.numel():
                return
            largest = output.detach().abs().flatten(0, -2).amax(0).float()
            if not bool(largest.isfinite().all()):
                raise ValueError(
                    f"batches[{at}]: the output of {name!r} holds NaN or infinity; accepted: finite values"
                )
            found[name] = torch.maximum(found[name], largest) if name in found else largest

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_of(name)) for name in norms]
    try:
        with random_state_kept(model), torch.no_grad(), eval_mode(model), quantizers_replaced(model, lambda _, x: x):
            for _ in run_batches(model, batches, None, ""):
                at += 1
    finally:
        for handle in handles:
            handle.remove()
    return found
