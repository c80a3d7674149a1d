"""Lets a converted model keep its activations as codes from layer to layer, in int8 programs."""

from __future__ import annotations

import copy
import functools
import heapq
import inspect
import operator
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..nn.attend import attend
from ..nn.integer_attention import IntegerMultiheadAttention
from ..nn.quantized import QuantizedLayer
from ..nn.tracing import NAMED, TRACING, first_line, say_which_of_torch
from ..ops.autograd import transformed
from ..ops.int8_program import int8_program
from .call_patterns import KINDS, Arguments, Pattern
from .graph import Graph, LayerTracer, overwritten
from .lowering import Part, parts_of
from .module_state import ModuleState

NOTHING = "no two operations in a row that a program can run"
_MORE: Pattern = ("more",)  # stands for all further ones


class FusedForward:
    """The forward of a converted module, in as few calls of programs as its graph allows.

    The graph is that of one kind of calls, first of those that leave all optional arguments out; calls of another kind,
    such as those with a mask, are traced when they come.

    It stands in the module's ``forward`` attribute, so that the tree of modules, their names, hooks and state_dict stay
    as they are. The module's own forward runs instead where a program would not do the same: if a module is in training
    mode, or one inside has hooks; for inputs that are not plain fp32 CPU tensors; under autocast or a transform of
    torch.func; while torch.fx or torch.jit traces; and, where an argument is overwritten, for gradients. Gradients are
    those of the module's own forward, which the backward pass runs again.

    Attributes:
        reason: why there is no program; None: there is one.
        refused: why a program did not take what the last call gave it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.reason: str | None = None
        self.refused: str | None = None
        self._built: dict[Pattern, _Built | None] = {}
        self._state: ModuleState | None = None
        self._cautious = False
        self._arguments: Arguments | None = None
        try:
            self._arguments = Arguments(type(module))
        except NotImplementedError as error:
            self.reason = str(error)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own)

    @property
    def __code__(self) -> Any:  # torch.export asks for it
        return type(self.module).forward.__code__

    @property
    def _own(self) -> Callable[..., Any]:
        """The module's own forward."""
        return functools.partial(type(self.module).forward, self.module)

    def build(self) -> None:
        """Traces the module and writes its programs; ``reason`` says if there are none."""
        with TRACING:
            if self._arguments is None:
                self._state = ModuleState(self.module)
            else:
                self.reason = self._build(self._arguments.pattern_of((), {}), {}, ModuleState(self.module))

    def _build(self, pattern: Pattern, others: dict[Pattern, _Built | None], state: ModuleState | None) -> str | None:
        """Traces the module for one more kind of calls; why it has no programs for it."""
        built, reason = None, None
        try:
            if pattern == _MORE:
                raise NotImplementedError(f"more than {KINDS} kinds of calls, each value of a text being one")
            built = _Built(self.module, pattern, self._cautious)
        except NotImplementedError as error:
            reason = first_line(error)
        except Exception as error:  # nobody's model is to fail by it, as its layers compute the same one by one
            reason = f"a fault of qkernels ({type(error).__name__}: {first_line(error)})"
            warnings.warn(
                f"{type(self.module).__name__}: its layers run one by one because of {reason}; please report it with "
                "the model",
                stacklevel=1,
            )
        self._built = {**others, pattern: built}
        self._state = state  # at last, as other threads look at it first
        return reason

    def _programs(self, pattern: Pattern) -> _Built | None:
        """What there is for calls of a kind, which is made if it was not asked for since the module has changed."""
        if not self._is_current():
            with TRACING:
                if not self._is_current():  # another thread may have built it meanwhile
                    self.build()
        if pattern not in self._built and len(self._built) >= KINDS:
            pattern = _MORE
        if pattern not in self._built and not torch.compiler.is_compiling():
            with TRACING:
                reason = self._build(pattern, self._built, self._state) if pattern not in self._built else None
                if reason not in (None, NOTHING):
                    assert self._arguments is not None
                    kind = "" if pattern == _MORE else f"{self._arguments.described(pattern)}: "
                    self.refused = f"{kind}{reason}"
                    self._fuse_children()
        return self._built.get(pattern)

    def _fuse_children(self) -> None:
        """Lets the modules inside run programs of their own where this one's own forward calls them."""
        for child in self.module.children():
            if not fused_parts(child):
                fuse(child)

    def _is_current(self) -> bool:
        return self._state is not None and self._state.holds()

    @property
    def plans(self) -> list[str]:
        """The programs for calls without optional arguments, in the language of ``ops/int8_program.py``."""
        built = next(iter(self._built.values()), None)
        return [] if built is None else [part.plan for part in built.parts]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._called(args, kwargs)
        except NAMED as error:
            say_which_of_torch(error)
            raise

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.module
        bound = None if self._arguments is None else self._arguments.bound(args, kwargs)
        if bound is None or module.training or _is_watched() or any(isinstance(x, fx.Proxy) for x in bound[1]):
            return self._own(*args, **kwargs)
        pattern, values = bound
        built, state = self._programs(pattern), self._state
        if built is None or state is None or any(state.hooks) or state.trains or not built.takes(values):
            return self._own(*args, **kwargs)
        try:
            try:
                return self._run(built, values, args, kwargs)
            except _Stale:
                self.build()
            again = self._programs(pattern)
            return self._own(*args, **kwargs) if again is None else self._run(again, values, args, kwargs)
        except (_Stale, _Unfit) as error:
            self.refused = str(error)
            result = self._own(*args, **kwargs)  # raises where the input is at fault
            self._be_cautious()
            return result

    def _be_cautious(self) -> None:
        """Writes programs again that do not count on shapes which are seen only when they run."""
        if self._cautious or torch.compiler.is_compiling():
            return
        with TRACING:
            self._cautious = True
            self.build()

    def _run(self, built: _Built, values: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._wants_gradient(values) or torch.compiler.is_exporting():
            return built.run(*values)
        if torch.compiler.is_compiling() or built.overwritten:  # the backward pass would run on what was overwritten
            return self._own(*args, **kwargs)
        assert self._arguments is not None
        return _with_gradient(self._own, built, values, self._arguments, self.module)

    def _wants_gradient(self, values: list[Any]) -> bool:
        assert self._state is not None
        if not torch.is_grad_enabled():
            return False
        return (
            any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(values)) or self._state.wants_gradient()
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedForward:
        return FusedForward(copy.deepcopy(self.module, memo))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(FusedForward(self.module))}


