"""Finds which BatchNorm follows which convolution, by tracing the model with torch.fx."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..nn.int8 import Int8Conv2d

LEAVES = (nn.Linear, nn.Conv2d)  # subclasses are leaves too


@dataclass
class Folds:
    """Pairs of a Conv2d and the BatchNorm2d that alone uses its output; for every other BatchNorm, why it stays."""

    batch_norm_of: dict[str, str] = field(default_factory=dict)  # convolution -> BatchNorm
    kept: dict[str, str] = field(default_factory=dict)  # BatchNorm -> reason


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts the model into eval mode, and afterwards every module back into its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def find_folds(model: nn.Module) -> Folds:
    """The foldable pairs of a float, prepared or converted model, traced in eval mode."""
    folds = Folds()
    norms = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    if not norms:
        return folds

    class LayerTracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)

    try:
        with eval_mode(model):
            graph = LayerTracer().trace(model)
    except Exception as error:  # a model's forward may raise anything when traced; the report repeats its message
        reason = f"torch.fx cannot trace the model ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
        folds.kept = dict.fromkeys(norms, reason)
        return folds

    calls: dict[str, list[torch.fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    for name, norm in norms.items():
        nodes = calls.get(name, [])
        source = nodes[0].args[0] if len(nodes) == 1 and nodes[0].args else None
        producer = str(source.target) if isinstance(source, torch.fx.Node) and source.op == "call_module" else None
        conv = None if producer is None else model.get_submodule(producer)
        if type(norm) is not nn.BatchNorm2d:
            folds.kept[name] = f"{type(norm).__name__} is not folded, only BatchNorm2d"
        elif norm.running_mean is None:
            folds.kept[name] = "it keeps no running statistics"
        elif len(nodes) != 1:
            folds.kept[name] = f"it is called {len(nodes)} times"
        elif not isinstance(conv, nn.Conv2d | Int8Conv2d) or producer is None:
            folds.kept[name] = "its input does not come straight from a Conv2d"
        elif hasattr(conv, "trial") and not conv.trial.returns_product:  # type: ignore[union-attr]
            folds.kept[name] = f"the forward of {producer} does more than convolve"
        elif getattr(conv, "output_fake_quant", None) is not None:
            folds.kept[name] = f"the output of {producer} is quantized"
        elif conv._forward_hooks or norm._forward_pre_hooks:
            folds.kept[name] = f"a hook stands between it and {producer}"
        elif len(calls[producer]) != 1 or len(source.users) != 1:  # type: ignore[union-attr]
            folds.kept[name] = f"the output of {producer} is used elsewhere too"
        else:
            folds.batch_norm_of[producer] = name
    return folds


def factor_and_bias(norm: nn.BatchNorm2d, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The BatchNorm in eval mode: f = gamma/sqrt(var + eps) and beta + (bias − mean)·f, both [C] fp32."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = -norm.running_mean.double() * factor
    if bias is not None:
        shift = shift + bias.detach().double() * factor
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return factor.float(), shift.float()
