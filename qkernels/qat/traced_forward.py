"""Quantizers inside of a module's own forward: for its sums, concatenations and average pools.

torch.fx traces the forward with the module's children as leaves. The graph's code, with calls of the quantizers in it,
then runs in place of the forward. A trace holds for one mode, for certain values of the module's attributes, and for
certain kinds of arguments; other ones are traced when they come.
"""

from __future__ import annotations

import functools
import itertools
import linecache
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Proxy

from ..nn.fake_quantize import FakeQuantize
from ..nn.qat_layer import SUFFIX, copied_state
from ..nn.quantized_parameters import QATParameters
from ..nn.tracing import TRACING, first_line, name_in_what_was_called
from .call_patterns import Arguments, Pattern
from .faithful_tracing import OWN_CODE, FaithfulTracer, attributes_of, traced_with_and_without_gradients
from .forward_tensors import OBSERVED, PLACE, Place, Tensors, find_tensors, place_of
from .graph import without_writes
from .module_state import is_switch, switches

KEPT = 256  # kinds of calls unlike the model's own whose traces are kept
_numbers = itertools.count()


class TracedForward:
    """Computes what a module's own forward does, with quantizers in it. Deep copies of a module share it.

    Attributes:
        roles: the role of the quantizer of each tensor, by the place in the source where the tensor is made.
        patterns: the kinds of arguments with which the model calls the module.
    """

    def __init__(self, module: nn.Module, roles: dict[Place, str], traces: Sequence[Trace]) -> None:
        """traces: one at least; others are made when they are needed."""
        self.roles = roles
        self.switches = traces[0].switches
        self.known = {place for trace in traces for place in trace.places()}
        self.patterns = list(dict.fromkeys(trace.pattern for trace in traces))
        self.arguments = Arguments(type(module))
        self._make(traces)

    def _make(self, traces: Sequence[Trace]) -> None:
        self._made = {(trace.pattern, trace.state): trace.function(self.roles) for trace in traces}
        self._first = len(self._made)

    @classmethod
    def of(cls, module: nn.Module, roles: dict[Place, str], patterns: Sequence[Pattern]) -> TracedForward:
        """That of a float module for which the roles and patterns are known.

        Raises:
            ValueError: its forward does not make these tensors.
        """
        traces = _in_both_modes(module, type(module), patterns)
        made = {place for trace in traces for place in trace.places()}
        missing = [f"{role} ({place})" for place, role in roles.items() if place not in made]
        if missing:
            raise ValueError(f"its forward makes no {', no '.join(missing)}")
        return cls(module, roles, traces)

    def restore(self, module: QATParameters) -> None:
        """Traces the module after it was pickled, so that compiled code finds what it needs."""
        if not self._made:
            traces = _in_both_modes(module, type(module).float_type, self.patterns)
            self._make(traces)

    def __call__(self, module: QATParameters, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = self.arguments.bound(args, kwargs)
        if bound is None:  # the module's own forward says what is wrong
            return type(module).float_type.forward(module, *args, **kwargs)
        pattern, values = bound
        key = pattern, state_of(module, self.switches)
        forward = self._made.get(key)
        if forward is None:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{type(module).float_type.__name__}: got a call, or attributes, unlike those that it had when it "
                    "was prepared; accepted: to call the model once in this way before it is compiled"
                )
            with TRACING:
                trace = self._traced(module, pattern)
                forward = trace.function(self.roles)
                self._keep(key, forward)
            self._name_new_sums(trace)
        return forward(module, *values)

    def _keep(self, key: tuple[Any, ...], forward: Callable[..., Any]) -> None:
        """Beside those that were made first, as the model makes such calls itself, the last ones."""
        others = list(self._made)[self._first :]
        if len(others) >= KEPT:
            linecache.cache.pop(self._made.pop(others[0]).__code__.co_filename, None)
        self._made[key] = forward

    def _name_new_sums(self, trace: Trace) -> None:
        kinds = trace.tensors().places().items()
        new = [place for place, kind in kinds if kind in ("add", "cat") and place not in self.known]
        if new:
            warnings.warn(
                f"{', '.join(new)}: a sum or concatenation that was not there when the model was prepared, for other "
                "arguments or attributes; it stays in float",
                stacklevel=5,
            )

    def _traced(self, module: QATParameters, pattern: Pattern) -> Trace:
        kind = type(module).float_type
        try:
            return Trace(shadow_of_own(module, kind), pattern)
        except NotImplementedError as error:
            name = name_in_what_was_called(module)
            raise RuntimeError(
                f"{f'{name} ({kind.__name__})' if name else kind.__name__}: its sums cannot be quantized in a call "
                f"{self.arguments.described(pattern)}: {first_line(error)}; accepted: calls and attributes like those "
                "that it had when it was prepared, or to prepare the model with the rule "
                f'({kind.__name__}, {{"residual": None}}), which leaves its sums in float'
            ) from None

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedForward:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_made": {}}


def _in_both_modes(module: nn.Module, kind: type[nn.Module], patterns: Sequence[Pattern]) -> list[Trace]:
    traces = []
    for training, pattern in itertools.product((False, True), patterns):
        shadow = shadow_of_own(module, kind)
        shadow.training = training
        traces.append(Trace(shadow, pattern))
    return traces