def _is_watched() -> bool:
    """Whether something runs that wants to see each layer, or that programs do not serve."""
    tracing = torch._C._get_tracing_state() is not None if not torch.compiler.is_compiling() else False
    hooked = torch_module._has_any_global_hook()
    return tracing or hooked or transformed() or torch.is_autocast_enabled("cpu")


class _Unfit(Exception):
    """A program cannot run on what it got."""


class _Stale(Exception):
    """Quantizers that a program takes for one have got different values."""


class _Built:
    """The graph of a module with calls of programs in it."""

    def __init__(self, module: nn.Module, pattern: Pattern, cautious: bool) -> None:
        self.pattern = pattern
        graph = Graph(module, pattern, cautious)
        self.parts = parts_of(graph)
        if not self.parts:
            raise NotImplementedError(NOTHING)
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        read = {node for part in self.parts for node in part.inputs}
        ranks = [graph.ranks.get(node) for node in places]
        # The arguments that programs read, and how many dims they want of them; 0: any number.
        self.dims = [
            (i, 0 if rank is None else rank + 2)
            for i, (node, rank) in enumerate(zip(places, ranks, strict=True))
            if node in read
        ]
        self.overwritten = [i for i, node in enumerate(places) if node in graph.copies.values()]
        called = {node.args[0] for node in graph.graph.nodes if node.op == "call_method"}
        self.tensors = [i for i, node in enumerate(places) if node in called]  # another object may do anything
        self.run: Callable[..., Any] = fx.GraphModule(module, _rewritten(graph, self.parts)).forward

    def takes(self, values: list[Any]) -> bool:
        for i, dims in self.dims:  # loops, as this runs at each call: generators would take 1 µs more
            if not (_is_plain(values[i]) and dims in (0, values[i].dim())):
                return False
        for i in self.tensors:
            if not isinstance(values[i], Tensor):
                return False
        return all(_is_alone(values[i], values) for i in self.overwritten) if self.overwritten else True


