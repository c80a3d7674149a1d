"""What is known of a converted model's graph: which of its nodes programs can run, on images of how many dims."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..nn.fake_quantize import FakeQuantize
from ..nn.int8 import Int8Linear
from ..nn.int8_stateful import Int8Stateful
from ..nn.integer_attention import IntegerMultiheadAttention
from ..nn.qat_layer import QATLayer
from ..nn.quantized import QuantizedLayer
from ..nn.quantized_parameters import QATParameters
from ..nn.tracing import first_line
from .call_patterns import Pattern
from .copying import shadow_of
from .faithful_tracing import (
    IN_PLACE,
    FaithfulTracer,
    attributes_of,
    is_number,
    is_size,
    traced_with_and_without_gradients,
    transformer_layers_traced_through,
)
from .handwritten_norms import handwritten_norm
from .norms import NORMS, function_norm, module_norm
from .operations import FUNCTIONS, LAYERS, POOL_MODULES, Operation, module_operation

SAME_SIZE = ("activate", "alias", "quantizer", "batch_norm", *NORMS)  # their results have the size of their input
# Their results hold elements of their inputs.
MOVES = ("max_pool", "cat", "slice", "shuffle", "pixel_shuffle", "pixel_unshuffle", "upsample", "flatten")
_OF_TENSORS = frozenset(dir(Tensor))
ANY_RANK = (
    "linear",
    "quantizer",
    "activate",
    "binary",
    "alias",
    *NORMS,
)  # they also take [..., C] with any number of dims in front


class LayerTracer(FaithfulTracer):
    """Layers of this package are single nodes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, QATParameters) and (m.between or type(m).float_type in POOL_MODULES):
            return False
        if isinstance(m, QuantizedLayer | QATLayer | FakeQuantize | Int8Stateful):
            return True
        holds = any(isinstance(inner, QuantizedLayer) for inner in m.modules())  # as torch's Transformer layers do
        return not holds and super().is_leaf_module(m, module_qualified_name)

    def record_call(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if isinstance(m, IntegerMultiheadAttention):
            return m.in_parts(*args, **kwargs)
        return super().record_call(m, forward, args, kwargs)


class Graph:
    """A traced module: its graph, and what is known of the nodes that a program can run.

    A product is an operation only if both operands are results of operations, as other factors seldom have their shape.
    A sum is one if an operand is such a result; ``cautious``: if both are. The other operand is else taken to have as
    many channels and pixels, which shows when it is there.

    Attributes:
        operations: nodes that a program can run.
        ranks: their numbers of spatial dims; None: any.
        channels: their numbers of channels, where known.
        points: nodes whose spatial sizes are all 1.
        read: nodes whose results are used when the operations run as such.
        constants: tensors that the forward makes of nothing that it is given, by the names in the graph.
        copies: nodes at the end that overwrite arguments, and these.
    """

    def __init__(self, root: nn.Module, pattern: Pattern, cautious: bool) -> None:
        self.root, self._cautious = root, cautious
        self.graph, self.constants = _traced(root, pattern)
        self.copies = _copied_back(self.graph, without_writes(self.graph, root))
        self.operations: dict[fx.Node, Operation] = {}
        for node in self.graph.nodes:
            operation = self._operation(node)
            if operation is not None:
                self.operations[node] = operation
        self.keep(self._read())  # without the single operations of a norm
        self.ranks: dict[fx.Node, int | None] = {}
        self.channels: dict[fx.Node, int] = {}
        self.points: set[fx.Node] = set()
        while True:  # a node that turns out to be none that a program can run changes what is known of the others
            self._infer_ranks()
            self._infer_channels()
            refused = [node for node, operation in self.operations.items() if not self._fits(node, operation)]
            if not refused:
                break
            for node in refused:
                del self.operations[node]
        self.read = self._read()

    def keep(self, nodes: Collection[fx.Node]) -> None:
        """Forgets the operations of all other nodes, which then read what they read in the graph."""
        self.operations = {node: operation for node, operation in self.operations.items() if node in nodes}
        self.read = self._read()

    def read_sizes_of_inputs(self) -> None:
        """Lets what asks for the size of a result ask its input, where that has the same: nobody then needs floats."""
        for node in reversed(self.graph.nodes):
            if node in self.operations and self.operations[node].kind in SAME_SIZE:
                for user in list(node.users):
                    if is_size(user):
                        user.replace_input_with(node, self.operations[node].inputs[0])
        self.read = self._read()

    def _read(self) -> set[fx.Node]:
        read: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if self.stays(node) or node in read:
                read.update(self.sources_of(node))
        return read

    def stays(self, node: fx.Node) -> bool:
        """Whether the node runs even if nobody reads its result."""
        kept = node.op in ("output", "placeholder") or (node.op == "call_function" and node.is_impure())
        return kept or writes(node, self.root)

    def argument_overwritten_by(self, node: fx.Node) -> fx.Node | None:
        """The argument that the node, run as such, would overwrite before the end."""
        target = node.args[0] if node not in self.copies and writes(node, self.root) else None
        return target if isinstance(target, fx.Node) and target.op == "placeholder" else None

    def overwrites(self, node: fx.Node) -> bool:
        """Whether the node overwrites a tensor when it runs: an argument only at the end."""
        return writes(node, self.root) and self.argument_overwritten_by(node) is None

    def sources_of(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose results the node reads: an operation may reach through others, such as a transposition."""
        operation = self.operations.get(node)
        return node.all_input_nodes if operation is None else operation.inputs

    def module_of(self, node: fx.Node) -> nn.Module | None:
        if node.op != "call_module":
            return None
        return self.root if str(node.target) == "itself" else self.root.get_submodule(str(node.target))

    def _operation(self, node: fx.Node) -> Operation | None:
        module = self.module_of(node)
        if module is not None:
            return module_norm(node, module) or module_operation(node, module)
        if node.op in ("call_function", "call_method"):
            read = FUNCTIONS.get(node.target)
            norm = function_norm(node, self.root) or handwritten_norm(node, self.root)
            return norm or (None if read is None else read(node))
        return None

    def _infer_ranks(self) -> None:
        ranks: dict[fx.Node, int | None] = {}
        changed = True

        def learn(node: fx.Node, rank: int | None) -> None:
            nonlocal changed
            if rank is not None and ranks.get(node) is None:
                ranks[node], changed = rank, True

        while changed:
            changed = False
            for node, operation in self.operations.items():
                for source in operation.inputs:
                    learn(source, operation.rank)
                if operation.out_rank is not None:
                    learn(node, operation.out_rank)
                    continue
                same = [*operation.inputs, node]
                for rank in {ranks[n] for n in same if ranks.get(n) is not None}:
                    for other in same:
                        learn(other, rank)
        self.ranks = ranks

    def _infer_channels(self) -> None:
        self.channels, self.points = {}, set()
        for node, operation in self.operations.items():
            module, inputs = operation.module, operation.inputs
            if isinstance(module, LAYERS):
                before, after = channels_of(module)
                self.channels.setdefault(inputs[0], before)
                self.channels[node] = after
            elif operation.kind in NORMS:
                self.channels.setdefault(inputs[0], operation.options["channels"])
                self.channels[node] = operation.options["channels"]
            elif operation.kind == "batch_norm":
                self.channels[node] = module.num_features  # type: ignore[union-attr, assignment]
            elif operation.kind == "cat":
                if all(source in self.channels for source in inputs):
                    self.channels[node] = sum(self.channels[source] for source in inputs)
            elif operation.kind == "slice":
                if self._has_slice(operation):
                    begin, end = self.slice_of(node)
                    self.channels[node] = end - begin
            elif operation.kind in ("pixel_shuffle", "pixel_unshuffle"):
                if inputs[0] in self.channels:
                    channels, square = self.channels[inputs[0]], operation.options["factor"] ** 2
                    self.channels[node] = channels // square if operation.kind == "pixel_shuffle" else channels * square
            elif operation.has_like:
                if inputs[0] in self.channels:
                    self.channels[node] = self.channels[inputs[0]]
            elif operation.kind != "flatten":
                known = [self.channels[source] for source in inputs if source in self.channels]
                if known:
                    self.channels[node] = known[0]
            if self._is_point(operation):
                self.points.add(node)

    def _is_point(self, operation: Operation) -> bool:
        if operation.kind == "mean" or operation.options.get("size") == (1, 1, 1):
            return True
        keeps = operation.kind in ("activate", *NORMS, "batch_norm", "quantizer", "alias", "binary", "cat", "slice")
        if isinstance(operation.module, LAYERS):
            kernel = operation.options.get("kernel", (1, 1, 1))
            added = [operation.options.get(key, (0, 0, 0)) for key in ("padding", "padding_after", "output_padding")]
            keeps = set(kernel) == {1} and not any(map(any, added))
        return keeps and all(source in self.points for source in operation.inputs)

    def _fits(self, node: fx.Node, operation: Operation) -> bool:
        """Whether what is known of the shapes allows the operation."""
        ranks = [self.ranks.get(source) for source in operation.inputs]
        if operation.rank is not None and any(rank != operation.rank for rank in ranks):
            return False
        if operation.out_rank is None and any(rank != self.ranks.get(node) for rank in ranks):
            return False
        if operation.kind == "binary":
            channels = {self.channels[source] for source in operation.inputs if source in self.channels}
            known = [self._is_result(source) for source in operation.inputs]
            factor = operation.options["kind"] == "mul"
            if not any(known) or ((self._cautious or factor) and not all(known)):
                return False
            if len(channels) > 1 or any(source.op == "get_attr" for source in operation.inputs):
                return False
        if None in ranks:
            return operation.kind in ANY_RANK
        if operation.kind in ("linear", *NORMS):
            return ranks == [0]
        if operation.kind == "batch_norm" and ranks[0] == 0:
            return isinstance(operation.module, nn.BatchNorm1d)
        rank, dims = ranks[0], operation.options.get("dims")
        if dims is not None and rank is not None and {d % (rank + 2) for d in dims} != set(range(2, rank + 2)):
            return False
        return operation.kind != "slice" or self._has_slice(operation)

    def _is_result(self, node: fx.Node) -> bool:
        """Whether an operation computes the node: of others, such as tables of positions, less is known."""
        while node in self.operations and self.operations[node].kind == "alias":
            node = self.operations[node].inputs[0]
        return node in self.operations

    def _has_slice(self, operation: Operation) -> bool:
        channels, at = self.channels.get(operation.inputs[0]), operation.options["at"]
        if channels is None:
            return False
        parts = _parts(channels, operation.options)
        return -len(parts) <= at < len(parts) and parts[-1][1] == channels

    def slice_of(self, node: fx.Node) -> tuple[int, int]:
        operation = self.operations[node]
        return _parts(self.channels[operation.inputs[0]], operation.options)[operation.options["at"]]


def channels_of(layer: Any) -> tuple[int, int]:
    """How many channels go into a layer, and out of it."""
    if isinstance(layer, Int8Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _traced(root: nn.Module, pattern: Pattern) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph of a module, and the constants in it. What the forward does while it is traced, it does to a copy.

    Raises:
        NotImplementedError: the forward does something that the graph would not do: it sets attributes, draws random
            numbers that depend on no input, or calls what may change an argument that is no tensor.
    """
    constants: dict[str, Any] = {}

    def trace() -> fx.Graph:
        try:
            shadow = shadow_of(root)
        except Exception as error:  # as what a user has set on a module may raise when it is copied
            raise NotImplementedError(f"it cannot be copied ({type(error).__name__}: {first_line(error)})") from error
        modules = dict(shadow.named_modules())
        before = attributes_of(modules)
        graph = LayerTracer(pattern).trace(shadow)
        for (path, name), value in attributes_of(modules).items():
            if _is_constant(path, name):
                constants[name] = getattr(shadow, name)
            elif before.get((path, name)) != value:
                raise NotImplementedError(f"its forward sets the attribute {f'{path}.{name}' if path else name}")
        return graph

    with transformer_layers_traced_through():
        graph = traced_with_and_without_gradients(trace)
    for node in graph.nodes:
        if node.op == "call_method" and _may_be_no_tensors(node, root):
            what = "an argument" if node.target == "__call__" else f"{node.target} of an argument"
            raise NotImplementedError(f"it calls {what} that may be no tensor")
        whole = overwritten(node, root)[-1:] if writes(node, root) else []
        if node.target == "__setitem__" or any(made.op == "get_attr" and made.target in constants for made in whole):
            raise NotImplementedError("it overwrites a tensor that it makes of constants")
    return graph, constants


def _may_be_no_tensors(node: fx.Node, root: nn.Module) -> bool:
    """Whether a called method may be that of a list, a dict or another object, which it may change."""
    if node.target not in _OF_TENSORS:
        return True
    source: Any = node.args[0]
    while isinstance(source, fx.Node) and source.target in (getattr, operator.getitem):
        source = source.args[0]
    of_argument = isinstance(source, fx.Node) and source.op == "placeholder"
    return of_argument and not (node.users or is_number(node) or writes(node, root))  # as set.add, without its result


def _is_constant(path: str, name: str) -> bool:
    return not path and name.startswith("_tensor_constant")  # the name that torch.fx gives them


def _parts(channels: int, options: dict[str, Any]) -> list[tuple[int, int]]:
    """The first and last channels of the parts that chunk or split makes."""
    sizes = options.get("sizes")
    if sizes is None:
        size = options["each"] if "each" in options else -(-channels // options["chunks"])
        sizes = [min(size, channels - begin) for begin in range(0, channels, size)]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def without_writes(graph: fx.Graph, root: nn.Module) -> dict[fx.Node, fx.Node]:
    """Lets what reads a tensor after an operation has overwritten it read that operation's result.

    Returns:
        The arguments that are overwritten, and the last results that they hold.

    Raises:
        NotImplementedError: an operation overwrites a view of an argument; a tensor that is read later through a view
            that was made before; or a tensor that it gets as ``out``.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.kwargs.get("out") is not None:
            raise NotImplementedError(f"{node.name} writes to a tensor that it gets as out")
        if not writes(node, root) or not isinstance(node.args[0], fx.Node):
            continue
        target, *of = overwritten(node, root)
        whole = of[-1] if of else target
        if of and whole.op == "placeholder":
            raise NotImplementedError(f"{node.name} overwrites a part of the argument {whole.name}")
        for source in (*of, *_views_of(whole, root) - {target}):
            if any(order[user] > order[node] for user in source.users):
                raise NotImplementedError(f"{node.name} overwrites what {source.name} shows, which is read later")
        argument = next((each for each, value in last.items() if value is target), target)
        if argument.op == "placeholder":
            last[argument] = node
        for user in list(target.users):
            if order[user] > order[node]:
                user.replace_input_with(target, node)
    return last


def _copied_back(graph: fx.Graph, last: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """Overwrites arguments for the caller too, by copies at the end of the graph, when no program can refuse any more.

    What returns the argument then returns it.

    Returns:
        The copies, and the arguments that they write to.
    """
    end = next(node for node in graph.nodes if node.op == "output")
    copies = {}
    for argument, value in last.items():
        with graph.inserting_before(end):
            copy = graph.call_method("copy_", (argument, value))
        end.replace_input_with(value, copy)
        copies[copy] = argument
    return copies


def _views_of(tensor: fx.Node, root: nn.Module) -> set[fx.Node]:
    """The nodes whose results are views of a tensor."""
    views = {user for user in tensor.users if user.args[:1] == (tensor,) and _is_view(user, root)}
    return views.union(*(_views_of(view, root) for view in views))


def overwritten(node: fx.Node, root: nn.Module) -> list[fx.Node]:
    """What a node that writes overwrites: its first argument, and the tensors of which this is a view."""
    source: Any = node.args[0]
    found = []
    while isinstance(source, fx.Node):
        found.append(source)
        if source.op == "placeholder" or not _is_view(source, root):
            break
        source = source.args[0]
    return found


def writes(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node overwrites its first argument."""
    if node.op == "call_module" and str(node.target) != "itself":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        if getattr(node.target, "__module__", "") == operator.add.__module__:
            return node.target in IN_PLACE  # operator.and_ writes nothing
        return name.endswith("_") or _is_asked_to_write(node)
    return False


def _is_asked_to_write(node: fx.Node) -> bool:
    if node.kwargs.get("inplace") is True:
        return True
    if getattr(node.target, "__module__", None) != F.__name__:
        return False
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin without a signature has no such argument
        return False
    return given.get("inplace") is True


def _is_view(node: fx.Node, root: nn.Module) -> bool:
    views = (
        *("view", "view_as", "reshape", "reshape_as", "flatten", "ravel", "unflatten", "squeeze", "unsqueeze"),
        *("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "getattr", "adjoint"),
        *("chunk", "split", "tensor_split", "unbind", "getitem", "narrow", "select", "diagonal", "unfold"),
        *("expand", "expand_as", "broadcast_to", "detach"),
        # The tensor itself, where nothing is to be done:
        *("contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    )
    if is_number(node) or (node.target is getattr and node.args[1] in ("dtype", "device")):
        return False
    if node.op == "call_module":
        kinds = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
        return isinstance(root.get_submodule(str(node.target)), kinds) if str(node.target) != "itself" else False
    return node.op != "get_attr" and (getattr(node.target, "__name__", None) or str(node.target)) in views
