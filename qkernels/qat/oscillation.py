"""OscillationTracker: which weights go back and forth between two codes, and the freezing of those that do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import check_module, unwrapped
from .fold import eval_mode
from .quant_loss import steps_of
from .quantized_weights import QuantizedWeight, codes_of, quantized_weights, scales_of, values_of
from .spec import listed
from .where import Where, chosen

FEW_BITS = 4  # at more the steps are so fine that it does not matter which of two codes a weight has
UNORDERED = {"dorefa": "which rounds tanh of the weight", "kmeans": "whose levels are trained"}
TENSORS = ("codes", "direction", "frequency", "average", "frozen")


@dataclass
class _Track:
    """What is remembered of a weight, in its shape."""

    bits: int
    codes: Tensor  # uint8, at the last step
    direction: Tensor  # int8, of the last change of the code: −1, 1, or 0 before the first
    frequency: Tensor  # fp32: the moving average of "turned back at this step"
    average: Tensor  # fp32: the moving average of the code
    frozen: Tensor  # bool

    @classmethod
    def of(cls, codes: Tensor, bits: int) -> _Track:
        zeros = torch.zeros_like(codes, dtype=torch.float32)
        sign, frozen = torch.zeros_like(codes, dtype=torch.int8), torch.zeros_like(codes, dtype=torch.bool)
        return cls(bits, codes, sign, zeros, codes.float(), frozen)


class OscillationTracker:
    """Tracks how often each weight's code turns back, and freezes those that do so too often (arXiv 2203.11086).

    ```
    tracker = qk.OscillationTracker(prepared, threshold=lambda step: 0.1 if step < 1000 else 0.02)
    for x, target in batches:
        ...
        optimizer.step()
        tracker.step()
    ```

    With the straight-through gradient, a weight whose best value lies between two levels moves across their middle
    again and again. A code turns back where it changes, and the change before it went the other way. Its frequency is
    the moving average of that: f = momentum·turned + (1 − momentum)·f. Where f exceeds the threshold, the weight
    is frozen at its average code, rounded, for the rest of the training: ``step`` puts it back on that code's level,
    whatever the optimizer made of it, and the scale, which goes on learning, takes it along. From the first step with a
    threshold on, the range of a tracked weight therefore no longer follows the weight, as if by ``freeze_observers``:
    else each would drive the other. A learned scale moves by its gradient alone then.

    A width that changes (``qk.BitSchedule``) starts the weight anew and thaws it. All ranks of DDP track alike.

    Args:
        model: from ``prepare``.
        momentum: of the averages, above 0 and at most 1. The threshold should be two to three times as large at least,
            or a single turn may freeze.
        threshold: above which frequency a weight is frozen: a number of at least 0, or a function of the step that
            returns one or None; None: weights are tracked alone. The authors lower it from 0.1 to 0.01 by half a
            cosine, after a first quarter of the training without.
        where: a glob, or a list of globs, on names of weights, such as ``"blocks.*.weight"``. None: those of at most 4
            bits.

    Raises:
        ValueError: the model has no quantizers, where matches no quantized weight, a "dorefa" or "kmeans" quantizer;
            with a threshold also weights that are computed from other tensors or that differing quantizers share; a
            momentum or threshold out of range.
        TypeError: model is not a module, threshold neither a number nor a function, or where no text or list of texts.
        RuntimeError: weights under ``fully_shard``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        momentum: float = 0.01,
        threshold: float | Callable[[int], float | None] | None = None,
        where: Where | None = None,
    ) -> None:
        check_module(model)
        if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 < momentum <= 1:
            raise ValueError(f"momentum: got {momentum!r}; accepted: above 0, at most 1")
        if not callable(threshold):
            _check_threshold("threshold", threshold)
        self.model, self.momentum, self.threshold = unwrapped(model), momentum, threshold
        self.steps = 0  # how often ``step`` was called
        self._holds_ranges = False
        every = {weight.name: weight for weight in quantized_weights(self.model)}
        few = {name: weight for name, weight in every.items() if weight.quantizer.bits <= FEW_BITS}
        if where is None and not few:
            raise ValueError(
                f"where: got None for a model without weights of at most 4 bits; accepted: a glob on {listed(every)}"
            )
        self._weights = few if where is None else {name: every[name] for name in chosen(where, every, "weights")}
        with torch.no_grad(), eval_mode(self.model):
            self._check()
            self._tracks = {}
            for name, weight in self._weights.items():
                x, quantizer = weight.value, weight.quantizer
                self._tracks[name] = _Track.of(codes_of(quantizer, x, scales_of(quantizer, x))[0], quantizer.bits)

    def _check(self) -> None:
        held = [weight.value for weight in self._weights.values()]
        for (name, weight), value in zip(self._weights.items(), held, strict=True):
            kind = weight.quantizer.quantizer
            if kind in UNORDERED:
                raise ValueError(
                    f'where: got {name!r} with quantizer="{kind}", {UNORDERED[kind]}; accepted: ordered, fixed levels'
                )
            if self.threshold is None:
                continue
            if value is not weight.layer._parameters.get(weight.parameter):
                raise ValueError(
                    f"where: got {name!r}, which is computed from other tensors and cannot be frozen; accepted: "
                    "weights that are parameters, or threshold=None"
                )
            if sum(other is value for other in held) > 1:
                raise ValueError(f"where: got {name!r}, which has several quantizers; accepted: one for each weight")

    @torch.no_grad()
    def step(self) -> None:
        """Looks at all codes, and holds and freezes weights; to be called once after each step of the optimizer.

        Raises:
            ValueError, TypeError: the function for the threshold returned neither None nor a number of at least 0.
        """
        threshold = self.threshold(self.steps) if callable(self.threshold) else self.threshold
        _check_threshold(f"threshold, at step {self.steps}", threshold)
        with eval_mode(self.model):
            if threshold is not None and not self._holds_ranges:
                for weight in self._weights.values():
                    weight.quantizer.follow(weight.value)
                    weight.quantizer.freeze()
                self._holds_ranges = True
            for name, weight in self._weights.items():
                self._look(name, weight, threshold)
        self.steps += 1

    def _look(self, name: str, weight: QuantizedWeight, threshold: float | None) -> None:
        track, quantizer, x = self._tracks[name], weight.quantizer, weight.value
        scales = scales_of(quantizer, x)
        codes, _ = codes_of(quantizer, x, scales)
        if track.bits != quantizer.bits:
            self._tracks[name] = _Track.of(codes, quantizer.bits)
            return
        codes = torch.where(track.frozen, track.codes, codes)
        change = (codes > track.codes).to(torch.int8).sub_((codes < track.codes).to(torch.int8))
        turned = change * track.direction < 0
        track.frequency.mul_(1 - self.momentum).add_(turned, alpha=self.momentum)
        track.average.mul_(1 - self.momentum).add_(codes, alpha=self.momentum)
        track.direction = torch.where(change == 0, track.direction, change)
        if threshold is not None:
            now = (track.frequency > threshold) & ~track.frozen
            codes = torch.where(now, track.average.round().to(torch.uint8), codes)
            track.frozen |= now
        track.codes = codes
        if self.threshold is not None:
            torch.where(track.frozen, values_of(quantizer, codes, scales, x.dtype), x, out=x)

    def oscillating(self, threshold: float = 0.005) -> dict[str, float]:
        """The share of each tracked weight's elements that turn back more often than that (waits for the device).

        Args:
            threshold: of the frequency; the authors count above 0.005. Frozen elements, whose frequency decays, do not
                count for long. It raises nothing.
        """
        return {name: float((track.frequency > threshold).float().mean()) for name, track in self._tracks.items()}

    def frozen(self) -> dict[str, float]:
        """The share of each tracked weight's elements that is frozen (waits for the device); it raises nothing."""
        return {name: float(track.frozen.float().mean()) for name, track in self._tracks.items()}

    def state_dict(self) -> dict[str, Any]:
        """The step, and of each weight codes, averages and what is frozen, 11 bytes an element. It raises nothing."""
        weights = {
            name: {"bits": track.bits, **{key: getattr(track, key).clone() for key in TENSORS}}
            for name, track in self._tracks.items()
        }
        return {"steps": self.steps, "weights": weights}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``, with the model's own state loaded too.

        Raises:
            ValueError: state is that of other weights; nothing is loaded then.
        """
        steps, weights = steps_of(state), state.get("weights", {})
        for name, track in self._tracks.items():
            shapes = [tuple(weights.get(name, {}).get(key, torch.empty(0)).shape) for key in TENSORS]
            if weights.keys() != self._tracks.keys() or any(shape != tuple(track.codes.shape) for shape in shapes):
                raise ValueError(f"state: got one of other weights ({listed(weights)}); accepted: that of {name}, …")
        for name, track in self._tracks.items():
            track.bits = weights[name]["bits"]
            for key in TENSORS:
                setattr(track, key, weights[name][key].to(track.codes.device, copy=True))
        self.steps = steps


def _check_threshold(name: str, threshold: Any) -> None:
    accepted = "a number of at least 0, None, or a function of the step that returns either"
    if threshold is None:
        return
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise TypeError(f"{name}: got {threshold!r}; accepted: {accepted}")
    if not threshold >= 0:
        raise ValueError(f"{name}: got {threshold}; accepted: {accepted}")
