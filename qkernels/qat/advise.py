"""advise: measures whether quantization without training is enough, and which layers want more bits or training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.fake_quantize import FakeQuantize
from ..nn.qat import QATConvolution
from .advice import MORE_BITS, PTQ, QAT, Advice, WidthAdvice
from .assign import assign
from .calibrate import call, progress, unwrapped
from .config import QConfig
from .copying import copy_of
from .hybrid import Layers, holding
from .post_training import FLOAT, WIDEST, Plan, PostTraining, Tried
from .repeated_batches import batches_of, random_state_kept
from .scores import differentiable, loss_of
from .sensitivity import widths_of
from .spec import check_type
from .training import parameter_groups

SHARE = 0.8  # of the summed sensitivity that the layers to train hold, as in ``hybrid``
MILD = 10  # times the tolerance: the loss up to which it is enough to train some layers
MOST = 0.25  # of the tensors may be widened, or two: where it takes more, it is the width that is too narrow
STORED = (2, 3, 4, 8)  # widths of codes in files
STEPS = 5  # of training, of which the median time is taken


def advise(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    evaluate: Callable[[nn.Module], Any],
    tolerance: float | None = None,
    budget: float | None = None,
    bits: Sequence[int] = (8, 4, 3, 2),
    loss: Callable[[Any, Any], Any] | None = None,
    training_steps: int = 1000,
    config: QConfig | str | None = None,
    max_batches: int | None = None,
) -> Advice:
    """Says for each width of the weights whether PTQ is enough, or which layers want more bits or QAT.

    It measures: the score of the float model and of the quantized one at each width, the sensitivity of each layer, the
    size, the time of a call of the converted model, and with a ``loss`` that of a training step. It trains nothing.
    From these it concludes, for each width:

    1. "ptq" if the loss of score is within the tolerance (1 % of the float score: arXiv 2004.09602, section 6) after
       ``calibrate``, or else after ``gptq`` and ``correct_bias`` too (ranges, then rounding, then biases: the order of
       arXiv 2106.08295).
    2. Else "more bits" if it is within the tolerance with the fewest of the most sensitive tensors widened, weights to
       8 bits (from 8 bits: left in float), inputs left in float (arXiv 2004.09602 and AIMET's guidebook). These are at
       most a quarter of the tensors, or two (a layer's weight and input); and the model has to stay smaller than at the
       next wider of 2, 3, 4, 8 bits and float, or within the budget.
    3. Else "qat". From 4 bits on, with a loss of at most 10 tolerances and no depthwise convolution of at most 4 bits
       (arXiv 2203.11086: these oscillate), the layers to train are those that hold 80 % of the summed sensitivity, as
       ``hybrid`` finds them; otherwise all.

    There is no advice where the float model is within the tolerance of one whose weights are shuffled: it is not
    trained, or its score is not higher for a better model. A verdict is as sure as the scores: an accuracy p of n
    samples has a standard error of sqrt(p·(1−p)/n), which should be well below the tolerance.

    The model and the random generators of Python and torch stay as they were, whatever happens. If tqdm is installed, a
    terminal shows the progress.

    Args:
        model: a trained float model.
        batches: as for ``sensitivity``; with ``loss`` also what that takes. A few hundred samples do.
        evaluate: a function of a model to its score, a finite number, the higher the better: accuracy, or the negative
            perplexity or error. It gets copies in eval mode, without gradients, a few for each width. Let it use
            samples that are not in ``batches``.
        tolerance: how far the score may fall, in its own unit; None: 1 % of the float score's magnitude.
        budget: the most bytes of codes and scales of the weights in the converted model's file. The best widths under
            it (``assign``) are then judged as well, and are what the advice is about.
        bits: the widths of weights to judge. Inputs keep the width of the config.
        loss: a function of the model's output and a batch to a tensor of one element, to time a training step.
        training_steps: how many steps QAT is taken to need, for the estimate of its time. A tenth of the steps of the
            float training is usual.
        config: how the model is prepared, as for ``prepare``, but for the widths of weights.
        max_batches: how many batches to take at most; None: all.

    Returns:
        An ``Advice``: ``print`` shows it, ``advice.config`` is the QConfig to use, ``advice.code`` the code.

    Raises:
        ValueError: no batches, NaN, infinity or a score at chance from ``evaluate``, a budget that no widths meet (the
            text names the smallest that can be met), a prepared model, a config that leaves all weights in float, or
            another value of an argument.
        TypeError: no number from ``evaluate``, or another type of an argument.
        What ``evaluate``, ``prepare`` and ``calibrate`` raise.
    """
    widths = widths_of(bits)
    _check(model, evaluate, tolerance, budget, loss, training_steps)
    kept = batches_of(batches, max_batches)
    model = unwrapped(model)
    with random_state_kept(model):
        work = PostTraining(model, kept, evaluate, widths, config)
        plans: dict[int | None, Plan] = {width: work.uniform(width) for width in widths}
        if budget is not None:
            given = assign(work.found, budget).bits
            plans[None] = {key: given[key[0][0]].get(key[1], own) for key, own in plans[widths[0]].items()}
        float_score = work.score(copy_of(model), "the float model")
        shuffled = work.shuffled_score()
        accepted = 0.01 * abs(float_score) if tolerance is None else float(tolerance)
        if not accepted and tolerance is None:
            raise ValueError("tolerance: got None with a float score of 0, of which 1 % is nothing; accepted: a number")
        if 0.1 * abs(float_score) < float_score - shuffled <= accepted:
            raise ValueError(
                f"tolerance: got {tolerance}, as far as the float model ({float_score:.6g}) is above a copy with "
                f"shuffled weights ({shuffled:.6g}); accepted: less, in the unit of the score"
            )
        if float_score - shuffled <= accepted:
            raise ValueError(
                f"evaluate: returned {float_score:.6g} for the float model and {shuffled:.6g} for a copy with shuffled "
                f"weights; accepted: a score of a trained model that is higher, the better, by more than {accepted:.3g}"
            )
        enough = float_score - accepted
        tried, found = [], []
        for width, plan in progress(plans.items(), "advise: widths", len(plans)):
            equal = work.tried(plan, enough)
            best = equal if equal.score >= enough else _widened(work, plan, enough, _fits(work, width, budget))
            tried.append(best or equal)
            found.append((width, equal, best))
        float_seconds, seconds = work.seconds([each.prepared for each in tried])
        step = None if loss is None else _step_seconds(tried[-1].prepared, kept, loss)
    advices = tuple(
        _concluded(work, width, equal, best, float_score, accepted, took)
        for (width, equal, best), took in zip(found, seconds, strict=True)
    )
    untrained = [each for each in advices if each.verdict != QAT]
    smallest = min(untrained, key=lambda each: (each.bytes, -each.score), default=advices[0])
    return Advice(
        widths=advices,
        chosen=smallest if budget is None else advices[-1],
        float_score=float_score,
        float_bytes=work.bytes_of(dict.fromkeys(work.rows)),
        float_seconds=float_seconds,
        shuffled_score=shuffled,
        tolerance=accepted,
        step_seconds=step,
        training_steps=training_steps,
        sensitivity=work.found,
        notes=tuple(work.notes),
    )


def _check(model: Any, evaluate: Any, tolerance: Any, budget: Any, loss: Any, training_steps: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}; accepted: a torch.nn.Module")
    if any(isinstance(module, FakeQuantize) for module in model.modules()):
        raise ValueError("model: got one that is prepared; accepted: a float model")
    if not callable(evaluate):
        raise TypeError(f"evaluate: got a {type(evaluate).__name__}; accepted: a function of a model to its score")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss: got a {type(loss).__name__}; accepted: a function of (output, batch) to a number")
    for name, value in (("tolerance", tolerance), ("budget", budget)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: got {value!r}; accepted: a number of at least 0, or None")
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name}: got {value!r}; accepted: a finite number of at least 0, or None")
    check_type("training_steps", training_steps, int, "a whole number of at least 1")
    if training_steps < 1:
        raise ValueError(f"training_steps: got {training_steps}; accepted: a whole number of at least 1")


def _fits(work: PostTraining, width: int | None, budget: float | None) -> Callable[[Plan], bool]:
    """Whether a plan is within the budget, or smaller than equal weights of the next wider width in a file."""
    if width is None:
        assert budget is not None
        return lambda plan: work.bytes_of(plan) <= budget
    # 5 to 7 bits take as much as 8.
    stored, wider = (next((bits for bits in STORED if bits >= least), FLOAT) for least in (width, width + 1))
    limit = work.bytes_of(dict.fromkeys(work.rows))
    if stored is not None and wider is not None:
        plan = work.uniform(width)
        elements = sum(row.elements for key, row in work.rows.items() if key[1] == "weight" and plan[key] == width)
        limit = work.bytes_of(plan) + elements * (wider - stored) // 8
    return lambda plan: work.bytes_of(plan) < limit


def _widened(work: PostTraining, plan: Plan, enough: float, fits: Callable[[Plan], bool]) -> Tried | None:
    """The plan with the fewest of its most sensitive tensors widened that scores enough; None: there is none."""
    plans = [plan]
    by_score = sorted(plan, key=lambda key: -work.sensitivity_of(key, plan[key]))
    for key in by_score:
        if len(plans) > max(MOST * len(plan), 2):
            break
        bits = plan[key]
        more = WIDEST if key[1] == "weight" and bits in range(WIDEST) and WIDEST in work.rows[key].scores else FLOAT
        wider = {**plans[-1], key: more}
        if bits is not None and fits(wider):
            plans.append(wider)
    if len(plans) == 1:
        return None
    best = work.tried(plans[-1], enough)
    if best.score < enough:
        return None
    few, many = 0, len(plans) - 1  # tensors widened: not enough, and enough
    while many - few > 1:
        middle = (few + many) // 2
        tried = work.tried(plans[middle], enough)
        if tried.score >= enough:
            many, best = middle, tried
        else:
            few = middle
    return best


def _concluded(
    work: PostTraining,
    width: int | None,
    equal: Tried,
    best: Tried | None,
    float_score: float,
    accepted: float,
    seconds: float | None,
) -> WidthAdvice:
    used = equal if best is None else best
    every = False
    names: tuple[str, ...] = ()
    if best is None:
        verdict = QAT
        names, every = _to_train(work, equal, float_score - equal.score <= MILD * accepted)
    elif best is equal:
        verdict = PTQ
    else:
        verdict = MORE_BITS
        wider = [(layers, kind) for (layers, kind), bits in best.plan.items() if bits != equal.plan[layers, kind]]
        names = tuple(f"{layer} {kind}".strip() for layers, kind in wider for layer in layers)
    return WidthAdvice(
        bits=width,
        verdict=verdict,
        layers=names,
        every_layer=every,
        config=used.config,
        steps=used.steps,
        score=used.score,
        plain_score=equal.score,
        bytes=work.bytes_of(used.plan),
        seconds=seconds,
    )


def _to_train(work: PostTraining, tried: Tried, mild: bool) -> tuple[tuple[str, ...], bool]:
    """The layers to train, the most sensitive first, and whether these are all."""
    scores: dict[Layers, float] = {}
    for (layers, kind), bits in tried.plan.items():
        scores[layers] = scores.get(layers, 0.0) + work.sensitivity_of((layers, kind), bits)
    widths = [bits for (_, kind), bits in tried.plan.items() if kind == "weight" and bits is not None]
    some = mild and min(widths, default=WIDEST) >= 4 and not _narrow_depthwise(work, tried)
    trained, left = holding(scores, SHARE if some else 1.0)
    if not some:
        trained, left = [*trained, *left], []
    return sum(trained, ()), not left


def _narrow_depthwise(work: PostTraining, tried: Tried) -> bool:
    """Whether a depthwise convolution has weights of at most 4 bits."""
    narrow = [layers for (layers, kind), bits in tried.plan.items() if kind == "weight" and bits and bits <= 4]
    modules = [tried.prepared.get_submodule(layer) for layers in narrow for layer in layers]
    convolutions: list[Any] = [module for module in modules if isinstance(module, QATConvolution)]
    return any(1 < layer.groups == layer.in_channels for layer in convolutions)


def _step_seconds(prepared: nn.Module, batches: Sequence[Any], loss: Callable[[Any, Any], Any]) -> float:
    """The median time of a training step of a copy of the model."""
    model = copy_of(prepared).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-5))
    seconds = []
    with torch.enable_grad():
        for at in range(-2, STEPS):  # the first two warm up
            batch = batches[at % len(batches)]
            begin = time.perf_counter()
            optimizer.zero_grad()
            value: Tensor = differentiable(loss_of(loss, call(model, batch), batch))
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if at >= 0:
                seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[STEPS // 2]
