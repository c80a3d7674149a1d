"""Finds, in the source of their forward, the modules that read the weight of a child instead of calling the child.

Such a module bypasses whatever the child does with its weight, so fake quantization would have no effect. A module
whose source cannot be read (compiled, typed at a prompt) counts as calling its children.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..nn.qat_lora import MAGNITUDE, has_magnitude
from ..nn.qat_sequential import QATSequential

SEQUENTIAL = (nn.Sequential.forward, QATSequential.forward)

# What a forward may ask of a weight besides its values.
METADATA = frozenset(
    (
        "dtype",
        "device",
        "shape",
        "size",
        "dim",
        "ndim",
        "numel",
        "nelement",
        "requires_grad",
        "is_cuda",
        "is_meta",
        "is_cpu",
        "is_floating_point",
        "element_size",
        "layout",
        "stride",
        "type",
        "get_device",
        "data_ptr",
        "grad",
        "new_empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_tensor",
    )
)
WEIGHTS = ("weight", "in_proj_weight")
ITERATION = frozenset(("enumerate", "zip", "reversed", "list", "tuple", "sorted"))
PAIRS = frozenset(("enumerate", "items", "named_children", "named_modules"))  # they give pairs; the module is second
CONTAINER_METHODS = frozenset(("children", "modules", "values", "items", "named_children", "named_modules"))


@dataclass
class WeightReaders:
    """Modules whose weight another module reads: name -> that reader's class and method."""

    instead: dict[str, str] = field(default_factory=dict)  # nothing calls these modules
    too: dict[str, str] = field(default_factory=dict)  # these modules are called as well
    used: set[str] = field(default_factory=set)  # all modules that something calls

    def calls(self, name: str) -> None:
        """Notes that a module is called in the prepared model, though its float parent reads its weight."""
        self.instead.pop(name, None)
        self.used.add(name)


def find_weight_readers(model: nn.Module) -> WeightReaders:
    """Searches every module of ``model``. torch's Transformer layers count as calling: ``prepare`` makes them call."""
    read: dict[nn.Module, str] = {}
    used: set[nn.Module] = set()
    # A Sequential uses its children only if something calls it: a forward may also use single children of it.
    sequential = {m for m in model.modules() if type(m).forward in SEQUENTIAL}
    wanted = [(module, "forward") for module in model.modules() if module._modules and module not in sequential]
    done = set(wanted)
    while wanted:
        module, method = wanted.pop()
        functions = _functions(type(module), method)  # type: ignore[arg-type]
        if functions is None:  # it has no source, so it may call any module in it
            used |= set(module.modules()) - {module}
            continue
        for function, source in functions:
            visitor = _Visitor(module, function)
            used |= visitor.used
            more = visitor.methods - done
            wanted += more
            done |= more
            if source != nn.modules.transformer.__name__:
                for child in visitor.read:
                    read.setdefault(child, f"{type(module).__name__}.{function.name}")
    while called := sequential & {model, *used}:
        sequential -= called
        used |= {child for module in called for child in module.children()}
    found = WeightReaders()
    for name, module in model.named_modules():
        if module in used:
            found.used.add(name)
        if has_magnitude(module) and "base_layer" in module._modules:
            found.too[f"{name}.base_layer".removeprefix(".")] = f"{type(module).__name__}.{MAGNITUDE}"
        if module in read:
            (found.too if module in used else found.instead)[name] = read[module]
    return found


@functools.cache
def _functions(kind: type[nn.Module], method: str) -> tuple[tuple[ast.FunctionDef, str], ...] | None:
    """The method and the methods of self that it names, parsed, each with its Python module; None: it has no source."""
    found: dict[str, list[tuple[ast.FunctionDef, str]]] = {}
    wanted = [method]
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        found[name] = []
        for cls in kind.__mro__:
            if cls is nn.Module:
                break
            if name not in vars(cls):
                continue
            function = _parse(vars(cls)[name])
            if function is None:
                if name == method:
                    return None
                break
            found[name].append((function, cls.__module__))
            self_name = _self_name(function)
            nodes = list(ast.walk(function))
            wanted += [
                node.attr
                for node in nodes
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self_name
            ]
            if not any(isinstance(node, ast.Name) and node.id == "super" for node in nodes):
                break  # the parent's method is not called
    return tuple(pair for pairs in found.values() for pair in pairs)


def _parse(function: Any) -> ast.FunctionDef | None:
    try:
        function = inspect.unwrap(getattr(function, "__func__", function))
        if not inspect.isfunction(function):
            return None
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    first = tree.body[0] if tree.body else None
    return first if isinstance(first, ast.FunctionDef) else None


def _self_name(function: ast.FunctionDef) -> str | None:
    arguments = [*function.args.posonlyargs, *function.args.args]
    return arguments[0].arg if arguments else None