def _with_gradient(
    own: Callable[..., Any], built: _Built, values: list[Any], arguments: Arguments, module: nn.Module
) -> Any:
    wanted = [p for p in module.parameters() if p.requires_grad]
    flat, spec = tree_flatten(values)
    structure: list[Any] = []

    def own_of(given: Any) -> Any:
        args, kwargs = arguments.values(built.pattern, tree_unflatten(list(given), spec))
        return own(*args, **kwargs)

    def run(given: Any) -> Any:
        return built.run(*tree_unflatten(list(given), spec))

    outputs = _Recomputed.apply(own_of, run, structure, len(flat), *flat, *wanted)  # type: ignore[no-untyped-call]
    return tree_unflatten(list(outputs), structure[0])


class _Recomputed(Function):
    """Programs forwards; backwards the module's own forward again, with its gradients, of any order."""

    @staticmethod
    def forward(ctx: Any, own: Any, run: Any, structure: list[Any], count: int, *given: Any) -> Any:
        ctx.own, ctx.count = own, count
        ctx.others = [None if isinstance(x, Tensor) else x for x in given]
        ctx.save_for_backward(*(x for x in given if isinstance(x, Tensor)))  # torch refuses those written meanwhile
        ctx.places = [i for i, x in enumerate(given) if isinstance(x, Tensor)]
        flat, spec = tree_flatten(run(given[:count]))
        structure.append(spec)
        return tuple(flat)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        given = list(ctx.others)
        for i, x in zip(ctx.places, ctx.saved_tensors, strict=True):
            given[i] = x
        further = torch.is_grad_enabled()  # gradients of these gradients will be wanted
        with torch.enable_grad():
            for i in ctx.places:
                if i < ctx.count:  # another tensor, so that the gradient ends here
                    x = given[i]
                    given[i] = (
                        x.view_as(x) if further and x.requires_grad else x.detach().requires_grad_(x.requires_grad)
                    )
            outputs, _ = tree_flatten(ctx.own(given[: ctx.count]))
            asked = [i for i in ctx.places if given[i].requires_grad]
            pairs = [
                (y, g)
                for y, g in zip(outputs, grads, strict=True)
                if isinstance(y, Tensor) and g is not None and y.requires_grad
            ]
            found = torch.autograd.grad(
                [y for y, _ in pairs],
                [given[i] for i in asked],
                [g for _, g in pairs],
                allow_unused=True,
                create_graph=further,
            )
        gradients: list[Any] = [None] * len(given)
        for i, gradient in zip(asked, found, strict=True):
            gradients[i] = gradient
        return (None, None, None, None, *gradients)


def _is_alone(x: Tensor, values: list[Any]) -> bool:
    """Whether no other tensor among the arguments has its memory; a graph of torch.compile cannot ask."""
    tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
    if len(tensors) == 1 or torch.compiler.is_compiling():
        return len(tensors) == 1
    return sum(t.untyped_storage()._cdata == x.untyped_storage()._cdata for t in tensors) == 1


def _is_plain(x: Any) -> bool:
    kind = type(x) is Tensor or isinstance(x, FakeTensor) or type(x) is nn.Parameter
    return kind and x.dtype is torch.float32 and x.device.type == "cpu" and x.layout is torch.strided and x.dim() >= 2


def _rewritten(graph: Graph, parts: list[Part]) -> fx.Graph:
    """The graph with a call of a program in place of each part, in an order in which everything is made before use.

    Raises:
        NotImplementedError: there is no such order.
    """
    part_of = {node: part for part in parts for node in part.nodes}
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    units: list[fx.Node | Part] = [
        node for node in graph.graph.nodes if node not in part_of and (node in graph.read or graph.stays(node))
    ]
    kept = {*units, *part_of}
    units += parts
    first = {id(unit): order[unit if isinstance(unit, fx.Node) else unit.nodes[0]] for unit in units}
    waiting: dict[int, int] = {}
    waiters: dict[int, list[fx.Node | Part]] = {}
    for unit in units:
        sources = unit.all_input_nodes if isinstance(unit, fx.Node) else unit.inputs
        if isinstance(unit, fx.Node) and graph.overwrites(unit):  # what reads the tensor before, does so before
            readers = chain.from_iterable(node.users for node in overwritten(unit, graph.root))
            sources = [*sources, *(user for user in readers if order[user] < order[unit] and user in kept)]
        needed = {id(part_of.get(source, source)) for source in sources}
        waiting[id(unit)] = len(needed)
        for source in needed:
            waiters.setdefault(source, []).append(unit)
    ready = [(first[id(unit)], id(unit), unit) for unit in units if not waiting[id(unit)]]
    heapq.heapify(ready)
    new = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    while ready:
        _, _, unit = heapq.heappop(ready)
        if isinstance(unit, Part):
            result = new.call_function(_caller(unit), tuple(made[source] for source in unit.inputs))
            for i, node in enumerate(unit.outputs):
                made[node] = new.call_function(operator.getitem, (result, i))
        elif unit.op == "get_attr":
            made[unit] = new.call_function(_getter(graph, str(unit.target)))
        else:
            given = dict(made)
            if (argument := graph.argument_overwritten_by(unit)) is not None:
                given[argument] = new.call_method("clone", (made[argument],))
            made[unit] = new.node_copy(unit, given.__getitem__)
            if unit.target is F.scaled_dot_product_attention:
                made[unit].target = attend
        for other in waiters.get(id(unit), ()):
            waiting[id(other)] -= 1
            if not waiting[id(other)]:
                heapq.heappush(ready, (first[id(other)], id(other), other))
    if any(waiting.values()):
        raise NotImplementedError("a program would read before and after an operation overwrites a tensor")
    return new


