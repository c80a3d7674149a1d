"""Finds what ``QConfig(residual=…)`` quantizes in modules of any class: sums, concatenations and inputs of pools.

Each module's own forward shows which tensors it makes (forward_tensors.py). The graph of the whole model then shows
which of them are quantized already, and which layers read them.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from ..nn.fake_quantize import FakeQuantize
from ..nn.qat_classes import qat_class_of
from ..nn.qat_layer import SUFFIX
from ..nn.quantized_parameters import QATParameters
from ..nn.tracing import first_line
from .call_patterns import Arguments, Pattern
from .copying import replace_modules, shadow_of
from .forward_tensors import POOLS, Place, Tensors, name_of
from .operations import POOL_MODULES
from .sharing import graphs_of
from .spec import QSpec
from .traced_forward import Trace, TracedForward, shadow_of_own

# Their results hold values of their input, and no others.
MOVES = frozenset(
    (
        *("maxpool1d", "maxpool2d", "maxpool3d", "adaptivemaxpool2d", "identity", "flatten", "unflatten", "view"),
        *("reshape", "permute", "transpose", "swapaxes", "contiguous", "chunk", "split", "unbind", "getitem"),
        *("squeeze", "unsqueeze", "channelshuffle", "pixelshuffle", "pixelunshuffle"),
    )
)
# By which code may call what is quantized.
NAMES = frozenset(("add", "add_", "cat", "concat", "concatenate", "mean", *(pool.__name__ for pool in POOLS)))


@dataclass
class Own:
    """The tensors of one module's forward that have quantizers, by the names of their roles."""

    roles: dict[Place, str] = field(default_factory=dict)
    sums: dict[str, list[str]] = field(default_factory=dict)  # role of a sum -> the roles of its operands
    traces: list[Trace] = field(default_factory=list)

    def add(self, trace: Trace, tensors: Tensors) -> None:
        self.traces.append(trace)
        for place, kind in tensors.places().items():
            if place not in self.roles:
                count = sum(role.rstrip("_0123456789") == kind for role in self.roles.values())
                self.roles[place] = f"{kind}_{count}" if count else kind
        for place, operands in tensors.sums.items():
            if place in self.roles:
                self.sums[self.roles[place]] = [self.roles[operand] for operand in operands]


@dataclass
class Residuals:
    """What a config makes of the sums, concatenations and pools of a model.

    Tensors have the names of their roles behind that of their module, "layer1.0.add".

    Attributes:
        own: modules whose forward is traced, by name.
        pools: average pools that quantize their input themselves.
        specs: the spec of each tensor.
        layers: layer -> the tensor that it reads.
        feature_dims: how many dims of each tensor make up a sample.
        reasons: modules whose forward stays as it is, and why.
        same: tensor -> the first of those that are one tensor, which enters several modules.
    """

    own: dict[str, Own] = field(default_factory=dict)
    pools: list[str] = field(default_factory=list)
    specs: dict[str, QSpec] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    feature_dims: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)

    def marked(self, model: nn.Module) -> nn.Module:
        """A copy of the model in which each tensor passes through a quantizer, to be traced once: traces change it."""
        shadow, made = shadow_of(model), dict[nn.Module, nn.Module]()
        for name, own in self.own.items():
            module = shadow.get_submodule(name)
            quantizers = {role: FakeQuantize(quantizer="minmax") for role in own.roles.values()}
            if quantizers:
                made[module] = QATParameters.of(module, quantizers, self.traced_forward(name, module))
        for name in self.pools:
            module = shadow.get_submodule(name)
            made[module] = QATParameters.of(module, {"input": FakeQuantize(quantizer="minmax")})
        return replace_modules(shadow, made.get)

    def roles_of(self, name: str) -> list[str]:
        """The roles of the tensors of a module."""
        return list(self.own[name].roles.values()) if name in self.own else ["input"] * (name in self.pools)

    def traced_forward(self, name: str, module: nn.Module) -> TracedForward | None:
        own = self.own.get(name)
        return None if own is None else TracedForward(module, own.roles, own.traces)

    def quantizer_names(self) -> list[str]:
        return [name + SUFFIX for name in self.specs]

    def drop(self, tensors: Collection[str]) -> None:
        """Leaves these tensors as they are."""
        self.specs = {name: spec for name, spec in self.specs.items() if name not in tensors}
        self.pools = [name for name in self.pools if _joined(name, "input") in self.specs]
        for name, own in self.own.items():
            own.roles = {place: role for place, role in own.roles.items() if _joined(name, role) in self.specs}
            own.sums = {
                total: [role for role in operands if _joined(name, role) in self.specs]
                for total, operands in own.sums.items()
            }
        self.own = {name: own for name, own in self.own.items() if own.roles}


