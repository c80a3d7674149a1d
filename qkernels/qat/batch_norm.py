"""BatchNorm around quantization-aware training: statistics that stay, and statistics of the trained weights."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.made_classes import made_again
from .calibrate import check_max_batches, check_module, run_batches
from .fold import BatchNorm, eval_mode
from .spec import check_frozen
from .where import Where, chosen


def freeze_bn(model: nn.Module, frozen: bool = True, where: Where = "*") -> list[str]:
    """Keeps every BatchNorm in eval mode, in place: it normalizes by its running statistics, which stay as they are.

    ``model.train()`` does not change that, until ``freeze_bn(model, frozen=False)``. Gamma and beta go on learning;
    ``requires_grad_(False)`` on them stops that. A copy, a pickle and a file of ``save`` are frozen too; a state_dict
    does not hold the switch. A BatchNorm without running statistics has nothing to keep and is left alone. ``convert``
    folds frozen ones as all others. ``nn.SyncBatchNorm.convert_sync_batchnorm`` makes new layers: freeze those
    afterwards.

    A usual time is the last part of the training, when the batches' statistics would still move what the quantizers
    have settled on, and from the start if batches are smaller than in float training.

    Args:
        model: any model, prepared or not.
        frozen: False undoes it: the layers are then in the mode of ``model`` itself.
        where: a glob, or a list of globs, on the names of BatchNorms; "*" also for a model without any.

    Returns:
        The names of the BatchNorms that changed.

    Raises:
        TypeError: model is not a module, frozen no bool, or where no text or list of texts.
        ValueError: where matches no BatchNorm.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}; accepted: a torch.nn.Module")
    check_frozen(frozen)
    norms = batch_norms(model)
    names = norms if where == "*" else chosen(where, norms, "BatchNorms")
    return [name for name in names if _switch(norms[name], frozen, model.training)]


def freeze_as_named(model: nn.Module, kinds: Mapping[str, str]) -> None:
    """Freezes, in place, the BatchNorms of which ``kinds``, names of classes, says that they are, and no others."""
    for name, norm in batch_norms(model).items():
        plain = type(norm).__bases__[1] if isinstance(norm, _Frozen) else type(norm)
        _switch(norm, kinds.get(name) == _frozen_class(plain).__name__, model.training)


def _switch(norm: nn.Module, frozen: bool, training: bool) -> bool:
    """Whether the layer was not so before; ``training``: of the model."""
    if isinstance(norm, _Frozen) is frozen:
        return False
    norm.__class__ = _frozen_class(type(norm)) if frozen else type(norm).__bases__[1]  # type: ignore[arg-type]
    norm.train(training)
    return True


class _Frozen(nn.Module):
    """The first base of a BatchNorm that stays in eval mode."""

    def train(self, mode: bool = True) -> _Frozen:
        return super().train(False)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return made_again, (_frozen_class, type(self).__bases__[1]), self.__getstate__()


@functools.cache
def _frozen_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Frozen{kind.__name__}", (_Frozen, kind), {"__module__": kind.__module__})


@torch.no_grad()
def reestimate_bn(model: nn.Module, batches: Iterable[Any], *, max_batches: int | None = None) -> None:
    """Sets the running statistics of every BatchNorm anew, in place, from batches through the model as it is now.

    At few bits the weights oscillate between two codes to the end of the training, and the moving averages belong to
    weights of the past (arXiv 2203.11086): call this before ``convert``. The statistics become the mean over the
    batches of their means and unbiased variances, each batch with the same weight. The rest of the model runs in eval
    mode: it quantizes and moves no range. All modes and momenta are as before afterwards. BatchNorms that ``freeze_bn``
    froze are set anew too. Under DistributedDataParallel each process takes the statistics of its own batches, and
    SyncBatchNorm those of all. If tqdm is installed, a terminal shows the progress.

    Args:
        model: prepared or float, on batches of the size that it trains on.
        batches: as for ``calibrate``; an empty one is skipped.
        max_batches: how many batches to take at most; None: all.

    Raises:
        ValueError: the model has no BatchNorm with running statistics, there are no batches, max_batches has another
            value, or statistics are not finite (the text names the layer). The model's statistics then stay as they
            were, also if the model raises anything.
        TypeError: a batch has another form, or more elements than the model takes arguments.
    """
    check_max_batches(max_batches)
    norms = batch_norms(model)
    if not norms:
        raise ValueError("model: got one without a BatchNorm that keeps running statistics; accepted: one with some")
    before = {name: ([t.clone() for t in _statistics(norm)], norm.momentum) for name, norm in norms.items()}
    reached: set[str] = set()
    try:
        with eval_mode(model):
            for norm in norms.values():
                norm.reset_running_stats()
                norm.training, norm.momentum = True, None  # None: the cumulative mean
            full = sum(full for full, _ in run_batches(model, batches, max_batches, "reestimate_bn: batches"))
        if not full:
            raise ValueError("batches: got none that holds elements; accepted: at least one batch of inputs")
        for name, norm in norms.items():
            if not all(bool(t.isfinite().all()) for t in _statistics(norm)):
                raise ValueError(f"batches: the input of {name!r} holds NaN or infinity; accepted: finite values")
        reached = {name for name, norm in norms.items() if bool(norm.num_batches_tracked)}
    finally:
        for name, (statistics, momentum) in before.items():
            norms[name].momentum = momentum
            if name not in reached:
                for t, old in zip(_statistics(norms[name]), statistics, strict=True):
                    t.copy_(old)
    missed = [name for name in norms if name not in reached]
    if missed:
        warnings.warn(f"qk.reestimate_bn: no batch reached {', '.join(missed)}; they stay as they were", stacklevel=2)


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Those that keep running statistics."""
    check_module(model, "a torch.nn.Module")
    return {name: m for name, m in model.named_modules() if isinstance(m, BatchNorm) and m.running_mean is not None}


def _statistics(norm: nn.Module) -> list[Tensor]:
    return [t for t in (norm.running_mean, norm.running_var, norm.num_batches_tracked) if isinstance(t, Tensor)]