def state_of(module: nn.Module, names: Sequence[str]) -> tuple[Any, ...]:
    """The values of some attributes of a module, and which of its children are missing."""
    values = [getattr(module, name, None) for name in names]
    known = tuple([value if is_switch(value) else type(value) for value in values])
    return known, tuple([child is None for child in module._modules.values() if not isinstance(child, FakeQuantize)])


def shadow_of_own(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The module with its own class again; it shares children and tensors."""
    shadow = kind.__new__(kind)
    shadow.__dict__ = copied_state(module)
    return shadow


class _OwnTracer(FaithfulTracer):
    """Traces a module's own forward, and notes where in the source each tensor is made."""

    def __init__(self, pattern: Pattern) -> None:
        super().__init__(pattern)
        self.calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        self._counts: dict[str, int] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def record_call(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.calls.append((m, args, kwargs))
        return super().record_call(m, forward, args, kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, Proxy):
            raise self.refusal("it makes a tensor of nothing that it is given")
        return super().create_arg(a)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        if kind not in ("output", "placeholder", "get_attr"):
            node.meta[PLACE], node.meta[OBSERVED] = self._place()
        return node

    def _place(self) -> tuple[Place, bool]:
        """The line of the user's code that runs, and how many calls that line has made before.

        And whether a method of torch's FloatFunctional runs, which hands its results to a quantizer of its own.
        """
        frame, code, line, observed = sys._getframe(2), None, 0, False
        while frame is not None and frame.f_code is not FaithfulTracer.trace.__code__:
            name = frame.f_globals.get("__name__", "")
            if name == "torch.utils.checkpoint":
                raise self.refusal("it uses activation checkpointing")
            observed = observed or name.startswith("torch.ao.nn.quantized.")
            if code is None and not name.startswith(OWN_CODE):
                code, line = frame.f_code, frame.f_lineno
            frame = frame.f_back  # type: ignore[assignment]
        place = "" if code is None else f"{getattr(code, 'co_qualname', code.co_name)}+{line - code.co_firstlineno}"
        count = self._counts[place] = self._counts.get(place, -1) + 1
        return f"{place}#{count}" if count else place, observed


class Trace:
    """The graph of a module's own forward for one pattern, in its mode.

    Raises:
        NotImplementedError: the forward cannot be traced, or the graph would not do what it does.
    """

    def __init__(self, module: nn.Module, pattern: Pattern) -> None:
        self.pattern, self.switches = pattern, ["training", *switches(module)]
        self.state = state_of(module, self.switches)
        self._module, self._name = module, f"{type(module).__module__}.{type(module).__qualname__}"
        self.graph = traced_with_and_without_gradients(functools.partial(self._traced, module))
        self._made: dict[tuple[tuple[Place, str], ...], Callable[..., Any]] = {}
        without_writes(self.graph, module)

    def _traced(self, module: nn.Module) -> fx.Graph:
        tracer, near = _OwnTracer(self.pattern), {"": module, **dict(module.named_children())}
        before = attributes_of(near)
        graph = tracer.trace(module)
        if attributes_of(near) != before:
            raise NotImplementedError("it sets attributes")
        self.calls = tracer.calls
        return graph

    def tensors(self) -> Tensors:
        return find_tensors(self.graph, self._module)

    def places(self) -> dict[Place, fx.Node]:
        """The nodes that make tensors, or other values, by their places."""
        return {place_of(node): node for node in self.graph.nodes if node.op == "placeholder" or PLACE in node.meta}

    def function(self, roles: Mapping[Place, str]) -> Callable[..., Any]:
        """The forward with quantizers, a function of the module and the given arguments."""
        made = self.places()
        here = tuple((place, role) for place, role in roles.items() if place in made)
        if here not in self._made:
            self._made[here] = self._compiled([(made[place], role) for place, role in here])
        return self._made[here]

    def _compiled(self, places: list[tuple[fx.Node, str]]) -> Callable[..., Any]:
        added: list[fx.Node] = []
        for node, role in places:
            with self.graph.inserting_after(node):
                quantizer = self.graph.get_attr(role + SUFFIX)
            with self.graph.inserting_after(quantizer):
                result = self.graph.call_function(passed, (quantizer, node))
            node.replace_all_uses_with(result, lambda user, result=result: user is not result)  # type: ignore[misc]
            added += [quantizer, result]
        code = self.graph.python_code("self")
        for node in reversed(added):  # the trace may serve with other roles
            if node.op == "call_function":
                node.replace_all_uses_with(node.args[1])  # type: ignore[arg-type]
            self.graph.erase_node(node)
        file = f"<{self._name} with quantizers {next(_numbers)}>"
        linecache.cache[file] = len(code.src), None, code.src.splitlines(True), file  # for tracebacks
        scope = dict(code.globals)
        exec(compile(code.src, file, "exec"), scope)
        return scope["forward"]  # type: ignore[no-any-return]


def passed(quantizer: nn.Module, x: Any) -> Any:
    """x through the quantizer, if it is a tensor of floats."""
    if isinstance(x, Tensor):
        return quantizer(x) if x.is_floating_point() else x
    return quantizer(x) if isinstance(x, Proxy) else x