def find_residuals(
    model: nn.Module,
    spec_of: Callable[[str, nn.Module], QSpec | None],
    takers: Collection[str],
    pools: Callable[[str], bool],
) -> Residuals:
    """What there is to be quantized in a model, which stays as it is.

    spec_of: the spec for a module's tensors, by its name. takers: layers that may leave the quantizing of their input
    to whoever makes it. pools: whether an average pool of this name may quantize its input.
    """
    found = _own_tensors(model, spec_of)
    for name, module in model.named_modules():
        spec = spec_of(name, module) if type(module) in POOL_MODULES and pools(name) else None
        if spec is not None and name not in found.read:
            found.residuals.pools.append(name)
            found.residuals.specs[_joined(name, "input")] = spec
    residuals = found.residuals
    if not residuals.specs:
        return residuals
    residuals.drop(_needless(residuals, residuals.marked(model)))
    if residuals.specs:
        marked = residuals.marked(model)
        both = [_readers(residuals, marked.train(training), takers) for training in (False, True)]
        residuals.layers = {layer: name for layer, name in both[0].items() if both[1].get(layer) == name}
    return residuals


@dataclass
class _Found:
    residuals: Residuals = field(default_factory=Residuals)
    read: set[str] = field(default_factory=set)  # average pools that a traced forward calls


def _own_tensors(model: nn.Module, spec_of: Callable[[str, nn.Module], QSpec | None]) -> _Found:
    """Traces each module's own forward, in both modes, for the calls that the model makes."""
    shadow = shadow_of(model)
    names = {module: name for name, module in shadow.named_modules()}
    found, traced = _Found(), dict[nn.Module, Own]()
    for training in (False, True):
        shadow.train(training)
        for module, trace in _traces(shadow, found.residuals.reasons, names):
            tensors = trace.tensors()
            traced.setdefault(module, Own()).add(trace, tensors)
            found.read |= {_joined(names[module], child) for child in tensors.pools}
    for module, own in traced.items():
        name = names[module]
        spec = spec_of(name, model.get_submodule(name)) if own.roles else None
        if spec is None or name in found.residuals.reasons:
            continue
        found.residuals.own[name] = own
        found.residuals.specs.update({_joined(name, role): spec for role in own.roles.values()})
    reasons = found.residuals.reasons
    found.residuals.reasons = {n: reason for n, reason in reasons.items() if spec_of(n, model.get_submodule(n))}
    return found


def _traces(
    shadow: nn.Module, reasons: dict[str, str], names: Mapping[nn.Module, str]
) -> Iterator[tuple[nn.Module, Trace]]:
    """The traces of all modules with a forward of their own, from the root on."""
    seen: set[tuple[nn.Module, Pattern]] = set()
    reached: set[nn.Module] = set()
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = [(shadow, (), {})]
    waiting = [*names]  # those that no trace reaches follow, with their defaults
    while calls or waiting:
        if not calls:
            calls = [(module, (), {}) for module in waiting[:1] if module not in reached]
            del waiting[0]
            continue
        module, args, kwargs = calls.pop(0)
        reached.add(module)
        if module not in names or _is_known(module):
            continue
        if type(module).forward is nn.Sequential.forward:
            calls += [(child, (...,), {}) for child in module.children()]
            continue
        kind = type(module)
        try:
            if "forward" in vars(module):
                raise NotImplementedError("its forward was replaced on the instance")
            if parametrize.is_parametrized(module):
                raise NotImplementedError("its parameters are computed by torch's parametrizations")
            pattern = Arguments(kind).pattern_of(args, kwargs)
            if (module, pattern) in seen:
                continue
            seen.add((module, pattern))
            trace = Trace(shadow_of_own(module, kind), pattern)
        except NotImplementedError as error:
            reasons.setdefault(names[module], first_line(error))
            continue
        calls += trace.calls
        yield module, trace


def may_hold_sums(module: nn.Module) -> bool:
    """Whether the code of a forward, or of the functions that it calls by name, adds, concatenates or pools."""
    waiting: list[Any] = [inspect.unwrap(type(module).forward)]
    seen: set[Any] = set()
    while waiting:
        function = waiting.pop()
        code = getattr(function, "__code__", function)
        if not isinstance(code, CodeType) or code in seen:
            continue
        seen.add(code)
        if not NAMES.isdisjoint(code.co_names) or any(map(_adds, dis.get_instructions(code))):
            return True
        named = getattr(function, "__globals__", {})
        own = [name for name in code.co_names if not hasattr(nn.Module, name)]
        waiting += [*code.co_consts, *(inspect.getattr_static(module, name, named.get(name)) for name in own)]
    return False


