"""Finds which BatchNorm follows which convolution, by tracing the model with torch.fx."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..nn.int8 import Int8Conv2d
from ..nn.int8_conv1d import Int8Conv1d
from ..nn.int8_conv3d import Int8Conv3d
from ..nn.int8_conv_transpose import Int8ConvTranspose1d, Int8ConvTranspose2d, Int8ConvTranspose3d
from ..nn.qat_conv_transpose import QATConvTranspose
from ..nn.tracing import Tracer, first_line

BatchNorm = nn.modules.batchnorm._BatchNorm  # the base of torch's BatchNorms
# The BatchNorm of as many dims; SyncBatchNorm takes any.
NORM_OF = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
    Int8Conv1d: nn.BatchNorm1d,
    Int8Conv2d: nn.BatchNorm2d,
    Int8Conv3d: nn.BatchNorm3d,
    Int8ConvTranspose1d: nn.BatchNorm1d,
    Int8ConvTranspose2d: nn.BatchNorm2d,
    Int8ConvTranspose3d: nn.BatchNorm3d,
}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LEAVES = (nn.Linear, BatchNorm, *NORM_OF)  # subclasses are leaves too


@dataclass
class Folds:
    """Pairs of a convolution and the BatchNorm that alone uses its output; for every other BatchNorm, why it stays."""

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
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}
    if not norms:
        return folds

    class LayerTracer(Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)

    try:
        with eval_mode(model):
            graph = LayerTracer().trace(model)
    except NotImplementedError as error:
        folds.kept = dict.fromkeys(norms, first_line(error).replace("its forward", "the model", 1))
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
        if type(norm).forward not in (BatchNorm.forward, nn.SyncBatchNorm.forward):
            folds.kept[name] = f"the forward of {type(norm).__name__} is its own"
        elif norm.running_mean is None:
            folds.kept[name] = "it keeps no running statistics"
        elif len(nodes) != 1:
            folds.kept[name] = f"it is called {len(nodes)} times"
        elif conv is None or producer is None or not _fits(norm, conv):
            folds.kept[name] = "its input does not come straight from a convolution"
        elif _does_more(conv):
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


def _fits(norm: nn.Module, conv: nn.Module) -> bool:
    kinds = [kind for convolution, kind in NORM_OF.items() if isinstance(conv, convolution)]
    return bool(kinds) and isinstance(norm, (kinds[0], nn.SyncBatchNorm))


def _does_more(conv: nn.Module) -> bool:
    """Whether the forward of a convolution's subclass may return something else than the convolution."""
    trial = getattr(conv, "trial", None)
    if trial is not None:
        return not trial.returns_product
    forwards = (QATConvTranspose.forward, *(kind.forward for kind in TRANSPOSED))
    return isinstance(conv, TRANSPOSED) and type(conv).forward not in forwards


def factor_and_bias(norm: nn.Module, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The BatchNorm in eval mode: f = gamma/sqrt(var + eps) and beta + (bias − mean)·f, both [C] fp64."""
    assert isinstance(norm, BatchNorm)
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
    return factor, shift