def _getter(graph: Graph, name: str) -> Callable[[], Any]:
    """Reads an attribute of the root when it runs: a move to another dtype may have replaced it."""
    root, constants = graph.root, graph.constants

    def attribute() -> Any:
        return constants[name] if name in constants else operator.attrgetter(name)(root)

    return attribute


def _caller(part: Part) -> Callable[..., list[Tensor]]:
    def int8_part(*inputs: Tensor) -> list[Tensor]:
        for x, dims in zip(inputs, part.dims, strict=True):
            if not _is_plain(x):
                raise _Unfit("an input of a program is no fp32 tensor on the CPU")
            if dims not in (None, x.dim()):
                raise _Unfit(f"inputs of a program have {[x.dim() for x in inputs]} dims; accepted: {part.dims}")
        flat = part.in_rows and (len(inputs) > 1 or inputs[0].dim() > 2)
        lead = inputs[0].shape[:-1]
        if flat and any(x.shape[:-1] != lead for x in inputs):  # as many rows can mean others
            raise _Unfit(f"inputs of a program have shapes {[list(x.shape) for x in inputs]}; accepted: equal ones")
        try:
            given = [x.flatten(0, -2) for x in inputs] if flat else list(inputs)
            outputs = int8_program(given, part.constants(), part.plan)
        except RuntimeError as error:
            raise (_Stale if "for one quantizer" in str(error) else _Unfit)(str(error)) from None
        return [y.reshape(*lead, y.shape[-1]) for y in outputs] if flat else outputs

    return int8_part


def fuse(model: nn.Module) -> nn.Module:
    """Gives ``model``, or the largest modules inside that can be traced, a ``FusedForward``, in place."""
    for _, fused in _tried(model):
        if fused.reason is None:
            fused.module.__dict__["forward"] = fused
    return model


def unfused(model: nn.Module) -> dict[str, str]:
    """The modules of a converted model that cannot be traced, though more than one layer or program runs in them."""
    tried = list(_tried(model))
    programs = {fused.module for _, fused in tried if fused.reason is None}
    inside = {layer for module in programs for layer in module.modules()} - programs
    found = {}
    for name, fused in tried:
        runs = {m for m in fused.module.modules() if m in programs or isinstance(m, QuantizedLayer)} - inside
        if fused.reason not in (None, NOTHING) and len(runs) > 1:
            found[name] = str(fused.reason)
    return found


def _tried(module: nn.Module, name: str = "") -> Iterator[tuple[str, FusedForward]]:
    """Programs of the module, or if it has none, of its children."""
    if LayerTracer().is_leaf_module(module, name) or not any(isinstance(m, QuantizedLayer) for m in module.modules()):
        return
    if isinstance(module, IntegerMultiheadAttention):  # it is traced as a part of another module alone
        return
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        fused = FusedForward(module)
        fused.build()
        yield name, fused
        if fused.reason is None:
            return
    for child_name, child in module.named_children():
        yield from _tried(child, f"{name}.{child_name}" if name else child_name)


def fused_parts(model: nn.Module) -> dict[str, FusedForward]:
    """The FusedForwards of a converted model, by their modules' names."""
    found = {name: vars(module).get("forward") for name, module in model.named_modules()}
    return {name: forward for name, forward in found.items() if isinstance(forward, FusedForward)}