def _adds(step: dis.Instruction) -> bool:
    in_one = step.opname == "BINARY_OP" and step.argrepr in ("+", "+=")
    sums = step.opname == "LOAD_GLOBAL" and step.argval == "sum"
    return in_one or sums or step.opname in ("BINARY_ADD", "INPLACE_ADD")  # the latter are Python 3.10's


def _is_known(module: nn.Module) -> bool:
    """Whether a module is a layer, or one of torch's that hold no others."""
    if qat_class_of(module) is not None or isinstance(module, nn.ModuleList | nn.ModuleDict):
        return True
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)


def tensor_name(name: str) -> str:
    """The name of a tensor by that of its quantizer; any other name is a layer's, and stays."""
    return name.removesuffix(SUFFIX)


def _joined(module: str, role: str) -> str:
    return f"{module}.{role}".removeprefix(".")


def _calls(root: nn.Module, graph: fx.Graph, wanted: Mapping[nn.Module, str]) -> dict[str, list[fx.Node]]:
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and (name := wanted.get(root.get_submodule(str(node.target)))) is not None:
            calls.setdefault(name, []).append(node)
    return calls


def _markers(marked: nn.Module) -> dict[nn.Module, str]:
    """The quantizers of a marked model, with the names of their tensors."""
    quantizers = ((name, module) for name, module in marked.named_modules() if isinstance(module, FakeQuantize))
    return {module: name.removesuffix(SUFFIX) for name, module in quantizers}


def _needless(residuals: Residuals, marked: nn.Module) -> set[str]:
    """Inputs of sums and pools that hold quantized values anyway; and of each sum the operand that is made last.

    A product computes this one in float, and can add the other ones before anything is stored.
    """
    markers = _markers(marked.eval())
    dropped: set[str] = set()
    for root, graph in graphs_of(marked, markers):
        calls = _calls(root, graph, markers)
        order = {node: i for i, node in enumerate(graph.nodes)}
        made_by = {node: name for name, nodes in calls.items() for node in nodes}
        for name, nodes in calls.items():
            if not name.endswith("input"):
                continue
            sources = [_maker(node, root, made_by, dropped) for node in nodes]
            if all(s is not None and residuals.specs[s] == residuals.specs[name] for s in sources):
                dropped.add(name)
        for module, own in residuals.own.items():
            for operands in own.sums.values():
                last = -1, ""
                for name in (_joined(module, role) for role in operands):
                    values = [node.args[0] for node in calls.get(name, ()) if name not in dropped]
                    if values and all(_is_computed_for_one(value) for value in values):
                        last = max(last, (order[values[0]], name))  # type: ignore[index]
                if last[1]:
                    dropped.add(last[1])
    return dropped


def _is_computed_for_one(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op.startswith("call") and len(value.users) == 1


def _maker(node: fx.Node, root: nn.Module, made_by: Mapping[fx.Node, str], dropped: Collection[str]) -> str | None:
    """The quantized tensor whose values a call gets as its first argument, if moves alone hand them on."""
    source: Any = node.args[0] if node.args else None
    while isinstance(source, fx.Node) and source.op not in ("placeholder", "get_attr", "output"):
        name = made_by.get(source)
        if name is not None and name not in dropped:
            return name
        if name is None and name_of(source, root) not in MOVES:
            return None
        source = source.args[0] if source.args else None
    return None


def _readers(residuals: Residuals, marked: nn.Module, takers: Collection[str]) -> dict[str, str]:
    """The layers that are called once, with a quantized tensor, and that tensor."""
    markers = _markers(marked)
    layers = {marked.get_submodule(name): name for name in takers}
    found: dict[str, str] = {}
    for root, graph in graphs_of(marked, {**markers, **layers}):
        made_by = {node: name for name, nodes in _calls(root, graph, markers).items() for node in nodes}
        for name, nodes in _calls(root, graph, layers).items():
            source = _maker(nodes[0], root, made_by, ()) if len(nodes) == 1 else None
            if source is not None:
                found[name] = source
        for node, name in made_by.items():
            residuals.feature_dims.setdefault(name, _feature_dims(node, root))
    return found


def _feature_dims(node: fx.Node, root: nn.Module) -> int:
    """How many dims a sample has: those of the nearest layer in front whose inputs have a certain number of dims."""
    waiting = list(node.all_input_nodes)
    seen: set[fx.Node] = set()
    while waiting:
        source = waiting.pop(0)
        if source in seen:
            continue
        seen.add(source)
        module = root.get_submodule(str(source.target)) if source.op == "call_module" else None
        if isinstance(module, nn.Linear | nn.LayerNorm):
            return 1
        kernel = getattr(module, "kernel_size", None)
        if isinstance(kernel, tuple):
            return 1 + len(kernel)
        waiting += source.all_input_nodes
    return 1