class _Visitor(ast.NodeVisitor):
    """Tracks which modules the expressions of a method stand for, through attributes, indices, loops and names."""

    def __init__(self, module: nn.Module, function: ast.FunctionDef) -> None:
        self.module = module
        self.read: set[nn.Module] = set()
        self.used: set[nn.Module] = set()
        self.methods: set[tuple[nn.Module, str]] = set()
        self.names: dict[str, list[nn.Module]] = {_self_name(function) or "": [module]}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                self._bind(node.targets[0], self._modules(node.value))
            elif isinstance(node, ast.NamedExpr):
                self._bind(node.target, self._modules(node.value))
            elif isinstance(node, ast.For | ast.comprehension):
                self._bind_loop(node.target, node.iter)
        for statement in function.body:
            self.visit(statement)

    def _bind(self, target: ast.expr, modules: list[nn.Module]) -> None:
        if isinstance(target, ast.Name) and modules:
            self.names[target.id] = self.names.get(target.id, []) + modules

    def _bind_loop(self, target: ast.expr, over: ast.expr) -> None:
        if isinstance(target, ast.Tuple | ast.List) and isinstance(over, ast.Call):
            name = getattr(over.func, "id", getattr(over.func, "attr", ""))
            if name == "zip":
                for element, argument in zip(target.elts, over.args, strict=False):
                    self._bind_loop(element, argument)
            elif len(target.elts) == 2 and name in PAIRS:
                self._bind_loop(target.elts[1], over.args[0] if name == "enumerate" and over.args else over)
        else:
            self._bind(target, self._children(over))

    def _modules(self, node: ast.expr) -> list[nn.Module]:
        if isinstance(node, ast.Name):
            return self.names.get(node.id, [])
        if isinstance(node, ast.Attribute):
            found = (module._modules.get(node.attr) for module in self._modules(node.value))
            return [child for child in found if child is not None]
        if isinstance(node, ast.Subscript):
            return list(self._elements(node))
        return []

    def _elements(self, node: ast.Subscript) -> Iterator[nn.Module]:
        key = node.slice.value if isinstance(node.slice, ast.Constant) else None
        for module in self._modules(node.value):
            if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                continue
            children = [child for child in module._modules.values() if child is not None]
            if isinstance(key, str) and key in module._modules:
                children = [module._modules[key]]  # type: ignore[list-item]
            elif isinstance(key, int) and -len(children) <= key < len(children):
                children = [children[key]]
            yield from children

    def _children(self, node: ast.expr) -> list[nn.Module]:
        """The modules that a loop over the expression gives."""
        if isinstance(node, ast.Call):
            inner = [child for argument in node.args for child in self._children(argument)]
            if isinstance(node.func, ast.Name) and node.func.id in ITERATION:
                return inner
            if isinstance(node.func, ast.Attribute) and node.func.attr in CONTAINER_METHODS:
                return self._children(node.func.value)
            return []
        if isinstance(node, ast.Tuple | ast.List):
            return [module for element in node.elts for module in self._modules(element)]
        return [child for module in self._modules(node) for child in module.children()]

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._reach(node)

    def visit_Name(self, node: ast.Name) -> None:
        self._reach(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self._reach(node)
        self.visit(node.slice)

    def visit_Assign(self, node: ast.Assign) -> None:
        if not self._modules(node.value):  # to give a module a name is not to use it
            self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        if not self._children(node.iter):
            self.visit(node.iter)
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        if not self._children(node.iter):
            self.visit(node.iter)
        for condition in node.ifs:
            self.visit(condition)

    def _reach(self, node: ast.expr) -> None:
        """Notes what an expression that ends a chain does: it uses a module, reads its weight or names its method."""
        if isinstance(node, ast.Attribute) and node.attr in METADATA and _is_weight(node.value):
            return
        modules = self._modules(node)
        if modules:
            self._use(module for module in modules if module is not self.module)
            return
        if isinstance(node, ast.Attribute):
            for owner in self._modules(node.value):
                if owner is self.module:
                    continue
                if node.attr in WEIGHTS:
                    self.read.add(owner)
                elif callable(getattr(type(owner), node.attr, None)):
                    self.methods.add((owner, node.attr))
                    if node.attr == "forward" or not hasattr(nn.Module, node.attr):
                        self.used.add(owner)
        if isinstance(node, ast.Attribute | ast.Subscript) and not self._modules(node.value):
            self.visit(node.value)

    def _use(self, modules: Iterable[nn.Module]) -> None:
        """Notes the modules as used, and the children of lists and dicts, which have no forward that says how."""
        for module in modules:
            self.used.add(module)
            if isinstance(module, nn.ModuleList | nn.ModuleDict):
                self._use(module.children())


def _is_weight(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in WEIGHTS
