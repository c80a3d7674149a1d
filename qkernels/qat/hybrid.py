"""hybrid: rounds the layers that bear it after training, and leaves the others to be trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..nn.fake_quantize import FakeQuantize
from ..nn.qat_layer import QATLayer
from .assign import Assignment, Costs, assign
from .calibrate import calibrate, unwrapped
from .config import QConfig
from .gptq import gptq
from .layerwise import roundable
from .prepare import prepare
from .repeated_batches import batches_of, random_state_kept
from .sensitivity import sensitivity
from .sensitivity_table import Sensitivity

Layers = tuple[str, ...]  # that have one width


@dataclass(frozen=True, repr=False)
class Hybrid:
    """A prepared model in which some layers are frozen; ``print`` says which, and at how many bits.

    Attributes:
        model: prepared and calibrated; the frozen layers are rounded.
        trained: layers left to train, the most sensitive first.
        frozen: layers whose parameters and quantizers stay as they are in training.
        plan: the widths.
        sensitivity: the scores that decided.
    """

    model: nn.Module
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    plan: Assignment
    sensitivity: Sensitivity

    def __repr__(self) -> str:
        def listed(layers: tuple[str, ...]) -> str:
            return ", ".join(f"{name or '(model)'} ({self._widths(name)})" for name in layers) or "none"

        return f"trained: {listed(self.trained)}\nfrozen: {listed(self.frozen)}"

    def _widths(self, name: str) -> str:
        bits = self.plan.bits.get(name, {})
        return " ".join(f"{letter}{bits[kind]}" for letter, kind in (("W", "weight"), ("A", "input")) if kind in bits)


def hybrid(
    model: nn.Module,
    batches: Iterable[Any],
    budget: float,
    *,
    cost: str | Costs = "bytes",
    share: float = 0.8,
    metric: str = "sqnr",
    bits: Sequence[int] = (8, 4, 3, 2),
    loss: Callable[[Any, Any], Any] | None = None,
    config: QConfig | str | None = None,
    max_batches: int | None = None,
) -> Hybrid:
    """A copy of a float model for a short training: the layers that hold most of the error train, the others are done.

    It measures ``sensitivity``, finds the widths by ``assign``, prepares and calibrates the model, and divides its
    layers: those with the largest scores that together hold ``share`` of the plan's summed score are left to be
    trained. The others are rounded by ``gptq`` where it takes them, and frozen: their parameters and those of their
    quantizers need no gradient, and neither training nor ``calibrate`` moves their ranges. Train ``found.model`` as any
    prepared model; ``parameter_groups`` leaves out what is frozen. BatchNorms train unless ``freeze_bn`` stops them.

    Args:
        model: a float model; it stays as it is.
        batches: as for ``sensitivity``.
        budget, cost: as for ``assign``.
        share: of the summed score, 0 to 1; at 0 all layers are frozen, at 1 those that have a score train.
        metric, bits, loss, config, max_batches: as for ``sensitivity``.

    Returns:
        A ``Hybrid``.

    Raises:
        ValueError: a prepared model, or a share outside of 0 to 1.
        ValueError, TypeError: as ``sensitivity`` and ``assign``.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ValueError(f"share: got {share!r}; accepted: 0 to 1")
    if isinstance(model, nn.Module) and any(isinstance(module, FakeQuantize) for module in model.modules()):
        raise ValueError("model: got one that is prepared; accepted: a float model")
    kept = batches_of(batches, max_batches)
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    found = sensitivity(model, kept, metric=metric, bits=bits, loss=loss, config=config)
    plan = assign(found, budget, cost=cost)
    prepared = prepare(model, plan.config)
    with random_state_kept(model):
        calibrate(prepared, kept)
    trained, frozen = _divided(found, plan, share)
    rounded = [name for name in roundable(prepared) if name in frozen]
    if rounded:
        gptq(prepared, kept, where=rounded)
    for name in frozen:
        _freeze(prepared.get_submodule(name))
    return Hybrid(prepared, trained, frozen, plan, found)


def _divided(found: Sensitivity, plan: Assignment, share: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The layers that hold the share of the summed score, the worst first, and the others."""
    scores: dict[tuple[str, ...], float] = {}
    for row in found.rows:
        own = plan.bits.get(row.layers[0], {}).get(row.tensor)
        # Beside a budget that narrows weights alone, inputs have the width of the config, which may not be a tried one.
        score = row.scores.get(own, 0.0) if own is not None else 0.0
        scores[row.layers] = scores.get(row.layers, 0.0) + max(score, 0.0)
    trained, frozen = holding(scores, share)
    return sum(trained, ()), sum(frozen, ())


def holding(scores: Mapping[Layers, float], share: float) -> tuple[list[Layers], list[Layers]]:
    """The fewest keys that hold the share of the sum of the scores, the largest first, and the others."""
    wanted = share * sum(scores.values())
    taken: list[Layers] = []
    left: list[Layers] = []
    held = 0.0
    for key in sorted(scores, key=lambda key: -scores[key]):
        (taken if held < wanted else left).append(key)
        held += scores[key]
    return taken, left


def _freeze(layer: nn.Module) -> None:
    for parameter in layer.parameters(recurse=False):
        parameter.requires_grad_(False)
    if parametrize.is_parametrized(layer):  # its tensors are computed from parameters of modules inside it
        layer.parametrizations.requires_grad_(False)  # type: ignore[union-attr, operator]
    if isinstance(layer, QATLayer):
        for _, _, quantizer in layer.own_quantizers():
            quantizer.requires_grad_(False)
            quantizer.freeze()
