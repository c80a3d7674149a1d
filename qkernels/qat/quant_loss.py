"""QuantLoss: the losses of ``qk.losses`` added up, each with a weight that may follow the step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.quantizer_rules import nearest
from . import losses
from .calibrate import check_module, check_shapes, quantizers_of, unwrapped
from .losses import Term, Weight, check_factor, check_term
from .spec import listed

TERMS: dict[str, Callable[..., Tensor]] = {
    name: getattr(losses, name) for name in losses.__all__ if name not in ("Term", "divergence")
}
GIVEN = ("model", "inputs", "output")  # what a QuantLoss itself gives the functions


class QuantLoss:
    """A penalty on what quantization costs, to add to the loss of the task: the sum of weight·loss over its terms.

    ```
    penalty = qk.QuantLoss(prepared, dampening=lambda step: 1e-4 * step, consistency=0.5)
    for x, target in batches:
        y = prepared(x)
        (task(y, target) + penalty(x, y)).backward()
        optimizer.step()
        optimizer.zero_grad()
        penalty.step()
    ```

    The terms, each a function of ``qk.losses`` that can be used alone: ``weight_error``, ``dampening``,
    ``bin_regularization``, ``kurtosis`` and ``activation_range``, for which ``penalty()`` will do; ``consistency``,
    ``distillation`` and ``layer_outputs``, which need the inputs, the first two the output too. Call it where the model
    was called, under the same autocast. With gradient accumulation scale it as the task's loss, and call ``step`` once
    for each step of the optimizer. It holds no parameters, moves no range, and works beside DDP, ``torch.compile`` and
    ``GradScaler``, on the model inside or around them.

    ``values`` holds what each term that counted in the last call was, before its weight, without a gradient.

    Args:
        model: from ``prepare``.
        terms: by the name of the loss: its weight, a number or a function of the step that returns one; or a
            ``qk.losses.Term``, which says more.

    Raises:
        TypeError: a weight or option of another type.
        ValueError: the model has no quantizers, or none that a term is for; there are no terms, or unknown ones; a
            weight is negative, also later when a function returns it; an option is unknown or missing.
    """

    def __init__(self, model: nn.Module, **terms: Weight | Term) -> None:
        check_module(model)
        self.model = unwrapped(model)
        check_shapes(self.model)
        quantizers_of(self.model)
        if not terms:
            raise ValueError(f"terms: got none; accepted: {', '.join(TERMS)}")
        self.terms = {name: self._term(name, given) for name, given in terms.items()}
        self.steps = 0  # how often ``step`` was called
        self.values: dict[str, Tensor] = {}

    def _term(self, name: str, given: Weight | Term) -> Term:
        if name not in TERMS:
            raise ValueError(f"terms: got {name!r}; accepted: {', '.join(TERMS)}{nearest(name, TERMS)}")
        if not isinstance(given, Term):
            if not callable(given):
                check_factor(name, given)
            given = Term(given)
        options = {key: p for key, p in inspect.signature(TERMS[name]).parameters.items() if key not in GIVEN}
        for option in given.options:
            if option not in options:
                known = ", ".join(options) or "none"
                raise ValueError(f"{name}: got the option {option!r}; accepted: {known}{nearest(option, options)}")
        for option, parameter in options.items():
            if parameter.default is parameter.empty and option not in given.options:
                raise ValueError(f"{name}: got no {option}; accepted: qk.losses.Term(weight, {option}=…)")
        check_term(name, self.model, given.options)
        return given

    def __call__(self, inputs: Any = None, output: Any = None) -> Tensor:
        """The sum of the terms that count at this step, a scalar; zero without a gradient if none does.

        Args:
            inputs: what the model was called on, as in ``qk.losses.consistency``; None if no term needs it.
            output: what it returned.

        Raises:
            ValueError: a term needs the inputs or the output; a weight's function returned a number that is negative or
                not finite; or what the functions of ``qk.losses`` raise.
        """
        given = {"model": self.model, "inputs": inputs, "output": output}
        values, total = {}, None
        for name, term in self.terms.items():
            weight = term.weight(self.steps) if callable(term.weight) else term.weight
            check_factor(f"{name}, at step {self.steps}", weight)
            if self.steps % term.every or not weight:
                continue
            needed = [key for key in inspect.signature(TERMS[name]).parameters if key in GIVEN]
            for key in needed:
                if given[key] is None:
                    raise ValueError(f"{key}: got None; accepted: the model's {key}, which {name} needs: penalty(x, y)")
            value = TERMS[name](**{key: given[key] for key in needed}, **term.options)
            values[name] = value.detach()
            total = weight * value if total is None else total + (weight * value).to(total.device)
        self.values = values
        if total is None:
            return torch.zeros((), device=next((p.device for p in self.model.parameters()), None))
        return total

    def step(self) -> None:
        """Counts a step of the optimizer, by which weights and ``every`` go; it raises nothing."""
        self.steps += 1

    def state_dict(self) -> dict[str, int]:
        """The step, to go on from in a resumed run; it raises nothing."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on from the step of a ``state_dict``.

        Raises:
            ValueError: state holds no number of steps.
        """
        self.steps = steps_of(state)


def steps_of(state: Mapping[str, Any]) -> int:
    """The number of steps in a state_dict."""
    steps = state.get("steps") if isinstance(state, Mapping) else None
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        got = f"one with the keys {listed(map(repr, state))}" if isinstance(state, Mapping) and state else repr(state)
        raise ValueError(f"state: got {got}; accepted: what state_dict() returned, with the number of 'steps'")
    return steps
