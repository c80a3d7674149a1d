"""Trials: a copy of a model in which single quantizers act at a chosen width, while all others pass their values."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.fake_quantize import FakeQuantize
from ..nn.qat import QATConvolution
from ..nn.qat_attention import QATMultiheadAttention, projection_weights
from ..nn.qat_conv_transpose import QATConvTranspose
from ..nn.qat_embedding import QATTable
from ..nn.qat_layer import QATLayer
from ..nn.quantized_parameters import QATParameters
from .calibrate import calibrate, quantizers_replaced, run_batches, tensors_in
from .copying import copy_of, shadow_of
from .fold import eval_mode
from .repeated_batches import seed
from .sharing import find_inputs
from .training import enable_fake_quant

KINDS = ("weight", "input")  # of the quantizers whose width is tried


@dataclass
class Group:
    """Layers that have one width, as they share an input or a weight, with their quantizers of each kind.

    multiplications: of each layer, for all batches; None: its products are not known.
    """

    names: list[str]
    quantizers: dict[str, list[FakeQuantize]]
    weights: list[tuple[Tensor, FakeQuantize]]
    multiplications: dict[str, int | None] = field(default_factory=dict)


class Trials:
    """A copy of a prepared model, and its quantizers as calibrated at each width.

    Inside ``running`` the copy computes in float, except for the quantizers in ``active``.

    Attributes:
        model: the copy, in eval mode.
        batches: those with elements.
        groups: layers with quantizers of weights or inputs that a batch reached.
        unreached: names of the layers that none reached.
        at: width -> quantizer of the copy -> the same quantizer, calibrated at that width.
        samples: how many the batches hold: the length of the first dim of their first tensors.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], widths: Iterable[int]) -> None:
        self.model = copy_of(model).eval()
        enable_fake_quant(self.model)
        self.batches = list(batches)
        self.active: dict[FakeQuantize, FakeQuantize] = {}
        self.own = {q: q.bits for q in self.model.modules() if isinstance(q, FakeQuantize)}
        for quantizer in self.own:
            if quantizer.frozen:  # the scores are those of ranges that fit each width
                quantizer.freeze(False)
        self.at: dict[int, dict[FakeQuantize, FakeQuantize]] = {}
        for bits in widths:
            self.at[bits] = self._calibrated(bits)
        self.groups, self.unreached, self.samples = self._grouped()

    def _calibrated(self, bits: int) -> dict[FakeQuantize, FakeQuantize]:
        taking = [quantizer for quantizer in self.own if takes(quantizer, bits)]
        for quantizer in taking:
            quantizer.set_bits(bits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of what no batch reached: ``unreached`` has it
            calibrate(self.model, self.batches)
        found = {}
        for quantizer in taking:
            found[quantizer] = copy.deepcopy(quantizer)
            found[quantizer].last = None
        return found

    def _grouped(self) -> tuple[list[Group], list[str], int]:
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, QATLayer)}
        counts: dict[str, int | None] = {}
        called: set[FakeQuantize] = set()

        def hook_of(name: str) -> Callable[..., None]:
            def hook(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
                more = _multiplications(layer, args, kwargs, first_float(output))
                before = counts.get(name, 0)
                counts[name] = None if more is None or before is None else before + more

            return hook

        hooks = [layer.register_forward_hook(hook_of(name), with_kwargs=True) for name, layer in layers.items()]

        def pass_on(quantizer: FakeQuantize, x: Tensor) -> Tensor:
            called.add(quantizer)
            return x

        try:
            with torch.no_grad(), self.running(pass_on):
                for batch in self.outputs():
                    del batch
        finally:
            for handle in hooks:
                handle.remove()
        found: list[Group] = []
        unreached = []
        for name, layer in layers.items():
            group = Group([name], {kind: [] for kind in KINDS}, [])
            for _, role, quantizer in layer.own_quantizers():
                if role.kind in KINDS and quantizer in called:
                    group.quantizers[role.kind].append(quantizer)
                    if role.kind == "weight":
                        group.weights.append((layer.unquantized(role.parameter).detach(), quantizer))
            if any(group.quantizers.values()):
                group.multiplications = {name: counts.get(name, 0)}
                found.append(group)
            elif any(role.kind in KINDS for _, role, _ in layer.own_quantizers()):
                unreached.append(name)
        samples = sum(max(_samples(batch), 1) for batch in self.batches)
        inputs = find_inputs(shadow_of(self.model), [group.names[0] for group in found])
        return _joined(found, inputs.groups), unreached, samples

    @contextlib.contextmanager
    def running(self, fn: Callable[[FakeQuantize, Tensor], Tensor] | None = None) -> Iterator[None]:
        """Inside, the copy computes in float, except for the quantizers in ``active``; fn: what computes instead."""

        def act(quantizer: FakeQuantize, x: Tensor) -> Tensor:
            return self.active[quantizer](x) if quantizer in self.active else x

        with eval_mode(self.model), quantizers_replaced(self.model, fn or act):
            yield

    @contextlib.contextmanager
    def quantized(self, quantizers: Iterable[FakeQuantize], bits: int) -> Iterator[None]:
        """Inside, these quantizers act at this width."""
        self.active = {quantizer: self.at[bits][quantizer] for quantizer in quantizers}
        try:
            yield
        finally:
            self.active = {}

    def outputs(self) -> Iterator[Any]:
        """What the copy returns for each batch; every pass draws the same random numbers."""
        device = next((t.device for t in self.model.parameters()), torch.device("cpu"))
        seed(device)
        for _, output in run_batches(self.model, self.batches, None, ""):
            yield output


def takes(quantizer: FakeQuantize, bits: int) -> bool:
    try:
        quantizer.check_width(bits)
    except ValueError:
        return False
    return True


def first_float(value: Any) -> Tensor | None:
    """The first floating tensor in nested tuples, lists and dicts."""
    return next((t for t in tensors_in(value) if t.is_floating_point()), None)


def _samples(batch: Any) -> int:
    first = next(tensors_in(batch), None)
    return 1 if first is None or first.dim() == 0 else first.shape[0]


def _multiplications(layer: Any, args: Any, kwargs: Any, y: Tensor | None) -> int | None:
    """Of one call: how many products with elements of quantized weights there are; None: it is not known."""
    elements = sum(layer.unquantized(parameter).numel() for parameter, _ in layer.quantized_weights())
    if not elements or isinstance(layer, QATTable):
        return 0
    if isinstance(layer, QATMultiheadAttention):
        return _projections(layer, *args, **kwargs)
    x = first_float((args, kwargs))
    if isinstance(layer, QATParameters):
        return None
    if isinstance(layer, QATConvolution) and y is not None:
        return elements * (y.numel() // layer.out_channels)  # type: ignore[operator]
    if isinstance(layer, QATConvTranspose) and x is not None:
        return elements * (x.numel() // layer.in_channels)  # type: ignore[operator]
    return None if x is None else elements * (x.numel() // max(x.shape[-1], 1))


def _projections(layer: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """The products of one call of an attention with the weights that project query, key and value."""
    quantized = {parameter for parameter, _ in layer.quantized_weights()}
    names = projection_weights(layer)
    given = zip(names if len(names) == 3 else names * 3, (query, key, value), strict=True)
    return sum(layer.embed_dim * x.numel() for name, x in given if name in quantized)  # type: ignore[no-any-return]


def _joined(groups: Sequence[Group], together: Iterable[Sequence[str]]) -> list[Group]:
    """The groups, joined where they share a quantizer or a weight, or where their layers get one tensor."""
    keys: dict[Any, int] = {}
    place = list(range(len(groups)))

    def root(at: int) -> int:
        while place[at] != at:
            at = place[at]
        return at

    shared: Mapping[str, Any] = {name: ("input", at) for at, names in enumerate(together) for name in names}
    for at, group in enumerate(groups):
        own: list[Any] = [quantizer for quantizers in group.quantizers.values() for quantizer in quantizers]
        own += [("weight", weight.data_ptr()) for weight, _ in group.weights if weight.data_ptr()]
        own += [shared[name] for name in group.names if name in shared]
        for key in own:
            first = keys.setdefault(key, at)
            low, high = sorted((root(first), root(at)))
            place[high] = low
    found: dict[int, Group] = {}
    for at, group in enumerate(groups):
        into = found.setdefault(root(at), Group([], {kind: [] for kind in KINDS}, []))
        into.names += group.names
        into.multiplications.update(group.multiplications)
        for kind in KINDS:
            into.quantizers[kind] = list(dict.fromkeys([*into.quantizers[kind], *group.quantizers[kind]]))
        held = {weight.data_ptr() for weight, _ in into.weights}
        into.weights += [(weight, q) for weight, q in group.weights if weight.data_ptr() not in held]
    return list(found.values())
